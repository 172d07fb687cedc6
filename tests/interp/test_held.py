"""What is measured while a plan is held is what is measured of the network that has the plan in its weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import interp as ip
from hooks import Model
from interp import training as tr
from tests import zoo
from tests.baking import COMPUTED, baked, held

CLOSE = {"rtol": 0, "atol": 1e-10}
FAMILIES = ("gpt2", "llama", "gemma2")
METRICS = [ip.logit_diff(7, 9), ip.kl()]

pytestmark = pytest.mark.parametrize("family", FAMILIES)


def of(family: str, seed: int = 0) -> tuple[Model, ip.Inputs, ip.Inputs]:
    """A model, and pairs of prompts that begin alike."""
    model = ip.wrap(zoo.make(family))
    ids, mask = zoo.random_inputs(zoo.VOCAB, (5, 3, 6), "left", seed)
    other, _ = zoo.random_inputs(zoo.VOCAB, (5, 3, 6), "left", seed + 1)
    return model, model.inputs(ids, mask), model.inputs(other, mask)


def scales(family: str) -> dict:
    """Those of the MLP are before the norm that gemma2 has after it."""
    return {key: by for key, by in COMPUTED.items() if family != "gemma2" or key[0] != "mlp_out"}


def as_baked(model: Model, family: str, measure: Callable[[Model], np.ndarray]) -> None:
    other = baked(model, scales(family))
    expected, plain = measure(other), measure(model)
    with model.apply(held(scales(family))) as audit:
        found = measure(model)
    np.testing.assert_allclose(found, expected, **CLOSE)
    assert np.abs(expected - plain).max() > 1e-3 and np.abs(expected).max() > 1e-3
    assert all(entry.calls for entry in audit)


def numbers(result: ip.Result) -> np.ndarray:
    assert result.source is not None
    return np.concatenate([part.ravel() for part in (result.effect, result.base, result.source)])


@pytest.mark.parametrize(
    ("executor", "direction"),
    [("sequential", "denoising"), ("batched", "noising"), ("shared", "denoising"), ("shared", "noising")],
)
def test_both_runs_of_a_sweep_are_under_the_plan(family, direction, executor):
    model, *pair = of(family)
    options = {"direction": direction, "executor": executor, "progress": False}
    for grid in (ip.grid("resid_post", layer="all", pos=[0, -1]), ip.grid("z", layer="all", head="all")):
        as_baked(model, family, lambda m, g=grid: numbers(ip.sweep(m, *pair, g, metric=METRICS, **options)))


def test_the_whole_residual_of_the_last_layer_makes_the_other_run(family):
    model, *pair = of(family)
    with model.apply(held(scales(family))):
        result = ip.sweep(model, *pair, ip.grid("resid_post", layer=[model.n_layers - 1]), metric=METRICS[0])
    np.testing.assert_allclose(result.base + result.effect[0], result.source, **CLOSE)
    np.testing.assert_allclose(result.normalized(), 1.0, **CLOSE)
    assert np.abs(result.effect).min() > 1e-3


def test_noise_that_is_held_is_that_of_the_sweeps_seed(family):
    model, *pair = of(family)
    plan = ip.Plan((ip.noise(ip.site("z", 0), 0.5),))
    with model.apply(plan):
        found = [f(model, *pair, ip.grid("mlp_out"), metric=METRICS[0], seed=3) for f in (ip.sweep, ip.attribution)]
    for inputs, name in zip(pair, ("source", "base"), strict=True):
        logits = model.run(ip.World(inputs, plan), seed=3).logits[:, -1]
        for result in found:
            np.testing.assert_allclose(getattr(result, name), logits[:, 7] - logits[:, 9], **CLOSE)


@pytest.mark.parametrize("budget", [None, 1])
def test_attribution(family, budget):
    model, *pair = of(family)
    grid = ip.grid("z", layer="all", head="all")
    as_baked(model, family, lambda m: numbers(ip.attribution(m, *pair, grid, metric=METRICS[0], budget=budget)))


def test_attribution_under_a_plan_that_mixes_rows(family):
    model, *pair = of(family)
    plan = ip.intervene(ip.site("mlp_out", 0), lambda x, ctx: x.flip(0), mixes=("row",))
    with pytest.raises(ip.InterpError, match="held on the model, mixes rows"), model.apply(plan):
        ip.attribution(model, *pair, ip.grid("z", layer="all"), metric=METRICS[0])


def test_lenses(family):
    model, inputs, _ = of(family)

    def measure(m: Model) -> np.ndarray:
        lens, metric = ip.logit_lens(m, inputs), ip.logit_lens(m, inputs, METRICS[0])
        parts = [ip.direct_logit_attribution(m, inputs, 7, 9, heads=heads).effect for heads in (True, False)]
        real = lens.logits[:, inputs.mask]
        return np.concatenate([part.ravel() for part in (real.numpy(), metric.effect, *parts)])

    as_baked(model, family, measure)


def test_what_is_measured_of_heads(family):
    model, inputs, _ = of(family)
    inputs = model.inputs(torch.cat([inputs.ids[:1, -4:]] * 2, 1))

    def measure(m: Model) -> np.ndarray:
        metric = ip.cross_entropy()
        strengths = [tr.previous_token_strength(m, inputs), tr.prefix_matching(m, inputs), tr.copying(m, inputs)]
        strengths.append(tr.induction_strength(m, inputs, 1, 5, 2, [[0, 1]]))
        strengths += [f(m, inputs, 1, metric) for f in (tr.heads_alone, tr.heads_without)]
        clamp = tr.ablate_heads(0, [0])
        return np.array([tr.under(m, inputs, metric, clamp), *torch.cat([s.flatten() for s in strengths]).tolist()])

    as_baked(model, family, measure)


@pytest.mark.parametrize("name", ["ln_final", "logits"])
def test_a_plan_of_what_is_read_out_is_refused(family, name):
    """The final norm and the unembedding are applied to parts of the stream, which the plan is not of."""
    model, inputs, _ = of(family)
    twice = model.inputs(torch.cat([inputs.ids[:1, -3:]] * 2, 1))
    plan = ip.scale(ip.site(name), 0.5)
    for run in (
        lambda: ip.logit_lens(model, inputs),
        lambda: ip.direct_logit_attribution(model, inputs, 7),
        lambda: tr.copying(model, twice),
    ):
        run()
        with pytest.raises(ip.InterpError, match=f"{name}.*held on the model"), model.apply(plan):
            run()


def test_components_do_not_add_up_to_a_stream_that_is_edited(family):
    model, inputs, _ = of(family)
    with model.apply(ip.scale(ip.site("resid_post", 0), 0.5)):
        ip.logit_lens(model, inputs)
        with pytest.raises(ip.InterpError, match="under the plan that is held"):
            ip.direct_logit_attribution(model, inputs, 7)
