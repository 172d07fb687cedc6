"""Finding circuits: by score, from the logits down, by removing what can be spared, and by significance."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from hooks import PathError, World
from interp.metrics import Metric, kl
from interp.paths.circuits import Circuit, check_size, run_circuits, score_array
from interp.paths.fronts import on_pair
from interp.paths.graph import Graph, graph_of
from interp.paths.measuring import Measure
from interp.paths.pair import Pair
from interp.progress import tqdm
from interp.results import Result


def top_k(scores: Result | np.ndarray, graph: Graph, k: int, *, absolute: bool = True, prune: bool = True) -> Circuit:
    """The k edges of the highest (absolute) mean score.

    Args:
        scores: of every edge: a result, or float [edges].
        graph: the graph.
        k: how many.
        absolute: by size, or by signed value.
        prune: leave out dangling edges, so that fewer than k may be left.

    Raises:
        PathError: k out of range, scores of other edges, or edges without a score.
    """
    mean = _scores(scores, graph, k)
    order = np.argsort(-(np.abs(mean) if absolute else mean), kind="stable")[:k]
    members = np.zeros(len(graph), bool)
    members[order] = True
    found = Circuit(graph, members, mean, {"found by": "top_k", "k": k, "absolute": absolute, **_told(scores)})
    return found.pruned() if prune else found


def greedy(scores: Result | np.ndarray, graph: Graph, k: int, *, absolute: bool = True, prune: bool = True) -> Circuit:
    """k edges, chosen from the logits downwards: at each step the best edge into a node that is already in.

    Of edges that score alike, the first in the graph's order.

    Args and raises: as `top_k`. (Hanna et al. 2024, section 3.)
    """
    mean = _scores(scores, graph, k)
    into: dict[str, list[int]] = {}
    for i, edge in enumerate(graph.listed):
        for writer in graph.feeds(edge.reader):
            into.setdefault(writer.name, []).append(i)
        if edge.reader.kind == "logits":
            into.setdefault("logits", []).append(i)
    members, inside = np.zeros(len(graph), bool), {"logits"}
    queue: list[tuple[float, int]] = []

    def offer(node: str) -> None:
        for i in into.get(node, []):
            heapq.heappush(queue, (-(abs(mean[i]) if absolute else mean[i]), i))

    offer("logits")
    while queue and members.sum() < k:
        _, i = heapq.heappop(queue)
        if members[i]:  # offered by two heads of one key/value head
            continue
        members[i] = True
        writer = graph.listed[i].writer.name
        if writer not in inside:
            inside.add(writer)
            offer(writer)
    found = Circuit(graph, members, mean, {"found by": "greedy", "k": k, "absolute": absolute, **_told(scores)})
    return found.pruned() if prune else found


@on_pair(directed=False)
def acdc(
    pair: Pair,
    *,
    tau: float,
    metric: Metric | None = None,
    graph: Graph | None = None,
    lower_is_better: bool = True,
    batch: int = 32,
    progress: bool | None = None,
) -> Circuit:
    """Remove every edge that can be spared, from the logits down (ACDC, Conmy et al. 2023, algorithm 1).

    In reverse topological order, an edge is removed where the metric's mean rises by less than `tau`. Several removals
    are tried at once, each on top of those before it, as if all of those were removed: up to `batch`, fewer after one
    was refused. The decisions are those of the serial algorithm, which `batch=1` is.

    Args:
        pair: the two runs, of which the clean one is edited; or a model, clean and corrupt prompts in its place, as in
            `edge_sweep`.
        graph, progress: as in `edge_sweep`.
        tau: largest rise, in the metric's unit.
        metric: default the KL divergence from the whole model on the clean prompts.
        lower_is_better: whether a rise is what removal costs; False for a metric such as a logit difference.
        batch: how many removals are tried at once, at most.

    Returns:
        The circuit, whose scores are the rise that each edge's removal made when it was tried.

    Raises:
        PathError: tau or batch out of range, or a graph of another model.
    """
    if not isinstance(batch, int) or isinstance(batch, bool) or not batch >= 1 or not tau >= 0:
        raise PathError(f"tau is at least 0, and batch a whole number, at least 1; got {tau!r} and {batch!r}")
    if metric is None and not lower_is_better:
        raise PathError("a rise of the KL divergence is what a removal costs: lower_is_better=False goes with a metric")
    graph = graph_of(pair.model, graph)
    measured = kl(World(pair.clean)) if metric is None else metric
    bound = Measure.of(measured, pair)
    sign = 1.0 if lower_is_better else -1.0

    def measure(masks: Sequence[np.ndarray]) -> np.ndarray:
        nothing = np.full(len(graph), np.nan)
        return sign * run_circuits(bound, [Circuit(graph, mask, nothing) for mask in masks]).mean(1)

    members, rises = np.ones(len(graph), bool), np.full(len(graph), np.nan)
    now = measure([members])[0]
    order = removal_order(graph)
    at, tried, size = 0, 1, 1
    with tqdm(total=len(order), disable=None if progress is None else not progress, unit="edge", leave=False) as bar:
        while at < len(order):
            some = order[at : at + size]
            masks, mask = [], members
            for i in some:
                mask = mask.copy()
                mask[i] = False
                masks.append(mask)
            found = measure(masks)
            tried += len(some)
            size = min(batch, 2 * size)
            for i, mask, value in zip(some, masks, found, strict=True):
                at += 1
                bar.update()
                rises[i] = value - now
                if not rises[i] < tau:
                    # It stays: the masks after it lack an edge that is in. Guess as far as this guess went.
                    size = max(1, some.index(i))
                    break
                members, now = mask, value
    told = {
        "found by": "acdc",
        "tau": tau,
        "metric": measured.name,
        "values": pair.values,
        "batch": batch,
        "tried": tried,
    }
    return Circuit(graph, members, rises, told)


def removal_order(graph: Graph) -> list[int]:
    """The edges in the order in which ACDC tries them: readers from the logits down, the latest writer first."""
    return sorted(range(len(graph)), key=lambda i: (-graph.listed[i].reader.time, -graph.listed[i].writer.time, -i))


def causal_graph(
    effects: Result, graph: Graph, *, q: float = 0.05, share: float = 0.0, n_perm: int = 10_000, seed: int = 0
) -> Circuit:
    """The causal explanatory graph: the edges whose effect is both significant across examples and large.

    Significance is of the mean paired difference, by sign-flip permutation, with Benjamini-Hochberg across edges; size
    is |mean effect| against the largest (Ahmad et al. 2024).

    Args:
        effects: exact effects, or scores, of every edge.
        graph: the graph.
        q: false discovery rate.
        share: smallest |mean effect|, as a share of the largest.
        n_perm: permutations; raise it above edges / q where there are many rows.
        seed: of the permutations.

    Raises:
        PathError: share out of range, or effects of other edges.
    """
    if not 0 <= share <= 1:
        raise PathError(f"share is of the largest effect, 0 to 1, not {share!r}")
    if not isinstance(effects, Result):
        raise PathError(f"significance is across a result's rows, and {type(effects).__name__} has none")
    mean = score_array(graph, effects)
    significant = effects.significant(q, n_perm, seed) & effects.above_noise()
    place = [graph.index[name] for name in effects.axes[0].values]
    found = np.zeros(len(graph), bool)
    found[place] = significant
    largest = np.nanmax(np.abs(mean), initial=0.0)  # an edge that no row has neither is in nor says what is large
    members = found & (np.abs(mean) >= share * largest) & (mean != 0)
    return Circuit(graph, members, mean, {"found by": "causal_graph", "q": q, "share": share, **_told(effects)})


def _scores(scores: Result | np.ndarray, graph: Graph, k: int) -> np.ndarray:
    check_size(graph, k)
    mean = score_array(graph, scores)
    if np.isnan(mean).any():
        missing = np.flatnonzero(np.isnan(mean))
        raise PathError(
            f"{len(missing)} of {len(mean)} edges have no score, {graph.edges[missing[0]]!r} for one: none can be "
            "chosen before it"
        )
    return mean


def _told(scores: Result | np.ndarray) -> dict[str, str]:
    known, config = ("method", "semantics", "values", "direction"), getattr(scores, "config", {})
    return {name: config[name] for name in known if name in config}
