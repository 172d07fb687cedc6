"""The effect of one edge, of a set of edges, or of a path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hooks import Model, PathError, Plan, Site, UnfiredError, World, nearest, run_worlds
from interp.metrics import Metric
from interp.parts import head_outputs
from interp.paths.exact import edge_sweep
from interp.paths.fronts import on_pair
from interp.paths.graph import Graph, graph_of
from interp.paths.measuring import Measure
from interp.paths.nodes import Edge, Reader, Writer
from interp.paths.pair import Pair
from interp.paths.readers import check_norms, forced, responses
from interp.paths.rewire import check_heads, rewire
from interp.paths.streams import Streams, plainly
from interp.results import Result

SEMANTICS = ("edge", "set", "frozen")
PlanOf = Callable[[Measure], Plan]
"""What is done to the run that is edited, once it is known."""


@on_pair()
@torch.no_grad()
def path_patch(
    pair: Pair,
    what: str | Edge | Sequence[Any],
    *,
    semantics: str,
    metric: Metric,
    graph: Graph | None = None,
    norms: str = "recompute",
) -> Result:
    """Measure the effect of an edge, a set of edges, or a path.

    With a the run that is edited, c what it is edited with, and d_u = c_u - a_u:

    - ``semantics="edge"``: an edge, "a0.h1->a2.h3<q>"; see `edge_sweep`.
    - ``semantics="set"``: several edges, or a sender and its receivers, ``("a0.h1", ["a2.h3<q>", "m2"])`` (path
      patching, Goldowsky-Dill et al. 2023, Wang et al. 2022): each reader v reads its live input, changed by
      c_u - live_u for the edges listed, and everything is computed again. The sender's change reaches the rest through
      them only.
    - ``semantics="frozen"``: a path, "input->a0.h1<v>->m1->logits": D_0 = d_u of its first node,
      D_{i+1} = f_{i+1}(in + D_i) - f_{i+1}(in), everything off the path held at a. Heads on the way are query heads; a
      key/value head that one is entered by is its group's.

    Args:
        pair: the two runs; or a model, clean and corrupt prompts in its place, as in `edge_sweep`.
        what: as `semantics` needs it.
        metric, graph, norms: as in `edge_sweep`.

    Returns:
        A `Result` of one cell, whose config says the semantics.

    Raises:
        PathError: edges that the model lacks or that run backwards, a path that does not end in the logits, norms that
            are frozen under "set", a graph with positions under "frozen", or spans that share tokens under "set".
        UnfiredError: no writer's output changes.
    """
    if semantics not in SEMANTICS:
        raise PathError(
            f"semantics is one of {', '.join(SEMANTICS)}, not {semantics!r}{nearest(str(semantics), SEMANTICS)}"
        )
    check_norms(norms)
    graph = graph_of(pair.model, graph)
    if semantics == "edge":
        if not isinstance(what, (str, Edge)):
            raise PathError(f"semantics='edge' takes the name of one edge, not {what!r}; for several, 'set'")
        swept = edge_sweep.bare(pair, metric=metric, graph=graph, edges=[what], norms=norms, progress=False)
        return swept.sel(edge=swept.axes[0].values[0])
    plan_of, writers, text = (_set_plan if semantics == "set" else _path_plan)(graph, what, norms)
    if not any(bool((pair.stack([writer]) != 0).any()) for writer in writers):
        raise UnfiredError(f"no writer's output differs between the two runs, so {what!r} has no effect")
    measure = Measure.of(metric, pair)
    found = measure.all([*measure.plain, World(measure.inputs, plan_of(measure))])
    result = measure.result(graph, *found, None, semantics=semantics, norms=norms)
    result.config["what"] = text
    return result


def _set_plan(graph: Graph, what: Any, norms: str) -> tuple[PlanOf, Sequence[Writer], list[str]]:
    """How a set of edges is edited, what they start from, and their names."""
    if norms != "recompute":
        raise PathError("a set of edges is computed with live norms: norms='recompute'")
    edges = edges_of(graph, what)
    check_heads(graph, "sets of edges")
    replaced, writers = graph.mask(edges), tuple(dict.fromkeys(edge.writer for edge in edges))
    return (lambda m: rewire(graph, replaced, m.pair.source, m.model)), writers, [edge.name for edge in edges]


def edges_of(graph: Graph, what: Any) -> tuple[Edge, ...]:
    """The edges that a user means: a sequence of them, or (sender, receivers).

    Raises:
        PathError: none, or one that the graph lacks.
    """
    if isinstance(what, (str, Edge)):
        what = [what]
    if isinstance(what, Sequence) and len(what) == 2 and isinstance(what[0], str) and "->" not in what[0]:
        sender, receivers = what
        listed = [receivers] if isinstance(receivers, str) else list(receivers)
        # Two heads that share a key/value head have a reader in common.
        found = dict.fromkeys(reader for name in listed for reader in graph.readers_of(name))
        writer = graph.writer(sender)
        what = [graph.edge(Edge(writer, reader, span)) for reader in found for span in graph.span_names]
    if not isinstance(what, Iterable):
        raise PathError(f"a set is a sequence of edges, or (sender, receivers), not {what!r}")
    return graph.select(edges=list(what))


def _path_plan(graph: Graph, path: Any, norms: str) -> tuple[PlanOf, Sequence[Writer], str]:
    """How a path's last reader is edited, after the nodes on the way one by one; what it starts from; and the path."""
    if not isinstance(path, str):
        raise PathError(f"a path is a text, 'input->a0.h1<v>->m1->logits', not {path!r}")
    if graph.spans is not None:
        raise PathError("a path runs through all positions: give a graph without any")
    names = [name.strip() for name in path.split("->")]
    if len(names) < 2 or names[-1] != "logits" or "logits" in names[:-1]:
        raise PathError(f"{path!r}: a path goes from a writer over readers to the logits, as 'input->a0.h1<v>->logits'")
    writer = graph.writer(names[0])
    readers = [_on_path(graph, name) for name in names[1:]]
    time = writer.time
    for reader, name in zip(readers, names[1:], strict=True):
        if time >= reader.time:
            raise PathError(f"{path!r} runs backwards at {name}")
        time = reader.time if reader.kind == "logits" else graph.writer(reader.node).time

    def plan(measure: Measure) -> Plan:
        base, change = measure.pair.base, measure.pair.stack([writer])[0]
        for reader in readers[:-1]:
            change = _node_change(measure, reader, _step(base, reader, change, norms))
        return _step(base, readers[-1], change, norms)

    return plan, [writer], path


def _step(base: Streams, reader: Reader, change: Tensor, norms: str) -> Plan:
    """The plan in which one reader of a path reads in + change."""
    values = responses(base, reader.kind, reader.layer, change, norms)
    return forced(reader, values, _site_head(base.model, reader))


def _on_path(graph: Graph, name: str) -> Reader:
    """A node on a path: heads are query heads there."""
    for reader in graph.readers:
        if reader.name == name:
            return reader
        head, _, kind = name.partition("<")
        # The query heads of a group have no reader of their own.
        same_kind = reader.kind in ("k", "v") and kind == f"{reader.kind}>" and f"a{reader.layer}.h" in head
        if same_kind and head in {w.name for w in graph.writers if w.layer == reader.layer}:
            return Reader(reader.kind, reader.layer, graph.writer(head).head, reader.time)
    return graph.reader(name)


def _site_head(model: Model, reader: Reader) -> int | None:
    if reader.kind not in ("k", "v"):
        return reader.head
    block = model.architecture.blocks[reader.layer]
    assert reader.head is not None
    return reader.head // (block.attention.q.heads // block.attention.k.heads)


def _node_change(measure: Measure, reader: Reader, plan: Plan) -> Tensor:
    """f(in + D) - f(in) of a node, [B, T, M]: what it adds to the residual stream, everything else held."""
    base, layer = measure.pair.base, reader.layer
    name = "mlp_out" if reader.kind == "mlp" else "z"
    place = Site(name, layer)
    pieces = [
        outcome.values[0]
        for outcome in run_worlds(
            base.model,
            [World(base.inputs, plan)],
            [place],
            executor=plainly(measure.pair.executor),
            budget=measure.budget,
            seed=measure.seed,
            meter=measure.meter,
        )
    ]
    new = torch.cat(pieces)
    if reader.kind == "mlp":
        old = base.mlp_out[layer]
        assert old is not None
        return new - old
    block = base.model.architecture.blocks[layer]
    if reader.kind == "attn":
        return head_outputs(block, new).sum(2) - base.heads(layer).sum(2)
    # Of a key/value head's group only this query head is on the path.
    z = base.z[layer].clone()
    z[:, :, reader.head] = new[:, :, reader.head]
    return head_outputs(block, z)[:, :, reader.head] - base.head(layer, reader.head or 0)
