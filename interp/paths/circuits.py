"""A circuit: the edges of a graph that carry a behaviour, as a value that runs, compares, saves and draws itself."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hooks import PathError, Plan, World, table
from interp.metrics import Metric
from interp.paths import drawing
from interp.paths.files import load_circuit, save_circuit
from interp.paths.fronts import on_pair
from interp.paths.graph import Graph
from interp.paths.measuring import Measure
from interp.paths.nodes import Edge
from interp.paths.pair import Pair
from interp.paths.rewire import rewire
from interp.results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Circuit:
    """Some edges of a graph, immutable.

    Attributes:
        graph: the whole.
        members: bool [edges], which are in.
        scores: float64 [edges], by which they were chosen; nan where there is none.
        config: JSON data: how it was found.

    Raises:
        PathError: arrays of another size than the graph.
    """

    graph: Graph
    members: np.ndarray
    scores: np.ndarray
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        members, scores = np.array(self.members), np.array(self.scores, np.float64)
        if members.dtype != bool or members.shape != (len(self.graph),) or scores.shape != members.shape:
            raise PathError(
                f"a circuit of {self.graph} has bool members and scores [{len(self.graph)}], got {members.dtype} "
                f"{list(members.shape)} and {list(scores.shape)}"
            )
        members.flags.writeable = scores.flags.writeable = False
        object.__setattr__(self, "members", members)
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "config", dict(self.config))

    @classmethod
    def of(
        cls,
        graph: Graph,
        edges: Iterable[str | Edge] | str | Edge,
        scores: Result | np.ndarray | None = None,
        config: dict[str, Any] | None = None,
    ) -> Circuit:
        """A circuit of named edges.

        Args:
            graph: the whole.
            edges: names.
            scores: a result over every edge of the graph, or float [edges].
            config: how it was found.

        Raises:
            PathError: an edge that the graph lacks, or scores of other edges.
        """
        return cls(graph, graph.mask(edges), score_array(graph, scores), config or {})

    @classmethod
    def all(cls, graph: Graph) -> Circuit:
        """Every edge."""
        return cls(graph, np.ones(len(graph), bool), score_array(graph, None))

    @property
    def edges(self) -> tuple[str, ...]:
        """The names of its edges, in the graph's order."""
        return tuple(self.graph.edges[i] for i in np.flatnonzero(self.members))

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """The nodes that its edges touch, in the order of time."""
        touched = {edge.writer.name for edge in self._listed} | {n for edge in self._listed for n in self.targets(edge)}
        order = [*(writer.name for writer in self.graph.writers), "logits"]
        return tuple(name for name in order if name in touched)

    def targets(self, edge: Edge) -> tuple[str, ...]:
        """The nodes that an edge leads to: of the query heads that share a key/value head, those that are in."""
        nodes = self.graph.nodes_of(edge.reader)
        return tuple(name for name in nodes if name in self._active) or nodes

    @cached_property
    def _active(self) -> set[str]:
        """The nodes that write, or that read by a reader of their own."""
        alone = (self.graph.nodes_of(edge.reader) for edge in self._listed)
        return {edge.writer.name for edge in self._listed} | {nodes[0] for nodes in alone if len(nodes) == 1}

    @property
    def _listed(self) -> list[Edge]:
        return [self.graph.listed[i] for i in np.flatnonzero(self.members)]

    def __len__(self) -> int:
        return int(self.members.sum())

    def __contains__(self, edge: str | Edge) -> bool:
        return bool(self.members[self.graph.index[self.graph.edge(edge).name]])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Circuit):
            return NotImplemented
        return self.graph.edges == other.graph.edges and bool((self.members == other.members).all())

    def __hash__(self) -> int:
        return hash(self.members.tobytes())

    def __repr__(self) -> str:
        return f"Circuit({len(self)} of {len(self.graph)} edges, {len(self.nodes)} nodes)"

    def without(self, edges: Iterable[str | Edge] | str | Edge = (), node: str | None = None) -> Circuit:
        """The circuit less some edges, or less every edge of a node.

        The keys and values that a head shares with others stay, since those read them.

        Raises:
            PathError: an edge or a node that the graph lacks.
        """
        members = self.members & ~self.graph.mask(edges)
        if node is not None:
            if node != "logits":
                self.graph.writer(node)
            touches = [
                edge.writer.name == node or self.graph.nodes_of(edge.reader) == (node,) for edge in self.graph.listed
            ]
            members &= ~np.array(touches)
        return Circuit(self.graph, members, self.scores, self.config)

    def pruned(self) -> Circuit:
        """The circuit less its dangling edges: those of nodes that no edge reaches, or that reach no logits.

        A node that is reached at one span counts as reached: attention carries from position to position.
        """
        members = self.members.copy()
        listed = self.graph.listed
        feeds = {reader: set(self.graph.feeds(reader)) for reader in self.graph.readers}
        while True:
            mine = [listed[i] for i in np.flatnonzero(members)]
            read = {writer for edge in mine for writer in feeds[edge.reader]} | set(self.graph.writers[:1])
            used = {edge.writer for edge in mine}
            kept = np.array(
                [
                    inside and edge.writer in read and (edge.reader.kind == "logits" or bool(feeds[edge.reader] & used))
                    for inside, edge in zip(members, listed, strict=True)
                ]
            )
            if (kept == members).all():
                return Circuit(self.graph, members, self.scores, self.config)
            members = kept

    def plan(self, pair: Pair) -> Plan:
        """The plan that runs it on the pair's clean prompts: every edge outside it carries the other values."""
        return rewire(self.graph, ~self.members, pair.noising().current().source, pair.model)

    def compare(self, other: Circuit) -> dict[str, Any]:
        """Edges in common and apart, and their Jaccard overlap.

        Raises:
            PathError: circuits of different graphs.
        """
        if self.graph.edges != other.graph.edges:
            raise PathError(f"circuits of different graphs cannot be compared: {self.graph} and {other.graph}")
        both, either = self.members & other.members, self.members | other.members
        name = np.array(self.graph.edges, dtype=object)
        return {
            "common": tuple(name[both]),
            "only_first": tuple(name[self.members & ~other.members]),
            "only_second": tuple(name[other.members & ~self.members]),
            "jaccard": float(both.sum() / either.sum()) if either.any() else 1.0,
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as JSON; see `interp.paths.files`."""
        return save_circuit(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Circuit:
        """Read what `save` wrote.

        Raises:
            PathError: the file is not a saved circuit.
        """
        return Circuit(*load_circuit(path))

    def draw(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Draw it as a layered graph; see `interp.paths.drawing.draw`."""
        return drawing.draw(self, ax, **options)

    def figure(self, **options: Any) -> Figure:
        """A figure of it, sized to its layers and heads."""
        return drawing.figure(self, **options)

    def _repr_html_(self) -> str:
        strongest = sorted(self._listed, key=lambda e: -abs(np.nan_to_num(self.scores[self.graph.index[e.name]])))[:5]
        scores = [self.scores[self.graph.index[edge.name]] for edge in strongest]
        rows = [(e.name, "" if np.isnan(s) else f"{s:+.4g}") for e, s in zip(strongest, scores, strict=True)]
        return table(("edge", "score"), rows, caption=repr(self)) + drawing.svg(self)


def score_array(graph: Graph, scores: Result | np.ndarray | None) -> np.ndarray:
    """Mean scores float64 [edges] of a result over a graph's edges; nan without one.

    Raises:
        PathError: the result is about other edges, or the array of another size.
    """
    if scores is None:
        return np.full(len(graph), np.nan)
    if not isinstance(scores, Result):
        try:
            array = np.asarray(scores, np.float64)
        except (TypeError, ValueError):
            raise PathError(f"scores are a result, or float [{len(graph)}], not {type(scores).__name__}") from None
        if array.shape != (len(graph),):
            raise PathError(f"scores of {graph} are float [{len(graph)}], got {list(array.shape)}")
        return array
    if len(scores.axes) != 1 or scores.axes[0].name != "edge" or scores.several:
        raise PathError("scores are a result with one axis, 'edge', and one metric, as edge_scores gives")
    names = scores.axes[0].values
    if set(names) != set(graph.edges):
        raise PathError(f"the scores are of {len(names)} edges, the graph has {len(graph)}: score all of this graph's")
    mean = scores.mean()
    return np.array([mean[i] for i in np.argsort([graph.index[name] for name in names])])


def check_size(graph: Graph, k: int, least: int = 0) -> None:
    """Raise PathError unless k is a number of edges that the graph has, `least` or more."""
    if not isinstance(k, (int, np.integer)) or isinstance(k, bool) or not least <= k <= len(graph):
        raise PathError(f"k is a number of edges, {least} to {len(graph)}, not {k!r}")


@on_pair(first=1, directed=False)
@torch.no_grad()
def circuit_metric(
    pair: Pair,
    circuits: Circuit | Sequence[Circuit] | np.ndarray | torch.Tensor,
    *,
    metric: Metric,
) -> np.ndarray:
    """The metric of the model reduced to circuits: on clean prompts, every edge outside carries other values.

    Args:
        pair: the two runs, of which the clean one is edited; or a model in its place, clean and corrupt prompts after
            the circuits, and the other attributes of `Pair` but the direction by name.
        circuits: one, or several; or bool [edges] or [n, edges] over the edges of ``Graph.of(model)``.
        metric: what is measured.

    Returns:
        float64 [rows], or [circuits, rows].

    Raises:
        PathError: a circuit of another model's graph.
    """
    if isinstance(circuits, (np.ndarray, torch.Tensor)):
        graph, masks = Graph.of(pair.model), np.array(circuits.tolist())
        made = [Circuit(graph, mask, score_array(graph, None)) for mask in np.atleast_2d(masks)]
        circuits = made[0] if masks.ndim == 1 else made
    measure = Measure.of(metric, pair)
    found = run_circuits(measure, [circuits] if isinstance(circuits, Circuit) else circuits)
    return found[0] if isinstance(circuits, Circuit) else found


@torch.no_grad()
def run_circuits(measure: Measure, circuits: Sequence[Circuit]) -> np.ndarray:
    """The metric of each circuit, float64 [circuits, rows]: every edge outside it carries the source's values."""
    for circuit in circuits if isinstance(circuits, (list, tuple)) else [circuits]:
        if not isinstance(circuit, Circuit):
            raise PathError(f"expected circuits, as Circuit.of(graph, edges), or bool [n, edges], not {circuit!r}")
    source = measure.pair.source
    plans = [rewire(circuit.graph, ~circuit.members, source, measure.model) for circuit in circuits]
    return measure.all([World(measure.inputs, plan) for plan in plans])[0]
