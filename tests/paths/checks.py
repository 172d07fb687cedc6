"""Slow and obvious versions of what is found and measured, and checks against them that raise AssertionError."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

import interp as ip
from interp import paths
from interp.axes import Axis
from tests.paths import oracle, scoring
from tests.paths.cases import CLOSE, MEASURE, METRIC, Case, at_last, case

TAU = 0.02  # of ACDC: about half of the edges of a tiny model stay


# Made-up scores


def made_up(graph: paths.Graph, effect: np.ndarray, floor: float = 0.0) -> ip.Result:
    """A result over a graph's edges, effects [edge, row]."""
    rows = effect.shape[1]
    return ip.Result(
        effect, (Axis("edge", graph.edges),), ("m",), False, np.zeros(rows), None, np.zeros(len(graph), np.int8),
        np.array(floor), tuple(f"row {r}" for r in range(rows)), {"method": "made up", "values": "patch"},
    )  # fmt: skip


def random_scores(family: str, seed: int = 0, rows: int = 3) -> tuple[ip.Result, paths.Graph]:
    graph = paths.Graph.of(case(family).model)
    return made_up(graph, np.random.default_rng(seed).standard_normal((len(graph), rows))), graph


# Nodes, by the names of edges


def ends(edge: str) -> tuple[str, str]:
    writer, reader = edge.partition("@")[0].split("->")
    return writer, reader


def fed(reader: str, group: int = 1) -> list[str]:
    """The writers that a reader's input makes, `group` query heads to a key/value head."""
    node, _, letter = reader.rstrip(">").partition("<")
    if node == "logits" or not letter or letter == "q":
        return [node]
    layer, head = node.split(".h")
    return [f"{layer}.h{h}" for h in range(int(head) * group, (int(head) + 1) * group)]


def time(node: str, parallel: bool = False) -> float:
    """When a node reads."""
    if node == "logits":
        return float("inf")
    layer = int(node[1:].split(".")[0])
    return 2 * layer + (node.startswith("m") and not parallel)


def written_at(node: str) -> float:
    """When a node writes."""
    return -1.0 if node == "input" else 2 * int(node[1:].split(".")[0]) + node.startswith("m")


def on_a_way(edges: Sequence[str], group: int = 1) -> set[str]:
    """The edges that lie on some way from the input to the logits, every one of which is walked."""
    found: set[str] = set()

    def walk(node: str, way: tuple[str, ...]) -> None:
        if node == "logits":
            found.update(way)
            return
        for edge in edges:
            writer, reader = ends(edge)
            if writer == node:
                for following in fed(reader, group):
                    walk(following, (*way, edge))

    walk("input", ())
    return found


# Circuits


def circuits_run_as_written(given: Case, graph: paths.Graph, spans: oracle.Spans | None = None, seed: int = 0) -> None:
    """The metric of random circuits is that of the clean run in which every edge outside carries the corrupt values."""
    generator = torch.Generator().manual_seed(seed)
    masks = (torch.rand(3, len(graph), generator=generator) < torch.tensor([[0.15], [0.5], [0.85]])).numpy()
    circuits = [paths.Circuit.of(graph, [e for e, inside in zip(graph.edges, m, strict=True) if inside]) for m in masks]
    found = paths.circuit_metric(given.model, circuits, *given.pair("left"), metric=METRIC)
    run, copied = scoring.pair(given, "noising")
    expected = []
    for mask in masks:
        outside = [edge for edge, inside in zip(graph.edges, mask, strict=True) if not inside]
        if graph.granularity == "blocks":
            outside = [e for edge in outside for e in oracle.block_edge(edge, given.module)]
        with torch.no_grad():
            logits = oracle.edge_set(given.module, run, copied, outside, spans=spans)
        expected.append(MEASURE(logits, run.mask).numpy())
    np.testing.assert_allclose(found, np.stack(expected), **CLOSE)
    assert np.ptp(expected, 0).min() > 1e-3


def pruning_leaves_the_ways_through(graph: paths.Graph, edges: Sequence[str], group: int = 1) -> None:
    """A pruned circuit has the edges that lie on a way from the input to the logits."""
    assert set(paths.Circuit.of(graph, edges).pruned().edges) == on_a_way(edges, group)


# Search


def greedy_slowly(mean: dict[str, float], k: int, absolute: bool, group: int = 1) -> set[str]:
    """At each step, of all edges into a node that is in, the best."""
    inside, chosen = {"logits"}, set()
    for _ in range(k):
        offered = [e for e in mean if e not in chosen and inside & set(fed(ends(e)[1], group))]
        if not offered:
            break
        best = max(offered, key=lambda e: abs(mean[e]) if absolute else mean[e])
        chosen.add(best)
        inside.add(ends(best)[0])
    return chosen


def greedy_is_the_slow_one(scores: ip.Result, graph: paths.Graph, k: int, absolute: bool, group: int = 1) -> None:
    mean = dict(zip(scores.axes[0].values, scores.mean(), strict=True))
    found = paths.greedy(scores, graph, k, absolute=absolute, prune=False)
    assert set(found.edges) == greedy_slowly({name: mean[name] for name in graph.edges}, k, absolute, group)


def divergence(given: Case):
    """KL of the clean run's next token from another's, as ACDC has it by default."""
    clean = given.prompts("clean")
    with torch.no_grad():
        theirs = at_last(oracle.forward(given.module, clean).logits, clean.mask).log_softmax(-1)
    return lambda logits, mask: (theirs.exp() * (theirs - at_last(logits, mask).log_softmax(-1))).sum(-1)


def acdc_slowly(given: Case, tau: float, measure, sign: float = 1.0) -> tuple[set[str], dict[str, float]]:
    """One edge after another, readers from the logits down and the latest writer first: what stays, and the rises."""
    run, copied = scoring.pair(given, "noising")
    parallel = given.model.architecture.blocks[0].parallel
    number = {edge: i for i, edge in enumerate(paths.Graph.of(given.model).edges)}
    order = sorted(
        given.edges, key=lambda e: (time(ends(e)[1], parallel), written_at(ends(e)[0]), number[e]), reverse=True
    )

    def value(removed: Sequence[str]) -> float:
        with torch.no_grad():
            return sign * float(measure(oracle.edge_set(given.module, run, copied, removed), run.mask).mean())

    removed: list[str] = []
    rises: dict[str, float] = {}
    now = value(removed)
    for edge in order:
        then = value([*removed, edge])
        rises[edge] = then - now
        if rises[edge] < tau:
            removed.append(edge)
            now = then
    return set(given.edges) - set(removed), rises


@functools.cache
def serial_acdc(given: Case, tau: float) -> tuple[set[str], dict[str, float]]:
    """`acdc_slowly` by divergence from the clean run, once for all tests that compare with it."""
    return acdc_slowly(given, tau, divergence(given))


def acdc_is_the_serial_one(given: Case, tau: float, expected: tuple[set[str], dict[str, float]], **options) -> None:
    """The same edges stay, each for the same rise."""
    kept, rises = expected
    found = paths.acdc(given.model, *given.pair("left"), tau=tau, progress=False, **options)
    assert set(found.edges) == kept
    np.testing.assert_allclose(found.scores, [rises[edge] for edge in found.graph.edges], **CLOSE)
    assert min(abs(rise - tau) for rise in rises.values()) > 1e-9  # no decision hangs on rounding
    assert 0 < len(kept) < len(rises)


# Quality


def roc_area(scores: Sequence[float], inside: Sequence[bool]) -> float:
    """The share of pairs of an edge inside and one outside in which the first has the larger |score|."""
    wins = [
        (abs(a) > abs(b)) + 0.5 * (abs(a) == abs(b))
        for a, mine in zip(scores, inside, strict=True)
        for b, theirs in zip(scores, inside, strict=True)
        if mine and not theirs
    ]
    return sum(wins) / len(wins)


def roc_area_is_that_of_all_pairs(scores: np.ndarray, known: paths.Circuit) -> None:
    assert abs(paths.auroc(scores, known) - roc_area(scores.tolist(), known.members.tolist())) < 1e-12


# Scores


def scores_are_those_defined(given: Case, expected: np.ndarray, **options) -> None:
    """Every edge has the score of the definition, and none is zero."""
    result = paths.edge_scores(given.model, *given.pair("left"), metric=METRIC, **options)
    scoring.agrees(result, given.edges, expected)


def verified_scores_are_exact(given: Case, exact: ip.Result, **options) -> None:
    """Where an adaptive score was verified or sampled it is the exact effect."""
    found = paths.edge_scores(given.model, *given.pair(), metric=METRIC, method="adaptive", **options)
    about, names = found.config["adaptive"], found.axes[0].values
    at = [names.index(name) for name in about["verified"] + about["sampled"]]
    assert len(at) > 2
    np.testing.assert_allclose(found.effect[at], exact.effect[at], **CLOSE)
    assert np.abs(exact.effect[at]).max() > 1e-3
