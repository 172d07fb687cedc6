"""`model.generate` where the model, its settings or its caller are not the usual: half precision, dropout, compiled
forwards, settings of the user's, caches, interrupts; and on models of other tools, under random plans.
"""

from __future__ import annotations

import copy
import pickle
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import hooks as hk
from hooks import Inputs, Model, Plan, new, site
from tests import zoo
from tests.hooks import bridged
from tests.hooks.decoding import OPTIONS, assert_equal, prompts
from tests.hooks.test_generation_modes import Breaks, mixed
from tests.hooks.test_restore import State
from tests.zoo import fresh

pytestmark = pytest.mark.filterwarnings("ignore")
PLACE = site("resid_post", 1)


@torch.no_grad()
def test_settings_of_the_users_stay_as_they_are() -> None:
    from transformers import GenerationConfig

    model = fresh("llama")
    x, plan = prompts(model), mixed(model)
    want = model.generate(x, plan, **OPTIONS)
    told = GenerationConfig(**OPTIONS)
    before, own = copy.deepcopy(told.to_dict()), copy.deepcopy(model.module.generation_config.to_dict())  # type: ignore[operator]
    got = model.generate(x, plan, generation_config=told, logits=True, capture=PLACE)
    assert torch.equal(got.sequences, want.sequences) and got.logits is not None
    assert told.to_dict() == before and model.module.generation_config.to_dict() == own  # type: ignore[operator]
    beams = GenerationConfig(**dict(OPTIONS, num_beams=3, num_return_sequences=2))
    assert model.generate(x, plan, generation_config=beams, capture=PLACE)[PLACE].shape[0] == 4
    ends = GenerationConfig(**dict(OPTIONS, eos_token_id=int(want.tokens[0, 1])))
    assert model.generate(x, plan, generation_config=ends).lengths[0] == 2


@torch.no_grad()
def test_half_precision_and_dropout() -> None:
    half = hk.wrap(zoo.make("llama", dtype=torch.bfloat16))
    x = prompts(half)
    out = half.generate(x, hk.scale(PLACE.at(pos="new"), 1.5), capture=PLACE, logits=True, **OPTIONS)
    assert out[PLACE].dtype == torch.bfloat16 and out.audit[0].positions == 6
    assert out.logits is not None and bool(out.logits.isfinite().all())
    model = fresh("gpt2")
    for part in model.module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.3
    model.module.train()
    found = []
    for plan in (None, hk.scale(site("z", 0), 1.0), hk.freeze(site("z", 1))):  # neither changes anything
        torch.manual_seed(0)
        found.append(model.generate(x, plan, logits=True, **OPTIONS).logits)
    assert model.module.training and torch.equal(found[0], found[1])
    assert_equal([found[2]], [found[0]])
    torch.manual_seed(1)
    assert not torch.equal(model.generate(x, logits=True, **OPTIONS).logits, found[0])  # type: ignore[arg-type]


@pytest.mark.full
@torch.no_grad()
def test_a_compiled_forward() -> None:
    plain = fresh("llama")
    y, plan = prompts(plain), mixed(plain)
    want = plain.generate(y, plan, **OPTIONS)
    plain.module.forward = torch.compile(plain.module.forward, backend="eager")
    assert torch.equal(plain.generate(y, plan, **OPTIONS).sequences, want.sequences)


@torch.no_grad()
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_whatever_was_raised_the_model_is_as_before(error: BaseException) -> None:
    model = fresh("llama")
    x, plan, state = prompts(model, lengths=(5,)), mixed(model), State(model.module)
    want = model.generate(x, plan, capture=PLACE, **OPTIONS)
    with pytest.raises(type(error)):
        model.generate(x, plan, capture=PLACE, streamer=Breaks(3, error), **OPTIONS)
    state.assert_kept()
    again = model.generate(x, plan, capture=PLACE, **OPTIONS)
    assert torch.equal(again[PLACE], want[PLACE]) and not model.holds
    there = pickle.loads(pickle.dumps(again))
    assert torch.equal(there[PLACE.at(pos="new")], want[PLACE.at(pos="new")])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["assistant", "static", "fresh cache", "hybrid", "draws of a function"])
def test_other_ways_give_what_the_plain_one_gives(kind: str) -> None:
    from transformers import DynamicCache

    model = fresh("gemma2" if kind == "hybrid" else "llama")
    x, plan = prompts(model, lengths=(6,)), mixed(model)
    ways: dict[str, dict[str, Any]] = {
        "assistant": {"assistant_model": zoo.make("llama", seed=3)},
        "static": {"cache_implementation": "static"},
        "hybrid": {"cache_implementation": "hybrid"},
        "fresh cache": {"past_key_values": DynamicCache(config=model.module.config)},  # type: ignore[arg-type]
        "draws of a function": {},
    }
    keep: dict[str, Any] = {"capture": ["resid_post", "pattern", "v"], "logits": True, "seed": 3}
    if kind == "draws of a function":
        plan = Plan(plan.interventions[:3])
    todo: Any = (lambda inputs: plan) if kind == "draws of a function" else plan
    want = model.generate(x, plan, **keep, **OPTIONS)
    got = model.generate(x, todo, **keep, **OPTIONS, **ways[kind])
    assert torch.equal(got.sequences, want.sequences)
    for place, value in want.values:
        assert_equal([got[place]], [value])


# On models of other tools

WAYS: list[dict[str, Any]] = [
    {},
    {"num_beams": 2, "num_return_sequences": 2},
    {"cache_implementation": "static"},
    {"use_cache": False},
    {"prefill_chunk_size": 2},
]


backward = pytest.fixture(autouse=True, scope="module")(bridged.torch_backward)


@st.composite
def items(draw: st.DrawFn, model: Model, x: Inputs) -> hk.Intervention:
    names = sorted(key for key in model.sizes if key[0] not in ("logits", "pos_embed"))
    name, layer, _ = draw(st.sampled_from(names))
    of_layer = None if layer == -1 else layer
    place = site(name, of_layer, pos=draw(st.sampled_from([None, "new", new(1), 0, -1, slice(1, None), (0, -1)])))
    if "head" in place.axes:
        place = place.at(head=draw(st.sampled_from([None, 0, (0, 1)])))
    if "key_pos" in place.axes:
        place = place.at(key_pos=draw(st.sampled_from([None, 0, -1, slice(1, None)])))
    kind = draw(st.sampled_from(["scale", "noise", "freeze", "knockout" if name == "scores" else "zero"]))
    if kind == "knockout":
        return hk.knockout(place)
    if kind == "zero":
        return hk.zero(place)
    if kind == "freeze":
        return hk.freeze(place)
    if kind == "noise" and name != "scores":
        return hk.noise(place, 0.3, seed=draw(st.integers(0, 3)))
    return hk.intervene(place, lambda v, ctx: torch.where(v > torch.finfo(v.dtype).min / 2, 1.4 * v, v))


@torch.no_grad()
@pytest.mark.parametrize("tool", bridged.TOOLS)
@pytest.mark.parametrize(
    ("family", "examples"), [("llama", 6), *(pytest.param(f, 25, marks=pytest.mark.full) for f in ("gpt2", "gemma2"))]
)
def test_random_plans_on_other_tools(tool: str, family: str, examples: int) -> None:
    if find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed")
    ours, theirs = bridged.native(family), bridged.TOOLS[tool](family)

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    @given(data=st.data())
    def holds(data: st.DataObject) -> None:
        x = prompts(ours, lengths=data.draw(st.sampled_from([(6, 4), (5,)])), seed=data.draw(st.integers(0, 9)))
        plan = Plan(tuple(data.draw(st.lists(items(theirs, x), min_size=1, max_size=3))))
        options: dict[str, Any] = dict(OPTIONS, logits=True, seed=2, **data.draw(st.sampled_from(WAYS)))
        try:
            one = ours.generate(x, plan, **options)
        except hk.UnfiredError:
            assume(False)
            raise
        two = theirs.generate(x, plan, **options)
        assert one.logits is not None and two.logits is not None
        bridged.close(one.logits[:, 0], two.logits[:, 0], atol=2e-4)
        if torch.equal(one.sequences, two.sequences):  # a tie may be broken otherwise
            bridged.close(one.logits, two.logits, atol=2e-4)
        else:
            top = one.logits.topk(2, -1).values
            assert float((top[..., 0] - top[..., 1]).min()) < 1e-3 or options.get("num_beams")
        assert [entry.status for entry in one.audit] == [entry.status for entry in two.audit]

    holds()
