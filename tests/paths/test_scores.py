"""Fast scores against their definitions, in float64; what they cost; and the exact effects that they end in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp as ip
from hooks.meter import Meter
from hooks.plan.sites import Span
from interp import paths
from interp.axes import Axis
from interp.models import Transformer, TransformerConfig
from interp.paths.adaptive import adaptive
from interp.paths.pair import Pair
from tests import zoo
from tests.paths import networks, scoring
from tests.paths.cases import CLOSE, DIRECTIONS, METRIC, case, kl, oracle

FAMILIES = ["gpt2", "llama", "gemma2", "neox", "qwen3", "small_attn_only"]
FAST = {"eap": scoring.eap, "receiver-exact": scoring.receiver_exact}
SPANS = {"early": 1, "end": -1, "both": [0, 3]}  # one row of three has no position 3

each_family = pytest.mark.parametrize("family", FAMILIES)
each_fast = pytest.mark.parametrize("method", FAST)


def score(family: str, padding: str = "right", **options) -> ip.Result:
    given = case(family)
    return paths.edge_scores(given.model, *given.pair(padding), **({"metric": METRIC} | options))


def with_spans(edges: list[str]) -> list[str]:
    return [f"{edge}@{span}" for edge in edges for span in SPANS]


# Definitions


@each_family
@each_fast
@pytest.mark.parametrize(("direction", "padding"), [("denoising", "left"), ("noising", "right")])
def test_scores_are_what_they_are_defined_to_be(family, method, direction, padding):
    given = case(family)
    result = score(family, padding, method=method, direction=direction)
    scoring.agrees(result, given.edges, FAST[method](given, given.edges, direction=direction))
    np.testing.assert_allclose(result.base, given.measured("corrupt" if direction == "denoising" else "clean"), **CLOSE)
    assert result.config["method"] == method
    assert result.config["forward_equivalents"] > 0


@each_family
@pytest.mark.parametrize(("direction", "padding", "steps"), [("denoising", "right", 3), ("noising", "left", 4)])
def test_integrated_gradients_are_averaged_on_the_line_between_the_prompts(family, direction, padding, steps):
    given = case(family)
    result = score(family, padding, method="eap-ig", steps=steps, direction=direction)
    expected = scoring.eap(given, given.edges, direction=direction, steps=steps)
    scoring.agrees(result, given.edges, expected)
    np.testing.assert_allclose(result.base, given.measured("corrupt" if direction == "denoising" else "clean"), **CLOSE)
    assert np.abs(expected - scoring.eap(given, given.edges, direction=direction)).max() > 1e-3


def test_the_one_step_there_is_may_be_at_the_clean_prompt():
    result = score("gpt2", method="eap-ig", steps=1, direction="noising")
    np.testing.assert_allclose(result.effect, score("gpt2", method="eap", direction="noising").effect, **CLOSE)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@each_fast
def test_scores_by_position(family, method):
    given = case(family)
    graph = paths.Graph.of(given.model, positions=SPANS)
    names = with_spans(given.edges)
    expected = FAST[method](given, names, spans=SPANS)
    for padding in ("left", "right"):
        result = score(family, padding, method=method, graph=graph)
        (axis,) = result.axes
        order = [axis.values.index(name) for name in names]
        np.testing.assert_allclose(result.effect[order], expected, **CLOSE)
    assert np.isnan(expected).any() and np.nanmax(np.abs(expected)) > 1e-2


def test_positions_of_a_score_add_up():
    """To first order in d_u an edge is the sum of its positions."""
    graph = paths.Graph.of(case("neox").model, positions={"first": [0, 1], "rest": Span(2, None)})
    found = score("neox", graph=graph)
    spans = {n: found.effect[[a.endswith(f"@{n}") for a in found.axes[0].values]] for n in ("first", "rest")}
    names = [n.removesuffix("@first") for n in found.axes[0].values if n.endswith("@first")]
    whole = score("neox")
    order = [whole.axes[0].values.index(name) for name in names]
    np.testing.assert_allclose(spans["first"] + spans["rest"], whole.effect[order], **CLOSE)


@each_family
@each_fast
def test_scores_between_blocks(family, method):
    given = case(family)
    graph = paths.Graph.of(given.model, "blocks")
    scoring.agrees(score(family, method=method, graph=graph), graph.edges, FAST[method](given, graph.edges))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@each_fast
@pytest.mark.parametrize("values", ["zero", "mean"])
def test_scores_with_other_values(family, method, values):
    given = case(family)
    reference = given.inputs("reference", "left") if values == "mean" else None
    options = {"metric": METRIC, "values": values, "reference": reference}
    for pooled in (False, True) if values == "mean" else (False,):
        result = paths.edge_scores(given.model, given.inputs("clean"), None, method=method, pooled=pooled, **options)
        expected = FAST[method](given, given.edges, values=values, pooled=pooled)
        scoring.agrees(result, given.edges, expected)


@pytest.mark.parametrize("values", ["zero", "mean"])
def test_integrated_gradients_towards_an_ablation(values):
    """The line is that between the prompts' embeddings and what stands for them."""
    given = case("gpt2")
    reference = given.inputs("reference") if values == "mean" else None
    options = {"metric": METRIC, "values": values, "reference": reference, "method": "eap-ig", "steps": 3}
    result = paths.edge_scores(given.model, given.inputs("clean"), None, **options)
    scoring.agrees(result, given.edges, scoring.eap(given, given.edges, values=values, steps=3))


@each_fast
def test_scores_of_a_divergence(method):
    given = case("qwen3")
    other = given.prompts("clean")
    with torch.no_grad():
        measure = kl(oracle.forward(given.module, other).logits, other.mask)
    expected = FAST[method](given, given.edges, measure=measure)
    scoring.agrees(score("qwen3", "left", method=method, metric=ip.kl()), given.edges, expected)


# Exactness


@pytest.mark.parametrize("method", paths.METHODS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_method_is_exact_on_a_linear_model(method, direction):
    model = ip.wrap(networks.linear_blocks())
    inputs = model.inputs([[networks.UP], [networks.DOWN]]), model.inputs([[networks.DOWN], [networks.UP]])
    options = {"metric": ip.logit(1), "direction": direction}
    exact = paths.edge_sweep(model, *inputs, **options)
    found = paths.edge_scores(model, *inputs, method=method, top=5, sample=5, **options)
    np.testing.assert_allclose(found.effect, exact.effect, **CLOSE)
    np.testing.assert_allclose(found.base, exact.base, **CLOSE)
    np.testing.assert_allclose(found.source, exact.source, **CLOSE)
    assert np.abs(exact.effect).max() > 10


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_exact_method_is_the_sweep(family):
    exact = paths.edge_sweep(case(family).model, *case(family).pair(), metric=METRIC)
    found = score(family, method="exact")
    assert found.axes[0].values == exact.axes[0].values
    np.testing.assert_allclose(found.effect, exact.effect, **CLOSE)
    assert found.config["method"] == "exact"


def test_receivers_are_closer_to_exact_than_gradients():
    exact = paths.edge_sweep(case("gpt2").model, *case("gpt2").pair(), metric=METRIC).effect
    gradient, response = (np.abs(score("gpt2", method=m).effect - exact) for m in FAST)
    assert response.mean() < 0.8 * gradient.mean()
    logits = [name.endswith("->logits") for name in paths.Graph.of(case("gpt2").model).edges]
    assert response[logits].max() < 1e-10 < gradient[logits].min()


# Cost


@pytest.mark.parametrize("method", ["eap", "eap-ig", "receiver-exact"])
def test_rows_taken_one_at_a_time_change_nothing(method):
    given = case("llama")
    graph = paths.Graph.of(given.model, positions=SPANS)
    few = {"method": method, "graph": graph, "steps": 2}
    whole, chunked = score("llama", **few), score("llama", budget=1, **few)
    np.testing.assert_allclose(chunked.effect, whole.effect, **CLOSE)
    np.testing.assert_allclose(chunked.base, whole.base, **CLOSE)
    assert np.nanmax(np.abs(whole.effect)) > 1e-2


@pytest.mark.parametrize("values", ["zero", "mean"])
def test_rows_of_an_ablation_taken_one_at_a_time_change_nothing(values):
    given = case("gpt2")
    reference = given.inputs("reference") if values == "mean" else None
    found = [
        paths.edge_scores(
            given.model,
            given.inputs("clean", "left"),
            None,
            metric=METRIC,
            values=values,
            reference=reference,
            budget=b,
        ).effect
        for b in (None, 1)
    ]
    np.testing.assert_allclose(found[0], found[1], **CLOSE)


def test_the_sample_of_adaptive_scores_is_drawn_by_name():
    """Edges that are not there, or stand elsewhere, change nothing of what else is drawn."""
    found = synthetic(np.linspace(2.0, 1.0, 12))
    names, every = found.axes[0].values, synthetic(np.linspace(2.0, 1.0, 12))

    def drawn(some: list[str], seed: int = 0) -> list[str]:
        about = adaptive(found.sel(edge=some), lambda names: every.sel(edge=list(names)), top=0, sample=4, seed=seed)
        return about.config["adaptive"]["sampled"]

    whole = drawn(list(names))
    assert len(whole) == 4 and set(drawn(list(names)[::-1])) == set(whole) != set(drawn(list(names), seed=1))
    left_out = next(name for name in names if name not in whole)
    assert drawn([name for name in names if name != left_out]) == whole


@pytest.mark.parametrize("method", ["eap", "eap-ig", "receiver-exact", "exact", "adaptive"])
def test_changes_of_few_writers_are_held_at_once(method, monkeypatch):
    config = TransformerConfig(vocab_size=zoo.VOCAB, n_layers=3, d_model=24, n_heads=12, d_head=2, d_mlp=8, n_ctx=8)
    model = ip.wrap(zoo.prepare(Transformer(config)))
    clean, corrupt = model.inputs([[1, 2, 3]]), model.inputs([[4, 5, 6]])
    held: list[int] = []
    stack = Pair.stack
    monkeypatch.setattr(Pair, "stack", lambda self, writers: held.append(len(writers)) or stack(self, writers))
    budget = 6 * 16 * 3 * 24 * 8  # of the exact effects: what sixteen writers take
    paths.edge_scores(model, clean, corrupt, metric=METRIC, method=method, steps=1, top=9, sample=9, budget=budget)
    assert len(paths.Graph.of(model).writers) == 40
    assert 1 < max(held) <= 16


def test_work_grows_with_the_steps():
    work = [score("gpt2", method="eap-ig", steps=n).config["forward_equivalents"] for n in (1, 2, 4)]
    assert work[2] - work[1] == pytest.approx(2 * (work[1] - work[0])) and work[1] > work[0]


# Adaptive


@pytest.fixture(scope="module")
def verified() -> tuple[ip.Result, ip.Result, ip.Result]:
    """The receivers' scores, the adaptive ones, and the exact ones."""
    fast, mixed = (score("llama", method=m, top=10, sample=20, seed=3) for m in ("receiver-exact", "adaptive"))
    return fast, mixed, score("llama", method="exact")


def test_adaptive_scores_are_exact_where_they_were_verified(verified):
    fast, mixed, exact = verified
    about, names = mixed.config["adaptive"], mixed.axes[0].values
    order = np.argsort(-np.abs(fast.mean()))
    assert about["verified"] == [names[i] for i in order[:10]]
    assert len(about["sampled"]) == len(set(about["sampled"])) == 20
    assert not set(about["sampled"]) & set(about["verified"])
    at = [names.index(name) for name in about["verified"] + about["sampled"]]
    np.testing.assert_allclose(mixed.effect[at], exact.effect[at], **CLOSE)
    others = [i for i in range(len(names)) if i not in at]
    np.testing.assert_array_equal(mixed.effect[others], fast.effect[others])
    assert np.abs(fast.effect[at] - exact.effect[at]).max() > 1e-3
    assert mixed.config["method"] == "adaptive"
    assert mixed.config["forward_equivalents"] > fast.config["forward_equivalents"]


def test_the_bound_of_adaptive_scores_is_that_of_the_sample(verified):
    fast, mixed, exact = verified
    about, names = mixed.config["adaptive"], mixed.axes[0].values
    at = [names.index(name) for name in about["sampled"]]
    assert about["largest_sampled"] == pytest.approx(np.abs(exact.mean()[at]).max(), abs=1e-10)
    assert about["largest_error"] == pytest.approx(np.abs((exact.mean() - fast.mean())[at]).max(), abs=1e-10)
    assert (1 - about["share_beyond"]) ** 20 == pytest.approx(1 - about["confidence"])


def synthetic(effect: np.ndarray) -> ip.Result:
    """A result over made-up edges."""
    names = tuple(f"edge {i}" for i in range(len(effect)))
    zero = np.zeros(1)
    return ip.Result(
        effect[:, None], (Axis("edge", names),), ("m",), False, zero, None, np.zeros(len(effect), np.int8),
        np.zeros(()), ("row 0",), {"forward_equivalents": 1.0},
    )  # fmt: skip


def test_the_share_beyond_the_bound_is_as_often_right_as_is_said():
    """Over many samples, the share of the rest that lies beyond the largest sampled exceeds what is said in 1 of 20."""
    truth = np.random.default_rng(0).standard_normal(400)
    fast, exact = synthetic(np.zeros(400)), synthetic(truth)
    wrong, trials = 0, 400
    for seed in range(trials):
        found = adaptive(fast, lambda names: exact.sel(edge=list(names)), top=0, sample=30, seed=seed)
        about = found.config["adaptive"]
        wrong += np.mean(np.abs(truth) > about["largest_sampled"]) > about["share_beyond"]
    assert 0.01 < wrong / trials < 0.075  # 0.05 within three standard errors; a little less without replacement


def test_a_sample_of_all_the_rest_leaves_nothing_beyond():
    exact = synthetic(np.arange(6.0))
    found = adaptive(synthetic(np.arange(6.0)[::-1].copy()), lambda names: exact.sel(edge=list(names)), 2, 99)
    np.testing.assert_array_equal(found.mean(), np.arange(6.0))
    assert found.config["adaptive"]["share_beyond"] == 0.0
    nothing = adaptive(synthetic(np.ones(6)), lambda names: exact.sel(edge=list(names)), 2, 0).config["adaptive"]
    assert (nothing["largest_sampled"], nothing["share_beyond"]) == (None, 1.0)


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "eap-ig", "steps": 0}, "steps"),
        ({"method": "eap-ig", "steps": 1.5}, "steps"),
        ({"method": "adaptive", "top": -1}, "top=-1"),
        ({"method": "adaptive", "top": 0, "sample": 0}, "sample=0"),
        ({"metric": ip.rank(7)}, "no gradient"),
    ],
)
def test_what_scores_refuse(options, message):
    with pytest.raises(ip.InterpError, match=message):
        score("gpt2", **options)


def test_first_order_scores_need_the_heads_that_the_model_has():
    graph = paths.Graph.of(case("llama").model, query_heads=True)
    with pytest.raises(ip.InterpError, match="query_heads=False"):
        score("llama", graph=graph)


def test_the_work_of_a_classifier_is_told_in_its_own_forward_passes():
    """It reads one position, so that a pass over a row of tokens is not so many passes over one."""
    model = ip.wrap(zoo.make("vit"))
    draw = torch.Generator().manual_seed(0)
    pair = [model.inputs(torch.randn(2, *zoo.IMAGE, generator=draw, dtype=torch.float64)) for _ in range(2)]
    options = {"metric": ip.logit_diff(0, 1)}
    scored = paths.edge_scores(model, *pair, method="receiver-exact", **options)
    exact = paths.edge_sweep(model, *pair, readers="logits", **options)
    meter, graph = Meter(model.architecture), paths.Graph.of(model)
    rows, tokens = pair[0].mask.shape
    first_order = 3.0 * rows * meter.row(tokens)
    for layer, cost in enumerate(meter.costs):
        writers = [w for w in graph.writers if w.time < 2 * layer + 2]
        first_order += (1 + len(writers)) * rows * tokens * sum(cost[part] for part in ("q", "k", "v", "mlp"))
    counted = [result.config["forward_equivalents"] for result in (scored, exact)]
    assert counted[0] - counted[1] == pytest.approx(first_order / meter.row(tokens), rel=1e-12)
    one = paths.path_patch(model, *pair, ["input->m0"], semantics="set", metric=options["metric"], executor="batched")
    assert one.config["forward_equivalents"] == pytest.approx(3 * rows, rel=1e-12)  # the two plain worlds and its own
