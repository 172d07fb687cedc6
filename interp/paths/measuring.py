"""A metric measured on many worlds of one batch of prompts, and the result that is made of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from hooks import Inputs, Meter, MetricError, Model, Plan, Site, World, recompute, run_chunks
from interp.axes import Axis
from interp.evaluation import check_metrics
from interp.grids import Cell
from interp.metrics import Bound, Metric, call_each
from interp.paths.graph import Graph
from interp.paths.nodes import Edge
from interp.paths.pair import Pair
from interp.provenance import describe_run
from interp.results import STATUS, Result
from interp.sweeps import assemble, references, source_metrics


@dataclass(frozen=True, eq=False)
class Measure:
    """A metric, bound to the prompts of the run that is edited.

    Attributes:
        metric, bound: what is measured.
        pair: the run that is edited, and what it is edited with.
        others: what the metric compares with, on all rows.
        meter: counts the work.
    """

    metric: Metric
    bound: Bound
    pair: Pair
    others: list[Tensor]
    meter: Meter

    @classmethod
    def of(cls, metric: Metric, pair: Pair) -> Measure:
        """Bind a metric.

        Raises:
            MetricError: it is not one metric, it reads nothing, or it compares with a source that there is not.
        """
        check_metrics([metric])
        model, inputs = pair.model, pair.edited
        bound = metric.bind(model, inputs)
        if not bound.reads:
            raise MetricError(f"metric {metric.name!r} reads no site, so nothing that is done to the model moves it")
        (others,) = pair.once(
            "compared",
            lambda: references(model, [metric], [bound], pair.other, inputs, pair.seed, pair.executor),
            metric,
        )
        return cls(metric, bound, pair, others, Meter(model.architecture))

    @property
    def model(self) -> Model:
        """The model that is edited."""
        return self.pair.model

    @property
    def budget(self) -> int | None:
        """Bytes that the activations of a chunk may take."""
        return self.pair.budget

    @property
    def seed(self) -> int:
        """Of random interventions."""
        return self.pair.seed

    @property
    def inputs(self) -> Inputs:
        """The prompts of the run that is edited."""
        return self.pair.edited

    @property
    def plain(self) -> list[World]:
        """The edited run as it is, and computed again: what differs between the two is rounding."""
        return [World(self.inputs), World(self.inputs, Plan((recompute(Site("embed")),)))]

    def each(
        self, worlds: Sequence[World], names: Sequence[str] | None = None
    ) -> Iterator[tuple[tuple[int, ...], slice, np.ndarray, list[int]]]:
        """Yield of worlds that were run together, for some rows: which they are, the rows, the metric float64 [W, b],
        and the status of each.

        Raises:
            MetricError: the metric is nan; the message has the world's name, where `names` are given.
        """
        for chunk in run_chunks(
            self.model,
            worlds,
            self.bound.reads,
            executor=self.pair.executor,
            budget=self.budget,
            seed=self.seed,
            meter=self.meter,
        ):
            others, places = [other[chunk.rows] for other in self.others], chunk.indices
            where = partial(_named, names, places)
            found = call_each(self.bound, self.metric.name, chunk.rows, chunk.values, others, where)
            yield places, chunk.rows, self.numbers(found), [STATUS.index(status) for status in chunk.statuses]

    @staticmethod
    def numbers(measured: Tensor) -> np.ndarray:
        """Values of the metric, in float64."""
        return measured.detach().to("cpu", torch.float64).numpy()

    def all(self, worlds: Sequence[World]) -> tuple[np.ndarray, np.ndarray]:
        """The metric of each world, float64 [worlds, rows], and its status, int8 [worlds, rows]."""
        shape = (len(worlds), len(self.inputs))
        out, status = np.full(shape, np.nan), np.zeros(shape, np.int8)
        for places, rows, values, codes in self.each(worlds):
            at = np.asarray(places)
            out[at, rows], status[at, rows] = values, np.asarray(codes, np.int8)[:, None]
        return out, status

    def result(
        self,
        graph: Graph,
        values: np.ndarray,
        status: np.ndarray,
        edges: Sequence[Edge] | None,
        *,
        semantics: str = "edge",
        norms: str = "recompute",
    ) -> Result:
        """The result of what was measured.

        Args:
            graph: whose edges they are.
            values: float64 [2 + cells, row]: the metric of the two `plain` worlds, and of every cell.
            status: int8 [2 + cells, row].
            edges: what the cells are, on an axis "edge"; None for one cell and no axis.
            semantics, norms: what the result says of how it was made.
        """
        source = None
        if self.pair.other is not None:
            source = self.pair.once("source metric", self._source, self.metric)
        axes = () if edges is None else (Axis("edge", tuple(edge.name for edge in edges)),)
        cells = [None] if edges is None else _cells(graph, edges, self.inputs)
        result = assemble(values[None], status, axes, cells, [self.metric], False, source, self.inputs, self.model)
        told = describe_run(
            self.model, graph, None, None, self.pair.role, self.seed, inputs=self.inputs, source=self.pair.other
        )
        del told["intervention"]
        result.config.update(told)
        result.config.update(
            direction=self.pair.role, semantics=semantics, values=self.pair.source.kind, norms=norms,
            granularity=graph.granularity, query_heads=graph.query_heads,
            forward_equivalents=self.meter.forwards(self.tokens),
        )  # fmt: skip
        return result

    def _source(self) -> np.ndarray:
        other = self.pair.other
        assert other is not None
        told = (self.budget, self.seed, self.pair.executor)
        return source_metrics(self.model, [self.metric], other, [self.others], *told)

    @property
    def tokens(self) -> float:
        """Tokens of a prompt, the mean."""
        return float(self.inputs.lengths.double().mean())


def _cells(graph: Graph, edges: Sequence[Edge], inputs: Inputs) -> list[Cell]:
    """Which rows have each edge: a row that lacks a position of its span does not."""
    present = {span: graph.span(span, inputs)[1] for span in graph.span_names}
    return [Cell((i,), (), present[edge.span]) for i, edge in enumerate(edges)]


def _named(names: Sequence[str] | None, places: Sequence[int], world: int) -> str:
    return "" if names is None else f" in {names[places[world]]}"
