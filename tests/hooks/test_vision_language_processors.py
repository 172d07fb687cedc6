"""What processors make of texts and images: real ones, made here without a network, and what is none of a model's."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

import hooks as hk
from hooks import Model, World, patch, site, zero
from hooks.errors import InputsError, PlanError
from tests import seeing, zoo

COUNTS = [1, 2, 0]
MARKS = {"gemma3": "<start_of_image>"}
"""What stands for an image in a text, where it is not ``<image>``."""


def tokenizer(*special: str, **named: Any) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *["what", "is", "this", "a", "cat", "dog", "and", "no", "image", "here"]]
    words += [f"word{number}" for number in range(seeing.PLACE - len(words))]
    core = Tokenizer(WordLevel({word: at for at, word in enumerate([*words, *special])}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    given = {"pad_token": "<pad>", "unk_token": "<unk>", "additional_special_tokens": list(special), **named}
    return PreTrainedTokenizerFast(tokenizer_object=core, **given)


def processor(family: str) -> Any:
    import transformers as t

    cut = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    llava = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if family == "llava":
        return t.LlavaProcessor(t.CLIPImageProcessor(**cut), tokenizer("<image>"), image_token="<image>", **llava)
    if family == "llava_next":
        images = t.LlavaNextImageProcessor(**cut, image_grid_pinpoints=seeing.GRID)
        return t.LlavaNextProcessor(images, tokenizer("<image>"), image_token="<image>", **llava)
    if family == "idefics3":
        edge = {"longest_edge": 16}
        images = t.Idefics3ImageProcessor(do_image_splitting=False, size=edge, max_image_size=edge)
        special = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
        return t.Idefics3Processor(images, tokenizer(*special), image_seq_len=4)
    named = {"image_token": "<image>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    images = t.Gemma3ImageProcessor(size={"height": 16, "width": 16})
    return t.Gemma3Processor(images, tokenizer(*named.values(), extra_special_tokens=named), image_seq_length=4)


@cache
def wrapped(family: str) -> Model:
    return hk.wrap(seeing.shared(family), processor(family))


def picture(seed: int) -> Image.Image:
    values = numpy.random.default_rng(seed).integers(0, 255, (16 + 4 * seed, 16, 3), dtype=numpy.uint8)
    return Image.fromarray(values)


def texts(family: str) -> list[str]:
    mark = MARKS.get(family, "<image>")
    return [f"what is {mark} a cat", f"{mark} and {mark} dog", "no image here"]


each_processor = pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, marks=() if f == "llava" else pytest.mark.full)
        for f in ("llava", "llava_next", "idefics3", "gemma3")
    ],
)


@each_processor
@pytest.mark.parametrize("padding", ["left", "right"])
def test_texts_with_images_are_rows_with_one_with_two_and_with_none(family: str, padding: str) -> None:
    model = wrapped(family)
    before = model.tokenizer.padding_side
    images = [picture(0), [picture(1), picture(2)], None]
    x = model.inputs(texts(family), images=images, padding=padding)
    assert x.pictures.number.tolist() == [0, 0, 1] and x.pictures.row.tolist() == [0, 1, 1]
    assert bool(x.mask[0, 0]) == (padding == "right" or x.lengths[0] == x.width)
    assert model.tokenizer.padding_side == before
    assert any("<image>" in label for label in x.labels(0)) and repr(x).count("<image>") <= 2
    alone = [model.inputs(text, images=[image]) for text, image in zip(texts(family), images, strict=True)]
    together = model.run(x).logits
    for row, one in enumerate(alone):
        want = model.run(one).logits[0]
        torch.testing.assert_close(together[row][x.mask[row]], want, rtol=0, atol=1e-9)
    blank = model.run(x, zero(site("resid_pre", 0, pos="image"))).logits
    assert float((blank - together).abs().amax(-1)[:2].max()) > 1e-3
    assert float((blank - together)[2][x.mask[2]].abs().max()) < 1e-9


@each_processor
def test_what_a_processor_made_is_the_same_as_what_it_is_given(family: str) -> None:
    model, images = wrapped(family), [picture(0), [picture(1), picture(2)], None]
    x = model.inputs(texts(family), images=images)
    given = images if family in ("idefics3", "gemma3") else [picture(0), picture(1), picture(2)]
    if given is images:
        given = [[picture(0)], [picture(1), picture(2)], []]
    model.tokenizer.padding_side = "right"
    made = model.processor(text=texts(family), images=given, padding=True, return_tensors="pt")
    y = model.inputs(made)
    assert torch.equal(x.contents(), y.contents())
    made["pixel_values"].zero_()  # what the caller does later reaches no inputs
    assert torch.equal(x.pictures.tensors["pixel_values"], y.pictures.tensors["pixel_values"])


def test_images_are_refused_where_they_do_not_belong() -> None:
    model, cat = wrapped("llava"), picture(0)
    with pytest.raises(InputsError, match="images for 1 rows"):
        model.inputs(texts("llava"), images=cat)
    with pytest.raises(InputsError, match="places for"):
        model.inputs(["<image> a", "a dog"], images=[None, cat])  # the image of another row
    with pytest.raises(InputsError, match="2 <image> tokens"):
        model.inputs(["<image> <image> a"], images=[cat])
    with pytest.raises(InputsError, match="stands for an image"):
        model.inputs(["<image> a cat"])
    with pytest.raises(InputsError, match="one of PIL's"):
        model.inputs(["<image> a"], images=["cat.png"])
    with pytest.raises(InputsError, match="need the model's processor"):
        hk.wrap(model.module).inputs(["<image> a"], images=[cat])
    with pytest.raises(InputsError, match="takes texts or token ids, and no images"):
        hk.wrap(zoo.make("llama")).inputs(["a"], images=[cat])


LIKE = {("qwen2_vl", "qwen2_5_vl"), ("smolvlm", "idefics3"), ("llava_next", "llava_onevision")}
"""Families whose processors give the same."""


@pytest.mark.parametrize("family", [
    pytest.param(f, marks=() if f in ("llava", "gemma3") else pytest.mark.full) for f in seeing.FAMILIES
])  # fmt: skip
def test_the_output_of_another_familys_processor_is_refused(family: str) -> None:
    model = hk.wrap(seeing.shared(family))
    for other in seeing.FAMILIES:
        batch = seeing.batch(other, COUNTS)
        if other == family or {family, other} in map(set, LIKE):
            assert model.inputs(batch).pictures is not None
            continue
        with pytest.raises(InputsError):
            model.inputs(batch)
    with pytest.raises(InputsError, match="only images"):
        model.inputs(seeing.batch(family, COUNTS) | {"pixel_values_videos": torch.zeros(1, 3)})
    bad = seeing.batch(family, COUNTS)
    bad["pixel_values"] = bad["pixel_values"].clone()
    bad["pixel_values"].flatten()[0] = torch.nan
    with pytest.raises(InputsError, match="finite"):
        model.inputs(bad)


def test_a_call_that_chooses_other_layers_of_the_tower_is_refused() -> None:
    model, batch = wrapped("llava"), seeing.batch("llava", [1])
    plan = zero(site("z", 0, stack="vision"))
    with pytest.raises(PlanError, match="vision_feature_layer"), model.apply(plan):
        model.module(**batch, vision_feature_layer=-1)


def test_plans_with_images_are_saved_and_read(tmp_path: Any) -> None:
    model = wrapped("llava")
    x, y = (model.inputs(seeing.batch("llava", [1, 2], seed=seed)) for seed in (0, 1))
    plan = hk.as_plan(patch(site("resid_post", 0, stack="vision", pos="image 0"), World(y)))
    plan.save(tmp_path / "plan")
    again = hk.Plan.load(tmp_path / "plan", model)
    assert again == plan and "image 0" in str(again)
    assert torch.equal(model.run(x, again).logits, model.run(x, plan).logits)
    other = hk.as_plan(patch(site("resid_post", 0, stack="vision", pos="image 0"), World(x)))
    assert other != plan
    assert hk.fingerprint(other) != hk.fingerprint(plan)
