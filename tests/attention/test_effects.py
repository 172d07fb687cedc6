"""Effects of attention, the routes inside heads, driving heads and maps, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp as ip
from experiments.modality_priors.questions import COLOUR_IDS
from interp.attention import (
    attention,
    attention_effect,
    driving_heads,
    image_map,
    overlay,
    route_effects,
    said,
    token_map,
)
from tests import zoo
from tests.attention.shapes import image_of, model, questions

METRIC = ip.logit_diff(int(COLOUR_IDS[0]), int(COLOUR_IDS[1]))


def measured(inputs, plan=None, seed=0):
    logits = model().run(inputs, plan, seed=seed).logits[:, -1]
    return (logits[:, COLOUR_IDS[0]] - logits[:, COLOUR_IDS[1]]).detach().numpy()


@pytest.mark.parametrize("stack", [None, "vision"])
@pytest.mark.parametrize("by", ["layer", "head", "all"])
def test_an_effect_is_with_attention_minus_without(stack, by):
    inputs = model().inputs(questions().arguments())
    found = attention_effect(model(), inputs, metric=METRIC, do="random", by=by, stack=stack, samples=2, progress=False)
    cells = {
        "layer": [((layer,), {"layers": layer}) for layer in range(3)],
        "head": [((1, 2), {"layers": 1, "heads": 2}), ((2, 0), {"layers": 2, "heads": 0})],
        "all": [((0,), {})],
    }[by]
    for index, where in cells:
        plans = [attention(model(), "random", stack=stack, seed=n, **where) for n in range(2)]
        want = measured(inputs) - np.mean([measured(inputs, plan) for plan in plans], axis=0)
        np.testing.assert_allclose(found.effect[index], want, atol=1e-6)
        assert np.abs(want).max() > 1e-5
    assert found.config["samples"] == 2 and found.effect.shape[-1] == 3


def test_the_attention_to_the_image_alone():
    asked = questions()
    inputs = model().inputs(asked.arguments())
    found = attention_effect(model(), inputs, metric=METRIC, do="reversed", keys="image", progress=False)
    for layer in range(3):
        want = measured(inputs) - measured(inputs, attention(model(), "reversed", layers=layer, keys=image_of(asked)))
        np.testing.assert_allclose(found.effect[layer], want, atol=1e-6)
    again = attention_effect(
        model(), inputs, metric=METRIC, do="reversed", keys="image", progress=False, executor="sequential"
    )
    np.testing.assert_allclose(found.effect, again.effect, atol=1e-6)


def test_an_effect_goes_on_where_it_stopped(tmp_path):
    inputs = model().inputs(questions().arguments())
    options = {"metric": METRIC, "do": "shuffled", "samples": 2, "progress": False, "path": tmp_path}
    first = attention_effect(model(), inputs, **options)
    assert {file.stem for file in tmp_path.glob("*.json")} >= {"draw_0", "draw_1"}
    np.testing.assert_array_equal(attention_effect(model(), inputs, **options).effect, first.effect)


@pytest.mark.parametrize("family", ["small_ln_learned", "llama", "gemma2", "qwen2"])
def test_routes_add_up(family):
    """z_img + z_txt is z, in grouped heads and soft-capped ones; their first-order effects sum to that of z."""
    wrapped = zoo.wrapped(family)
    inputs = wrapped.inputs([[6, 1, 5, 3, 8], [2, 7, 4]], padding="left")
    image = torch.zeros_like(inputs.mask, dtype=torch.bool)
    image[0, 1:3], image[1, 3] = True, True
    real = inputs.mask.bool()
    places = [ip.site(name, 1) for name in ("pattern", "v", "z")]
    pattern, v, z = (wrapped.run(inputs, capture=places).tape[place] for place in places)
    groups = pattern.shape[1] // v.shape[2]
    wide = v.repeat_interleave(groups, 2)
    parts = [torch.einsum("bhts,bshd->bthd", pattern * keys[:, None, None], wide) for keys in (image, real & ~image)]
    torch.testing.assert_close(sum(parts)[real], z[real], rtol=0, atol=1e-6)
    metric = ip.logit_diff(3, 7)
    routes = route_effects(wrapped, inputs, image, metric=metric)
    heads = ip.attribution(wrapped, inputs, None, ip.grid("z", layer="all"), metric=metric, intervention=ip.zero)
    both = routes.image.effect.sum(1) + routes.text.effect.sum(1)
    np.testing.assert_allclose(both, -heads.effect, atol=1e-6)
    assert np.abs(routes.image.effect).max() > 1e-3


def test_first_order_routes_are_exact_where_all_after_the_head_is_linear():
    wrapped = zoo.wrapped("llama")
    inputs = wrapped.inputs([[6, 1, 5, 3, 8], [2, 7, 4, 1, 9]])
    image = torch.zeros_like(inputs.mask, dtype=torch.bool)
    image[:, 1:3] = True
    # What the last layer's attention adds, along a direction: nothing of it is seen through a norm.
    width = wrapped.sizes["attn_out", 2, None]["dim"]
    direction = torch.randn(width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    metric = ip.metric(lambda x: x[:, 0] @ direction, [ip.site("attn_out", 2, pos=-1)])
    rough, exact = (route_effects(wrapped, inputs, image, metric=metric, exact=e) for e in (False, True))
    for one, two in ((rough.image, exact.image), (rough.text, exact.text)):
        np.testing.assert_allclose(one.effect[2], two.effect[2], atol=1e-8)
        assert np.abs(two.effect[2]).max() > 1e-3 and np.abs(one.effect[0] - two.effect[0]).max() > 1e-6


def test_exact_routes_are_knocked_out_one_by_one():
    asked = questions()
    inputs, image = model().inputs(asked.arguments()), image_of(asked)
    found = route_effects(model(), inputs, image, metric=METRIC, exact=True, queries=-1, progress=False)
    for result, keys in ((found.image, image), (found.text, asked.attention_mask.bool() & ~image)):
        plan = ip.zero(ip.site("pattern", 0, head=1, pos=-1, key_pos=keys))
        np.testing.assert_allclose(result.effect[0, 1], measured(inputs) - measured(inputs, plan), atol=1e-6)
    share = found.visual_share
    assert share.shape == (3, 4) and bool(((share >= 0) & (share <= 1)).all())
    for layer, head in found.prior_dominant(1.0):
        assert found.image.mean()[layer, head] * found.text.mean()[layer, head] < 0


def test_driving_heads_are_edges_to_the_logits():
    wrapped = zoo.wrapped("llama")
    conflict, agree = wrapped.inputs([[6, 1, 5, 3], [2, 7, 4, 1]]), wrapped.inputs([[6, 1, 9, 3], [2, 7, 8, 1]])
    found = driving_heads(wrapped, conflict, agree, metric=ip.logit_diff(3, 7), progress=False)
    assert len(found.axes[0]) == 12 and found.axes[0].values[0] == "a0.h0->logits"
    want = ip.paths.edge_sweep(
        wrapped, conflict, agree, metric=ip.logit_diff(3, 7), edges=["a1.h2->logits"], progress=False
    )
    np.testing.assert_allclose(found.sel(edge="a1.h2->logits").effect, want.effect[0], atol=1e-9)


def test_maps_of_tokens():
    asked = questions()
    inputs = model().inputs(asked.arguments())
    exact = token_map(model(), inputs, metric=METRIC, exact=True, progress=False)
    rough = token_map(model(), inputs, metric=METRIC)
    real = asked.attention_mask.bool()
    assert torch.equal(exact.isnan(), ~real) and torch.equal(rough.isnan(), ~real)
    keys = torch.zeros_like(real)
    keys[:, -2] = True
    plan = ip.Plan(tuple(ip.zero(ip.site("pattern", layer, key_pos=keys)) for layer in range(3)))
    np.testing.assert_allclose(exact[:, -2].numpy(), measured(inputs) - measured(inputs, plan), atol=1e-6)
    assert np.corrcoef(exact[real].numpy(), rough[real].numpy())[0, 1] > 0.5
    shown = image_map(exact, image_of(asked), (3, 3))
    assert torch.equal(shown[0].flatten(), exact[0][image_of(asked)[0]])
    assert overlay(np.zeros((3, 24, 24)), shown[0]).images and said(["a", "b"], [0.5, -1.0]).texts
    with pytest.raises(ip.InputsError, match="patches"):
        image_map(exact, image_of(asked), (4, 3))
    with pytest.raises(ip.InputsError, match="2 words"):
        said(["a", "b"], [1.0])
    with pytest.raises(ip.MetricError, match="no gradient"):
        token_map(model(), inputs, metric=ip.accuracy(3))


def test_bad_input():
    wrapped = zoo.wrapped("llama")
    inputs = wrapped.inputs([[6, 1, 5, 3, 8], [2, 7, 4, 1, 9]])
    with pytest.raises(ip.SiteError, match="no stack 'vision'"):
        attention_effect(wrapped, inputs, metric=METRIC, stack="vision")
    with pytest.raises(ip.PlanError, match="by is one of"):
        attention_effect(wrapped, inputs, metric=METRIC, by="token")
    with pytest.raises(ip.PlanError, match="1 or more"):
        attention_effect(wrapped, inputs, metric=METRIC, samples=0)
    with pytest.raises(ip.PlanError, match="unknown form"):
        attention_effect(wrapped, inputs, metric=METRIC, do="zero")
    with pytest.raises(ip.InterpError):
        attention_effect(wrapped, inputs, metric=ip.logit_diff(3, 7), keys="image", progress=False)
    for image in (torch.ones(2, 5), torch.ones(2, 4, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.bool)):
        with pytest.raises(ip.InputsError, match=r"mask bool|both kinds"):
            route_effects(wrapped, inputs, image, metric=ip.logit_diff(3, 7))
