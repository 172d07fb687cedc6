"""Activation patching and ablation over grids: the effect of an intervention in every cell, for every row, on every
metric.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from hooks import (
    KEY,
    POS,
    PRUNED,
    Inputs,
    MetricError,
    Model,
    Outcomes,
    Plan,
    Site,
    UnfiredError,
    World,
    choose,
    joined,
    recompute,
)
from hooks import run_chunks as run_worlds
from interp.axes import Axis
from interp.evaluation import check_metrics, read_reference
from interp.grids import Cell, Factory, Grid
from interp.metrics import Bound, Metric, call_each
from interp.progress import tqdm
from interp.provenance import describe_run, sweep_identity
from interp.results import STATUS, Result
from interp.sides import check_model, require_grid, source_of, stated
from interp.streaming import Stream, finished


def sweep(
    model: Model,
    clean: Inputs,
    corrupt: Inputs | None,
    grid: Grid,
    *,
    metric: Metric | Sequence[Metric],
    intervention: Factory | None = None,
    direction: str | None = None,
    executor: str = "auto",
    budget: int | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    seed: int = 0,
) -> Result:
    """Intervene in every cell of a grid and measure the effect, metric(edited) - metric(the same world unedited).

    Args:
        model: a wrapped model, in evaluation mode.
        clean: the prompts (or images) that show the behaviour.
        corrupt: the prompts that do not, row by row of the same lengths (of any where the grid says what corresponds:
            ``pos=[-1, -2]``, counted from the end, or ``pos={"name": ip.paired(...)}``); None where `intervention`
            needs no other prompts, which then is applied to `clean`.
        grid: the cells; see `interp.grid`.
        metric: what is measured; a sequence adds a first axis to the result.
        intervention: from a site to what is done there, in place of patching from the other prompts: ``ip.zero``,
            ``functools.partial(ip.mean, source=reference)``, ``lambda site: ip.steer(site, v)``.
        direction: ``"denoising"`` edits the corrupt run (with clean values, when patching), ``"noising"`` the clean run
            (Heimersheim & Nanda 2024). Patching denoises by default; an `intervention` that takes nothing from either
            run says which of the two it edits, or comes without `corrupt`.
        executor: see `run_worlds`; the result says which was used, and why.
        budget: bytes that the activations of a chunk may take.
        path: save the result there, stream to it while running, and resume from it after an interruption. Where the
            finished result of the same sweep is there, it is returned.
        progress: show a bar; by default where the output is a terminal or a notebook.
        seed: seed of random interventions.

    Returns:
        A `Result` with axes [metric if several, *the grid's, row].

    Raises:
        InputsError: clean and corrupt of different lengths, with the tokens that differ; or an ablation of two runs
            that does not say which one it edits.
        ModelError: the model is in training mode.
        MetricError: a metric is nan on some row, or infinite on one of the unedited run, so that there is no effect. An
            edited run may be infinite (a log-probability of 0, say): so is its effect, and the mean.
        ResultError: there is a result of another sweep at `path`.
        UnfiredError: no cell changed anything (clean equals corrupt, say).
    """
    started = time.perf_counter()
    require_grid(grid)
    direction = check_model(model, stated(model, direction, clean, corrupt, grid, intervention))
    several = isinstance(metric, (list, tuple))
    metrics: list[Metric] = list(metric) if isinstance(metric, (list, tuple)) else [metric]  # type: ignore[list-item]
    check_metrics(metrics)
    base_inputs, source, factory, on = source_of(
        model, clean, corrupt, direction, intervention, grid, seed, executor, budget
    )
    model.check_inputs(base_inputs)
    axes, cells = on.cells(model, base_inputs)
    worlds = _cell_worlds(cells, factory, base_inputs)
    bound = [m.bind(model, base_inputs) for m in metrics]
    compared = references(model, metrics, bound, source, base_inputs, seed, executor)

    identity: dict[str, str] = {}
    if path is not None:
        told = direction if corrupt is not None else "ablation"
        identity = sweep_identity(
            model, base_inputs, source, axes, worlds, metrics, bound, several, told, seed, executor
        )
        before = finished(path, identity)
        if before is not None:
            return before
    rows = len(base_inputs)
    stream = Stream(path, (len(metrics), len(worlds), rows), identity)
    # The first two worlds are the base itself, and the base computed again: what the second changes is rounding.
    todo = stream.remaining()
    reads, spans = _all_reads(bound)
    known = stream.done.copy()  # what an interrupted sweep has left; what is run now is run once
    choice = None if todo else choose(model, [], executor)
    hidden = None if progress is None else not progress
    bar = tqdm(total=len(cells), initial=stream.complete(), disable=hidden, unit="cell", leave=False)
    with bar:
        for chunk in run_worlds(
            model,
            [worlds[i] for i in todo],
            reads,
            executor=executor,
            budget=budget,
            seed=seed,
            skip=(lambda i, rows: bool(known[todo[i], rows].all())) if known.any() else None,
        ):
            if choice is None:
                choice = chunk.choice
                bar.set_description(f"{len(cells)} cells x {rows} rows ({choice.executor})")
            # A function of the user's may take long or break: what it has given is written world by world.
            alone = any(b.alone for b in bound)
            for part in map(chunk.one, range(len(chunk))) if alone else [chunk]:
                places = [todo[i] for i in part.indices]
                numbers = _measured(metrics, bound, spans, compared, part, partial(_where, axes, places))
                if 0 in places:
                    require_finite(numbers[:, places.index(0)], [m.name for m in metrics], part.rows)
                stream.write(numbers, places, part.rows, [STATUS.index(status) for status in part.statuses])
                bar.update(stream.complete() - bar.n)

    assert choice is not None
    source_values = None if source is None else source_metrics(model, metrics, source, compared, budget, seed, executor)
    values, status = np.array(stream.values), np.array(stream.status)
    result = assemble(values, status, axes, cells, metrics, several, source_values, base_inputs, model)
    told = {"inputs": base_inputs, "source": source, "plans": [world.plan for world in worlds[2:]]}
    result.config.update(describe_run(model, grid, intervention, corrupt, direction, seed, **told))
    cost = {"cells": len(cells), "worlds_run": len(todo), "seconds": round(time.perf_counter() - started, 3)}
    result.config.update(executor=choice.executor, executor_reason=choice.reason, identity=identity, cost=cost)
    _require_effect(result, cells)
    if path is not None:
        result.save(path)
        stream.close()
    return result


def _cell_worlds(cells: Sequence[Cell], factory: Factory, inputs: Inputs) -> list[World]:
    """The base, the base recomputed, and one world for each cell."""
    again = recompute(Site("embed", pos=_first_position(cells)))
    worlds = [World(inputs), World(inputs, Plan((again,)))]
    return worlds + [World(inputs, cell.plan(factory)) for cell in cells]


def _first_position(cells: Sequence[Cell]) -> int | None:
    """The first position that a cell edits, from which on all that cells compute is computed again; None where that is
    not one and the same for all rows.
    """
    found = {None if place.stack is not None else place.pos for cell in cells for place in cell.sites}
    ints = {i for pos in found for i in (pos if isinstance(pos, tuple) else (pos,))}
    if not all(type(i) is int for i in ints) or len({i < 0 for i in ints if isinstance(i, int)}) != 1:
        return None
    return min(i for i in ints if isinstance(i, int)) or None


def _all_reads(bound: Sequence[Bound]) -> tuple[list[Site], list[slice]]:
    reads: list[Site] = []
    spans = []
    for b in bound:
        spans.append(slice(len(reads), len(reads) + len(b.reads)))
        reads += b.reads
    return reads, spans


def _where(axes: Sequence[Axis], places: Sequence[int], world: int) -> str:
    """What is read of a sweep's worlds (the base, the base computed again, every cell), for messages."""
    number = places[world]
    return f" in {_cell(axes, number - 2)}" if number > 1 else " of the unedited run"


def _cell(axes: Sequence[Axis], number: int) -> str:
    """The coordinates of a cell, the last axis fastest."""
    at = np.unravel_index(number, tuple(len(axis) for axis in axes)) if axes else ()
    named = (f"{axis.name}={axis.values[i]!r}" for axis, i in zip(axes, at, strict=True))
    return f"the cell {', '.join(named)}" if axes else "the only cell"


def require_finite(base: np.ndarray, metrics: Sequence[str], rows: slice) -> None:
    """Check the metrics [metric, b] of the unedited run, of which effects are differences.

    Raises:
        MetricError: one is infinite, so that no effect is defined.
    """
    for name, values in zip(metrics, base, strict=True):
        endless = np.flatnonzero(np.isinf(values))
        if len(endless):
            raise MetricError(
                f"metric {name!r} is {values[endless[0]]} on rows {(endless + rows.start).tolist()} of the unedited "
                "run, and an effect is the difference from that: measure what is finite there (logit, prob), or leave "
                "the rows out"
            )


def references(
    model: Model,
    metrics: Sequence[Metric],
    bound: Sequence[Bound],
    source: World | None,
    inputs: Inputs,
    seed: int = 0,
    executor: str = "auto",
) -> list[list[Tensor]]:
    """For each metric, the values that it compares with, on all rows."""
    out = []
    for m, b in zip(metrics, bound, strict=True):
        if m.reference is None:
            out.append([])
            continue
        # What is held on the model comes first in every world that is run, so the source is run without it.
        own = None if source is None else World(source.inputs)
        world = own if m.reference == "source" else m.reference
        if not isinstance(world, World):
            raise MetricError(f"{m.name} compares with the source of a sweep, and this sweep patches from nothing")
        out.append(read_reference(model, m, world, b, inputs, seed, executor))
    return out


def source_metrics(
    model: Model,
    metrics: Sequence[Metric],
    source: World,
    compared: Sequence[Sequence[Tensor]],
    budget: int | None,
    seed: int = 0,
    executor: str = "auto",
) -> np.ndarray:
    """The metrics of the source world itself, [metric, row]."""
    bound = [m.bind(model, source.inputs) for m in metrics]
    reads, spans = _all_reads(bound)
    out = np.full((len(metrics), len(source.inputs)), np.nan)
    for chunk in run_worlds(model, [World(source.inputs)], reads, executor=executor, budget=budget, seed=seed):
        out[:, chunk.rows] = _measured(metrics, bound, spans, compared, chunk, lambda _: " of the source")[:, 0]
    return out


def _measured(
    metrics: Sequence[Metric],
    bound: Sequence[Bound],
    spans: Sequence[slice],
    compared: Sequence[Sequence[Tensor]],
    chunk: Outcomes,
    where: Callable[[int], str],
) -> np.ndarray:
    """The metrics of some worlds on some of their rows, float64 [metric, W, b]."""
    found = []
    for m, b, span, other in zip(metrics, bound, spans, compared, strict=True):
        others = [o[chunk.rows] for o in other]
        found.append(call_each(b, m.name, chunk.rows, chunk.values[span], others, where).double())
    return torch.stack(found).detach().cpu().numpy()  # a metric may be made of parameters


def assemble(
    values: np.ndarray,
    status: np.ndarray,
    axes: tuple[Axis, ...],
    cells: Sequence[Cell | None],
    metrics: Sequence[Metric],
    several: bool,
    source: np.ndarray | None,
    inputs: Inputs,
    model: Model,
) -> Result:
    """Make a result of measured values.

    Args:
        values: float64 [metric, 2 + cells, row]: the base, the base computed again, and every cell.
        status: int8 [2 + cells, row], indices into `STATUS`.
        cells: what says which rows have each cell; None where all do.
        source: [metric, row], or None.

    Raises:
        MetricError: an effect is not defined: the base is infinite, or the effect nan on a row that has the cell.
    """
    require_finite(values[:, 0], [m.name for m in metrics], slice(0, len(inputs)))
    base, effect = values[:, 0], values[:, 2:] - values[:, :1]
    absent = np.zeros((len(cells), len(inputs)), bool)
    for i, cell in enumerate(cells):
        if cell is not None and cell.present is not None:
            absent[i] = ~cell.present.numpy()
    for metric, number in np.argwhere((np.isnan(effect) & ~absent).any(-1))[:1]:
        rows = np.flatnonzero(np.isnan(effect[metric, number]) & ~absent[number]).tolist()
        raise MetricError(
            f"the effect on metric {metrics[metric].name!r} in {_cell(axes, number)} is nan on rows {rows}: the values "
            "that are put in, or what is made of them, are no numbers there"
        )
    effect[:, absent] = np.nan
    # A cell fired if it did on any row that has it; one that is inert on some and pruned on the rest is inert.
    code = status[2:]
    fired, pruned = (code == 0) & ~absent, (code == 2) | absent
    merged = np.where(fired.any(1), 0, np.where(pruned.all(1), 2, 1)).astype(np.int8)
    shape = tuple(len(axis) for axis in axes)
    effect = effect.reshape(len(metrics), *shape, len(inputs))
    rounding = np.finfo(np.float64).eps if model.dtype == torch.float64 else torch.finfo(model.dtype).eps
    floor = np.maximum(np.abs(values[:, 1] - base).max(1), rounding * np.abs(base).max(1))
    pick = (lambda a: a) if several else (lambda a: a[0])
    worded = inputs.tokens is not None and inputs.pixels is None
    labels = tuple(joined(inputs.labels(r)) if worded else f"row {r}" for r in range(len(inputs)))
    return Result(
        effect=pick(effect),
        axes=axes,
        metrics=tuple(m.name for m in metrics),
        several=several,
        base=pick(base),
        source=None if source is None else pick(source),
        status=merged.reshape(shape),
        noise_floor=np.asarray(pick(floor)),
        rows=labels,
        # What stands at a position in each row, where a position is the same number and not the same token.
        config={"tokens": [list(inputs.labels(r)) for r in range(len(inputs))]} if _ragged(axes, inputs) else {},
    )


def _ragged(axes: Sequence[Axis], inputs: Inputs) -> bool:
    """Whether an axis of positions has other tokens in other rows."""
    tokens = inputs.tokens if inputs.pixels is None else None
    return tokens is not None and len(set(tokens)) > 1 and any(axis.name in (POS, KEY) for axis in axes)


def _require_effect(result: Result, cells: Sequence[Cell]) -> None:
    if (result.status == 0).any():
        return
    pruned = bool((result.status == STATUS.index(PRUNED)).all())
    why = "nothing that is read depends on any of them" if pruned else "every value that was set equals the value there"
    raise UnfiredError(f"none of the {len(cells)} cells changed anything: {why}")
