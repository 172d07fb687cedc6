"""Debiased decoding on every family that sees: in float64, small random models, rows with one image, two and none."""

from __future__ import annotations

import pytest
import torch

import interp as ip
from interp.attention import Branch, Decoder, Term, attention, debiased
from tests import seeing
from tests.hooks.decoding import recorded

COUNTS = [1, 2, 0, 1]
OPTIONS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
OPTIONS["bad_words_ids"] = [[n] for n in range(100, 106)]  # what stands for images is no word
QUICK = ("qwen2_vl", "gemma3")

families = pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in QUICK else pytest.mark.full) for f in seeing.FAMILIES]
)


def wrapped(family: str) -> ip.Model:
    return ip.wrap(seeing.shared(family))


def dimmed(pixels):
    return pixels * 0.5 + 0.1


def changed(branch: Branch, pixels: torch.Tensor) -> torch.Tensor:
    """Other images, but for those that fill up a row and are all zero."""
    if pixels.ndim < 4:  # packed patches
        return branch.images(pixels)
    each = [branch.images(one) if bool(one.any()) else one for one in pixels.flatten(0, -4)]
    return torch.stack(each).reshape(pixels.shape)


def branches(model: ip.Model, names: str) -> tuple[Branch, ...]:
    """Edits of the tower, of pixels, of the language model throughout and of its last layer alone, by first letters."""
    made = {
        "t": lambda: Branch(attention(model, "random", stack="vision")),
        "p": lambda: Branch(images=dimmed),
        "l": lambda: Branch(attention(model, "shuffled")),
        "i": lambda: Branch(attention(model, "uniform", keys="image")),
        "e": lambda: Branch(attention(model, "random", layers=-1)),
    }
    return tuple(made[name]() for name in names)


def decoder_of(model: ip.Model, names: str) -> Decoder:
    return Decoder(tuple(Term((branch,), 1.5) for branch in branches(model, names)), 1e-4)


def by_hand(model, batch, decoder, tokens):
    """The logits at every step, from separate runs of the whole text in every world."""
    found = []
    for step in range(tokens.shape[1]):
        text, worlds = seeing.longer(batch, tokens[:, :step]), []
        for branch in (Branch(), *decoder.branches):
            looked = text if branch.images is None else {**text, "pixel_values": changed(branch, text["pixel_values"])}
            worlds.append(model.run(model.inputs(looked), branch.plan, seed=5).logits[:, -1:])
        found.append(decoder.combine(torch.stack(worlds), ip.attention.Moment(step, torch.arange(4), {}))[:, -1])
    return found


@families
@pytest.mark.parametrize("names", ["tp", "l", "ie", "e"])
@torch.no_grad()
def test_worlds_are_separate_runs_of_the_whole_text(family, names):
    model, batch = wrapped(family), seeing.batch(family, COUNTS, "left")
    decoder = decoder_of(model, names)
    with debiased(model, decoder, seed=5):
        got = recorded(model.module, lambda: model.module.generate(**batch, **OPTIONS))
    tokens = got.tokens[:, batch["input_ids"].shape[1] :]
    plain = recorded(model.module, lambda: model.module.generate(**batch, **OPTIONS))
    for one, two in zip(got.logits, by_hand(model, batch, decoder, tokens), strict=True):
        assert torch.equal(one.isinf(), two.isinf())
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    moved = (plain.logits[0] - got.logits[0]).nan_to_num(0, 0, 0).abs().amax(-1)
    # A row without an image is moved by what is done to the language model alone.
    assert bool((moved[[0, 1, 3]] > 1e-6).all()) and (float(moved[2]) > 1e-6) == bool(set(names) & {"l", "e"})


@families
@pytest.mark.parametrize("mode", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
@torch.no_grad()
def test_beams_and_samples_are_those_of_a_generation_without_a_cache(family, mode):
    model, batch = wrapped(family), seeing.batch(family, [1, 2], "left")
    for names in ("tle", "e"):
        outputs = []
        for cached in (True, False):
            torch.manual_seed(0)
            with debiased(model, decoder_of(model, names), seed=5):
                outputs.append(model.module.generate(**batch, **{**OPTIONS, **mode}, use_cache=cached))
        assert torch.equal(*outputs)


@families
@torch.no_grad()
def test_at_weight_zero_it_is_plain_decoding_and_rows_are_as_they_are_alone(family):
    model, batch = wrapped(family), seeing.batch(family, COUNTS, "left")
    module, width = model.module, batch["input_ids"].shape[1]
    plain = module.generate(**batch, **OPTIONS)
    with debiased(model, Decoder((Term(branches(model, "tle"), 0.0),))):
        assert torch.equal(module.generate(**batch, **OPTIONS), plain)
    same = Decoder((Term((Branch(attention(model, "uniform")),)),), None)
    with debiased(model, same):
        together = module.generate(**batch, **OPTIONS)[:, width:]
    for number in (0, 1, 3):
        one = seeing.row(family, batch, COUNTS, number)
        with debiased(model, same):
            assert torch.equal(module.generate(**one, **OPTIONS)[0, -3:], together[number])
    assert torch.equal(module.generate(**batch, **OPTIONS), plain)
