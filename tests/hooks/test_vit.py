"""A vision transformer in the engine: images as inputs, attention without a mask, one set of logits an image."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hooks as hk
from hooks import Inputs, Model, Plan, Site, Span, World, patch, site
from hooks.errors import InputsError, InterpError, ModelError, PlanError, ShapeError, SiteError
from hooks.record import choose
from tests import oracle, zoo
from tests.hooks.test_properties import bend, gap, interventions, outcomes, parts
from tests.hooks.test_region import chosen
from tests.hooks.test_restore import State

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

EXACT = {"rtol": 0.0, "atol": 1e-10}
EXECUTORS = ("sequential", "batched", "shared")
TOKENS = 5
LAST = 2
LOGITS = [site("logits")]

each_executor = pytest.mark.parametrize("executor", EXECUTORS)


@cache
def wrapped() -> Model:
    return hk.wrap(zoo.make("vit"))


def fresh() -> Model:
    """A model of the test's own, to put hooks on or to train."""
    return hk.wrap(zoo.make("vit"))


def inputs(seed: int = 1, rows: int = 3) -> Inputs:
    return wrapped().inputs(zoo.random_images(rows, seed))


def with_patches_of(x: Inputs, other: Inputs, *patches: tuple[int, int]) -> Inputs:
    """The images `x` with some patches, by row and column, taken from others."""
    pixels, size = x.pixels.clone(), zoo.PATCH
    for row, column in patches:
        cut = (..., slice(row * size, row * size + size), slice(column * size, column * size + size))
        pixels[cut] = other.pixels[cut]
    return wrapped().inputs(pixels)


def every_site(model: Model) -> list[Site]:
    return [
        site(info.name, layer if info.layers else None) for info in model.sites() for layer in range(info.layers or 1)
    ]


@torch.no_grad()
def by_hand(x: Inputs, edits: dict | None = None) -> dict:
    return oracle.forward(wrapped().module, x.pixels, x.mask, edits)[1]


def ran(worlds: list[World], reads: list[Site], executor: str, model: Model | None = None, **options: Any) -> list:
    """What is read of each world."""
    return outcomes(model or wrapped(), worlds, reads, executor, **options)[0]


def patched(x: Inputs, places: list[Site], source: World, executor: str) -> list[tuple[Site, Tensor]]:
    """Each site, and the logits with it patched."""
    found = ran([World(x, patch(place, source)) for place in places], LOGITS, executor)
    return [(place, logits) for place, (logits,) in zip(places, found, strict=True)]


def close(value: Tensor, expected: Tensor, *what: object) -> None:
    torch.testing.assert_close(value, expected, **EXACT, msg=lambda text: f"{', '.join(map(str, what))}\n{text}")


def agree(worlds: list[World], reads: list[Site], effect: float = 1e-6) -> list:
    """Run worlds in every executor, with all memory and next to none; nearly all of them are to change something."""
    expected = ran(worlds, reads, "sequential")
    base = ran([World(w.inputs) for w in worlds], reads, "sequential")
    moved = [gap(a, b) > effect for a, b in zip(expected, base, strict=True)]
    assert sum(moved) > 0.8 * len(worlds)
    for executor, budget in (("batched", None), ("shared", None), ("batched", 1), ("shared", 1), ("shared", 30_000)):
        for world, a, b in zip(worlds, expected, ran(worlds, reads, executor, budget=budget), strict=True):
            assert gap(a, b) < 1e-10, f"{executor} with {budget} is off by {gap(a, b):.2g}: {world.plan}"
    return expected


# Images as inputs


def test_images_are_a_class_token_and_patches():
    model = wrapped()
    pixels = zoo.random_images(2)
    x = model.inputs(pixels)
    assert len(x) == 2 and x.width == TOKENS and not x.padded
    assert x.positions.tolist() == [[0, 1, 2, 3, 4]] * 2 and x.lengths.tolist() == [TOKENS] * 2
    assert x.labels(1) == ("[cls]", "0,0", "0,1", "1,0", "1,1")
    assert repr(x) == "Inputs(2 images of 2 x 8 x 8, 5 tokens)"
    assert x.row_ids.tolist() == [0, 1]
    assert model.inputs(pixels, row_ids=torch.tensor([7, 3])).row_ids.tolist() == [7, 3]
    pixels.zero_()
    assert float(x.pixels.abs().min()) > 0, "what the caller does to his tensor reached the inputs"
    part = x.rows(slice(1, 2))
    assert torch.equal(part.pixels, x.pixels[1:]) and len(part) == 1 and part.row_ids.tolist() == [1]
    assert len(model.inputs(x.pixels[0])) == 1
    assert torch.equal(model.inputs(x.pixels.numpy()).pixels, x.pixels)


@pytest.mark.parametrize(("size", "patch"), [((8, 8), 4), ((9, 14), (4, 3)), ((4, 12), (2, 6))])
def test_a_pixel_belongs_to_the_token_whose_embedding_it_changes(size, patch):
    """Pixel by pixel, for images and patches that are no squares, and with pixels to spare."""
    from transformers import ViTConfig, ViTForImageClassification

    config = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    module = ViTForImageClassification(ViTConfig(image_size=size, patch_size=patch, num_channels=1, **config))
    model = hk.wrap(zoo.prepare(module))
    x = model.inputs(torch.randn(1, 1, *size).double())
    down, across = (n // p for n, p in zip(size, patch if isinstance(patch, tuple) else (patch, patch), strict=True))
    assert x.labels()[1:] == tuple(f"{i},{j}" for i in range(down) for j in range(across))
    base, seen = model.run(x, capture="hook_embed").tape["embed"], set()
    for row in range(size[0]):
        for column in range(size[1]):
            pixels = x.pixels.clone()
            pixels[0, 0, row, column] += 1.0
            other = model.inputs(pixels)
            expected = (model.run(other, capture="hook_embed").tape["embed"] != base).any(-1)
            assert torch.equal(x.differs(other), expected)
            assert torch.equal(hk.align(x, other).differs, expected)
            seen |= {tuple(where) for where in expected.nonzero().tolist()}
    assert seen == {(0, position) for position in range(1, x.width)}


def test_alignment_of_images():
    x, other = inputs(1), inputs(2)
    mixed = with_patches_of(x, other, (0, 1), (1, 1))
    found = hk.align(x, mixed)
    assert found.differs.tolist() == [[False, False, True, False, True]] * 3
    assert found.first_difference.tolist() == [2, 2, 2]
    assert str(found).splitlines()[0] == "row 0: [cls] 0,0 [0,1] 1,0 [1,1]"
    assert not hk.align(x, x).differs.any()
    with pytest.raises(InputsError, match="3 clean prompts and 2"):
        hk.align(x, inputs(2, rows=2))
    words = Inputs.of(torch.ones(3, TOKENS, dtype=torch.int64))
    for pair in ((x, words), (words, x)):
        with pytest.raises(InputsError, match="do not correspond"):
            hk.align(*pair)


def test_equality_and_fingerprints_take_the_pixels_along(tmp_path):
    from hooks.digest import digest_of
    from hooks.plan.saving import fingerprint

    model, x, same = wrapped(), inputs(1), inputs(1)
    near = x.pixels.clone()
    near[2, 1, 7, 7] += 1e-12
    near = model.inputs(near)
    assert World(x) == World(same) and World(x) != World(near)
    assert fingerprint(x) == fingerprint(same) != fingerprint(near)
    assert digest_of(x) == digest_of(same) != digest_of(near)
    hk.align(x, same)  # which computes things that inputs keep
    assert digest_of(x) == digest_of(inputs(1))
    assert fingerprint(x) != fingerprint(model.inputs(x.pixels, row_ids=torch.tensor([2, 1, 0])))
    # The class token, which is the same of every image.
    tapes = [model.run(i, capture=site("embed", pos=0)).tape for i in (x, same, near)]
    assert tapes[0] == tapes[1] != tapes[2]
    plans = [Plan((patch(site("z", 0), World(i)),)) for i in (x, same, near)]
    assert plans[0] == plans[1] != plans[2]
    for place, plan in enumerate([plans[0], Plan((patch(site("logits"), model.run(x, capture="logits").tape),))]):
        plan.save(tmp_path / f"plan{place}")
        loaded = Plan.load(tmp_path / f"plan{place}", model)
        assert loaded == plan and fingerprint(loaded) == fingerprint(plan)
        y = inputs(2)
        assert torch.equal(model.run(y, loaded).logits, model.run(y, plan).logits)


def test_a_damaged_file_of_images_is_refused(tmp_path):
    Plan((patch(site("z", 0), World(inputs(1))),)).save(tmp_path / "p")
    written = json.loads((tmp_path / "p.json").read_text())
    for damage in ({"type": "imagesx"}, {"patches": 4}, {"patch": 4}, {"patch": {"type": "tuple", "items": [0, 4]}}):
        record = copy.deepcopy(written)
        images = record["plan"]["interventions"]["items"][0]["reads"]["items"][0]["source"]["inputs"]
        assert images["type"] == "images"
        images.update(damage)
        (tmp_path / "p.json").write_text(json.dumps(record))
        with pytest.raises(InterpError):
            Plan.load(tmp_path / "p")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.ones(2, 5, dtype=torch.int64), "takes images.*not token ids"),
        ([[1, 2, 3]], "takes images.*not list.*image processor"),
        ("a cat", "takes images.*not text"),
        (["a cat", "a dog"], "takes images.*not text"),
        (torch.zeros(2, 2, 8, 8, dtype=torch.uint8), "floating-point.*uint8.*image processor"),
        (torch.zeros(2, 3, 8, 8), "3 channels, and the model takes 2"),
        (torch.zeros(2, 2, 8, 9), "8 x 9, and the model takes 8 x 8"),
        (torch.zeros(8, 8), r"shape \[8, 8\]"),
        (torch.zeros(0, 2, 8, 8), r"shape \[0, 2, 8, 8\]"),
        (torch.full((2, 2, 8, 8), torch.nan), r"rows \[0, 1\].*not finite"),
    ],
)
def test_what_is_no_image_of_the_model_s_is_refused(given, words):
    with pytest.raises(InputsError, match=words):
        wrapped().inputs(given)


def test_images_and_prompts_are_not_mixed_up():
    model, language = wrapped(), hk.wrap(zoo.make("gpt2"))
    x, words = inputs(1), language.inputs([[1, 2, 3, 4, 5]] * 3)
    with pytest.raises(InputsError, match=r"language model.*not pixels \[3, 2, 8, 8\]"):
        language.inputs(x.pixels)
    with pytest.raises(InputsError, match="mask"):
        model.inputs(x.pixels, torch.ones(3, 5))
    plan = Plan((hk.zero(site("z", 0)),))
    for mine, theirs in ((model, words), (language, x)):
        good = x if mine is model else words
        for call in (
            lambda mine=mine, theirs=theirs: mine.run(theirs),
            lambda mine=mine, theirs=theirs: mine.run(World(theirs, plan)),
            lambda mine=mine, theirs=theirs, good=good: mine.run(good, patch(site("z", 0), theirs)),
            lambda mine=mine, theirs=theirs: list(hk.run_worlds(mine, [World(theirs, plan)], LOGITS)),
            lambda mine=mine, theirs=theirs, good=good: list(
                hk.run_worlds(mine, [World(good, patch(site("z", 0), theirs))], LOGITS)
            ),
        ):
            with pytest.raises(InputsError, match=r"holds (images|token ids).*takes (images|token ids).*inputs\(\)"):
                call()
    other = Inputs.of_images(torch.randn(3, 2, 8, 12), (4, 4))
    with pytest.raises(InputsError, match="8 x 12"):
        model.run(other)


def test_models_that_are_no_classifiers_are_refused():
    from transformers import ViTForMaskedImageModeling

    config = wrapped().module.config
    with pytest.raises(ModelError, match="AutoModelForImageClassification"):
        hk.wrap(ViTForMaskedImageModeling(config))


def test_other_dtypes():
    """A run brings pixels into the model's dtype, in each executor."""
    pixels = zoo.random_images(2)
    for dtype in (torch.float32, torch.bfloat16):
        model = hk.wrap(zoo.make("vit", dtype=dtype))
        for own in (pixels, pixels.float()):
            x = model.inputs(own)
            assert x.pixels.dtype == own.dtype
            expected = model.module(own.to(dtype)).logits
            values = [v[0] for ex in EXECUTORS for v in ran([World(x)], LOGITS, ex, model)]
            for value in [model.run(x).logits, *values]:
                assert value.dtype == dtype
                torch.testing.assert_close(value[:, 0], expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.3)


# Sites


def test_the_sites_and_their_shapes():
    model = wrapped()
    table = {info.name: info for info in model.sites()}
    without = {"pos_embed", "rot_q", "rot_k", "mlp_pre_linear", "router", "expert_out", "pooled"}
    assert set(hk.KINDS) - set(table) == without
    assert table["logits"].letters == "B1V" and table["logits"].shape == ("B", 1, zoo.CLASSES)
    assert table["scores"].shape == ("B", 4, "T", "S") and table["mlp_pre"].shape == ("B", "T", 24)
    assert "[B, 1, 6]" in str(model.sites())
    assert repr(model) == "Model(vit: 3 layers, 4 heads, width 16, 6 classes)"
    run = model.run(inputs(), capture=every_site(model))
    for place in every_site(model):
        letters = {"B": 3, "T": TOKENS, "S": TOKENS}
        assert list(run.tape[place].shape) == [letters.get(n, n) for n in table[place.name].shape], place
    with pytest.raises(SiteError, match="no site 'pos_embed'"):
        model.run(inputs(), capture="hook_pos_embed")


@torch.no_grad()
def test_the_oracle_is_the_model():
    x = inputs()
    close(by_hand(x)["logits", None][:, 0], wrapped().module(x.pixels).logits)


def test_every_site_is_kept_as_the_oracle_has_it():
    model, x = wrapped(), inputs()
    values = by_hand(x)
    assert set(every_site(model)) == {Site(*key) for key in values}
    places = [Site(*key) for key in values]
    run = model.run(x, capture=places)
    for key in values:
        close(run.tape[Site(*key)], values[key], key)
        close(model.run(x, capture=Site(*key)).tape[Site(*key)], values[key], key, "alone")
    close(run.logits, values["logits", None])
    for executor in EXECUTORS:
        (found,) = ran([World(x)], places, executor)
        for key, value in zip(values, found, strict=True):
            close(value, values[key], executor, key)


def restrictions(place: Site) -> list[dict]:
    """Parts of every form, of the axes that a site has."""
    if place.name == "logits":
        some = torch.arange(6).reshape(3, 2)
        return [{"pos": 0, "dim": some}, {"pos": -1}, {"pos": slice(0, 1), "dim": (4, 1)}, {"pos": (0,), "dim": 2}]
    mask = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 1]]).bool()
    listed = [
        {"pos": 0, "key_pos": (1, 3), "head": 0, "dim": Span(1, None)},
        {"pos": Span(1, None), "key_pos": 0, "head": -1, "dim": (0, 2)},
        {"pos": mask, "key_pos": Span(None, -1), "head": (2, 0)},
        {"pos": torch.tensor([[0, 3], [2, 1], [4, 0]]), "key_pos": mask},
        {"pos": torch.tensor([4, 0, 2]), "head": Span(1, 3), "key_pos": -1},
    ]
    axes = [axis for axis in place.axes if axis != "dim" or not place.name.endswith("_scale")]
    return [{axis: index for axis, index in one.items() if axis in axes} for one in listed]


def where(place: Site, like: Tensor) -> Tensor:
    return chosen(place, torch.ones(3, 1 if place.name == "logits" else TOKENS, dtype=torch.bool), like.shape)


def replaced(place: Site, value: Tensor) -> dict:
    return {(place.name, place.layer): lambda x: torch.where(where(place, x), value, x)}


def test_every_site_is_written_as_by_hand():
    """Whole and in part, from a world, a tape and a tensor, read at the logits and at every site after it.

    Of the parts, each site takes every other one, beginning with the first or the second.
    """
    model, x, other = wrapped(), inputs(1), inputs(2)
    values = by_hand(other)
    tape = model.run(other, capture=[Site(*key) for key in values]).tape
    cases: list[tuple[Plan, dict]] = []
    for i, place in enumerate(every_site(model)):
        value = values[place.name, place.layer]
        donors = [World(other), tape, value]
        for j, part in enumerate([{}, *restrictions(place)[i % 2 :: 2]]):
            here = place.at(**part)
            cases.append((Plan((patch(here, donors[(i + j) % 3]),)), replaced(here, value)))
        cases.append((Plan((hk.intervene(place, bend),)), {(place.name, place.layer): lambda v: bend(v, None)}))
    expected = [by_hand(x, edits) for _, edits in cases]
    base, worlds = by_hand(x), [World(x, plan) for plan, _ in cases]
    moved = [gap([e["logits", None]], [base["logits", None]]) > 1e-6 for e in expected]
    assert sum(moved) > 0.8 * len(cases)
    narrow = [site("logits", pos=-1, dim=(1, 3)), site("logits", pos=0, dim=torch.arange(6).reshape(3, 2))]
    for executor in EXECUTORS:
        for world, values_, want in zip(worlds, ran(worlds, [*LOGITS, *narrow], executor), expected, strict=True):
            logits = want["logits", None]
            close(values_[0], logits, executor, world.plan)
            close(values_[1], logits[..., [1, 3]], executor, world.plan)
            close(values_[2], logits[:, 0].gather(1, narrow[1].dim)[:, None], executor, world.plan)
    some = slice(None, None, 7)
    keys = list(base)
    for executor in EXECUTORS:
        found = ran(worlds[some], [Site(*key) for key in keys], executor)
        for world, values_, want in zip(worlds[some], found, expected[some], strict=True):
            for key, value in zip(keys, values_, strict=True):
                close(value, want[key], executor, world.plan, key)


def test_gradients_of_every_site():
    model, x = wrapped(), inputs()
    keys = [key for key in by_hand(x) if key[0] != "resid_post" or key[1] == LAST]
    deltas = {key: torch.zeros_like(by_hand(x)[key]).requires_grad_() for key in keys}
    edits = {key: lambda v, d=delta: v + d for key, delta in deltas.items()}
    logits, _ = oracle.forward(model.module, x.pixels, x.mask, edits)
    weight = torch.randn_like(logits)
    expected = torch.autograd.grad((logits * weight).sum(), list(deltas.values()))
    run = model.run(x, capture=[Site(*key) for key in keys], grad=True)
    found = torch.autograd.grad((run.logits * weight).sum(), [run.tape[Site(*key)] for key in keys])
    for key, mine, theirs in zip(keys, found, expected, strict=True):
        close(mine, theirs, "gradient", key)
        assert float(mine.abs().max()) > 1e-6


def test_the_logits_have_one_position():
    model, x = wrapped(), inputs()
    tape = model.run(x, capture=LOGITS).tape
    assert tape["logits"].shape == (3, 1, zoo.CLASSES)
    for pos in (None, 0, -1, (0,), slice(None), slice(0, 3), torch.tensor([0, -1, 0])):
        assert torch.equal(tape[site("logits", pos=pos)], tape["logits"])
        run = model.run(x, hk.scale(site("logits", pos=pos), 2.0), capture=site("logits", pos=pos))
        assert torch.equal(run.logits, 2.0 * tape["logits"]) and torch.equal(run.tape.values[0][1], run.logits)
        assert run.audit[0].rows == run.audit[0].positions == 3
    for pos in (1, -2, (0, 4)):
        with pytest.raises(SiteError, match="1 position"):
            model.run(x, hk.zero(site("logits", pos=pos)))
    with pytest.raises(SiteError, match="selects no token"):
        model.run(x, hk.zero(site("logits", pos=slice(1, None))))
    with pytest.raises(ShapeError, match=r"where.*\[3, 1\]"):
        model.run(x, hk.zero(site("logits")).where(torch.ones(3, TOKENS).bool()))
    with pytest.raises(ShapeError, match="1"):
        model.run(x, patch(site("logits"), torch.zeros(3, TOKENS, zoo.CLASSES).double()))
    rows = torch.tensor([True, False, True])
    for only in (rows, rows[:, None]):
        logits = model.run(x, hk.zero(site("logits")).where(only)).logits
        assert torch.equal(logits, torch.where(rows[:, None, None], 0.0, tape["logits"]))


def test_labels_of_classes():
    model = fresh()
    model.module.config.id2label = {0: "cat", 1: "dog", 2: "crane", 3: "fox", 4: "crane", 5: "owl"}
    model.module.config.label2id = {name: i for i, name in model.module.config.id2label.items()}
    assert [model.token(name) for name in ("cat", "owl", "dog")] == [0, 5, 1]
    assert model.decode([5]) == "owl"
    with pytest.raises(InputsError, match=r"'crane' names several classes, \[2, 4\]"):
        model.token("crane")
    with pytest.raises(InputsError, match="did you mean 'dog'"):
        model.token("dogs")


# Identities


@torch.no_grad()
def test_an_empty_plan_is_the_bare_model_bitwise():
    model, x = wrapped(), inputs()
    expected = model.module(x.pixels).logits
    for run in (model.run(x), model.run(World(x)), model.run(x, Plan(), grad=True)):
        assert run.logits.shape == (3, 1, zoo.CLASSES) and torch.equal(run.logits[:, 0], expected)
    with model.apply(Plan()):
        assert torch.equal(model.module(x.pixels).logits, expected)
    assert torch.equal(ran([World(x)], LOGITS, "sequential")[0][0][:, 0], expected)


@each_executor
def test_clean_patched_into_clean_changes_nothing(executor):
    model, x, other = wrapped(), inputs(1), inputs(2)
    expected = model.run(x).logits
    for inside in (False, True):
        places = [p for p in every_site(model) if (p.name in ("scores", "pattern")) == inside]
        for place, got in patched(x, places, World(x), executor):
            close(got, expected, place)
        for place, got in patched(x, places, World(other), executor):
            assert float((got - expected).abs().max()) > 1e-3, place


@each_executor
def test_a_whole_residual_reproduces_the_other_run(executor):
    model, x, other = wrapped(), inputs(1), inputs(2)
    expected = model.run(other).logits
    assert float((expected - model.run(x).logits).abs().max()) > 0.1
    places = [site(name, layer) for layer in range(3) for name in ("resid_pre", "resid_post")]
    places += [site("embed"), site("ln_final"), site("logits"), site("resid_post", LAST, pos=0)]
    for place, got in patched(x, places, World(other), executor):
        close(got, expected, place)
    sources = [patch(site(name, LAST), World(other)) for name in ("resid_pre", "attn_out", "mlp_out")]
    ((got,),) = ran([World(x, Plan(tuple(sources)))], LOGITS, executor)
    close(got, expected)


@pytest.mark.full
@torch.no_grad()
def test_plans_compose():
    """Two plans at once are one applied inside the other, at every pair of sites of a layer and the next."""
    model, x = wrapped(), inputs()
    places = [p for p in every_site(model) if p.layer in (None, 0, 1)]
    pairs = [(a, b) for i, a in enumerate(places) for j, b in enumerate(places) if (i + 3 * j) % 5 == 0]
    for a, b in pairs:
        first, second = (
            hk.intervene(a, bend),
            hk.intervene(b, lambda v, ctx: torch.where(v.isfinite(), 1.3 * v + 0.1, v)),
        )
        expected = model.run(x, first + second).logits[:, 0]
        with model.apply(first), model.apply(second):
            close(model.module(pixel_values=x.pixels).logits, expected, a, b)
    assert len(pairs) > 100


# What there is to do


def everything(x: Inputs, other: Inputs) -> list[Plan]:
    """A plan for each thing that can be done."""
    reference = World(inputs(7, rows=5))
    z, resid, scores = site("z", 1, head=1), site("resid_pre", 1, pos=(0, 2)), site("scores", 1, head=(0, 2))
    direction = torch.linspace(-1, 1, 16).double()
    read = hk.here(site("attn_out", 0, pos=2))
    plans = [
        patch(resid, World(other)),
        patch(site("resid_post", 0, pos=0), World(other), source_site=site("resid_post", 1, pos=3)),
        patch(z, World(other, hk.scale(site("resid_pre", 0, pos=1), 2.0))),
        hk.clamp(site("mlp_post", 1, pos=3), 0.5),
        hk.zero(site("result", 2, head=3)),
        hk.mean(z, reference),
        hk.mean(site("resid_pre", 2), reference, pooled=True),
        hk.resample(site("k", 0), reference, seed=3),
        hk.resample(site("scores", 0, pos=1), reference),
        hk.noise(site("embed"), 0.7, seed=2),
        hk.noise(site("logits"), 0.7),
        hk.steer(site("resid_mid", 0), direction, 3.0),
        hk.steer(site("resid_pre", 2, pos=4), direction).strength(torch.tensor([0.0, 0.5, 1.0]).double()),
        hk.scale(site("attn_out", 1), 0.2).where(torch.tensor([True, False, True])),
        hk.scale(site("v", 1), 2.0).where(torch.eye(5)[:3].bool()),
        hk.project_out(site("mlp_out", 1), direction),
        hk.interchange(site("resid_post", 1, pos=1), direction, World(other)),
        hk.knockout(scores.at(pos=0, key_pos=(1, 4))),
        hk.knockout(site("scores", 2)),
        hk.zero(site("pattern", 2, pos=0, key_pos=3)),
        hk.intervene(site("q_input", 1), bend),
        hk.intervene(site("resid_mid", 1, pos=0), lambda v, r, ctx: v + r, read),
    ]
    plans = [Plan((item,)) for item in plans]
    return [*plans, hk.scale(site("resid_pre", 1), 2.0) + hk.freeze(site("z", 1)), Plan(tuple(p[0] for p in plans[:6]))]


def test_everything_there_is_to_do():
    x, other = inputs(1), inputs(2)
    worlds = [World(x, plan) for plan in everything(x, other)]
    agree(worlds, LOGITS)
    agree(worlds, [site("logits", pos=-1, dim=(0, 5)), site("resid_post", 1, pos=(0, 3)), site("pattern", 2)])


def test_random_numbers_are_those_of_the_row():
    """The same alone, in any batch, and by position."""
    model, x = wrapped(), inputs()
    plan = hk.noise(site("resid_pre", 1), 1.0, seed=1) + hk.resample(site("z", 0), World(inputs(9, rows=4)))
    whole = model.run(x, plan).logits
    for row in range(3):
        alone = model.inputs(x.pixels[row], row_ids=torch.tensor([row]))
        close(model.run(alone, plan).logits, whole[row : row + 1])
    shifted = model.run(model.inputs(x.pixels, row_ids=torch.tensor([5, 6, 7])), plan).logits
    assert float((shifted - whole).abs().max()) > 1e-3


def test_a_query_that_sees_nothing_has_no_pattern():
    model, x = wrapped(), inputs()
    blind = hk.knockout(site("scores", 2, pos=0))
    assert torch.equal(
        model.run(x, blind, capture=site("pattern", 2, pos=0)).tape.values[0][1].abs().max(), torch.tensor(0.0).double()
    )
    close(model.run(x, blind).logits, model.run(x, hk.zero(site("z", 2, pos=0))).logits)


def test_queries_see_the_keys_after_them():
    """The last patch moves the class token's answer from the first layer on, and in the last one through its keys."""
    model, x = wrapped(), inputs()
    names, base = ("resid_pre", "k", "v"), model.run(x).logits
    worlds = [World(x, hk.zero(site(name, layer, pos=4))) for name in names for layer in range(3)]
    for (value,), world in zip(agree(worlds, LOGITS), worlds, strict=True):
        assert float((value - base).abs().max()) > 1e-3, world.plan


# What the copy-on-write executor leaves out


def test_what_cannot_reach_the_class_token_is_pruned():
    model, x = wrapped(), inputs()
    dead = [site(name, LAST, pos=3) for name in ("q", "z", "attn_out", "resid_mid", "mlp_post", "resid_post")]
    dead += [site("ln_final", pos=2), site("pattern", LAST, pos=1), site("resid_post", LAST, pos=slice(1, None))]
    alive = [p.at(pos=0) for p in dead] + [site("k", LAST, pos=3), site("z", 1, pos=3), site("resid_post", 1, pos=4)]
    worlds = [World(x, hk.zero(place)) for place in [*dead, *alive]]
    values, statuses = outcomes(model, [*worlds, World(x)], LOGITS, "shared")
    assert statuses[: len(dead)] == [{"pruned"}] * len(dead)
    assert statuses[len(dead) : -1] == [{"fired"}] * len(alive)
    assert all(torch.equal(v[0], values[-1][0]) for v in values[: len(dead)])
    oracle_values = ran([*worlds, World(x)], LOGITS, "sequential")
    for a, b in zip(values, oracle_values, strict=True):
        assert gap(a, b) < 1e-10


def test_worlds_share_the_patches_in_which_their_images_agree():
    """Bit for bit: there a patch from one into the other is inert, and elsewhere in the first layer it is not."""
    x = inputs(1)
    other = with_patches_of(x, inputs(2), (1, 0))
    places = [site("resid_pre", 0, pos=p) for p in range(TOKENS)] + [site("q", 0, pos=p) for p in range(TOKENS)]
    places += [site("resid_post", 0, pos=p) for p in range(TOKENS)]
    worlds = [World(x, patch(place, World(other))) for place in places]
    values, statuses = outcomes(wrapped(), worlds, LOGITS, "shared")
    assert statuses == [{"fired" if p.pos == 3 or p.name == "resid_post" else "inert"} for p in places]
    for a, b in zip(values, ran(worlds, LOGITS, "sequential"), strict=True):
        assert gap(a, b) < 1e-10


def test_shared_is_chosen_and_gives_way():
    model, x = fresh(), inputs()
    assert choose(model, [World(x)]).executor == "shared"
    mixing = hk.intervene(site("resid_pre", 1), lambda v, ctx: v.flip(1), mixes=("pos",))
    assert choose(model, [World(x, mixing)], "shared").executor == "batched"
    expected = ran([World(x, mixing)], LOGITS, "sequential", model)[0][0]
    close(ran([World(x, mixing)], LOGITS, "shared", model)[0][0], expected)
    close(by_hand(x, {("resid_pre", 1): lambda v: v.flip(1)})["logits", None], expected)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_any_attention_kernel(kernel):
    model, x = fresh(), inputs(1)
    model.module.set_attn_implementation(kernel)
    # transformers' eager attention takes its softmax in float32.
    atol = 1e-10 if kernel == "sdpa" else 1e-4
    for place in (site("scores", 1, pos=2), site("pattern", 0, head=1), site("z", 1), site("k", 2, pos=4)):
        plan = Plan((patch(place, World(inputs(2))),))
        torch.testing.assert_close(model.run(x, plan).logits, wrapped().run(x, plan).logits, rtol=0, atol=atol)


# Random plans


@st.composite
def cases(draw: st.DrawFn) -> tuple[Inputs, list[Plan], list[Site]]:
    model = wrapped()
    x = inputs(draw(st.integers(0, 99)), rows=draw(st.integers(1, 3)))
    grid = st.sampled_from([(0, 0), (0, 1), (1, 0), (1, 1)])
    source = World(with_patches_of(x, inputs(100, rows=len(x)), *draw(st.lists(grid, min_size=1, unique=True))))
    reference = World(inputs(101, rows=2))
    if draw(st.integers(0, 3)) == 0:
        source = World(source.inputs, hk.scale(site("resid_pre", 0, pos=1), 2.0))
    plans = [
        Plan(tuple(draw(st.lists(interventions(model, x, source, reference), min_size=1, max_size=4))))
        for _ in range(draw(st.integers(1, 3)))
    ]
    reads = [site("logits", pos=draw(st.sampled_from([None, 0, -1])))]
    if draw(st.booleans()):
        reads.append(site("logits", pos=-1, dim=(3, 5)))
    if draw(st.integers(0, 2)) == 0:
        reads.append(draw(parts(model, x)))
    if draw(st.integers(0, 5)) == 0:
        reads = reads[2:] or [site("resid_post", 0, pos=1)]
    return x, plans, reads


@settings(max_examples=40)
@given(cases())
def test_executors_agree_on_random_plans(case):
    x, plans, reads = case
    worlds = [*(World(x, plan) for plan in plans), World(x)]
    choice = choose(wrapped(), worlds)
    assert choice.executor == "shared" or "in one plan" in choice.reason
    expected, oracle_status = outcomes(wrapped(), worlds, reads, "sequential")
    batched, _ = outcomes(wrapped(), worlds, reads, "batched")
    shared, status = outcomes(wrapped(), worlds, reads, "shared")
    chunked, _ = outcomes(wrapped(), worlds, reads, "shared", budget=1)
    for i, world in enumerate(worlds):
        for name, other in {"batched": batched, "shared": shared, "in chunks": chunked}.items():
            assert gap(expected[i], other[i]) < 1e-10, f"{name} is off: {world.plan}"
        effect = gap(expected[i], expected[-1])
        if status[i] <= {"pruned", "inert"}:
            assert effect < 1e-12, f"{status[i]}, yet the effect is {effect:.2g}: {world.plan}"
        if effect > 1e-6:
            assert status[i] == {"fired"} == oracle_status[i], world.plan


# While the user calls


def called(model: Model, x: Inputs) -> list[Callable[[], Tensor]]:
    module: Any = model.module
    return [
        lambda: module(x.pixels).logits,
        lambda: module(pixel_values=x.pixels, labels=torch.tensor([0, 1, 2])).logits,
        lambda: module(x.pixels, return_dict=False)[0],
        lambda: module(x.pixels, attention_mask=torch.ones(3, TOKENS)).logits,
    ]


@torch.no_grad()
def test_a_plan_held_on_the_model():
    model, x = wrapped(), inputs(1)
    for plan in everything(x, inputs(2)):
        expected = model.run(x, plan).logits[:, 0]
        for call in called(model, x)[:: 1 if len(plan) > 1 else 3]:
            with model.apply(plan) as audit:
                close(call(), expected, plan)
            assert [entry.status for entry in audit] == [entry.status for entry in model.run(x, plan).audit]
    small = model.inputs(x.pixels[:1])
    with model.apply(hk.zero(site("z", 0, pos=1))):
        model.module(small.pixels)  # another number of rows
        inner = model.run(x).logits
    close(inner, model.run(x, hk.zero(site("z", 0, pos=1))).logits)


def test_calls_that_a_plan_cannot_follow_are_refused():
    model, x = wrapped(), inputs()
    with pytest.raises(PlanError, match="pixel_values"), model.apply(hk.zero(site("z", 0))):
        model.module(pixel_values=None)
    masked = torch.ones(3, TOKENS)
    masked[0, 2] = 0
    with pytest.raises(InputsError, match="masks some"), model.apply(hk.zero(site("z", 0))):
        model.module(x.pixels, attention_mask=masked)


def test_images_of_another_size_where_the_user_asks_for_it():
    """Positions are interpolated by the model; there are more patches, and the plan counts them."""
    model, pixels = wrapped(), torch.randn(2, 2, 8, 12).double()
    with torch.no_grad():
        plain = model.module(pixels, interpolate_pos_encoding=True).logits
        with model.apply(hk.zero(site("resid_pre", 1, pos=6))) as audit:
            changed = model.module(pixels, interpolate_pos_encoding=True).logits
    assert audit[0].positions == 2 and float((changed - plain).abs().max()) > 1e-3


def test_training_with_dropout_between_the_sublayers():
    """What a block drops after its MLP, it drops under a plan: an edit that changes nothing changes no gradient."""
    model = fresh()
    for part in model.module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.4
    model.module.train()
    x = inputs()

    def step(plan: Plan) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        model.module.zero_grad()
        with model.apply(plan):
            logits = model.module(x.pixels).logits
        logits.square().sum().backward()
        return logits.detach(), next(model.module.parameters()).grad.clone()

    plain = step(Plan())
    names = ("resid_mid", "mlp_out", "attn_out", "resid_post", "mlp_in", "z", "embed")
    for name in names:
        places = [site(name, layer if hk.KINDS[name].per_layer else None) for layer in range(3)]
        for same in (hk.scale(place, 1.0) for place in places):
            for mine, theirs in zip(step(Plan((same,))), plain, strict=True):
                close(mine, theirs, same)
    changed = step(Plan((hk.scale(site("resid_mid", 1), 2.0),)))
    assert float((changed[0] - plain[0]).abs().max()) > 1e-3


def test_gradients_flow_through_a_plan_with_checkpointing():
    model, x = fresh(), inputs()
    direction = torch.randn(16).double().requires_grad_()
    found = []
    for checkpointing in (False, True):
        model.module.train()
        if checkpointing:
            model.module.gradient_checkpointing_enable({"use_reentrant": False})
        with model.apply(hk.steer(site("resid_mid", 1), direction) + hk.scale(site("scores", 0), 0.5)):
            loss = model.module(x.pixels).logits.square().sum()
            found.append(torch.autograd.grad(loss, [direction, *model.module.parameters()]))
    for a, b in zip(*found, strict=True):
        close(a, b)
    assert float(found[0][0].abs().max()) > 1e-3


# As it was


class Stop(BaseException):
    """Not an Exception, as an interrupt is not."""


def fail(v: Tensor, ctx: hk.Context) -> Tensor:
    raise Stop


def test_the_model_is_as_it_was():
    model, x = fresh(), inputs(1)
    before, logits = State(model.module), model.run(x).logits
    worlds = [World(x, plan) for plan in everything(x, inputs(2))]
    for executor in EXECUTORS:
        ran(worlds, LOGITS, executor, model)
        before.assert_kept()
        for place in every_site(model):
            with pytest.raises(Stop):
                ran([World(x, hk.intervene(place, fail))], LOGITS, executor, model)
            before.assert_kept()
    for place in every_site(model):
        with pytest.raises(Stop):
            model.run(x, hk.intervene(place, fail))
        with pytest.raises(Stop), model.apply(hk.intervene(place, fail)):
            model.module(x.pixels)
        before.assert_kept()
    with pytest.raises(ValueError, match="channel"), model.apply(hk.zero(site("z", 0, head=0))):
        model.module(x.pixels[:, :1])  # the wrong channels
    before.assert_kept()
    assert torch.equal(model.run(x).logits, logits)


def test_two_wrappers_of_one_model_see_each_other_s_plans():
    module: Any = zoo.make("vit")
    one, two, x = hk.wrap(module), hk.wrap(module), inputs()
    with one.apply(hk.zero(site("z", 1))):
        held = two.run(x).logits
    close(held, one.run(x, hk.zero(site("z", 1))).logits)
