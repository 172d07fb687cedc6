"""Random plans x ways to generate: the same tokens and logits as recomputation, and the model stays as it was."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor

import hooks as hk
from hooks import Inputs, Intervention, Model, Plan, Site, World, new, site
from tests import zoo
from tests.hooks.decoding import assert_equal, generated, recomputed
from tests.zoo import wrapped

FAMILIES = ("gpt2", "llama", "mistral", "gemma2", "neox")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@cache
def weights(family: str) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in wrapped(family).module.state_dict().items()}


@st.composite
def ways(draw: st.DrawFn) -> dict[str, Any]:
    way = draw(
        st.sampled_from(
            [
                {},
                {"num_beams": 2},
                {"num_beams": 2, "num_return_sequences": 2},
                {"do_sample": True, "draws": draw(st.integers(0, 9))},
                {"do_sample": True, "num_return_sequences": 2, "draws": 1},
                {"cache_implementation": "static"},
                {"prefill_chunk_size": draw(st.integers(1, 4))},
                {"use_cache": False},
                {"cache_implementation": "static", "num_beams": 2},
            ]
        )
    )
    return way | {"max_new_tokens": draw(st.integers(2, 4))}


@st.composite
def positions(draw: st.DrawFn, x: Inputs) -> Any:
    """Positions of the prompt, new ones, or all."""
    shortest, rows = int(x.lengths.min()), len(x)
    one = st.integers(-shortest, shortest - 1)
    kinds: list[Any] = [None, "all", "new", new(1), new(0, 2), new(0, None, 2), slice(None), slice(1, None), (0, -1)]
    kinds += [slice(-2, None), slice(0, 2), draw(one), draw(one)]
    kinds.append(torch.tensor(draw(st.lists(one, min_size=rows, max_size=rows))))
    kinds.append(x.mask & (x.positions % 2 == draw(st.integers(0, 1))))
    return draw(st.sampled_from(kinds))


@st.composite
def interventions(draw: st.DrawFn, model: Model, x: Inputs, source: World) -> Intervention:
    info = draw(st.sampled_from(list(model.sites())))
    layer = draw(st.integers(0, info.layers - 1)) if info.layers else None
    place: Site = site(info.name, layer, pos=draw(positions(x)))
    if "key_pos" in place.axes:
        place = place.at(key_pos=draw(st.sampled_from([None, 0, -1, (0, 1), slice(1, None), "new", new(0, 1)])))
    if "head" in place.axes:
        place = place.at(head=draw(st.sampled_from([None, 0, -1, (0, 1)])))
    of_prompt = place.pos is not None and not isinstance(place.pos, hk.New)
    kinds = ["scale", "noise", "freeze", "bend", "zero"]
    if of_prompt and "key_pos" not in place.axes:
        kinds += ["patch", "patch"]
    if place.name == "scores":
        kinds += ["knockout"] * 3
    kind = draw(st.sampled_from(kinds))
    if kind == "scale":
        item = hk.intervene(place, lambda v, ctx: torch.where(v.isfinite(), 1.5 * v, v))
    elif kind == "noise":
        item = hk.noise(place, 0.5, seed=draw(st.integers(0, 3)))
    elif kind == "freeze":
        item = hk.freeze(place)
    elif kind == "bend":
        item = hk.intervene(place, lambda v, ctx: torch.where(v.isfinite(), 0.7 * v + torch.sin(2.0 * v), v))
    elif kind == "patch":
        item = hk.patch(place, source)
    elif kind == "knockout":
        item = hk.knockout(place)
    else:
        item = hk.freeze(place) if place.name.endswith("_scale") else hk.zero(place)
    if not item.op.writes_inf and draw(st.integers(0, 3)) == 0:
        item = item.strength(torch.tensor([0.3, 0.9])[: len(x)].double())
    if draw(st.integers(0, 3)) == 0:
        item = item.where(torch.arange(len(x)) == draw(st.integers(0, len(x) - 1)))
    return item


@st.composite
def cases(draw: st.DrawFn, family: str) -> tuple[Inputs, Plan, dict[str, Any]]:
    model = wrapped(family)
    lengths = draw(st.lists(st.integers(2, 6), min_size=1, max_size=2))
    x = model.inputs(*zoo.random_inputs(zoo.VOCAB, lengths, "left", draw(st.integers(0, 99))))
    source = World(Inputs.of((x.ids + 5) % zoo.VOCAB, x.mask), hk.scale(site("resid_pre", 0), 1.3))
    items = draw(st.lists(interventions(model, x, source), min_size=1, max_size=4))
    return x, Plan(tuple(items)), draw(ways())


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_generation_is_recomputation(family, data):
    x, plan, way = data.draw(cases(family))
    model = wrapped(family)
    before, idle = weights(family), []
    try:
        got, audit = generated(model, x, plan, seed=3, **way)
    except hk.UnfiredError as error:
        idle = [item for item in plan if str(item) in str(error)]
    if idle:
        # Some never come: the logits of most of a prompt are not computed, nor is what a short generation lacks.
        event("unfired")
        assert all(may_never_fire(item, x, way) for item in idle), idle
        return
    want = recomputed(model, x, plan, seed=3, **way)
    assert torch.equal(got.tokens, want.tokens)
    assert_equal(got.logits, want.logits)
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    expand = max(way.get("num_beams", 1), way.get("num_return_sequences", 1))
    most = expand * (int(x.lengths.sum()) + len(x) * (way["max_new_tokens"] - 1))
    assert all(0 <= entry.positions <= most for entry in audit)


def may_never_fire(item: Intervention, x: Inputs, way: dict[str, Any]) -> bool:
    place, steps = item.site, way["max_new_tokens"] - 1
    lacking = any(isinstance(index, hk.New) and index.start >= steps for index in (place.pos, place.key_pos))
    # A query of the prompt never attends to a new token, nor a window's last to the first.
    before = isinstance(place.key_pos, hk.New) and place.pos is not None and not isinstance(place.pos, hk.New)
    return lacking or before or place.name == "logits" or item.only is not None
