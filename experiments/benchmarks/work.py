"""The floating-point work of a sweep that computes only what a patch changes and what is read depends on."""

from __future__ import annotations

from experiments.benchmarks.setting import Setting, Task


def forward_operations(setting: Setting, tokens: int) -> int:
    """Operations of the linear layers of all blocks on `tokens` tokens: two for each parameter and token.

    The products inside attention (under 2 % at 64 tokens of width 768) and the two columns of the unembedding that the
    metric reads are left out, so a bound made of this is a little too low.
    """
    return 2 * 12 * setting.width**2 * setting.layers * tokens


def sweep_operations(setting: Setting, task: Task) -> int:
    """Operations of a sweep: the corrupt run, the clean run where it differs, and in each cell what the patch reaches.

    A patch at a position reaches the positions from there on. Of the last block, only the last position is read: its
    other tokens need keys and values and nothing else. A patch where the prompts agree changes nothing, at no cost.
    """
    square = setting.width**2
    keys, query, after = 2 * square, square, 9 * square  # keys and values; queries; output projection and MLP
    block = keys + query + after
    positions = range(task.shared, task.tokens)
    starts = list(positions) if task.site == "resid_pre" else [task.shared] * setting.heads
    total = setting.layers * block * (task.tokens + len(positions))
    for layer in range(setting.layers):
        above = setting.layers - 1 - layer
        for start in starts:
            reached = task.tokens - start
            total += after * (reached if above else 1)
            if task.site == "resid_pre":  # one token changes before attention
                total += keys + (query if above or reached == 1 else 0)
            if above:
                total += (above - 1) * block * reached + keys * reached + query + after
    return 2 * total
