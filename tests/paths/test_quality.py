"""How good circuits are, on networks whose circuits are known."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch

import interp as ip
from interp import paths
from tests import zoo
from tests.paths import checks, networks
from tests.paths.cases import METRIC, case
from tests.paths.checks import made_up, random_scores
from tests.turns import pairs

W = networks.LINEAR[:, 1].double().tolist()


def linear() -> tuple[ip.Model, ip.Inputs, ip.Inputs]:
    model = ip.wrap(networks.linear_blocks())
    return model, model.inputs([[networks.UP]]), model.inputs([[networks.DOWN]])


def either() -> tuple[ip.Model, ip.Inputs, ip.Inputs]:
    """Two heads of which either is enough."""
    model = ip.wrap(networks.two_heads(1.0, 2))
    return model, model.inputs([[networks.ON]]), model.inputs([[networks.OFF]])


def carried(edges: tuple[str, ...]) -> float:
    """What linear blocks carry over the ways through some edges, as a share of all: each is a product of weights."""
    total = 0.0
    for first in (None, 0, 1):
        for second in (None, 0, 1):
            nodes = [f"a{i}.h{h}" for i, h in enumerate((first, second)) if h is not None]
            way = ["input", *nodes, "logits"]
            steps = [f"{u}->{v}" + ("<v>" if v != "logits" else "") for u, v in itertools.pairwise(way)]
            if set(steps) <= set(edges):
                total += np.prod([W[h] for h in (first, second) if h is not None])
    return total / (1 + sum(W)) ** 2


# Faithfulness


@pytest.mark.parametrize("choose", [paths.greedy, paths.top_k])
def test_faithfulness_of_linear_blocks(choose):
    """A circuit keeps the ways to the logits that lie in it."""
    model, clean, corrupt = linear()
    scores = paths.edge_sweep(model, clean, corrupt, metric=ip.logit(1))
    graph = paths.Graph.of(model)
    sizes = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
    curve = paths.faithfulness(model, clean, corrupt, scores, graph, metric=ip.logit(1), sizes=sizes, choose=choose)
    circuits = [choose(scores, graph, round(size * len(graph))) for size in sizes]
    expected = [carried(circuit.edges) for circuit in circuits]
    np.testing.assert_allclose(curve.faithfulness, expected, rtol=0, atol=1e-10)
    assert (expected[0], expected[-1]) == (0.0, 1.0) and 0.1 < expected[3] < 0.9
    assert curve.edges == tuple(len(c) for c in circuits) and curve.sizes == sizes
    steps = list(zip(sizes, sizes[1:], expected, expected[1:], strict=False))
    assert curve.cpr == pytest.approx(sum((b - a) * (f + g) / 2 for a, b, f, g in steps), abs=1e-12)
    assert curve.cmd == pytest.approx(sum((b - a) * (2 - f - g) / 2 for a, b, f, g in steps), abs=1e-12)


def test_areas_by_hand():
    """Cancelling heads: f is 2 with one of them in, and the distance from 1 counts on both sides."""
    model = ip.wrap(networks.two_heads(-0.5, None))
    clean, corrupt = model.inputs([[networks.ON]]), model.inputs([[networks.OFF]])
    graph = paths.Graph.of(model)
    names = ["input->a0.h0<v>", "a0.h0->logits"]

    def choose(scores, graph, k):
        return paths.Circuit.all(graph) if k == len(graph) else paths.Circuit.of(graph, names if k else [])

    scores = made_up(graph, np.zeros((len(graph), 1)))
    curve = paths.faithfulness(
        model, clean, corrupt, scores, graph, metric=ip.logit(networks.WANTED), sizes=(0, 0.5, 1), choose=choose
    )
    assert curve.faithfulness == pytest.approx((0, 2, 1), abs=1e-12)
    assert (curve.cpr, curve.cmd) == pytest.approx((0.5 + 0.75, 0.25 * 2 + 0.25), abs=1e-12)


@pytest.mark.parametrize("sizes", [(), (0.5, 0.2), (0.1, 0.1), (-0.1, 1), (0.5, 1.5)])
def test_sizes_that_there_are_not(sizes):
    model, clean, corrupt = linear()
    graph = paths.Graph.of(model)
    with pytest.raises(ip.InterpError, match="ascending"):
        paths.faithfulness(
            model, clean, corrupt, made_up(graph, np.zeros((len(graph), 1))), graph, metric=ip.logit(1), sizes=sizes
        )


def test_a_whole_difference_of_zero_is_refused():
    model, clean, _ = linear()
    graph = paths.Graph.of(model)
    with pytest.raises(ip.InterpError, match="no difference"):
        paths.faithfulness(model, clean, clean, made_up(graph, np.ones((len(graph), 1))), graph, metric=ip.logit(1))


@pytest.mark.parametrize(
    ("family", "executor", "dtype"), pairs(["gpt2", "llama"], ["auto", "sequential"], [torch.float32, torch.float64])
)
def test_a_prompt_against_itself_has_no_quality(family, executor, dtype):
    """Numerator and denominator are rounding, which is not a share of anything."""
    model = ip.wrap(copy.deepcopy(zoo.make(family)).to(dtype))
    rows = torch.arange(1, 37).reshape(3, 12) % (zoo.VOCAB - 1) + 1
    inputs, graph = model.inputs(rows), paths.Graph.of(model)
    draw = np.random.default_rng(0)
    scores = draw.normal(size=len(graph))
    circuit = paths.Circuit(graph, draw.random(len(graph)) < 0.5, scores)
    for other in (inputs, model.inputs(rows)):
        told = {"metric": METRIC, "executor": executor}
        for measured in (
            lambda other=other, told=told: paths.faithfulness(model, inputs, other, scores, graph, **told),
            lambda other=other, told=told: paths.completeness(model, circuit, inputs, other, subsets=3, **told),
            lambda other=other, told=told: paths.minimality(model, circuit, inputs, other, **told),
        ):
            with pytest.raises(ip.InterpError, match="two runs do not differ"):
                measured()


def test_rows_that_do_not_differ_are_masked():
    """Of four pairs one is of a prompt and itself, and one hardly differs: neither has a share of its own."""
    given = case("gpt2", (4, 4, 4, 4))
    corrupt = list(given.tokens["corrupt"])
    corrupt[1] = given.tokens["clean"][1]
    pair = paths.Pair.of(given.model, given.inputs("clean"), given.model.inputs(corrupt))
    scores, graph = random_scores("gpt2")
    told = {"metric": METRIC, "sizes": (0.3, 0.6, 1.0)}
    curve = paths.faithfulness(pair, scores, graph, per_row=True, **told)
    assert curve.rows is not None
    shares, circuits = np.array(curve.rows), [paths.greedy(scores, graph, round(s * len(graph))) for s in curve.sizes]
    nothing, everything = paths.Circuit.of(graph, []), paths.Circuit.all(graph)
    empty, full, *found = paths.circuit_metric(pair, [nothing, everything, *circuits], metric=METRIC)
    difference = full - empty
    large = np.abs(difference) >= 0.1 * np.abs(difference).mean()
    assert not large[1] and large.sum() >= 2
    np.testing.assert_allclose(shares[:, large], (found - empty)[:, large] / difference[large], rtol=0, atol=1e-9)
    assert np.isnan(shares[:, ~large]).all() and shares[-1, large] == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose(curve.faithfulness, (found - empty).mean(1) / difference.mean(), rtol=0, atol=1e-9)
    assert paths.faithfulness(pair, scores, graph, **told).rows is None


def test_choices_that_are_no_circuits_of_the_graph():
    model, clean, corrupt = linear()
    graph = paths.Graph.of(model)
    other = paths.Circuit.all(paths.Graph.of(model, "blocks"))
    for choose in (lambda *_: ["input->logits"], lambda *_: other):
        with pytest.raises(ip.InterpError, match="choose gives circuits of"):
            paths.faithfulness(model, clean, corrupt, np.zeros(len(graph)), graph, metric=ip.logit(1), choose=choose)


def test_means_that_are_pooled():
    """Short reference prompts have a mean over all their positions."""
    given = case("gpt2")
    scores, graph = random_scores("gpt2")
    options = {"metric": METRIC, "values": "mean", "reference": given.model.inputs([[3, 4], [5, 6]])}
    with pytest.raises(ip.InterpError, match="pooled=True"):
        paths.faithfulness(given.model, given.inputs("clean"), None, scores, graph, **options)
    curve = paths.faithfulness(given.model, given.inputs("clean"), None, scores, graph, pooled=True, **options)
    assert curve.faithfulness[-1] == pytest.approx(1, abs=1e-10)


# Completeness and minimality

HALF = ["input->a0.h0<v>", "a0.h0->m0", "m0->logits"]
BOTH = [*HALF, "input->a0.h1<v>", "a0.h1->m0"]


def test_half_an_or_is_faithful_but_not_complete():
    """Without head 0 the model still has head 1; a circuit of head 0 alone has nothing."""
    model, clean, corrupt = either()
    graph = paths.Graph.of(model)
    options = {"metric": ip.logit(networks.WANTED), "subsets": 30, "size": 1}
    half, both = (
        paths.completeness(model, paths.Circuit.of(graph, edges), clean, corrupt, **options) for edges in (HALF, BOTH)
    )
    assert half["score"] == pytest.approx(1, abs=1e-12) and both["score"] == pytest.approx(0, abs=1e-12)
    for names, mine, theirs in zip(half["subsets"], half["circuit"], half["model"], strict=True):
        assert mine == pytest.approx(0, abs=1e-12)
        assert theirs == pytest.approx(1.0 if names == ["a0.h0"] else 0.0, abs=1e-12)
    assert {name for names in half["subsets"] for name in names} == {"a0.h0", "m0"}


def test_completeness_takes_out_sets_of_nodes():
    model, clean, corrupt = linear()
    whole = paths.Circuit.all(paths.Graph.of(model))
    found = paths.completeness(model, whole, clean, corrupt, metric=ip.logit(1), subsets=12, size=3, seed=1)
    assert {len(names) for names in found["subsets"]} == {1, 2, 3} and found["score"] == 0
    for names, share in zip(found["subsets"], found["circuit"], strict=True):
        left = whole
        for name in names:
            left = left.without(node=name)
        assert share == pytest.approx(carried(left.edges), abs=1e-10)
    again = paths.completeness(model, whole, clean, corrupt, metric=ip.logit(1), subsets=12, size=3, seed=1)
    assert again["subsets"] == found["subsets"]


def test_sets_of_nodes_are_drawn_by_name():
    """One node more in the circuit changes the sets that it gets into, and no other."""
    graph = paths.Graph.of(case("gpt2").model)
    whole = paths.Circuit.all(graph)
    pair, told = paths.Pair.of(case("gpt2").model, *case("gpt2").pair(), seed=4), {"metric": METRIC, "size": 1}
    some, more = (
        paths.completeness(pair, circuit, subsets=12, **told)["subsets"]
        for circuit in (whole.without(node="m1"), whole)
    )
    apart = [(a, b) for a, b in zip(some, more, strict=True) if a != b]
    assert len({name for names in some for name in names}) > 3 and 0 < len(apart) < 6
    assert all(b == ["m1"] for _, b in apart)
    assert paths.completeness(pair, whole, subsets=5, **told)["subsets"] == more[:5]


@pytest.mark.parametrize("edges", [[], ["input->logits"]])
@pytest.mark.parametrize("measured", [paths.completeness, paths.minimality])
def test_nodes_are_taken_out_of_circuits_that_have_some(measured, edges):
    model, clean, corrupt = linear()
    with pytest.raises(ip.InterpError, match="none but input and logits"):
        measured(model, paths.Circuit.of(paths.Graph.of(model), edges), clean, corrupt, metric=ip.logit(1))


@pytest.mark.parametrize("options", [{"subsets": 0}, {"size": 0}])
def test_completeness_takes_something_out(options):
    model, clean, corrupt = linear()
    whole = paths.Circuit.all(paths.Graph.of(model))
    with pytest.raises(ip.InterpError, match="one or more sets of one or more nodes"):
        paths.completeness(model, whole, clean, corrupt, metric=ip.logit(1), **options)


def test_minimality():
    model, clean, corrupt = either()
    graph, metric = paths.Graph.of(model), ip.logit(networks.WANTED)
    half, both = (
        paths.minimality(model, paths.Circuit.of(graph, edges), clean, corrupt, metric=metric) for edges in (HALF, BOTH)
    )
    assert half == pytest.approx({"a0.h0": 1, "m0": 1}, abs=1e-12)
    assert both == pytest.approx({"a0.h0": 0, "a0.h1": 0, "m0": 1}, abs=1e-12)


def test_minimality_of_linear_blocks():
    model, clean, corrupt = linear()
    whole = paths.Circuit.all(paths.Graph.of(model))
    found = paths.minimality(model, whole, clean, corrupt, metric=ip.logit(1))
    assert found == pytest.approx(
        {name: 1 - carried(whole.without(node=name).edges) for name in ("a0.h0", "a0.h1", "a1.h0", "a1.h1")}, abs=1e-10
    )
    assert min(found.values()) > 0.1


# Likeness


@pytest.mark.parametrize("seed", range(3))
def test_the_area_under_the_curve_is_that_of_all_pairs(seed):
    scores, graph = random_scores("gpt2", seed)
    draw = np.random.default_rng(seed)
    known = paths.Circuit(graph, draw.random(len(graph)) < 0.3, np.zeros(len(graph)))
    for values in (scores.mean(), scores.mean().round(), np.zeros(len(graph)), known.members * -1.0):
        checks.roc_area_is_that_of_all_pairs(values, known)
    assert paths.auroc(np.zeros(len(graph)), known) == 0.5 and paths.auroc(known.members * -1.0, known) == 1.0
    assert paths.auroc(scores, known) == paths.auroc(scores.mean(), known)


def test_areas_that_there_are_not():
    scores, graph = random_scores("gpt2")
    for circuit in (paths.Circuit.all(graph), paths.Circuit.of(graph, [])):
        with pytest.raises(ip.InterpError, match="inside and outside"):
            paths.auroc(scores, circuit)
    lacking = scores.mean()
    lacking[3] = np.nan
    with pytest.raises(ip.InterpError, match="1 of 110 edges have no score"):
        paths.auroc(lacking, paths.Circuit.of(graph, ["input->m0"]))


def test_stability():
    from scipy.stats import spearmanr

    (one, graph), (two, _) = random_scores("gpt2", 0), random_scores("gpt2", 1)
    a, b = np.abs(one.mean()).round(1), np.abs(two.mean()).round(1)  # with ties
    found = paths.stability(a, -b, graph, 10)
    assert found["spearman"] == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    tops = [set(sorted(range(len(x)), key=lambda i: -x[i])[:10]) for x in (a, b)]
    assert found["jaccard"] == len(tops[0] & tops[1]) / len(tops[0] | tops[1])
    assert paths.stability(one, one, graph, 10) == pytest.approx({"spearman": 1.0, "jaccard": 1.0})
    assert np.isnan(paths.stability(one, np.zeros(len(graph)), graph, 10)["spearman"])
    a[5] = np.nan
    without = np.delete(np.arange(len(a)), 5)
    assert paths.stability(a, b, graph, 3)["spearman"] == pytest.approx(spearmanr(a[without], b[without]).statistic)
    for k in (0, 111, 2.5, True):
        with pytest.raises(ip.InterpError, match="1 to 110"):
            paths.stability(one, two, graph, k)
    for scores in ("text", paths.Circuit.all(graph), ["a"] * len(graph)):
        with pytest.raises(ip.InterpError, match=r"a result, or float \[110\]"):
            paths.stability(one, scores, graph, 3)


def test_halves():
    graph = paths.Graph.of(case("gpt2").model)
    draw = np.random.default_rng(0)
    signal = draw.standard_normal((len(graph), 1))
    alike, noise = made_up(graph, signal.repeat(8, 1)), made_up(graph, draw.standard_normal((len(graph), 8)))
    for name in ("spearman", "jaccard"):
        same, none = (paths.split_half(x, graph, 10)[name] for x in (alike, noise))
        assert same == pytest.approx({"low": 1, "median": 1, "high": 1})
        assert none["low"] <= none["median"] <= none["high"] < 0.4
    two = made_up(graph, draw.standard_normal((len(graph), 2)))
    found = paths.split_half(two, graph, 10, draws=3)
    assert found["jaccard"]["low"] == found["jaccard"]["high"]  # there is one way to halve two rows
    assert found["jaccard"]["low"] == paths.stability(two.effect[:, 0], two.effect[:, 1], graph, 10)["jaccard"]
    with pytest.raises(ip.InterpError, match="two rows"):
        paths.split_half(made_up(graph, signal), graph, 10)
    with pytest.raises(ip.InterpError, match="one draw, not 2 and 0"):
        paths.split_half(two, graph, 10, draws=0)
    with pytest.raises(ip.InterpError, match="1 to 110"):
        paths.split_half(two, graph, 0)
    with pytest.raises(ip.InterpError, match="rows, and ndarray has none"):
        paths.split_half(two.mean(), graph, 10)


def test_halves_of_rows_that_lack_a_position():
    given = case("gpt2")
    graph = paths.Graph.of(given.model, positions={"end": -1, "late": 4})
    scores = paths.edge_scores(given.model, *given.pair(), metric=METRIC, graph=graph)
    assert np.isnan(scores.effect).any()
    found = paths.split_half(scores, graph, 10)
    assert 0 < found["spearman"]["median"] < 1
