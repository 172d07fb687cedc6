"""Estimates from gradients: against finite differences, against exact effects, and where they are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp as ip
from hooks import Tail
from tests import zoo
from tests.kv.test_effects import CONTEXT, texts


def gated(model, context, suffix, gates: torch.Tensor) -> float:
    """The answer's negative log-likelihood with a gate on exp(score) of every unit, [L, K, S]."""
    tail = Tail(model, torch.tensor(context + suffix), CONTEXT, range(CONTEXT, CONTEXT + len(suffix) - 1))
    bias = torch.zeros(*gates.shape[:2], tail.total, dtype=torch.float64)
    bias[..., :CONTEXT] = gates.log()
    with torch.no_grad():
        logits = tail.run(bias[None])[0]
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(suffix[1:]), reduction="sum"))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_gradient_is_the_derivative_of_the_gated_forward(family):
    model = zoo.wrapped(family)
    (context,), (suffix,) = texts(1)
    found = ip.kv.kv_effects(model, context, suffix, how="gradient").effect[..., 0]
    checked = [*np.argsort(-np.abs(found).ravel())[:4].tolist(), 0, 7]
    for flat in checked:
        at = np.unravel_index(flat, found.shape)
        step, values = 1e-5, []
        for sign in (1, -1):
            gates = torch.ones(found.shape, dtype=torch.float64)
            gates[at] += sign * step
            values.append(gated(model, context, suffix, gates))
        assert -(values[0] - values[1]) / (2 * step) == pytest.approx(found[at], rel=1e-5, abs=1e-8)
    assert np.abs(found).max() > 1e-3


def test_estimates_are_near_what_they_estimate():
    """On a model whose attention is spread thin, one unit is a small change, which is what first order is about."""
    model = zoo.fresh("llama")
    with torch.no_grad():
        for block in model.module.model.layers:
            block.self_attn.q_proj.weight.mul_(0.2)
            block.self_attn.o_proj.weight.mul_(0.2)
    contexts, suffixes = texts(2)
    exact = ip.kv.kv_effects(model, contexts, suffixes)
    errors = {}
    for how in ("gradient", "rescaled"):
        found = ip.kv.kv_effects(model, contexts, suffixes, how=how)
        assert found.config["how"] == how
        errors[how] = np.abs(found.effect - exact.effect).max() / np.abs(exact.effect).max()
    assert errors["rescaled"] < 0.3 and errors["rescaled"] < errors["gradient"] < 0.6
    kl = ip.kv.kv_effects(model, contexts, suffixes, metric="kl")
    curved = ip.kv.kv_effects(model, contexts, suffixes, metric="kl", how="gauss_newton", steps=400)
    assert kl.effect.min() >= 0 and curved.effect.min() >= 0
    large = kl.effect > np.quantile(kl.effect, 0.7)
    np.testing.assert_allclose(curved.effect[large] / kl.effect[large], 1, atol=0.35)


def test_integrated_gradients_add_up():
    """Gates that close together account for what all units together do."""
    model = zoo.wrapped("llama")
    (context,), (suffix,) = texts(3)
    found = ip.kv.kv_effects(model, context, suffix, metric=("nll", "kl"), how="integrated", steps=300)
    whole = ip.kv.kv_effects(model, context, suffix, metric=("nll", "kl"), unit=[(0, CONTEXT)])
    assert np.abs(whole.effect).min() > 0.1
    np.testing.assert_allclose(found.effect[..., 0].sum((1, 2, 3)), whole.effect[:, 0, 0], rtol=0.03)


@pytest.mark.parametrize("how", ["gradient", "rescaled", "integrated"])
def test_larger_units_are_sums_and_queries_are_parts(how):
    model = zoo.wrapped("llama")
    (context,), (suffix,) = texts(4)
    units = ip.kv.kv_effects(model, context, suffix, how=how, metric=("nll", "margin")).effect
    tokens = ip.kv.kv_effects(model, context, suffix, how=how, metric=("nll", "margin"), unit="token").effect
    np.testing.assert_allclose(tokens, units.sum((1, 2)), atol=1e-11)
    spans = ip.kv.kv_effects(model, context, suffix, how=how, metric=("nll", "margin"), unit=[(1, 4)]).effect
    np.testing.assert_allclose(spans[:, 0], tokens[:, 1:4].sum(1), atol=1e-11)
    each = ip.kv.kv_effects(model, context, suffix, how=how, metric=("nll", "margin"), per_query=True).effect
    np.testing.assert_allclose(each.sum(-2), units, atol=1e-11)


def test_a_stream_has_a_gradient():
    """The gate of a unit counts for the queries that come after it was evicted."""
    model = zoo.wrapped("llama")
    (context,), (suffix,) = texts(5)
    found = ip.kv.kv_effects(model, context, suffix, how="gradient", estimand="streaming", chunk=3).effect[..., 0]
    prefill = ip.kv.kv_effects(model, context, suffix, how="gradient").effect[..., 0]
    np.testing.assert_allclose(found[..., 6:], prefill[..., 6:], atol=1e-11)
    step, at = 1e-5, (0, 1, 2)
    tail = Tail(model, torch.tensor(context + suffix), 3, range(CONTEXT, CONTEXT + len(suffix) - 1))
    values = []
    for sign in (1, -1):
        bias = torch.zeros(1, *found.shape[:2], tail.total, dtype=torch.float64)
        bias[0][at] = np.log1p(sign * step)
        with torch.no_grad():
            logits = tail.run(bias)[0]
        values.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(suffix[1:]), reduction="sum")))
    assert -(values[0] - values[1]) / (2 * step) == pytest.approx(found[at], rel=1e-5)


def test_a_stream_is_integrated():
    """Gates that close for the queries after their tokens left account for attention to nothing but a chunk."""
    model = zoo.wrapped("llama")
    (context,), (suffix,) = texts(3)
    options = {"how": "integrated", "estimand": "streaming", "chunk": 4}
    found = ip.kv.kv_effects(model, context, suffix, steps=400, **options).effect[..., 0]
    plan = ip.Plan()
    for start, stop in ((0, 4), (4, 8), (8, CONTEXT)):
        asking, keys = range(stop, CONTEXT + len(suffix)), range(start, stop)
        for layer in range(model.n_layers):
            plan = plan + ip.knockout(ip.site("scores", layer=layer, pos=asking, key_pos=keys))
    targets = torch.tensor(suffix[1:])
    base, gone = (
        torch.nn.functional.cross_entropy(
            model.run(model.inputs([context + suffix]), one).logits[0, CONTEXT:-1], targets, reduction="sum"
        )
        for one in (ip.Plan(), plan)
    )
    assert abs(float(gone - base)) > 0.1
    assert found.sum() == pytest.approx(float(gone - base), rel=1e-3)
    spans = ip.kv.kv_effects(model, context, suffix, unit=[(1, 3), (4, 7)], steps=400, **options).effect[:, 0]
    np.testing.assert_allclose(spans, [found[..., 1:3].sum(), found[..., 4:7].sum()], atol=1e-11)
    with pytest.raises(ip.InputsError, match="shares tokens"):
        ip.kv.kv_effects(model, context, suffix, unit=[(0, 3), (2, 7)], **options)


def test_spans_that_share_tokens_leave_a_stream_each_at_its_time():
    model = zoo.wrapped("llama")
    (context,), (suffix,) = texts(5)
    options = {"how": "gradient", "estimand": "streaming", "chunk": 4}
    together = ip.kv.kv_effects(model, context, suffix, unit=[(0, 3), (2, 7)], **options).effect
    alone = [ip.kv.kv_effects(model, context, suffix, unit=[span], **options).effect[0] for span in ((0, 3), (2, 7))]
    np.testing.assert_allclose(together, alone, atol=1e-11)
    tokens = ip.kv.kv_effects(model, context, suffix, unit="token", **options).effect
    np.testing.assert_allclose(together[0], tokens[:3].sum(0), atol=1e-11)
    assert np.abs(together).min() > 1e-4 and np.abs(together[1] - tokens[2:7].sum(0)).max() > 1e-4


def test_estimates_need_the_description():
    model = zoo.fresh("llama")
    (context,), (suffix,) = texts()
    with model.apply(ip.zero(ip.site("mlp_out", layer=0))):
        ip.evaluate(model, model.inputs([context]), ip.logit(1))
        with pytest.raises(ip.InputsError, match="held"):
            ip.kv.kv_effects(model, context, suffix, how="gradient")
