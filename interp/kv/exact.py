"""The exact effect of removing each unit: by the removal formula and worlds above it, or by the engine's worlds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hooks import Inputs, Model, Plan, Tail, World, budget_of, knockout, run_worlds, site
from interp.kv.asked import Asked, Units
from interp.kv.measure import Measure


def eviction_times(units: Units, context: int, chunk: int | None) -> list[int]:
    """For each value of the last axis, the first token that no longer sees it.

    After prefill that is the first of the suffix; in a stream (`chunk`) the first after the chunk that the unit ends
    in.
    """
    if chunk is None or units.spans is None:
        return [context] * len(units.spans or (0,))
    return [min(-(-stop // chunk) * chunk, context) for _, stop in units.spans]


def worlds_at_once(model: Model, tail: Tail) -> int:
    """How many worlds of a tail the memory budget holds."""
    attention = model.architecture.blocks[0].attention
    each = 8 * model.architecture.width + attention.q.heads * (2 * tail.total + 8 * attention.q.width)
    size = torch.finfo(model.dtype).bits // 8
    taken = size * (tail.n * each + 3 * len(tail.wanted) * model.architecture.vocabulary)
    limit = budget_of(model, None) or float("inf")
    # Past some thousands of tokens products do not get faster, and what they make leaves the processor's cache.
    enough = 4096 if model.device.type == "cpu" else 1 << 18
    return max(1, min(int(limit / 4 / taken), enough // tail.n))


def tails(model: Model, row: Asked, times: Sequence[int]) -> Iterator[tuple[Tail, list[int]]]:
    """For each time at which something is removed, the tail from there on, and which values of the last axis."""
    for time in sorted(set(times)):
        yield Tail(model, row.ids, time, row.queries), [i for i, t in enumerate(times) if t == time]


def through_tails(
    model: Model, units: Units, tail: Tail, chosen: Sequence[int], measure: Measure, bias: Tensor | None = None
) -> Iterator[tuple[list[tuple[int, ...]], Tensor]]:
    """Cells and the metrics [metric, w, m] of the worlds without them, for some values of the last axis.

    Cells that are left out change nothing: no query attends to what they are of.

    Args:
        bias: [L, K, T] of keys that are gone already, -inf.
    """
    chunk = worlds_at_once(model, tail)
    if units.names == ("layer", "head", "token"):
        seen, _ = tail.seen(bias)
        wanted = torch.zeros(tail.start, dtype=torch.bool)
        wanted[list(chosen)] = True
        last = None
        for layer in range(units.layers):
            for heads, keys, logits in tail.without_each(layer, seen[layer], chunk, wanted, bias):
                last = measure(logits)
                yield [(layer, h, k) for h, k in zip(heads.tolist(), keys.tolist(), strict=True)], last
        return
    cells = [cell for cell in units.cells() if units.spans is None or cell[-1] in set(chosen)]
    for start in range(0, len(cells), chunk):
        some = cells[start : start + chunk]
        gone = units.removed(some, tail.total, model.device)
        gone[..., tail.start :] = False
        yield some, measure(tail.run(as_bias(gone, tail, bias)))


def as_bias(gone: Tensor, tail: Tail, more: Tensor | None = None) -> Tensor:
    """What removed keys bool [W, L, K, S] add to scores, [W, L, K, T] in the tail's dtype."""
    bias = torch.zeros(*gone.shape[:-1], tail.total, dtype=tail.logits.dtype, device=gone.device)
    bias[..., : gone.shape[-1]].masked_fill_(gone, -torch.inf)
    return bias if more is None else bias + more


def through_worlds(
    model: Model, row: Asked, units: Units, times: Sequence[int], measure: Measure, executor: str
) -> Iterator[tuple[list[tuple[int, ...]], Tensor]]:
    """The same for all cells, by the engine's worlds: attention knocked out, edge by edge."""
    inputs, cells = Inputs.of(row.ids), list(units.cells())
    worlds = [World(inputs)] + [World(inputs, removal(model, units, cell, times, row)) for cell in cells]
    reads = [site("logits", pos=row.queries)]
    for outcome in run_worlds(model, worlds, reads, executor=executor):
        if outcome.index:
            yield [cells[outcome.index - 1]], measure(outcome.values[0])


def removal(model: Model, units: Units, cell: tuple[int, ...], times: Sequence[int], row: Asked) -> Plan:
    """A unit's removal as a plan: no query from its time on attends to it."""
    at = dict(zip(units.names, cell, strict=True))
    span = at.get("token", at.get("span"))
    keys = range(row.context) if span is None else range(*(units.spans or ())[span])
    first = times[0 if span is None else span]
    layers = range(units.layers) if "layer" not in at else [at["layer"]]
    heads = range(units.heads) if "head" not in at else [at["head"]]
    plan = Plan()
    for layer in layers:
        attention = model.architecture.blocks[layer].attention
        groups = attention.q.heads // attention.k.heads
        asking = [h * groups + g for h in heads for g in range(groups)]
        place = site("scores", layer=layer, head=asking, pos=range(first, row.queries[-1] + 1), key_pos=list(keys))
        plan = plan + knockout(place)
    return plan
