"""How good a circuit is: faithful, complete, minimal, stable, and like a known one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hooks import PathError, World, choice
from interp.metrics import Metric
from interp.paths.circuits import Circuit, check_size, run_circuits, score_array
from interp.paths.draws import lots
from interp.paths.fronts import on_pair
from interp.paths.graph import Graph
from interp.paths.measuring import Measure
from interp.paths.pair import Pair
from interp.paths.rewire import rewire
from interp.paths.search import greedy
from interp.paths.sources import Source
from interp.results import Result
from interp.stats import row_mean

SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of edges at which the MIB circuit track measures faithfulness (Mueller et al. 2025)."""
TOLERANCE = 0.1
"""A row's own share is masked where its difference is below this share of the mean: as in `Result.normalized`."""
Choose = Callable[[Any, Graph, int], Circuit]


@dataclass(frozen=True)
class Curve:
    """Faithfulness by circuit size.

    Attributes:
        sizes: shares of the graph's edges.
        edges: how many edges each circuit has, after pruning.
        faithfulness: f = (m(C) - m(empty)) / (m(N) - m(empty)).
        cpr: area under f over the sizes (trapezoid, linear axis, from the smallest size to the largest).
        cmd: area of |1 - f|, likewise.
        rows: f of each row, [sizes][rows], where it was asked for; nan where the row's own m(N) - m(empty) is small.
    """

    sizes: tuple[float, ...]
    edges: tuple[int, ...]
    faithfulness: tuple[float, ...]
    cpr: float
    cmd: float
    rows: tuple[tuple[float, ...], ...] | None = None


@on_pair(directed=False)
def faithfulness(
    pair: Pair,
    scores: Result | np.ndarray,
    graph: Graph,
    *,
    metric: Metric,
    sizes: Sequence[float] = SIZES,
    choose: Choose = greedy,
    per_row: bool = False,
) -> Curve:
    """Measure how much of the behaviour circuits of growing size keep.

    m(N) is the metric of the whole model on clean prompts, m(empty) with every edge replaced, m(C) with those outside C
    replaced. The ratio is of means over rows. CPR and CMD are those of the MIB circuit track (Mueller et al. 2025).

    Args:
        pair: the two runs, of which the clean one is edited; or a model, clean and corrupt prompts in its place, as in
            `edge_sweep`.
        metric: what is measured.
        scores: of every edge.
        graph: the graph.
        sizes: shares of its edges, ascending, at most 1.
        choose: `greedy` or `top_k`, or a function of yours of scores, graph and k.
        per_row: give the curve of each row too. A row is masked with nan where |m(N) - m(empty)| is below a tenth of
            its mean, or within noise.

    Raises:
        PathError: sizes out of range, two runs that do not differ beyond noise in the metric, or a `choose` that gives
            no circuits of the graph.
    """
    if list(sizes) != sorted(set(sizes)) or not sizes or not 0 <= sizes[0] <= sizes[-1] <= 1:
        raise PathError(f"sizes are ascending shares of the edges, 0 to 1, not {tuple(sizes)}")
    circuits = [choose(scores, graph, round(size * len(graph))) for size in sizes]
    if any(not isinstance(c, Circuit) or (c.graph is not graph and c.graph.edges != graph.edges) for c in circuits):
        raise PathError(f"choose gives circuits of {graph}, not {circuits[0]!r}")
    shares, rows = _faithful(Measure.of(metric, pair), circuits, graph)
    return Curve(
        sizes=tuple(float(s) for s in sizes),
        edges=tuple(len(c) for c in circuits),
        faithfulness=tuple(float(f) for f in shares),
        cpr=_area(shares, sizes),
        cmd=_area(np.abs(1 - shares), sizes),
        rows=tuple(map(tuple, rows.tolist())) if per_row else None,
    )


def _area(values: np.ndarray, sizes: Sequence[float]) -> float:
    return float(((values[1:] + values[:-1]) / 2 * np.diff(sizes)).sum())


def _faithful(measure: Measure, circuits: Sequence[Circuit], graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """(m(C) - m(empty)) / (m(N) - m(empty)) of circuits: of the means over rows, and of each row, nan where noise."""
    nothing, everything = Circuit.all(graph).without(graph.edges), Circuit.all(graph)
    empty, full, *found = run_circuits(measure, [nothing, everything, *circuits])
    difference, floor = full - empty, _noise(measure, graph, full)
    whole = difference.mean()
    if not abs(whole) > floor:
        raise PathError(
            f"the two runs do not differ in {measure.metric.name!r} on average: it is {full.mean():.4g} for the whole "
            f"model and {empty.mean():.4g} with every edge replaced, apart by {abs(whole):.1e}, within the noise of "
            f"{floor:.1e}: no difference that a circuit could keep"
        )
    kept = np.stack(found) - empty
    sizes = np.abs(difference)
    large = (sizes >= TOLERANCE * sizes.mean()) & (sizes > floor)
    return kept.mean(1) / whole, kept / np.where(large, difference, np.nan)


def _noise(measure: Measure, graph: Graph, full: np.ndarray) -> float:
    """The largest change of the metric where every edge is replaced by what it carries anyway: rounding."""
    itself = Source("patch", measure.inputs, run=measure.pair.base)
    same = World(measure.inputs, rewire(graph, np.ones(len(graph), bool), itself, measure.model))
    again = measure.all([same])[0][0]
    return float(max(np.abs(again - full).max(), torch.finfo(measure.model.dtype).eps * np.abs(full).max()))


@on_pair(first=1, directed=False)
def completeness(
    pair: Pair,
    circuit: Circuit,
    *,
    metric: Metric,
    subsets: int = 20,
    size: int = 3,
) -> dict[str, Any]:
    """Whether a circuit fails as the model does when parts of both are taken out (Wang et al. 2022, section 4).

    Args:
        pair, metric: as in `circuit_metric`; the pair's seed is of the sets too.
        circuit: the circuit C.
        subsets: how many random sets K of its nodes are drawn.
        size: largest number of nodes in K.

    Returns:
        "subsets" (names), "circuit" m(C without K) and "model" m(N without K), each a list, and "score", the largest
        difference of the two as a share of m(N) - m(empty): 0 is complete.

    Raises:
        PathError: the circuit has no nodes but input and logits, no set of them is asked for, or the two runs do not
            differ beyond noise in the metric.
    """
    inner = _inner(circuit)
    if subsets < 1 or size < 1:
        raise PathError(f"completeness takes out one or more sets of one or more nodes, not {subsets} of up to {size}")
    sets = [_drawn(inner, 1 + int(choice(min(size, len(inner)), pair.seed, n)), pair.seed, n) for n in range(subsets)]
    graph = circuit.graph
    small, large = ([_without(whole, names) for names in sets] for whole in (circuit, Circuit.all(graph)))
    share, _ = _faithful(Measure.of(metric, pair), [*small, *large], graph)
    mine, theirs = share[: len(sets)], share[len(sets) :]
    return {
        "subsets": sets,
        "circuit": mine.tolist(),
        "model": theirs.tolist(),
        "score": float(np.abs(mine - theirs).max()),
    }


@on_pair(first=1, directed=False)
def minimality(pair: Pair, circuit: Circuit, *, metric: Metric) -> dict[str, float]:
    """What each node of a circuit is good for: the share of the behaviour that the circuit loses without it.

    Near 0 for a node that the circuit could do without (Wang et al. 2022, section 4, with K empty). Arguments as in
    `completeness`; input and logits are not nodes to be taken out.

    Raises:
        PathError: the circuit has no nodes but input and logits, or the two runs do not differ beyond noise.
    """
    inner = _inner(circuit)
    smaller = [circuit.without(node=name) for name in inner]
    share, _ = _faithful(Measure.of(metric, pair), [circuit, *smaller], circuit.graph)
    return {name: float(share[0] - found) for name, found in zip(inner, share[1:], strict=True)}


def _inner(circuit: Circuit) -> list[str]:
    inner = [name for name in circuit.nodes if name not in ("input", "logits")]
    if not inner:
        raise PathError("nodes are taken out of a circuit, and this one has none but input and logits")
    return inner


def _drawn(nodes: Sequence[str], size: int, *counters: int) -> list[str]:
    """A random set of nodes, by name."""
    return sorted(nodes[int(i)] for i in np.argsort(lots(nodes, *counters), kind="stable")[:size])


def _without(circuit: Circuit, nodes: Sequence[str]) -> Circuit:
    for node in nodes:
        circuit = circuit.without(node=node)
    return circuit


def auroc(scores: Result | np.ndarray, known: Circuit) -> float:
    """How well |score| tells the edges of a known circuit from the others: 1 is perfect, 0.5 is chance.

    The probability that an edge inside scores above one outside, ties counting half.

    Raises:
        PathError: the circuit has every edge, or none; or an edge has no score.
    """
    inside = known.members
    if inside.all() or not inside.any():
        raise PathError("an AUROC needs edges inside and outside the known circuit")
    sizes = np.abs(score_array(known.graph, scores))
    if np.isnan(sizes).any():
        raise PathError(f"{int(np.isnan(sizes).sum())} of {len(sizes)} edges have no score")
    ranks = _ranks(sizes)
    n, m = int(inside.sum()), int((~inside).sum())
    return float((ranks[inside].sum() - n * (n + 1) / 2) / (n * m))


def stability(one: Result | np.ndarray, two: Result | np.ndarray, graph: Graph, k: int) -> dict[str, float]:
    """How much two sets of scores agree: of two seeds, two halves of the data, or with and without input noise.

    Edges that have no score in one of them (no prompt has their position, say) are left out.

    Returns:
        "spearman", the rank correlation of |score| over all edges, nan where one of the two scores all edges alike; and
        "jaccard", the overlap of the k largest.

    Raises:
        PathError: k out of range, or scores of other edges.
    """
    check_size(graph, k, 1)
    a, b = (np.abs(score_array(graph, scores)) for scores in (one, two))
    both = ~(np.isnan(a) | np.isnan(b))
    a, b = a[both], b[both]
    if k > len(a):
        raise PathError(f"{len(a)} edges have a score in both, so {k} cannot be compared")
    tops = [set(np.argsort(-x, kind="stable")[:k].tolist()) for x in (a, b)]
    one_rank, two_rank = (x - x.mean() for x in (_ranks(a), _ranks(b)))
    spread = float(np.sqrt((one_rank**2).sum() * (two_rank**2).sum()))
    return {
        "spearman": float((one_rank * two_rank).sum() / spread) if spread else float("nan"),
        "jaccard": len(tops[0] & tops[1]) / len(tops[0] | tops[1]),
    }


def split_half(scores: Result, graph: Graph, k: int, *, draws: int = 20, seed: int = 0) -> dict[str, Any]:
    """`stability` between two random halves of the rows.

    Returns:
        for "spearman" and "jaccard" the "low" quartile, "median" and "high" quartile over draws.

    Raises:
        PathError: fewer than two rows or one draw, k out of range, or scores of other edges or without rows.
    """
    if not isinstance(scores, Result):
        raise PathError(f"halves are of a result's rows, and {type(scores).__name__} has none")
    rows = len(scores.rows)
    if rows < 2 or draws < 1:
        raise PathError(f"two halves need at least two rows and one draw, not {rows} and {draws}")
    check_size(graph, k, 1)
    score_array(graph, scores)  # which says so, where they are of other edges
    draw = np.random.default_rng(seed)
    found: list[dict[str, float]] = []
    place = [graph.index[name] for name in scores.axes[0].values]
    for _ in range(draws):
        order = draw.permutation(rows)
        halves = []
        for part in (order[: rows // 2], order[rows // 2 :]):
            mean = np.full(len(graph), np.nan)
            mean[place] = row_mean(scores.effect[:, part])
            halves.append(mean)
        found.append(stability(halves[0], halves[1], graph, k))
    told = {}
    for name in ("spearman", "jaccard"):
        low, median, high = np.quantile([each[name] for each in found], [0.25, 0.5, 0.75]).tolist()
        told[name] = {"low": low, "median": median, "high": high}
    return told


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties sharing their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[inverse]
