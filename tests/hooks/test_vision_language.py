"""Models that see, in the engine: a tower and a language model, each with its sites, against the blocks by hand."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import hooks as hk
import interp as ip
from hooks import Inputs, Model, Site, World, patch, scale, site, steer, zero
from hooks.errors import InputsError, ModelError, PlanError, ShapeError, SiteError, UnfiredError
from hooks.record import choose
from tests import seeing, zoo
from tests.hooks.test_properties import gap, outcomes
from tests.seeing_oracle import Oracle, as_rows

EXACT = {"rtol": 0.0, "atol": 1e-9}
COUNTS = [1, 2, 0, 1]
SQUARE = ("scores", "pattern")

USUAL = ("llava", "qwen2_5_vl")
"""The families that are always tested: images and packed patches. The others are in the whole product."""

each_family = pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in USUAL else pytest.mark.full) for f in seeing.FAMILIES]
)


@cache
def wrapped(family: str) -> Model:
    return hk.wrap(seeing.shared(family))


def sites_of(model: Model) -> list[Site]:
    return [
        site(s.name, layer if s.layers else None, stack=s.stack)
        for s in model.sites()
        for layer in range(s.layers or 1)
    ]


def key_of(place: Site) -> tuple[str, str, int | None]:
    return place.stack or "text", place.name, place.layer


def bent(x: Tensor) -> Tensor:
    """What no norm takes back."""
    return x + x.sin()


def _scaled(x: Tensor) -> Tensor:
    return 1.5 * x


_MOVED = {"scores": _scaled, "pattern": _scaled}


def moved(place: Site) -> hk.Intervention:
    """An edit of a whole site by a function, which leaves what is forbidden so."""
    return scale(place, 1.5) if place.name in SQUARE else hk.intervene(place, lambda x, ctx: bent(x))


def laid(family: str, place: Site, value: Tensor, counts: list[int]) -> Tensor:
    """A tower's value by hand, as the engine shows it."""
    rows = [
        [token for image in row for token in image]
        for row in seeing.tower_tokens(family, counts, place.name == "embed")
    ]
    if place.name not in SQUARE:
        return as_rows(value if seeing.packed(family) else value.flatten(0, 1), rows, False)
    n, heads, length, _ = value.shape  # one sequence of all, where they are packed
    whole = value.new_full((n * length, heads, n * length), -torch.inf if place.name == "scores" else 0.0)
    for number, one in enumerate(value):
        here = slice(number * length, (number + 1) * length)
        whole[here, :, here] = one.transpose(0, 1)
    return as_rows(whole, rows, True, -torch.inf if place.name == "scores" else 0.0)


def real(place: Site, x: Inputs) -> Tensor:
    """bool, broadcastable to a value: what is of real queries."""
    mask = x.along(place.stack).real
    return mask[:, None, :, None] if place.name in SQUARE else mask.reshape(*mask.shape, *[1] * (len(place.axes) - 2))


@pytest.mark.parametrize("side", ["left", "right"])
@each_family
def test_every_site_of_both_stacks_holds_what_the_block_by_hand_computes(family: str, side: str) -> None:
    model, batch = wrapped(family), seeing.batch(family, COUNTS, side)
    x, hand = model.inputs(batch), Oracle(model.module)
    logits = hand(**seeing.called(family, batch))
    places = sites_of(model)
    run = model.run(x, capture=places)
    torch.testing.assert_close(run.logits[x.mask], logits[x.mask], **EXACT)
    assert {place.stack for place in places} == {None, "vision"}
    for place in places:
        want, got = hand.values.get(key_of(place)), run.tape[place]
        if place.name == "resid_pre" and place.layer:
            want = hand.values[key_of(site("resid_post", place.layer - 1, stack=place.stack))]
        if place.stack is not None:
            want = laid(family, place, want, COUNTS)
        keep = real(place, x)
        assert got.shape == want.shape, place
        torch.testing.assert_close(torch.where(keep, got, 0.0), torch.where(keep, want, 0.0), **EXACT, msg=str(place))


first_family = pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f == "llava" else pytest.mark.full) for f in seeing.FAMILIES]
)
"""For what takes long: the first family, and the others in the whole product."""


@first_family
def test_an_edit_of_any_site_does_to_the_logits_what_it_does_by_hand(family: str) -> None:
    model, batch = wrapped(family), seeing.batch(family, COUNTS, "left")
    x = model.inputs(batch)
    clean = model.run(x).logits
    places = [place for place in sites_of(model) if place.name != "resid_pre" or not place.layer]
    call = seeing.called(family, batch)
    inert = []
    for place in places:
        got = model.run(x, moved(place)).logits
        want = Oracle(model.module, {key_of(place): _MOVED.get(place.name, bent)})(**call)
        torch.testing.assert_close(got[x.mask], want[x.mask], **EXACT, msg=str(place))
        if gap([got[x.mask]], [clean[x.mask]]) < 1e-6:
            inert.append(place)
    # Gemma norms what attention adds, so a factor of all of a pattern is gone again.
    assert not [place for place in inert if (family, place.name) != ("gemma3", "pattern")]


@each_family
def test_an_edit_of_one_image_reaches_its_row_alone_and_equals_the_edit_by_hand(family: str) -> None:
    model, batch = wrapped(family), seeing.batch(family, COUNTS)
    x = model.inputs(batch)
    clean = model.run(x).logits
    for name in ("resid_pre", "q", "pattern", "z", "mlp_out", "resid_post"):
        place = site(name, 0, stack="vision")
        second = seeing.tower_tokens(family, COUNTS)[1][1]

        def by_hand(value: Tensor, name: str = name, second: list[int] = second) -> Tensor:
            flat = value.flatten(0, 1) if value.ndim > 2 and not seeing.packed(family) and name != "pattern" else value
            if name == "pattern":
                value = value.clone()
                if seeing.packed(family):
                    value[:, :, second] = 0.0
                else:
                    value[sorted({token // value.shape[-1] for token in second})] = 0.0
                return value
            flat = flat.clone()
            flat[second] = 0.0
            return flat.reshape(value.shape)

        got = model.run(x, zero(place.at(pos="image 1"))).logits
        want = Oracle(model.module, {key_of(place): by_hand})(**seeing.called(family, batch))
        torch.testing.assert_close(got[x.mask], want[x.mask], **EXACT, msg=name)
        gone = (got - clean).abs().amax(-1).masked_fill(~x.mask, 0).amax(1)
        assert gone[1] > 1e-4 and float(gone[[0, 2, 3]].max()) < 1e-9, name


@each_family
def test_executors_agree_on_both_stacks_and_across_them(family: str) -> None:
    model = wrapped(family)
    x, y = (model.inputs(seeing.batch(family, COUNTS, seed=seed)) for seed in (0, 1))
    vector = torch.linspace(-2, 2, 32).double()
    worlds = [
        World(x),
        World(x, steer(site("resid_post", 0, stack="vision", pos="image 0"), vector)),
        World(x, patch(site("z", 1, stack="vision", head=2), World(y))),
        World(x, scale(site("scores", 0, stack="vision", key_pos="image"), 0.3)),
        World(x, zero(site("resid_pre", 1, pos="image"))),
        World(x, zero(site("pattern", 1, key_pos="image 0", pos=-1))),
        World(x, patch(site("resid_pre", 0, pos="image"), World(y))),
        World(x, steer(site("z", 0, stack="vision"), vector[:8]) + hk.freeze(site("attn_out", 0, pos="image"))),
        World(y, hk.noise(site("mlp_out", 0, stack="vision"), 1.0) + hk.mean(site("z", 1, pos="image"), World(x))),
    ]
    reads = [site("logits"), site("resid_post", 0), site("pattern", 1, stack="vision", pos="image 0")]
    (one, *_), (two, *_) = (outcomes(model, worlds, reads, executor) for executor in ("sequential", "batched"))
    for number, (a, b) in enumerate(zip(one, two, strict=True)):
        for left, right in zip(a, b, strict=True):
            assert gap([torch.nan_to_num(left)], [torch.nan_to_num(right)]) < 1e-9, number
    plain = one[0][0]
    for number, values in enumerate(one[1:8], 1):
        assert gap([values[0][x.mask]], [plain[x.mask]]) > 1e-6, number


@each_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_worlds_of_the_text_are_shared_with_the_features_of_their_images(family: str, side: str) -> None:
    model = wrapped(family)
    x, y = (model.inputs(seeing.batch(family, COUNTS, side, seed=seed)) for seed in (0, 1))
    worlds = [
        World(x),
        World(x, zero(site("resid_pre", 1, pos="image"))),
        World(x, zero(site("pattern", 1, key_pos="image 0", pos=-1))),
        World(x, patch(site("resid_pre", 0, pos="image"), World(y))),
        World(x, patch(site("z", 1, head=2), World(y))),
        World(x, hk.knockout(site("scores", 1, key_pos="image"))),
        World(y, patch(site("embed", pos="image 0"), World(x))),
    ]
    reads = [site("logits"), site("resid_post", 0)]
    choice = choose(model, worlds)
    if family == "gemma3":
        assert choice.executor == "batched" and "see later ones" in choice.reason
    else:
        assert choice.executor == "shared", choice.reason
    (want, *_), (got, *_) = (outcomes(model, worlds, reads, executor) for executor in ("sequential", "shared"))
    for number, (a, b) in enumerate(zip(want, got, strict=True)):
        assert max(gap([p[x.mask]], [q[x.mask]]) for p, q in zip(a, b, strict=True)) < 1e-9, number
    assert all(gap([values[0][x.mask]], [want[0][0][x.mask]]) > 1e-6 for values in want[1:])
    tower = site("z", 0, stack="vision")
    assert "tower" in choose(model, [World(x, zero(tower))]).reason
    assert "tower" in choose(model, [World(x)], reads=[tower]).reason


@each_family
def test_rows_in_small_chunks_give_what_they_give_together(family: str) -> None:
    model = wrapped(family)
    x = model.inputs(seeing.batch(family, COUNTS))
    place = site("resid_post", 0, stack="vision")
    worlds = [World(x), World(x, zero(place.at(pos="image 0")))]
    whole, *_ = outcomes(model, worlds, [site("logits"), place], "batched")
    parts, *_ = outcomes(model, worlds, [site("logits"), place], "batched", budget=1.0)
    for a, b in zip(whole, parts, strict=True):
        assert gap([a[0][x.mask]], [b[0][x.mask]]) < 1e-9
        assert gap([a[1][x.along("vision").real]], [b[1][x.along("vision").real]]) < 1e-9
    assert gap([whole[0][0][x.mask]], [whole[1][0][x.mask]]) > 1e-4


@each_family
def test_an_image_is_patched_from_a_row_where_it_stands_elsewhere(family: str) -> None:
    """Rows with one image and with two: token by token of the image, wherever in the text it is."""
    model = wrapped(family)
    x, y = (model.inputs(seeing.batch(family, counts, seed=seed)) for counts, seed in (([1, 2], 0), ([2, 1], 3)))
    place = site("resid_post", 1, stack="vision")
    there = model.run(y, capture=place).tape[place]
    run = model.run(x, patch(place.at(pos="image 0"), World(y)), capture=place)
    for row, images in enumerate(seeing.tower_tokens(family, [1, 2])):
        each = len(images[0])
        torch.testing.assert_close(run.tape[place][row, :each], there[row, :each])
    inside = site("resid_post", 0, pos="image 0")
    source = model.run(y, capture=inside).tape[inside]
    got = model.run(x, patch(inside, World(y)), capture=inside).tape[inside]
    for row, count in enumerate((x.pictures.image == 0).sum(1).tolist()):
        torch.testing.assert_close(got[row, :count], source[row, :count])
    assert not torch.equal(x.pictures.image, y.pictures.image)
    with pytest.raises(ShapeError, match="do not correspond"):
        model.run(x, patch(site("resid_post", 0, pos="image"), World(y)))
    with pytest.raises(SiteError, match="selects no token"):
        model.run(x, zero(place.at(pos="image 2")))


@each_family
def test_what_is_not_there_is_refused_by_name(family: str) -> None:
    model = wrapped(family)
    batch = seeing.batch(family, [1, 1])
    x = model.inputs(batch)
    with pytest.raises(SiteError, match="stacks vision, text"):
        model.run(x, capture=site("z", 0, stack="visoin"))
    with pytest.raises(SiteError, match="layers 0"):
        model.run(x, capture=site("z", 9, stack="vision"))
    blind = model.inputs([[1, 5, 6], [1, 7]])
    with pytest.raises(SiteError, match="no row has an image"):
        model.run(blind, zero(site("z", 0, stack="vision")))
    with pytest.raises(SiteError, match="no images"):
        model.run(blind, zero(site("z", 0, pos="image")))
    with pytest.raises(InputsError, match="features"):
        model.inputs(batch["input_ids"])
    with pytest.raises(InputsError):
        model.inputs({**batch, "pixel_values": batch["pixel_values"][:1]})
    with pytest.raises(InputsError):
        model.inputs({**batch, "pixel_values": batch["pixel_values"][..., :3]})
    with pytest.raises(InputsError, match="input_ids"):
        model.inputs({"pixel_values": batch["pixel_values"]})


@each_family
def test_nothing_stays_on_the_model(family: str) -> None:
    module = seeing.make(family)
    model, batch = hk.wrap(module), seeing.batch(family, [1, 2])
    batch = seeing.called(family, batch)
    plain = module(**batch).logits
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x = model.inputs({name: value for name, value in batch.items() if name != "position_ids"})
    model.run(x, zero(site("pattern", 0, stack="vision")) + zero(site("z", 0)))
    with model.apply(zero(site("pattern", 0, stack="vision"))):
        module(**batch)
    assert torch.equal(module(**batch).logits, plain)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    empty = model.run(x, hk.Plan()).logits
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(empty[mask], plain[mask], **EXACT)


# Holding a plan

PLANS: dict[str, Any] = {
    "tower": lambda: steer(site("resid_post", 0, stack="vision"), torch.linspace(-3, 3, 32).double()),
    "pattern": lambda: zero(site("pattern", 0, stack="vision", head=1, key_pos="image 0")),
    "text": lambda: zero(site("resid_post", 0, pos="image")),
    "keys": lambda: scale(site("scores", 1, key_pos="image"), 0.4),
    "across": lambda: zero(site("mlp_out", 0, stack="vision")) + scale(site("z", 1, pos="image"), 2.0),
    "unedited": lambda: zero(site("z", 0, stack="vision")) + hk.freeze(site("z", 0, pos="image")),
    "another plan": lambda: (
        zero(site("z", 0, stack="vision"))
        + patch(site("attn_out", 0, pos="image"), hk.as_plan(scale(site("mlp_out", 1, stack="vision"), 3.0)))
    ),
}
FEW = {("qwen2_5_vl", "tower"), ("qwen2_5_vl", "unedited"), ("gemma3", "across")}
OPTIONS: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
WORDS: dict[str, Any] = {"suppress_tokens": [seeing.PLACE]}
"""A random model may answer with the token of an image, and a text with one image more cannot be read again."""


@each_family
def test_a_call_of_the_users_under_a_plan_is_the_run_of_it(family: str) -> None:
    model, batch = wrapped(family), seeing.batch(family, COUNTS)
    x = model.inputs(batch)
    for name, make in PLANS.items():
        with model.apply(make()) as audit, torch.no_grad():
            got = model.module(**seeing.called(family, batch)).logits
        torch.testing.assert_close(got[x.mask], model.run(x, make()).logits[x.mask], **EXACT, msg=name)
        assert audit[0].rows == 3, name


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, marks=() if family == "llava" or (family, name) in FEW else pytest.mark.full)
        for family in seeing.FAMILIES
        for name in PLANS
    ],
)
def test_generation_under_a_plan_is_the_whole_text_anew_at_every_step(family: str, name: str) -> None:
    model, batch = wrapped(family), seeing.batch(family, COUNTS, "left")
    module, plan, seen = model.module, PLANS[name](), []
    handle = module.lm_head.register_forward_hook(lambda m, a, out: seen.append(out[:, -1].clone()))
    try:
        with model.apply(plan) as audit:
            ids = module.generate(**batch, **OPTIONS, **WORDS)
    finally:
        handle.remove()
    # A plan that reads other worlds runs the model for those as well, before it runs for its own.
    steps = seen[len(seen) // OPTIONS["max_new_tokens"] - 1 :: len(seen) // OPTIONS["max_new_tokens"]]
    plain = module.generate(**batch, **OPTIONS, **WORDS)
    width = batch["input_ids"].shape[1]
    assert audit[0].rows == 3
    for step, got in enumerate(steps):
        text = seeing.longer(batch, ids[:, width : width + step])
        want = model.run(model.inputs(text), plan).logits[:, -1]
        assert gap([got], [want]) < 1e-9, step
    assert len(steps) == 3
    clean = model.run(model.inputs(batch)).logits[:, -1]
    assert gap([steps[0]], [clean]) > 1e-6
    assert plain.shape == ids.shape


@first_family
def test_beams_and_samples_go_on_from_the_rows_of_their_prompts(family: str) -> None:
    model, batch = wrapped(family), seeing.batch(family, [1, 2], "left")
    module = model.module
    for name in ("tower", "across", "unedited"):
        plan = PLANS[name]()
        more = {"num_beams": 2, "num_return_sequences": 2}
        with model.apply(plan):
            both = module.generate(**batch, **OPTIONS, **more)
        alone = []
        for row in range(2):
            one = seeing.row(family, batch, [1, 2], row)
            with model.apply(plan):
                alone.append(module.generate(**one, **OPTIONS, **more))
        for row in range(2):
            start = -OPTIONS["max_new_tokens"]
            assert torch.equal(both[2 * row : 2 * row + 2, start:], alone[row][:, start:]), name


@each_family
def test_a_plan_of_the_tower_where_no_image_comes_never_fires(family: str) -> None:
    model = wrapped(family)
    with pytest.raises(UnfiredError), model.apply(PLANS["tower"]()):
        model.module.generate(torch.tensor([[1, 5, 6]]), **OPTIONS)
    looks = {name: value for name, value in seeing.batch(family, [1]).items() if name in seeing.LOOKS}
    with pytest.raises(PlanError, match="called by itself"), model.apply(PLANS["tower"]()):
        model.module.get_image_features(**looks)


def test_sweeps_go_through_a_tower_and_over_images() -> None:
    model = wrapped("llava")
    x, y = (model.inputs(seeing.batch("llava", [1, 2, 0], seed=seed)) for seed in (0, 1))
    metric = ip.logit_diff(5, 7)
    in_tower = ip.sweep(model, x, None, ip.grid("z", layer="all", head="all", stack="vision"), metric=metric,
                        intervention=ip.zero)  # fmt: skip
    assert in_tower.effect.shape == (2, 4, 3)
    values = torch.as_tensor(numpy.asarray(in_tower.effect))
    assert bool(values[..., 2].isnan().all()) and bool((values[..., :2].abs() > 1e-9).all())
    base = model.run(x).logits
    one = model.run(x, zero(site("z", 1, head=2, stack="vision"))).logits
    last = x.lengths - 1
    want = [(one - base)[row, last[row], 5] - (one - base)[row, last[row], 7] for row in range(2)]
    torch.testing.assert_close(values[1, 2, :2].double(), torch.stack(want), atol=1e-9, rtol=0)
    spans = ip.grid("resid_pre", layer="all", pos={"first": "image 0", "second": "image 1", "end": -1})
    places = ip.sweep(model, x, y, spans, metric=metric)
    assert places.effect.shape == (2, 3, 3)
    values = torch.as_tensor(numpy.asarray(places.effect))
    assert bool(values[:, 1, [0, 2]].isnan().all()) and bool((values[:, 0, :2].abs() > 1e-9).all())
    with pytest.raises(SiteError, match="stack"):
        ip.sweep(hk.wrap(zoo.make("llama")), *[hk.wrap(zoo.make("llama")).inputs([[1, 2]])] * 2,
                 ip.grid("z", layer="all", stack="vision"), metric=metric)  # fmt: skip


def test_a_graph_with_images_is_refused_and_one_of_text_alone_is_not() -> None:
    model = wrapped("llava")
    x = model.inputs(seeing.batch("llava", [1]))
    text = model.inputs([[1, 5, 6]])
    fast = model.compile(hk.scale(site("z", 0), 2.0), backend="eager")
    with pytest.raises(ModelError, match="no tower"):
        fast(x)
    with pytest.raises(ModelError, match="no tower"):
        fast(text, patch(site("z", 0, pos=0), World(x)))
    torch.testing.assert_close(fast(text).logits, model.run(text, hk.scale(site("z", 0), 2.0)).logits)


def test_gradients_flow_from_the_text_into_the_tower() -> None:
    module = seeing.make("llava")
    model, batch = hk.wrap(module), seeing.batch("llava", [1, 2])
    x, place = model.inputs(batch), site("resid_post", 0, stack="vision", pos="image 0")
    run = model.run(x, capture=place, grad=True)
    (gradient,) = run.gradient(run.logits[:, -1, 5].sum(), place)
    assert gradient.shape == (2, 17, 32) and float(gradient.norm()) > 1e-3
    step = 1e-6 * gradient / gradient.norm()
    moved = model.run(x, hk.intervene(place, lambda v, ctx: v + step)).logits
    change = float((moved - run.logits.detach())[:, -1, 5].sum())
    torch.testing.assert_close(change, 1e-6 * float(gradient.norm()), rtol=1e-3, atol=0)


def test_a_plan_holds_through_checkpointed_training() -> None:
    module = seeing.make("llava")
    model, batch = hk.wrap(module), seeing.called("llava", seeing.batch("llava", [1, 2]))
    plan = PLANS["across"]()

    def gradients() -> list[Tensor]:
        module.zero_grad()
        with model.apply(plan):
            module(**batch, labels=batch["input_ids"]).loss.backward()
        return [p.grad.clone() for p in module.parameters() if p.grad is not None]

    plain = gradients()
    module.train()
    module.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients()
    assert len(plain) == len(again) > 20
    assert all(gap([a], [b]) < 1e-8 for a, b in zip(plain, again, strict=True))


def test_a_plan_that_is_a_function_meets_the_tower_of_generate() -> None:
    model, batch = wrapped("llava"), seeing.batch("llava", [1, 2], "left")
    seen: list[bool] = []

    def plan(inputs: Inputs) -> hk.Plan:
        seen.append(inputs.pictures is not None)
        return hk.as_plan(PLANS["tower"]())

    with model.apply(plan) as audit:
        got = model.module.generate(**batch, **OPTIONS)
    with model.apply(PLANS["tower"]()):
        want = model.module.generate(**batch, **OPTIONS)
    assert torch.equal(got, want) and seen[0] and audit[0].rows == 2
    assert not torch.equal(got, model.module.generate(**batch, **OPTIONS))


def test_a_loop_of_the_users_own_decodes_under_a_plan_of_both_stacks() -> None:
    model, batch = wrapped("llava"), seeing.batch("llava", [1, 2], "left")
    module, plan = model.module, PLANS["across"]()
    with model.apply(plan):
        want = module.generate(**batch, **OPTIONS)[:, batch["input_ids"].shape[1] :]
    found, cache, call = [], None, seeing.called("llava", batch)
    with torch.no_grad(), model.apply(plan):
        for _ in range(3):
            out = module(**call, past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
            found.append(token)
            mask = torch.cat([call["attention_mask"], torch.ones_like(token)], 1)
            call = {"input_ids": token, "attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
    assert torch.equal(torch.cat(found, 1), want)


def test_prompts_in_pieces_meet_the_tower_once() -> None:
    model, batch = wrapped("llava"), seeing.batch("llava", [1, 2], "left")
    module = model.module
    for name in ("tower", "across"):
        with model.apply(PLANS[name]()):
            whole = module.generate(**batch, **OPTIONS)
            pieces = module.generate(**batch, **OPTIONS, prefill_chunk_size=7)
        assert torch.equal(whole, pieces)
    with pytest.raises(PlanError, match="prefill_chunk_size"), model.apply(PLANS["unedited"]()):
        module.generate(**batch, **OPTIONS, prefill_chunk_size=7)


def test_features_that_a_call_brings_are_of_one_world() -> None:
    model, batch = wrapped("llava"), seeing.batch("llava", [1])
    module = model.module
    features = {"image": module.get_image_features(batch["pixel_values"], return_dict=True)}
    call = {"input_ids": batch["input_ids"], "mm_encoder_outputs": features}
    with torch.no_grad(), model.apply(zero(site("resid_pre", 0, pos="image"))):
        got = module(**call).logits
    want = model.run(model.inputs(batch), zero(site("resid_pre", 0, pos="image"))).logits
    torch.testing.assert_close(got, want, **EXACT)
    with pytest.raises(UnfiredError), model.apply(PLANS["tower"]()):
        module(**call)
    with pytest.raises(PlanError, match="features of images"), model.apply(PLANS["unedited"]()):
        module(**call)


def test_members_are_refused() -> None:
    model = wrapped("llava")
    with pytest.raises(PlanError, match="sees"):
        hk.Members(model, [zero(site("z", 0))], model.inputs([[1, 5, 6]]))


@first_family
def test_paths_begin_where_images_have_entered_the_text(family: str) -> None:
    """Every edge from the input, with the values of other images, is the run on those images."""
    model = wrapped(family)
    x, y = (model.inputs(seeing.batch(family, [1, 2], seed=seed)) for seed in (0, 1))
    readers = [f"a{layer}.h{head}" for layer in range(2) for head in range(4)] + ["m0", "m1", "logits"]
    metric = ip.logit_diff(5, 7)
    found = ip.paths.path_patch(model, x, y, ("input", readers), semantics="set", metric=metric, direction="noising")
    differences = []
    for inputs in (x, y):
        last = model.run(inputs).logits[torch.arange(2), x.lengths - 1]
        differences.append(last[:, 5] - last[:, 7])
    want = differences[1] - differences[0]
    torch.testing.assert_close(torch.as_tensor(numpy.asarray(found.effect)).double(), want, atol=1e-8, rtol=0)
    assert float(want.abs().min()) > 1e-3


def test_a_stack_has_its_names() -> None:
    model = wrapped("llava")
    assert site("z", 0, stack="text") == site("z", 0) != site("z", 0, stack="vision")
    assert str(site("blocks.1.attn.hook_z", stack="vision", pos="image 1")) == "vision:z.1[pos=image 1]"
    x = model.inputs(seeing.batch("llava", [1]))
    run = model.run(x, capture=[site("z", 0, stack="text"), site("z", 0, stack="vision")])
    assert run.tape["blocks.0.attn.hook_z"].shape[1] == x.width
    assert run.tape[site("z", 0, stack="vision", pos=0)].shape == (1, 1, 4, 8)
    assert "vision:pattern" in str(model.sites()) and "text:logits" in str(model.sites())
    result = ip.sweep(model, x, None, ip.grid("z", layer="all"), metric=_seen_by_the_tower(), intervention=ip.zero)
    assert result.config["executor"] == "batched"


def _seen_by_the_tower() -> Any:
    place = site("resid_post", 1, stack="vision", pos="image 0")
    return ip.metric(lambda logits, seen: logits[:, -1, 5] + seen.mean((1, 2)), reads=[site("logits"), place])
