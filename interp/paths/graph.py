"""The graph of a transformer: who writes to the residual stream, who reads from it, and every edge between them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from hooks import Index, Inputs, Model, ModelError, PathError, SiteError, nearest
from interp.paths.nodes import QKV, Edge, Reader, Writer
from interp.paths.spans import spans_of
from interp.positions import row_positions

GRANULARITIES = ("heads", "blocks")


@dataclass(frozen=True)
class Graph:
    """The writers, the readers, and the edges between them, at some granularity.

    Edges are numbered by reader, then by span, then by writer, all in the order in which the model computes them.

    Attributes:
        heads: query heads of each layer.
        groups: how many of them read one key/value head.
        mlps: whether each layer has an MLP.
        parallel: whether attention and MLP of a block read the same residual stream.
        width: M.
        granularity: "heads" or "blocks".
        query_heads: whether "k" and "v" readers are those of query heads.
        spans: named positions, each an edge of its own; None where an edge is at all positions.
    """

    heads: tuple[int, ...]
    groups: tuple[int, ...]
    mlps: tuple[bool, ...]
    parallel: bool
    width: int
    granularity: str = "heads"
    query_heads: bool = False
    spans: tuple[tuple[str, Index], ...] | None = None

    @classmethod
    def of(
        cls,
        model: Model,
        granularity: str = "heads",
        *,
        query_heads: bool = False,
        positions: Mapping[str, Any] | Sequence[int] | None = None,
    ) -> Graph:
        """The graph of a model.

        Args:
            model: a wrapped model.
            granularity: "heads" (heads and MLPs write; q, k and v of each head, MLPs and logits read) or "blocks"
                (whole attention layers and MLPs).
            query_heads: under grouped-query attention, give every query head "k" and "v" readers of its own, as tools
                do that know no key/value heads: such an edge changes what one query head sees of a shared key.
            positions: None for edges at all positions; a list of positions, each an edge of its own; or names of
                positions, ``{"subject": 3, "rest": [4, 5]}``.

        Raises:
            ModelError: this is no wrapped model.
            PathError: the granularity is unknown, or no position is given.
        """
        if not isinstance(model, Model):
            raise ModelError(f"a graph is of a wrapped model: ip.wrap(model), not {type(model).__name__}")
        if granularity not in GRANULARITIES:
            hint = nearest(str(granularity), GRANULARITIES)
            raise PathError(f"granularity is {' or '.join(map(repr, GRANULARITIES))}, not {granularity!r}{hint}")
        blocks = model.architecture.blocks
        return cls(
            heads=tuple(block.attention.q.heads for block in blocks),
            groups=tuple(block.attention.q.heads // block.attention.k.heads for block in blocks),
            mlps=tuple(block.mlp is not None for block in blocks),
            parallel=any(block.parallel for block in blocks),
            width=model.architecture.width,
            granularity=granularity,
            query_heads=query_heads,
            spans=spans_of(positions),
        )

    @cached_property
    def writers(self) -> tuple[Writer, ...]:
        """What writes, in the order of time."""
        found = [Writer("input", -1, None, 0)]
        for layer, heads in enumerate(self.heads):
            at = 2 * layer + 1
            if self.granularity == "blocks":
                found.append(Writer("attn", layer, None, at))
            else:
                found += [Writer("head", layer, head, at) for head in range(heads)]
            if self.mlps[layer]:
                found.append(Writer("mlp", layer, None, at + 1))
        return tuple(found)

    @cached_property
    def readers(self) -> tuple[Reader, ...]:
        """What reads, in the order of time."""
        found = []
        for layer, heads in enumerate(self.heads):
            at = 2 * layer + 1
            if self.granularity == "blocks":
                found.append(Reader("attn", layer, None, at))
            else:
                counts = {"q": heads} | dict.fromkeys("kv", heads // (1 if self.query_heads else self.groups[layer]))
                found += [Reader(kind, layer, head, at) for kind in QKV for head in range(counts[kind])]
            if self.mlps[layer]:
                found.append(Reader("mlp", layer, None, at if self.parallel else at + 1))
        return (*found, Reader("logits", self.layers, None, 2 * self.layers + 1))

    def __repr__(self) -> str:
        spans = "" if self.spans is None else f", {len(self.spans)} spans"
        nodes = f"{len(self.writers)} writers, {len(self.readers)} readers"
        return f"Graph({self.granularity}: {nodes}{spans}, {len(self)} edges)"

    @property
    def layers(self) -> int:
        """Number of blocks L."""
        return len(self.heads)

    @property
    def span_names(self) -> tuple[str | None, ...]:
        """The names of the spans; (None,) where there are none."""
        return (None,) if self.spans is None else tuple(name for name, _ in self.spans)

    def span(self, name: str | None, inputs: Inputs) -> tuple[Index, Tensor | None]:
        """The positions of a span as a site takes them, and which rows have it, bool [B] (None: all).

        Raises:
            PathError: no row has it.
        """
        if name is None or self.spans is None:
            return None, None
        try:
            return row_positions(dict(self.spans)[name], inputs)
        except SiteError as error:
            raise PathError(f"span {name!r}: {error}") from None

    def require(self, model: Model) -> None:
        """Raise PathError unless this is a graph of that model."""
        mine = Graph.of(model, self.granularity, query_heads=self.query_heads)
        if replace(self, spans=None) != mine:
            raise PathError(f"the graph is of another model: {self}, and this model's is {mine}")

    @cached_property
    def listed(self) -> tuple[Edge, ...]:
        """Every edge, in order."""
        return tuple(
            Edge(writer, reader, span)
            for reader in self.readers
            for span in self.span_names
            for writer in self.writers
            if writer.time < reader.time
        )

    @cached_property
    def edges(self) -> tuple[str, ...]:
        """The name of every edge, in order."""
        return tuple(edge.name for edge in self.listed)

    @cached_property
    def index(self) -> dict[str, int]:
        """Place of each edge in `edges`, by name."""
        return {name: i for i, name in enumerate(self.edges)}

    @cached_property
    def table(self) -> np.ndarray:
        """int [spans, writers, readers]: the place of each edge, -1 where there is none."""
        out = np.full((len(self.span_names), len(self.writers), len(self.readers)), -1)
        at = 0
        for r, reader in enumerate(self.readers):
            before = [u for u, writer in enumerate(self.writers) if writer.time < reader.time]
            for s in range(len(self.span_names)):
                out[s, before, r] = np.arange(at, at + len(before))
                at += len(before)
        return out

    def __len__(self) -> int:
        return len(self.listed)

    def edge(self, name: str | Edge) -> Edge:
        """The edge of a name.

        Raises:
            PathError: there is no such edge: a node that the model lacks, or an edge that runs backwards.
        """
        if isinstance(name, Edge):
            name = name.name
        if not isinstance(name, str):
            raise PathError(f"an edge is a name such as 'a0.h1->m1', not {name!r}")
        found = self.index.get(name)
        if found is not None:
            return self.listed[found]
        bare, at, span = name.partition("@")
        ends = [end.strip() for end in bare.split("->")]
        if len(ends) != 2:
            raise PathError(f"{name!r} is not an edge: write 'writer->reader', as {self.edges[0]!r}")
        writer, reader = self.writer(ends[0]), self.reader(ends[1])
        if writer.time >= reader.time:
            raise PathError(f"{name!r} runs backwards: {writer.name} writes after {reader.name} has read")
        if (self.spans is None) == bool(at):
            raise PathError(f"{name!r}: " + ("this graph has no positions" if at else f"name a span{self._some()}"))
        if at and span not in dict(self.spans or ()):
            raise PathError(
                f"{name!r}: no span {span!r}{nearest(span, [s for s in self.span_names if s])}{self._some()}"
            )
        return Edge(writer, reader, span if at else None)

    def _some(self) -> str:
        return ", one of " + ", ".join(repr(s) for s in self.span_names[:8])

    def writer(self, name: str) -> Writer:
        """The writer of a name.

        Raises:
            PathError: the graph has none; the message names the nearest.
        """
        return _find("writer", name, self.writers)

    def reader(self, name: str) -> Reader:
        """The reader of a name.

        Raises:
            PathError: the graph has none; the message names the nearest.
        """
        return _find("reader", name, self.readers)

    def select(
        self,
        edges: Iterable[str | Edge] | str | Edge | None = None,
        writers: Iterable[str] | str | None = None,
        readers: Iterable[str] | str | None = None,
    ) -> tuple[Edge, ...]:
        """The edges named, or those of named writers and readers; all where nothing is named.

        A reader may be a node: ``"a2.h1"`` means its q, k and v, under grouped-query attention those of its group.

        Raises:
            PathError: a name that the graph lacks, or nothing left.
        """
        if edges is not None:
            chosen = tuple(self.edge(edge) for edge in _listed(edges))
            if writers is not None or readers is not None:
                raise PathError("name edges, or writers and readers, not both")
        else:
            senders = None if writers is None else {self.writer(w).name for w in _listed(writers)}
            receivers = (
                None if readers is None else {r.name for name in _listed(readers) for r in self.readers_of(name)}
            )
            chosen = tuple(
                edge
                for edge in self.listed
                if (senders is None or edge.writer.name in senders)
                and (receivers is None or edge.reader.name in receivers)
            )
        if not chosen:
            raise PathError("no edge is left: the writers named all write after the readers named, or none is named")
        if len(set(chosen)) != len(chosen):
            raise PathError("an edge is named twice")
        return chosen

    def readers_of(self, name: str) -> tuple[Reader, ...]:
        """The reader of a name, or the readers of a node.

        Raises:
            PathError: there is none.
        """
        found = tuple(r for r in self.readers if r.name == name) or tuple(
            r for r in self.readers if name in self.nodes_of(r)
        )
        return found or (self.reader(name),)

    def feeds(self, reader: Reader) -> tuple[Writer, ...]:
        """What a reader's input makes: under grouped-query attention a key/value head feeds several query heads."""
        if reader.kind == "logits":
            return ()
        heads: set[int | None] = {reader.head}
        if reader.kind in ("k", "v") and not self.query_heads:
            group = self.groups[reader.layer]
            assert reader.head is not None
            heads = set(range(reader.head * group, (reader.head + 1) * group))
        return tuple(
            w
            for w in self.writers
            if w.layer == reader.layer and (w.kind == "mlp") == (reader.kind == "mlp") and w.head in heads
        )

    def nodes_of(self, reader: Reader) -> tuple[str, ...]:
        """The names of the nodes that read by it: several for a key/value head that query heads share."""
        return ("logits",) if reader.kind == "logits" else tuple(writer.name for writer in self.feeds(reader))

    def mask(self, edges: Iterable[str | Edge] | str | Edge) -> np.ndarray:
        """bool [edges], True for those named."""
        out = np.zeros(len(self), bool)
        for edge in _listed(edges):
            out[self.index[self.edge(edge).name]] = True
        return out


def graph_of(model: Model, graph: Graph | None) -> Graph:
    """The graph that is given, checked to be of this model; by default that of its heads.

    Raises:
        ModelError: the model is not wrapped.
        PathError: the graph is another model's, or none.
    """
    if graph is None:
        return Graph.of(model)
    if not isinstance(graph, Graph):
        raise PathError(f"graph is a Graph, Graph.of(model, ...), not {graph!r}")
    graph.require(model)
    return graph


def _listed(names: Any) -> list[Any]:
    if not isinstance(names, Iterable) and not isinstance(names, Edge):
        raise PathError(f"expected names of edges or nodes, such as 'a0.h1->m1' or 'm1', not {names!r}")
    return [names] if isinstance(names, (str, Edge)) else list(names)


def _find(what: str, name: str, nodes: Sequence[Any]) -> Any:
    names = {node.name: node for node in nodes}
    if name in names:
        return names[name]
    head = re.fullmatch(r"(a\d+)\.h\d+(<.>)?", str(name))
    if head and what == "reader":
        like = [n for n in names if n.startswith(head[1] + ".") and n.endswith(head[2] or ">")]
        if like:
            raise PathError(
                f"no reader {name!r}{nearest(str(name), like)}; layer {head[1][1:]} has {like[0]} to {like[-1]}"
            )
    some = ", ".join(list(names)[:6])
    raise PathError(f"no {what} {name!r}{nearest(str(name), names)}; there are {some}, ..., {list(names)[-1]}")
