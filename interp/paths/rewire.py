"""Many edges at once: what each reader of a world sees when some of its edges carry other values.

A reader v reads in_v + sum over its replaced edges of (c_u - live_u), where live_u is what u adds in this very world.
So with every edge replaced the source run comes out, with none the base, and a circuit is a plan.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooks import Context, Inputs, Intervention, PathError, Plan, Read, Site, here, intervene
from interp.parts import head_outputs
from interp.paths.graph import Graph
from interp.paths.nodes import QKV, Reader, Writer
from interp.paths.sources import Source

SITES = {"q": "q_input", "k": "k_input", "v": "v_input", "attn": "attn_in", "mlp": "mlp_in"}


def rewire(graph: Graph, replaced: np.ndarray, source: Source, model: Any) -> Plan:
    """The plan in which some edges carry the source's values instead of their own.

    Args:
        graph: the graph, of key/value heads where there are those.
        replaced: bool [edges].
        source: the values c_u.
        model: the wrapped model.

    Raises:
        PathError: a mask of another size, a graph of query heads under grouped-query attention, or an edge that is
            replaced twice at a token that two spans share.
    """
    replaced = np.asarray(replaced)
    if replaced.shape != (len(graph),) or replaced.dtype != bool:
        raise PathError(f"a mask of edges is bool [{len(graph)}], got {replaced.dtype} {list(replaced.shape)}")
    check_heads(graph, "sets of edges")
    graph.require(model)
    items: list[Intervention] = []
    chosen = [graph.listed[i] for i in np.flatnonzero(replaced)]
    marks = {span: span_tokens(graph, span, source.inputs, model) for span in {edge.span for edge in chosen}}
    ports: dict[tuple[str, int], list[Any]] = {}
    for edge in chosen:
        ports.setdefault((edge.reader.kind, edge.reader.layer), []).append(edge)
    for (kind, layer), edges in ports.items():
        writers = tuple(dict.fromkeys(edge.writer for edge in edges))
        readers = tuple(dict.fromkeys(edge.reader for edge in edges))
        spans = tuple(dict.fromkeys(edge.span for edge in edges))
        weights = torch.zeros(len(spans), len(readers), len(writers), dtype=torch.bool)
        for edge in edges:
            weights[spans.index(edge.span), readers.index(edge.reader), writers.index(edge.writer)] = True
        _check_apart(spans, weights, marks)
        fn = Rewired(model, writers, weights, [marks[span] for span in spans], source, kind in QKV)
        items.append(intervene(_site(kind, layer, readers), fn, fn.reads()))
    return Plan(tuple(items))


def check_heads(graph: Graph, what: str) -> None:
    """Raise PathError where query heads that share keys and values have readers of their own."""
    if graph.query_heads and any(group > 1 for group in graph.groups):
        raise PathError(f"the model has key/value heads: {what} need a graph with query_heads=False")


def _check_apart(spans: tuple[str | None, ...], weights: Tensor, marks: dict[str | None, Tensor | None]) -> None:
    for (a, one), (b, two) in combinations(enumerate(spans), 2):
        first, second = marks[one], marks[two]
        if first is not None and second is not None and bool((first & second).any() & (weights[a] & weights[b]).any()):
            raise PathError(
                f"the spans {one!r} and {two!r} share tokens, at which an edge would be replaced twice: sets of edges "
                "need spans that lie apart in every row"
            )


def _site(kind: str, layer: int, readers: tuple[Reader, ...]) -> Site:
    if kind == "logits":
        return Site("resid_post", layer - 1)
    heads = tuple(reader.head for reader in readers) if kind in QKV else None
    return Site(SITES[kind], layer, head=heads)  # type: ignore[arg-type]


def span_tokens(graph: Graph, span: str | None, inputs: Inputs, model: Any) -> Tensor | None:
    """bool [B, T]: the tokens of a span; None for all."""
    if span is None:
        return None
    place = Site("resid_pre", 0, pos=graph.span(span, inputs)[0])
    region = model.region(place, inputs)
    marks = torch.ones_like(region.cols, dtype=torch.bool)
    if region.valid is not None:
        marks = region.full_valid()[..., 0]
    return torch.zeros_like(inputs.mask).scatter(1, region.cols, marks)


class Rewired:
    """The function of one port's readers: x + sum over replaced edges of (c_u - live_u)."""

    __name__ = "rewire"

    def __init__(
        self,
        model: Any,
        writers: tuple[Writer, ...],
        weights: Tensor,
        tokens: list[Tensor | None],
        source: Source,
        per_head: bool,
    ) -> None:
        self.model, self.writers, self.weights, self.tokens = model, writers, weights, tokens
        self.source, self.per_head = source, per_head
        self.places = tuple(dict.fromkeys(_output(writer) for writer in writers))

    def reads(self) -> tuple[Read, ...]:
        """What it reads of its own world: the sites from which writers' outputs are made."""
        return tuple(here(place) for place in self.places)

    def __call__(self, x: Tensor, *live: Tensor, ctx: Context) -> Tensor:
        window = ctx.window
        change = torch.zeros((), dtype=x.dtype, device=x.device)
        for place, value in zip(self.places, live, strict=True):
            mine = [i for i, writer in enumerate(self.writers) if _output(writer) == place]
            differs = self._difference(place, value, [self.writers[i] for i in mine], window)
            for weights, tokens in zip(self.weights, self.tokens, strict=True):
                part = torch.einsum("ru,btum->btrm", weights[:, mine].to(differs), differs)
                if tokens is not None:
                    part = part * self._in_order(tokens[..., None], window, part)[..., None]
                change = change + part
        return x + (change if self.per_head else change.sum(2))

    def _difference(self, place: Site, value: Tensor, writers: list[Writer], window: slice | Tensor) -> Tensor:
        """c_u - live_u, [B, T, U, M]."""
        if place.name != "z":
            other = self.source.writer(writers[0], self._whole(value))
            return (self._in_order(other, window, value) - value).unsqueeze(2)
        assert place.layer is not None
        block = self.model.architecture.blocks[place.layer]
        own = head_outputs(block, value)
        heads = [writer.head for writer in writers]
        # An index that is a list would be copied to the device, and waited for.
        own = own.sum(2, keepdim=True) if heads[0] is None else torch.stack([own[:, :, head] for head in heads], 2)
        other = [self.source.writer(writer, self._whole(own[:, :, 0])) for writer in writers]
        return torch.stack([self._in_order(value, window, own) for value in other], 2) - own

    def _in_order(self, value: Tensor, window: slice | Tensor, like: Tensor) -> Tensor:
        """Rows of a value [B, T, ...] in the order of positions, in which a function sees them: real tokens first."""
        cols = self.source.inputs.order[window, : like.shape[1]].to(value.device)
        value = value[window].to(like.dtype)
        return value.gather(1, cols[..., None].expand(*cols.shape, value.shape[-1]))

    def _whole(self, part: Tensor) -> Tensor:
        """A tensor of the shape of all rows and columns, whatever is run."""
        return part.new_zeros(()).expand(*self.source.inputs.ids.shape, part.shape[-1])


def _output(writer: Writer) -> Site:
    """The site from which a writer's output is made."""
    if writer.kind == "input":
        return Site("resid_pre", 0)
    return Site("mlp_out" if writer.kind == "mlp" else "z", writer.layer)
