"""The exact effect of removing each unit: by the removal formula and worlds above it, or by the engine's worlds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hooks import Inputs, InputsError, Model, Plan, Tail, World, budget_of, knockout, run_worlds, site
from interp.kv.asked import Asked, Units
from interp.kv.measure import Measure


def eviction_times(units: Units, context: int, chunk: int | None) -> list[int]:
    """For each token or span of the last axis, the first token that no longer sees it; without one, for each token.

    After prefill that is the first of the suffix; in a stream (`chunk`) the first after the chunk that the token or
    span ends in.
    """
    stops = range(1, context + 1) if units.spans is None else [stop for _, stop in units.spans]
    return [context if chunk is None else min(-(-stop // chunk) * chunk, context) for stop in stops]


def times_of_tokens(units: Units, times: Sequence[int], context: int, chunk: int | None) -> Tensor:
    """int64 [S]: the first token that no longer sees each one, where all units are gone.

    A token of no span is gone after its own chunk.

    Raises:
        InputsError: spans that overlap leave at different times.
    """
    found = torch.tensor(eviction_times(replace(units, spans=None), context, chunk))
    taken = torch.zeros(context, dtype=torch.bool)
    for (start, stop), time in zip(units.spans or (), times, strict=units.spans is not None):
        if bool((taken[start:stop] & (found[start:stop] != time)).any()):
            raise InputsError(
                f"the span {(start, stop)} shares tokens with one that leaves the stream at another time, so there is "
                "no one path on which all units go: ask for them one call at a time"
            )
        found[start:stop], taken[start:stop] = time, True
    return found


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


def tails(model: Model, row: Asked, units: Units, times: Sequence[int]) -> Iterator[tuple[Tail, Sequence[int]]]:
    """For each time at which something is removed, the tail from there on, and which values of `times`.

    Units of all tokens go little by little: theirs is one tail, from where the first is gone.
    """
    if units.spans is None:
        yield Tail(model, row.ids, min(times), row.queries), range(len(times))
        return
    for time in sorted(set(times)):
        yield Tail(model, row.ids, time, row.queries), [i for i, t in enumerate(times) if t == time]


def through_tails(
    model: Model,
    units: Units,
    tail: Tail,
    times: Sequence[int],
    chosen: Sequence[int],
    measure: Measure,
    bias: Tensor | None = None,
) -> Iterator[tuple[list[tuple[int, ...]], Tensor]]:
    """Cells and the metrics [metric, w, m] of the worlds without them, for some values of the last axis.

    Cells that are left out change nothing: no query attends to what they are of.

    Args:
        times: the first token that no longer sees each value of the last axis, or each token where there is none.
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
    cells, wanted = list(units.cells()), set(chosen)
    if units.spans is not None:
        cells = [cell for cell in cells if cell[-1] in wanted]
    stepwise = units.spans is None and min(times) < max(times)
    # What is gone differs between queries then, and is as large as the attention of all layers.
    chunk = max(1, chunk // units.layers) if stepwise else chunk
    for start in range(0, len(cells), chunk):
        some = cells[start : start + chunk]
        gone = units.removed(some, max(times) if stepwise else tail.start, model.device)
        if stepwise:
            gone = gone[..., None, :] & asking(tail, torch.tensor(times)).to(gone.device)
        yield some, measure(tail.run(as_bias(gone, tail, bias)))


def asking(tail: Tail, times: Tensor) -> Tensor:
    """bool [n, S]: the queries of a tail that no longer see what is gone at int64 [S]."""
    return torch.arange(tail.start, tail.total)[:, None] >= times


def as_bias(gone: Tensor, tail: Tail, more: Tensor | None = None) -> Tensor:
    """What removed keys bool [W, L, K, S], or [W, L, K, n, S], add to scores, [W, L, K, T] or [W, L, K, n, T]."""
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
    # Keys by the first token that no longer sees them.
    leaving: dict[int, list[int]] = {}
    for key in range(row.context) if span is None else range(*(units.spans or ())[span]):
        leaving.setdefault(times[key if span is None else span], []).append(key)
    layers = range(units.layers) if "layer" not in at else [at["layer"]]
    heads = range(units.heads) if "head" not in at else [at["head"]]
    plan = Plan()
    for layer in layers:
        attention = model.architecture.blocks[layer].attention
        groups = attention.q.heads // attention.k.heads
        queries = [h * groups + g for h in heads for g in range(groups)]
        for first, keys in leaving.items():
            place = site("scores", layer=layer, head=queries, pos=range(first, row.queries[-1] + 1), key_pos=keys)
            plan = plan + knockout(place)
    return plan
