"""Reference mode on random models that see, against the formulas of CausalMM's released code on the bare module.

Each row is computed alone and without padding, as that code does it; reference mode has them in one padded batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

import interp as ip
from hooks import choice
from interp.attention import debiased, reference
from tests import seeing, zoo
from tests.attention.shapes import image_of, model, questions
from tests.hooks.decoding import recorded

COUNTS = [1, 2, 1]
OPTIONS: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
OPTIONS |= {"eos_token_id": None, "bad_words_ids": [[n] for n in range(100, 106)]}
FAMILIES = ["llava", "qwen2_vl", "gemma3"]
GAMMA, EPSILON, SEED = 0.7, 1e-3, 3


class Bare:
    """A Hugging Face model whose attention is written out here, may be edited in the language model, and is seen."""

    def __init__(self, family: str) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask

        name = f"written_out_{family}"
        AttentionInterface.register(name, self.attend)
        AttentionMaskInterface.register(name, eager_mask)
        self.family, self.module = family, seeing.make(family)
        self.module.set_attn_implementation(name)
        self.patterns: list[Tensor] = []
        self.edit: Callable[[Tensor, int], Tensor] | None = None

    def attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        **_: object,
    ) -> tuple[Tensor, None]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * scaling
        pattern = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
        layer = getattr(module, "layer_idx", None)
        if layer is not None and self.edit is not None:
            pattern = self.edit(pattern, layer)
        self.patterns.append(pattern)
        return (pattern @ v).transpose(1, 2).contiguous(), None

    def logits(self, given: dict[str, Tensor], features: Tensor, edit: Any = None) -> Tensor:
        """Of the last token, of one row, where image tokens are replaced by features."""
        ids, core = given["input_ids"], self.module.model
        embedded = self.module.get_input_embeddings()(ids)
        embedded[ids == seeing.PLACE] = features
        self.edit, more = edit, {}
        if self.family == "qwen2_vl":
            more["position_ids"], _ = core.get_rope_index(
                ids, mm_token_type_ids=given["mm_token_type_ids"], image_grid_thw=given["image_grid_thw"]
            )
        if self.family == "gemma3":
            more["token_type_ids"] = given["token_type_ids"]
            return self.module(inputs_embeds=embedded, **more, use_cache=False).logits[0, -1]
        out = core.language_model(inputs_embeds=embedded, **more, use_cache=False).last_hidden_state
        return self.module.lm_head(out[0, -1])

    def features(self, given: dict[str, Tensor], form: str | None, row: int) -> Tensor:
        """What the images of one row become in the text, multiplied by edited attention where there is a form."""
        core, pixels = self.module.model, given["pixel_values"]
        self.patterns, self.edit = [], None
        if self.family == "qwen2_vl":
            return self._packed(core.visual, pixels, given["image_grid_thw"], form, row)
        out = core.vision_tower(pixels, output_hidden_states=True)
        llava = self.family == "llava"
        found, attention = (
            (out.hidden_states[-2][:, 1:], self.patterns[-2]) if llava else (out.last_hidden_state, self.patterns[-1])
        )
        if form is not None:
            each = [weights(attention[n : n + 1], form, (4, 4), row, n) for n in range(len(pixels))]
            found = found * torch.stack(each).reshape(len(pixels), 16, 1)
        return core.multi_modal_projector(found).flatten(0, 1)

    def _packed(self, visual: Any, pixels: Tensor, grid: Tensor, form: str | None, row: int) -> Tensor:
        """Qwen's patches are ordered by blocks of 2 x 2; the maps are of patches row by row."""
        found = visual.merger.ln_q(visual(pixels, grid_thw=grid).last_hidden_state)
        attentions, factors = self.patterns[-len(grid) :], []
        for number, (_, height, width) in enumerate(grid.tolist()):
            if form is None:
                factors.append(torch.ones(height * width, dtype=torch.float64))
                continue
            blocks = torch.arange(height * width).reshape(height // 2, width // 2, 2, 2).transpose(1, 2).flatten()
            attention = attentions[number][:, :, blocks][..., blocks]
            at = weights(attention, form, (height, width), row, number).reshape(height // 2, 2, width // 2, 2)
            factors.append(at.transpose(1, 2).flatten())
        return visual.merger.mlp((found * torch.cat(factors)[:, None]).reshape(-1, visual.merger.hidden_size))


def weights(attention: Tensor, form: str, size: tuple[int, int], row: int, number: int) -> Tensor:
    """The factor [h, w] of each patch of one image, given its attention [1, H, N, N]."""
    draw = torch.Generator().manual_seed(int(choice(1 << 31, SEED, row, number)))
    if form == "shuffle":
        heads = [
            head.flatten()[torch.randperm(head.numel(), generator=draw)].reshape(head.shape) for head in attention[0]
        ]
        edited = torch.stack(heads)[None]
    elif form == "reversed":
        edited = attention.flatten(2).max(-1).values[..., None, None] - attention
    elif form == "uniform":
        edited = attention.flatten(2).mean(-1)[..., None, None].expand_as(attention)
    else:
        edited = 2 * torch.rand(attention.shape, generator=draw, dtype=torch.float64)
    return interpolate(edited, size=size, mode="bilinear", align_corners=False).mean(1)[0]


def attending(form: str, row: int) -> Callable[[Tensor, int], Tensor]:
    """Attention of the language model edited as the code says, in one row of T tokens."""

    def edit(pattern: Tensor, layer: int) -> Tensor:
        size = pattern.shape[-1]
        before = torch.ones(size, size, dtype=torch.float64).tril()
        if form == "uniform":
            return torch.ones_like(pattern) / size * before
        if form == "reversed":
            return (pattern.max(-1, keepdim=True).values - pattern) * before
        drawn = drawn_at(layer, row, pattern.shape[1], size)
        return drawn / drawn.sum(-1, keepdim=True) * before

    return edit


def drawn_at(layer: int, row: int, heads: int, size: int) -> Tensor:
    """Numbers in (0, 1) as the mode draws them, in place of its own, which tests of random numbers are about."""
    where = torch.meshgrid(torch.arange(heads), torch.arange(size), torch.arange(size), indexing="ij")
    return mixed(row, *where)[None]


def mixed(row: Tensor | int, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return ((row * 7 + head * 3 + query * 1.7 + key * 0.9).double().sin() * 99.1) % 0.9 + 0.05


@cache
def bare(family: str) -> Bare:
    return Bare(family)


def expected(family: str, batch: dict[str, Tensor], visual: str | None, language: str | None) -> Tensor:
    """The logits that the first token is chosen from, by the formulas, row by row."""
    found, one = [], bare(family)
    for number in range(len(COUNTS)):
        given = seeing.row(family, batch, COUNTS, number)
        plain = one.features(given, None, number)
        own = one.logits(given, plain)
        z = own * (1 + GAMMA * ((visual is not None) + (language is not None)))
        if visual is not None:
            z = z - GAMMA * one.logits(given, one.features(given, visual, number))
        if language is not None:
            z = z - GAMMA * one.logits(given, plain, attending(language, number))
        cut = math.log(EPSILON) + own.max()
        found.append(torch.where(own < cut, -torch.inf, z))
    return torch.stack(found)


BRANCHES = [(form, None) for form in reference.FORMS] + [(None, form) for form in reference.LANGUAGE_FORMS]


# The code's masks are causal, and Gemma 3's images see what comes after them.
CASES = [(family, *one) for family in ("llava", "qwen2_vl") for one in [*BRANCHES, ("shuffle", "reversed")]]
CASES += [("gemma3", form, None) for form in reference.FORMS]


@pytest.mark.parametrize(("family", "visual", "language"), CASES)
@torch.no_grad()
def test_first_step_logits_are_those_of_the_published_formulas(family, visual, language, monkeypatch):
    monkeypatch.setattr(reference, "uniform", lambda _seed, _own, _salt, *where: mixed(*where))
    wrapped, batch = ip.wrap(seeing.shared(family)), seeing.batch(family, COUNTS, "left")
    mine = None if visual is None else reference.visual(wrapped, wrapped.inputs(batch), visual, seed=SEED)
    said = None if language is None else reference.language(wrapped, language)
    with debiased(wrapped, reference.decoder(mine, said, gamma=GAMMA, epsilon=EPSILON)):
        got = first(wrapped.module, batch)
    want = expected(family, batch, visual, language)
    assert torch.equal(got.isinf(), want.isinf()) and bool(want.isinf().any()) and not bool(want.isnan().any())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    moved = (first(wrapped.module, batch) - want).nan_to_num(0, 0, 0).abs().amax(1)
    assert bool((moved > 1e-6).all())


def first(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The logits of the first step."""
    options = {**OPTIONS, "max_new_tokens": 1, "min_new_tokens": 1}
    return recorded(module, lambda: module.generate(**batch, **options)).logits[0]


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@torch.no_grad()
def test_with_one_cache_for_both_the_visual_counterfactual_of_later_tokens_is_the_fact(family):
    """As in the released code; with a cache of its own, or with none, it is not."""
    wrapped, batch = ip.wrap(seeing.shared(family)), seeing.batch(family, COUNTS, "left")
    branch = reference.visual(wrapped, wrapped.inputs(batch), "reversed")
    for shared, cached in ((True, True), (False, True), (True, False)):
        with debiased(wrapped, reference.decoder(branch, gamma=GAMMA, epsilon=EPSILON, shared_cache=shared)):
            got = recorded(wrapped.module, lambda: wrapped.module.generate(**batch, **OPTIONS, use_cache=cached))  # noqa: B023
        tokens = got.tokens[:, batch["input_ids"].shape[1] :]
        for step in range(1, 3):
            own = wrapped.run(wrapped.inputs(seeing.longer(batch, tokens[:, :step]))).logits[:, -1]
            fact = own.masked_fill(own < math.log(EPSILON) + own.amax(-1, keepdim=True), -torch.inf)
            assert torch.equal(fact.isinf(), got.logits[step].isinf())
            far = float((fact - got.logits[step]).nan_to_num(0, 0, 0).abs().max())
            assert far < 1e-8 if shared and cached else far > 1e-3


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in FAMILIES else pytest.mark.full) for f in seeing.FAMILIES]
)
@torch.no_grad()
def test_every_family_bears_the_visual_branch_and_its_draws_do_not_depend_on_the_batch(family):
    wrapped, batch = ip.wrap(seeing.shared(family)), seeing.batch(family, COUNTS, "left")
    plain = wrapped.run(wrapped.inputs(batch)).logits[:, -1]
    for form in reference.FORMS:
        inputs = wrapped.inputs(batch)
        together = wrapped.run(inputs, reference.visual(wrapped, inputs, form).plan).logits[:, -1]
        assert bool(((together - plain).abs().amax(-1) > 1e-7).all()) and bool(together.isfinite().all())
        for number in (0, 2):
            one = wrapped.inputs(seeing.row(family, batch, COUNTS, number), row_ids=torch.tensor([number]))
            alone = wrapped.run(one, reference.visual(wrapped, one, form).plan).logits[0, -1]
            torch.testing.assert_close(alone, together[number], rtol=0, atol=1e-8)


def test_what_the_mode_does_not_bear():
    wrapped, batch = ip.wrap(seeing.shared("llava")), seeing.batch("llava", COUNTS, "left")
    inputs = wrapped.inputs(batch)
    with pytest.raises(ip.PlanError, match="did you mean 'shuffle'"):
        reference.visual(wrapped, inputs, "shuffled")
    with pytest.raises(ip.PlanError, match="0/0 at the first token"):
        reference.language(wrapped, "reverse_and_normalize")
    with pytest.raises(ip.PlanError, match="did you mean 'reversed'"):
        reference.language(wrapped, "reverse")
    with pytest.raises(ip.PlanError, match="a visual branch, one of the language, or both"):
        reference.decoder()
    with pytest.raises(ip.InputsError, match="have none"):
        reference.visual(wrapped, wrapped.inputs(seeing.batch("llava", [0, 0])))
    with pytest.raises(ip.SiteError, match="no stack 'vision'"):
        reference.visual(zoo.wrapped("llama"), inputs)
    branch = reference.visual(wrapped, inputs)
    with pytest.raises(ip.InputsError, match="of 3 rows of images, the call has 2"), debiased(wrapped, branch):
        wrapped.module(**seeing.batch("llava", [1, 1]))
    with pytest.raises(ip.InputsError, match="tokens of images in row 1"), debiased(wrapped, branch):
        wrapped.module(**seeing.batch("llava", [1, 1, 1]))
    with pytest.raises(ip.PlanError, match="no 3 x 4"):
        reference.weighted_features(torch.ones(1, 9, 2), torch.ones(1, 2, 5, 5), (3, 4))


@torch.no_grad()
def test_a_do_is_none_of_these():
    """What the code does to the features is not what edited attention in the encoder does to them."""
    asked, wrapped = questions(), model()
    assert bool(image_of(asked).any())
    inputs = wrapped.inputs({k: v for k, v in asked.arguments().items() if v is not None})
    plans = (
        reference.visual(wrapped, inputs, "uniform").plan,
        ip.attention.attention(wrapped, "uniform", stack="vision"),
    )
    one, two = (wrapped.run(inputs, plan).logits[:, -1] for plan in plans)
    assert float((one - two).abs().min(1).values.max()) > 1e-3
