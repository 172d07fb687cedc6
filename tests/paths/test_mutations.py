"""The checks can fail: each rejects an implementation that is wrong in one way, and passes the one there is."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from interp import paths
from interp.paths import adaptive, circuits, quality, scores, search
from interp.paths.circuits import Circuit
from interp.paths.graph import Graph
from interp.paths.pair import Pair
from interp.paths.rewire import rewire
from tests.paths import checks, scoring
from tests.paths.cases import METRIC, case
from tests.paths.checks import TAU, random_scores

Mutation = Callable[[pytest.MonkeyPatch], None]
GIVEN, SHORT = case("gpt2"), case("gpt2", (4, 5))
GRAPH = Graph.of(GIVEN.model)


def caught(check: Callable[[], None], mutate: Mutation) -> None:
    """The check passes as things are, and raises AssertionError once they are mutated."""
    check()
    with pytest.MonkeyPatch.context() as patched:
        mutate(patched)
        with pytest.raises(AssertionError):
            check()
    check()


# Scores


def nothing(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(scores, "_scores", lambda graph, pair, *_: np.zeros((len(graph), len(pair.base.inputs))))


def shuffled(patched: pytest.MonkeyPatch) -> None:
    found = scores._scores
    order = random.Random(0).sample(range(len(GRAPH)), len(GRAPH))
    patched.setattr(scores, "_scores", lambda *given: found(*given)[order])


def two_edges_swapped(patched: pytest.MonkeyPatch) -> None:
    found = scores._scores
    order = [1, 0, *range(2, len(GRAPH))]
    patched.setattr(scores, "_scores", lambda *given: found(*given)[order])


def of_absolute_size(patched: pytest.MonkeyPatch) -> None:
    found = scores._scores
    patched.setattr(scores, "_scores", lambda *given: np.abs(found(*given)))


def position_forgotten(patched: pytest.MonkeyPatch) -> None:
    stack = Pair.stack

    def forgetful(self: Pair, writers) -> torch.Tensor:
        changes = stack(self, writers).clone()
        changes[:, :, -2] = 0
        return changes

    patched.setattr(Pair, "stack", forgetful)


def other_way_round(patched: pytest.MonkeyPatch) -> None:
    stack = Pair.stack
    patched.setattr(Pair, "stack", lambda self, writers: -stack(self, writers))


SCORERS = {
    "eap": partial(scoring.eap, GIVEN, GIVEN.edges),
    "receiver-exact": partial(scoring.receiver_exact, GIVEN, GIVEN.edges),
    "eap-ig": partial(scoring.eap, GIVEN, GIVEN.edges, steps=2),
}


@pytest.mark.parametrize("method", SCORERS)
@pytest.mark.parametrize(
    "mutate", [nothing, shuffled, two_edges_swapped, of_absolute_size, position_forgotten, other_way_round]
)
def test_wrong_scores_are_caught(method, mutate):
    expected = SCORERS[method]()
    caught(lambda: checks.scores_are_those_defined(GIVEN, expected, method=method, steps=2), mutate)


@pytest.mark.parametrize(
    "points",
    [
        pytest.param([0.0, 0.5], id="the other end"),
        pytest.param([0.5], id="a point forgotten"),
        pytest.param([0.25, 0.75], id="midpoints"),
    ],
)
def test_wrong_points_of_integrated_gradients_are_caught(points):
    expected = SCORERS["eap-ig"]()
    caught(
        lambda: checks.scores_are_those_defined(GIVEN, expected, method="eap-ig", steps=2),
        lambda patched: patched.setattr(scores, "_points", lambda *_: points),
    )


def test_a_gradient_in_place_of_a_response_is_caught():
    expected = SCORERS["receiver-exact"]()
    gradients = scores.Gradients

    def mutate(patched: pytest.MonkeyPatch) -> None:
        patched.setattr(gradients, "at_outputs", gradients.at_inputs)

    caught(lambda: checks.scores_are_those_defined(GIVEN, expected, method="receiver-exact"), mutate)


def test_scores_that_were_not_verified_are_caught():
    exact = paths.edge_sweep(GIVEN.model, *GIVEN.pair(), metric=METRIC)

    def mutate(patched: pytest.MonkeyPatch) -> None:
        verify = adaptive.adaptive

        def trusting(fast, exactly, *given):
            return verify(fast, lambda names: fast.sel(edge=list(names)), *given)

        patched.setattr(scores, "adaptive", trusting)

    caught(lambda: checks.verified_scores_are_exact(GIVEN, exact, top=5, sample=5), mutate)


# Circuits


def test_a_circuit_run_inside_out_is_caught():
    def mutate(patched: pytest.MonkeyPatch) -> None:
        patched.setattr(circuits, "rewire", lambda graph, replaced, *rest: rewire(graph, ~replaced, *rest))

    caught(lambda: checks.circuits_run_as_written(GIVEN, GRAPH), mutate)


def test_a_circuit_that_loses_an_edge_is_caught():
    def mutate(patched: pytest.MonkeyPatch) -> None:
        def forgetful(graph: Graph, replaced: np.ndarray, *rest):
            more = replaced.copy()
            more[np.flatnonzero(~replaced)[-1]] = True
            return rewire(graph, more, *rest)

        patched.setattr(circuits, "rewire", forgetful)

    caught(lambda: checks.circuits_run_as_written(GIVEN, GRAPH), mutate)


@pytest.mark.parametrize("kept", ["all", "what is read"])
def test_pruning_too_little_is_caught(kept):
    edges = sorted({*random.Random(1).sample(GRAPH.edges, 25), "m1->logits"})

    def mutate(patched: pytest.MonkeyPatch) -> None:
        def pruned(self: Circuit) -> Circuit:
            if kept == "all":
                return self
            sent = {checks.ends(edge)[0] for edge in self.edges} | {"logits"}
            return Circuit.of(self.graph, [e for e in self.edges if sent & set(checks.fed(checks.ends(e)[1]))])

        patched.setattr(Circuit, "pruned", pruned)

    caught(lambda: checks.pruning_leaves_the_ways_through(GRAPH, edges), mutate)


# Search


@pytest.mark.full
def test_an_acdc_that_ignores_the_order_is_caught():
    expected = checks.serial_acdc(SHORT, TAU)
    for order in (lambda graph: list(range(len(graph))), lambda graph: list(range(len(graph)))[::-1][1:]):
        caught(
            lambda: checks.acdc_is_the_serial_one(SHORT, TAU, expected, batch=1),
            lambda patched, order=order: patched.setattr(search, "removal_order", order),
        )


@pytest.mark.full
def test_an_acdc_that_tries_each_edge_alone_is_caught():
    """Each removal is tried on top of those before it, and not alone."""
    expected = checks.serial_acdc(SHORT, TAU)

    def mutate(patched: pytest.MonkeyPatch) -> None:
        def alone(given: Circuit, mask, scores, config=None) -> Circuit:
            one = np.ones(len(given), bool)
            one[np.flatnonzero(~mask)[-1:]] = False
            return Circuit(given, one, scores, config or {})

        patched.setattr(search, "Circuit", alone)

    check = partial(checks.acdc_is_the_serial_one, SHORT, TAU, expected, batch=4)
    caught(check, mutate)


def test_a_greedy_search_that_takes_what_nothing_reads_is_caught():
    found, graph = random_scores("gpt2")
    caught(
        lambda: checks.greedy_is_the_slow_one(found, graph, 12, True),
        lambda patched: patched.setattr(paths, "greedy", paths.top_k),
    )


# Quality


@pytest.mark.parametrize("wrong", ["signed", "ties"])
def test_a_wrong_area_under_the_curve_is_caught(wrong):
    values = random_scores("gpt2")[0].mean().round()
    known = Circuit(GRAPH, np.random.default_rng(0).random(len(GRAPH)) < 0.3, np.zeros(len(GRAPH)))

    def mutate(patched: pytest.MonkeyPatch) -> None:
        if wrong == "ties":
            patched.setattr(quality, "_ranks", lambda x: np.argsort(np.argsort(x, kind="stable")) + 1.0)
        else:
            patched.setattr(quality, "_ranks", lambda x, ranks=quality._ranks: ranks(values))

    caught(lambda: checks.roc_area_is_that_of_all_pairs(values, known), mutate)
