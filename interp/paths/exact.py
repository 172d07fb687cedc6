"""Exact effects of edges: one reader reads a changed residual stream, and everything after it is run again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooks import Inputs, Meter, Plan, Site, UnfiredError, World, budget_of, digest_of, fingerprint, patch, run_worlds
from interp.metrics import Metric
from interp.paths.fronts import on_pair
from interp.paths.graph import Graph, graph_of
from interp.paths.measuring import Measure
from interp.paths.nodes import QKV, Edge, Writer
from interp.paths.pair import Pair
from interp.paths.readers import changed_tokens, check_norms, forced, key_value_head, responses, suffix
from interp.paths.streams import edits
from interp.progress import tqdm
from interp.provenance import metric_identity, model_identity
from interp.results import Result
from interp.streaming import Stream, finished
from interp.sweeps import require_finite


@on_pair()
@torch.no_grad()
def edge_sweep(
    pair: Pair,
    *,
    metric: Metric,
    graph: Graph | None = None,
    edges: Iterable[str | Edge] | None = None,
    writers: Iterable[str] | str | None = None,
    readers: Iterable[str] | str | None = None,
    norms: str = "recompute",
    path: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Result:
    """Measure the exact effect of every edge, or of some.

    With a the run that is edited and c what it is edited with, an edge u -> v means: v alone reads in_v + c_u - a_u,
    and everything after v is computed again (the edges of ACDC and EAP). Its effect is metric(edited) - metric(a).

    All edges into a reader go as one batch of worlds, which share with a all that comes before the reader, and all
    positions before the first that differs.

    Args:
        pair: the two runs; or a model, clean and corrupt prompts in its place, and the other attributes of `Pair` by
            name: ``edge_sweep(model, clean, corrupt, metric=metric, direction="noising")``.
        metric: what is measured.
        graph: default ``Graph.of(model)``.
        edges: names of edges; or `writers` and `readers`, whose edges are measured; default all.
        norms: "recompute" the reader's norm on the changed stream, or hold it "frozen" at its scale in a.
        path, progress: as in `interp.sweep`.

    Returns:
        A `Result` with one axis, "edge". Its config has "semantics", "values", "norms", and "forward_equivalents": the
        work, in forward passes of one prompt.

    Raises:
        PathError: an edge that the model lacks or that runs backwards; a model that the graph does not describe.
        InputsError, PathError: as `Pair`, or a pair and other arguments that contradict it.
        MetricError: the metric is nan, or infinite in the run that is edited.
        ResultError: there is a result of another sweep at `path`.
        UnfiredError: no writer's output changes.
    """
    check_norms(norms)
    graph = graph_of(pair.model, graph)
    chosen = graph.select(edges, writers, readers)
    measure = Measure.of(metric, pair)
    rows = len(measure.inputs)
    identity: dict[str, str] = {}
    if path is not None:
        options = (pair.values, pair.pooled, norms, pair.seed, pair.executor)
        identity = _identity(measure, chosen, graph, options, pair.reference)
        known = finished(path, identity)
        if known is not None:
            return known
    stream = Stream(path, (1, len(chosen) + 2, rows), identity)
    todo = set(stream.remaining())
    hidden, known = None if progress is None else not progress, stream.complete()
    with tqdm(total=len(chosen), initial=known, disable=hidden, unit="edge", leave=False) as bar:
        bar.set_description(f"{len(chosen)} edges x {rows} rows")
        for numbers, worlds in _batches(graph, chosen, todo, norms, measure):
            names = [f"the edge {chosen[i - 2].name}" if i > 1 else "the unedited run" for i in numbers]
            for some, window, measured, status in measure.each(worlds, names):
                places = [numbers[i] for i in some]
                if 0 in places:
                    require_finite(measured[None, places.index(0)], [metric.name], window)
                stream.write(measured[None], places, window, status)
                bar.update(stream.complete() - bar.n)
    found, status = np.array(stream.values[0]), np.array(stream.status)
    result = measure.result(graph, found, status, chosen, norms=norms)
    result.config["identity"] = identity
    if path is not None:
        result.save(path)
        stream.close()
    return result


def port(edge: Edge) -> tuple[int, str, int]:
    """What the readers of one kind in one layer share: their inputs are the same residual stream."""
    return (edge.reader.time, edge.reader.kind, edge.reader.layer)


def _batches(
    graph: Graph, chosen: tuple[Edge, ...], todo: set[int], norms: str, measure: Measure
) -> Iterator[tuple[list[int], list[World]]]:
    """Worlds, some at a time, with the place of each among the sweep's (the two plain worlds are 0 and 1)."""
    places = {edge: i + 2 for i, edge in enumerate(chosen)}
    plain = [i for i in (0, 1) if i in todo]
    if plain:
        yield plain, [measure.plain[i] for i in plain]
    left = sorted((edge for edge in chosen if places[edge] in todo), key=port)
    limit = budget_of(measure.model, measure.budget)
    base = measure.pair.base
    per_writer = 6 * base.embedded.numel() * base.embedded.element_size()
    moved = False
    held: tuple[list[Writer], Tensor] = ([], base.embedded)  # q, k and v of a layer see the same writers
    for key, group in groupby(left, key=port):
        edges = list(group)
        # Under a plan that edits heads one by one, each has a copy of what it reads.
        copies = graph.heads[key[2]] if key[1] in QKV and edits(base.held, key[1], key[2]) else 1
        fit = max(1, int(limit // (copies * per_writer)))
        writers = list(dict.fromkeys(edge.writer for edge in edges))
        for start in range(0, len(writers), fit):
            some = writers[start : start + fit]
            if some != held[0]:
                held = (some, measure.pair.stack(some))
            changes = held[1]
            moved = moved or bool((changes != 0).any())
            _count(measure.meter, key[1], key[2], changes)
            values = responses(base, key[1], key[2], changes, norms)
            worlds, numbers = [], []
            for u, writer in enumerate(some):
                mine = [edge for edge in edges if edge.writer == writer]
                parts = {name: value[u] for name, value in values.items()}
                plans = _edge_plans(graph, mine, parts, changes[u], measure)
                numbers += [places[edge] for edge in mine]
                worlds += [World(base.inputs, plan) for plan in plans]
            yield numbers, worlds
    if left and not moved:
        raise UnfiredError("no writer's output differs between the two runs, so no edge has an effect")


def _count(meter: Meter, kind: str, layer: int, changes: Tensor) -> None:
    # What an MLP or the logits read is set before them, so their own work is counted where the worlds run.
    for part in QKV:
        if kind in (part, "attn"):
            meter.block(layer, part, changes[..., 0].numel())


def _edge_plans(
    graph: Graph, edges: list[Edge], values: dict[str, Tensor], change: Tensor, measure: Measure
) -> list[Plan]:
    """The plan of each of some edges of one writer into readers of one kind and layer."""
    inputs, changed = measure.inputs, changed_tokens(change)
    start = None if inputs.padded else suffix(changed)
    plans = []
    for edge in edges:
        pos: Any = graph.span(edge.span, inputs)[0]
        where = None
        if pos is None and start is not None:
            pos = slice(start, None) if start else None
        elif not bool(changed.all()):
            where = changed
        if not bool(changed.any()):
            # What the two runs share cannot have an effect: a world without a plan, whose effect is exactly 0.
            plans.append(Plan())
            continue
        head = key_value_head(measure.model, edge.reader, graph.query_heads)
        plans.append(forced(edge.reader, values, head, pos, where))
    shared = graph.query_heads and edges and edges[0].reader.kind in ("k", "v")
    if shared and graph.groups[edges[0].reader.layer] > 1:
        return _only_query_heads(edges, plans, measure)
    return plans


def _only_query_heads(edges: list[Edge], plans: list[Plan], measure: Measure) -> list[Plan]:
    """Plans that change a shared key or value for one query head: its z in a world where the whole group saw it."""
    layer = edges[0].reader.layer
    place = Site("z", layer)
    found: dict[int, list[Tensor]] = {}
    worlds = [World(measure.inputs, plan) for plan in plans]
    for outcome in run_worlds(
        measure.model,
        worlds,
        [place],
        executor=measure.pair.executor,
        budget=measure.budget,
        seed=measure.seed,
        meter=measure.meter,
    ):
        found.setdefault(outcome.index, []).append(outcome.values[0])
    out = []
    for i, (edge, plan) in enumerate(zip(edges, plans, strict=True)):
        one = patch(Site("z", layer, head=edge.reader.head), torch.cat(found[i]))
        out.append(Plan((one,)) if len(plan) else plan)
    return out


def _identity(
    measure: Measure, chosen: tuple[Edge, ...], graph: Graph, options: tuple[Any, ...], reference: Inputs | None
) -> dict[str, str]:
    """Digests of everything that a sweep of edges depends on."""
    run = measure.pair.source.run
    model, every = measure.model, [measure.inputs, run and run.inputs, reference]
    held = [model.held_on(inputs)[0] for inputs in every if inputs is not None] if model.holds else []
    around = {"held": digest_of(tuple(map(fingerprint, held)))} if held else {}
    return {
        **around,
        **model_identity(model),
        "inputs": fingerprint(measure.inputs),
        "source": "" if run is None else fingerprint(run.inputs),
        "reference": "" if reference is None else fingerprint(reference),
        "edges": digest_of(tuple(edge.name for edge in chosen)),
        "graph": digest_of((graph.granularity, graph.query_heads, graph.spans)),
        "direction": measure.pair.direction,
        "metrics": metric_identity(measure.metric, measure.bound),
        "options": digest_of(tuple(map(str, options))),
    }
