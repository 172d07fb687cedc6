"""The floating-point work of a sweep that computes only what a patch changes and what is read depends on.

python -m experiments.benchmarks.work
"""

from __future__ import annotations

from dataclasses import replace

from experiments.benchmarks.setting import EDGE_TOKENS, SIZES, Setting, Task


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


def prompt_operations(setting: Setting, tokens: int) -> int:
    """Operations of a plain forward pass over one prompt, logits and all: the unit in which work is told."""
    return forward_operations(setting, tokens) + 2 * setting.width * setting.vocabulary * tokens


def edges(setting: Setting) -> int:
    """How many edges a model has: into the query, key and value of every head, every MLP, and the logits."""
    writers = _writers(setting)
    heads = 3 * setting.heads * sum(writers)
    mlps = sum(before + setting.heads for before in writers)
    return heads + mlps + writers[-1] + setting.heads + 1


def projections(setting: Setting) -> int:
    """Products of width x width, for each token, by which writers' changes become changes of queries, keys and values.

    This is all that heads of rank `width / heads` could be cheaper in than their width x width products.
    """
    return 3 * sum(_writers(setting))


def edges_operations(setting: Setting, tokens: int, shared: int) -> int:
    """Operations of the exact effect of every edge, where a pair has its first `shared` tokens in common.

    An edge costs what lies above its reader, at the tokens from the first that differs on; of the last block only the
    last position is read. The projections of writers' changes are made once for all heads. The runs that are edited
    and edited with, a few among thousands, are left out.
    """
    reached = tokens - shared
    mlp, after, block = 8, 9, 12  # an MLP; with the output projection before it; a block
    products = projections(setting) * reached
    for layer, writers in enumerate(_writers(setting)):
        above = setting.layers - 1 - layer
        here = reached if above else 1
        # The last block's keys and values are of all tokens that changed, its query and the rest of one.
        rest = block * reached * (above - 1) + 2 * reached + (block - 2) if above else 0
        products += 3 * setting.heads * writers * (after * here + rest)
        products += (writers + setting.heads) * (mlp * here + rest)
    return 2 * setting.width**2 * products


def _writers(setting: Setting) -> list[int]:
    """How many nodes write before the attention of each layer: the input, and the heads and MLPs below."""
    return [1 + (setting.heads + 1) * layer for layer in range(setting.layers)]


def main() -> None:
    """Print the work of measuring every edge, and what part of it low-rank heads could save."""
    for name, size in SIZES.items():
        setting = replace(Setting(), **size)
        for shared in (0, EDGE_TOKENS // 2):
            work = edges_operations(setting, EDGE_TOKENS, shared)
            print(
                f"{name}, {shared} of {EDGE_TOKENS} tokens shared: {edges(setting):,} edges cost "
                f"{work / prompt_operations(setting, EDGE_TOKENS):,.0f} forward passes of one prompt"
            )
        total = edges_operations(setting, EDGE_TOKENS, 0) / (2 * setting.width**2 * EDGE_TOKENS)
        print(
            f"{name}: {projections(setting):,} of {total:,.0f} products of width x width a token are projections of "
            f"writers' changes, {100 * projections(setting) / total:.1f} %"
        )


if __name__ == "__main__":
    main()
