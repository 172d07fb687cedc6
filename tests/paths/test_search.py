"""Searches for circuits against slow and obvious versions of themselves."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

import interp as ip
from interp import paths
from tests.paths import checks, networks
from tests.paths.cases import MEASURE, METRIC, case
from tests.paths.checks import TAU, made_up, random_scores

# By score


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("k", [0, 1, 7, 60])
def test_top_k_are_the_k_best(k, absolute):
    scores, graph = random_scores("gpt2")
    mean = scores.effect.mean(1)
    size = np.abs(mean) if absolute else mean
    found = paths.top_k(scores, graph, k, absolute=absolute, prune=False)
    best = sorted(range(len(graph)), key=lambda i: size[i], reverse=True)[:k]
    assert set(found.edges) == {graph.edges[i] for i in best} and len(found) == k
    np.testing.assert_allclose(found.scores, mean, atol=1e-15)
    assert paths.top_k(scores, graph, k, absolute=absolute) == found.pruned()
    assert found.config == {"found by": "top_k", "k": k, "absolute": absolute, "method": "made up", "values": "patch"}


@pytest.mark.parametrize(("family", "group"), [("gpt2", 1), ("llama", 2), ("neox", 1)])
@pytest.mark.parametrize("absolute", [True, False])
def test_greedy_is_what_it_says(family, group, absolute):
    for seed, k in product(range(2), (0, 1, 5, 40)):
        scores, graph = random_scores(family, seed)
        checks.greedy_is_the_slow_one(scores, graph, k, absolute, group)
        found = paths.greedy(scores, graph, k, absolute=absolute, prune=False)
        assert len(found) == k and paths.greedy(scores, graph, k, absolute=absolute) == found.pruned()


def test_greedy_with_every_edge_is_the_graph():
    scores, graph = random_scores("gemma2")
    assert paths.greedy(scores, graph, len(graph)) == paths.Circuit.all(graph)


def test_greedy_never_dangles_at_its_upper_end():
    scores, graph = random_scores("gpt2", 5)
    circuit = paths.greedy(scores, graph, 25, prune=False)
    sent = {checks.ends(edge)[0] for edge in circuit.edges}
    assert all(set(checks.fed(checks.ends(edge)[1])) & (sent | {"logits"}) for edge in circuit.edges)


@pytest.mark.parametrize("k", [-1, 111, 2.0, True, "3"])
def test_numbers_of_edges_that_there_are_not(k):
    scores, graph = random_scores("gpt2")
    for find in (paths.top_k, paths.greedy):
        with pytest.raises(ip.InterpError, match="0 to 110"):
            find(scores, graph, k)


def test_scores_may_be_an_array_and_have_no_gaps():
    """An edge without a score can be ranked nowhere: a nan would put the others in any order."""
    scores, graph = random_scores("gpt2")
    lacking = scores.mean()
    lacking[3] = np.nan
    for find in (paths.top_k, paths.greedy):
        assert find(scores.mean(), graph, 9) == find(scores, graph, 9) and len(find(scores, graph, 9, prune=False)) == 9
        with pytest.raises(ip.InterpError, match=rf"1 of 110 edges have no score, '{graph.edges[3]}'"):
            find(lacking, graph, 9)


# ACDC


@pytest.mark.parametrize("family", ["gpt2", "neox"])
@pytest.mark.parametrize("batch", [1, 4, pytest.param(20, marks=pytest.mark.full)])
def test_acdc_is_the_serial_algorithm(family, batch):
    given = case(family, (4, 5))
    checks.acdc_is_the_serial_one(given, TAU, checks.serial_acdc(given, TAU), batch=batch)


@pytest.mark.full
def test_acdc_with_a_metric_of_which_more_is_better():
    given = case("gpt2", (4, 5))
    expected = checks.acdc_slowly(given, 0.05, MEASURE, sign=-1.0)
    checks.acdc_is_the_serial_one(given, 0.05, expected, metric=METRIC, lower_is_better=False, batch=4)


def test_acdc_finds_the_induction_circuit():
    """Where another token stands before B, the key of the induction head is all that the pair changes."""
    model = ip.wrap(networks.induction())
    A, B, C, D, X = networks.A, networks.B, networks.C, networks.D, networks.X
    clean, corrupt = ([networks.START, first, B, D, C, A] for first in (A, X))
    found = paths.acdc(model, model.inputs([clean]), model.inputs([corrupt]), tau=0.1, batch=1)
    previous, induction = networks.PREVIOUS, networks.INDUCTION
    assert set(found.edges) == {
        f"input->{previous}<v>", f"{previous}->{induction}<k>", f"{induction}->logits"
    }  # fmt: skip
    assert found.config["tried"] == len(found.graph) + 1


@pytest.mark.parametrize("tau", [np.inf, 1e9])
def test_acdc_to_which_every_rise_is_small(tau):
    given = case("gpt2", (4, 5))
    assert len(paths.acdc(given.model, *given.pair(), tau=tau)) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"tau": -1}, {"tau": float("nan")}, {"tau": 0.1, "batch": 0}, {"tau": 0.1, "batch": 1.5},
        {"tau": 0.1, "lower_is_better": False},
    ],
)  # fmt: skip
def test_what_acdc_refuses(options):
    given = case("gpt2", (4, 5))
    with pytest.raises(ip.InterpError, match=r"at least|goes with a metric"):
        paths.acdc(given.model, *given.pair(), **options)


# Causal explanatory graphs


def flips(effect: np.ndarray) -> np.ndarray:
    """The two-sided p-value of each row of effects: the share of all ways to flip signs that are as large."""
    signs = np.array(list(product((-1, 1), repeat=effect.shape[1])))
    return (np.abs(signs @ effect.T) >= np.abs(effect.sum(1)) - 1e-12).mean(0)


def discovered(p: np.ndarray, q: float) -> np.ndarray:
    """Benjamini and Hochberg: all up to the largest rank i of n with p <= q i / n."""
    order = np.argsort(p, kind="stable")
    passing = [i for i in range(len(p)) if p[order[i]] <= q * (i + 1) / len(p)]
    found = np.zeros(len(p), bool)
    found[order[: max(passing) + 1 if passing else 0]] = True
    return found


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_causal_graph_is_what_is_significant_and_large(share):
    graph = paths.Graph.of(case("gpt2").model)
    draw = np.random.default_rng(0)
    real = draw.random(len(graph)) < 0.4
    effect = draw.standard_normal((len(graph), 10)) + np.where(real, draw.uniform(1, 4, len(graph)), 0)[:, None]
    effect[0] = 0.0
    found = paths.causal_graph(made_up(graph, effect, floor=0.1), graph, share=share)
    mean = effect.mean(1)
    expected = discovered(flips(effect), 0.05) & (np.abs(mean) > 0.1) & (np.abs(mean) >= share * np.abs(mean).max())
    np.testing.assert_array_equal(found.members, expected)
    assert 5 < len(found) < real.sum() + 5 and not found.members[0]
    np.testing.assert_allclose(found.scores, mean, atol=1e-15)


def test_nothing_is_significant_in_noise_or_in_few_rows():
    graph = paths.Graph.of(case("gpt2").model)
    noise = np.random.default_rng(1).standard_normal((len(graph), 12))
    assert len(paths.causal_graph(made_up(graph, noise), graph)) <= 1
    assert len(paths.causal_graph(made_up(graph, np.ones((len(graph), 3))), graph)) == 0
    assert len(paths.causal_graph(made_up(graph, np.ones((len(graph), 12)) * 1e-9, floor=1e-6), graph)) == 0


@pytest.mark.parametrize("lacking", [0, 40, 109])
def test_an_edge_without_an_effect_does_not_rule_the_causal_graph(lacking):
    """Size is against the largest effect that there is."""
    graph = paths.Graph.of(case("gpt2").model)
    effect = np.linspace(1, 2, len(graph))[:, None] * np.ones((len(graph), 12))
    effect[lacking] = np.nan
    found = paths.causal_graph(made_up(graph, effect), graph, share=0.75)
    large = np.linspace(1, 2, len(graph)) >= 0.75 * np.nanmax(effect)
    large[lacking] = False
    np.testing.assert_array_equal(found.members, large)
    assert 30 < len(found) < len(graph) - 30
    assert len(paths.causal_graph(made_up(graph, np.full_like(effect, np.nan)), graph)) == 0


def test_what_a_causal_graph_refuses():
    scores, graph = random_scores("gpt2")
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ip.InterpError, match="0 to 1"):
            paths.causal_graph(scores, graph, share=share)
    with pytest.raises(ip.InterpError, match="rows, and ndarray has none"):
        paths.causal_graph(scores.mean(), graph)
