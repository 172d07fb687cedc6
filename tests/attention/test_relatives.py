"""The neighbours of counterfactual decoding, each against its own equation from separate runs."""

from __future__ import annotations

import math

import pytest
import torch

import interp as ip
from interp.attention import Branch, Detector, ShareBelow, debiased, gated, reference, relatives
from tests import zoo
from tests.attention.shapes import generate, image_of, model, questions
from tests.hooks.decoding import recorded


def first_logits(asked, decoder):
    with debiased(model(), decoder):
        return model().module(**asked.arguments()).logits[:, -1]


def plain_logits(asked, **changed):
    return model().module(**{**asked.arguments(), **changed}).logits[:, -1]


def text_alone(asked):
    keep = asked.attention_mask.bool() & ~image_of(asked)
    rows = [model().module(input_ids=i[k][None]).logits[0, -1] for i, k in zip(asked.input_ids, keep, strict=True)]
    return torch.stack(rows)


def cut(z, own, eps):
    return z.masked_fill(own < own.amax(-1, keepdim=True) + math.log(eps), -torch.inf)


@torch.no_grad()
def test_vcd():
    asked = questions()
    own, noised = plain_logits(asked), plain_logits(asked, pixel_values=relatives.diffused(500)(asked.pixel_values))
    assert float((own - noised).abs().max()) > 0.01
    torch.testing.assert_close(first_logits(asked, relatives.vcd(1.5, 0.2)), cut(2.5 * own - 1.5 * noised, own, 0.2))
    # The noise of a picture is its own, whatever the batch.
    one = relatives.diffused(500)(asked.pixel_values[1:2])
    assert torch.equal(one, relatives.diffused(500)(asked.pixel_values)[1:2])


@torch.no_grad()
def test_without_the_image():
    asked = questions()
    own, other = plain_logits(asked), text_alone(asked)
    assert float((own - other).abs().max()) > 0.1
    got = first_logits(asked, relatives.without_image(image_of(asked), 2.0, 0.1))
    torch.testing.assert_close(got, cut(3 * own - 2 * other, own, 0.1), rtol=0, atol=1e-5)
    confident = float(own.softmax(-1).amax(-1).sort().values[1:].mean())
    unsure = own.softmax(-1).amax(-1, keepdim=True) < confident
    got = first_logits(asked, relatives.m3id(image_of(asked), 0.3, confident))
    want = own + torch.where(unsure, (1 - math.exp(-0.3)) / math.exp(-0.3), 0.0) * (own - other)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert bool(unsure.any()) and not bool(unsure.all())


@torch.no_grad()
def test_pai_attends_more_and_subtracts_the_text():
    asked = questions()
    image = image_of(asked)
    with debiased(model(), relatives.pai(model(), image, 1.4, 0.5, 0.1)):
        generate(asked)  # new tokens attend more too
    got = first_logits(asked, relatives.pai(model(), image, 1.4, 0.5, 0.1, queries=(-1,)))
    with model().apply(relatives.attend_more(model(), 0.5, queries=(-1,))):
        louder = model().module(**asked.arguments()).logits[:, -1]
    torch.testing.assert_close(got, cut(1.4 * louder - 0.4 * text_alone(asked), louder, 0.1), rtol=0, atol=1e-5)
    place = ip.site("scores", 1)
    inputs, plan = model().inputs(asked.arguments()), relatives.attend_more(model(), 0.5, layers=[1], queries=(-1,))
    before, after = (model().run(inputs, p, capture=place).tape[place][:, :, -1:] for p in (None, plan))
    columns = image[:, None, None].expand_as(before)
    torch.testing.assert_close(after[columns], before[columns] + 0.5 * before[columns].abs())
    assert torch.equal(after[~columns], before[~columns])


@torch.no_grad()
def test_icd_hides_the_disturbance_from_the_model_itself():
    wrapped = zoo.wrapped("llama")
    clean = torch.tensor([[6, 1, 5, 3], [2, 7, 4, 1]])
    disturbed = torch.cat([clean[:, :1], torch.tensor([[8, 9], [8, 9]]), clean[:, 1:]], 1)
    away = relatives.disturbance(disturbed, clean)
    assert away.sum(1).tolist() == [2, 2] and away[0].tolist() == [False, True, True, False, False, False]
    with debiased(wrapped, relatives.icd(away, 0.5, None)):
        got = wrapped.module(disturbed).logits[:, -1]
    own, other = wrapped.module(clean).logits[:, -1], wrapped.module(disturbed).logits[:, -1]
    torch.testing.assert_close(got, 1.5 * own - 0.5 * other, rtol=0, atol=1e-9)
    with pytest.raises(ip.InputsError, match="differ by more"):
        relatives.disturbance(disturbed.flip(1), clean)


@torch.no_grad()
def test_agla_adds_the_masked_picture():
    asked = questions()
    relevance = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(0))
    masked = relatives.masked(relevance, 4 / 9)(asked.pixel_values)
    patches = masked.unfold(2, 8, 8).unfold(3, 8, 8)
    flat = patches.std((-1, -2)).sum(1) < 1e-9
    assert flat.sum((1, 2)).tolist() == [5, 5, 5]
    assert bool((relevance[flat].reshape(3, 5).amax(1) < relevance[~flat].reshape(3, 4).amin(1)).all())
    own, other = plain_logits(asked), plain_logits(asked, pixel_values=masked)
    got = first_logits(asked, relatives.agla(relevance, 2.0, 0.5, kept=4 / 9))
    torch.testing.assert_close(got, cut(own + 2 * other, own, 0.5))


@torch.no_grad()
def test_dola_takes_the_layer_that_differs_most():
    wrapped = zoo.wrapped("llama")
    ids = torch.tensor([[6, 1, 5, 3], [2, 7, 4, 1]])
    with debiased(wrapped, relatives.dola(wrapped, [0, 1], 0.1)):
        got = wrapped.module(ids).logits[:, -1]
    lens = wrapped.module(ids, output_hidden_states=True)
    own = lens.logits[:, -1]
    p, best = own.softmax(-1), []
    for layer in (1, 2):
        q = wrapped.module.lm_head(wrapped.module.model.norm(lens.hidden_states[layer]))[:, -1].softmax(-1)
        m = (p + q) / 2
        best.append((0.5 * (p * (p / m).log() + q * (q / m).log()).sum(-1), q.log()))
    chosen = torch.where((best[0][0] > best[1][0])[:, None], best[0][1], best[1][1])
    torch.testing.assert_close(got, cut(p.log() - chosen, own, 0.1), rtol=0, atol=1e-6)


@torch.no_grad()
def test_vti_turns_and_keeps_the_norm():
    wrapped = zoo.wrapped("llama")
    better, worse = wrapped.inputs([[6, 1, 5, 3], [2, 7, 4, 1]]), wrapped.inputs([[6, 1, 9, 3], [2, 7, 8, 2]])
    moves = relatives.shifts(wrapped, better, worse)
    place = ip.site("resid_post", 1)
    tape = [wrapped.run(x, capture=place).tape[place][:, -1] for x in (better, worse)]
    change = tape[0] - tape[1]
    assert moves.shape == (3, 24) and float(change.mean(0) @ moves[1]) > 0
    plan = relatives.vti(moves, 0.8, layers=[1])
    before, after = (wrapped.run(better, p, capture=place).tape[place] for p in (None, plan))
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))
    want = before + 0.8 * moves[1]
    torch.testing.assert_close(after, want * before.norm(dim=-1, keepdim=True) / want.norm(dim=-1, keepdim=True))


@torch.no_grad()
def test_routes_are_turned_down_only_where_the_head_looks_little_at_the_image():
    asked, wrapped = questions(), model()
    inputs, image = wrapped.inputs(asked.arguments()), image_of(asked)
    pattern = ip.site("pattern", 1)
    clean = wrapped.run(inputs, capture=[pattern]).tape[pattern][:, :, -1:]
    share = (clean * image[:, None, None]).sum(-1)
    level = float(share[:, :2].flatten().sort().values[2:4].mean())
    plan = relatives.gate_routes([(1, 0), (1, 1)], image, asked.attention_mask, 0.25, share=level, queries=(-1,))
    after = wrapped.run(inputs, plan, capture=pattern).tape[pattern][:, :, -1:]
    opened = share < level
    opened[:, 2:] = False
    scaled = torch.where(opened[..., None] & ~image[:, None, None], 0.25 * clean, clean)
    torch.testing.assert_close(after, scaled, rtol=0, atol=1e-9)
    assert bool(opened.any()) and not bool(opened[:, :2].all()) and not torch.equal(scaled, clean)
    with wrapped.apply(relatives.gate_routes([(1, 0)], image, asked.attention_mask, 0.5)):
        generate(asked)


@torch.no_grad()
def test_driving_heads_are_turned_down_where_a_detector_says_so():
    wrapped = zoo.wrapped("llama")
    x = wrapped.inputs([[6, 1, 5, 3], [2, 7, 4, 1], [3, 3, 9, 5]])
    seen = ip.site("z", 0, head=(1,), pos=-1)
    value = wrapped.run(x, capture=seen).tape[seen][:, 0]
    direction = torch.randn(1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    told = (value * direction).flatten(1).sum(1)
    plan = relatives.suppress(
        [(2, 0), (2, 3)], 0.0, detector=Detector(seen, direction, float(told.median())), queries=(-1,)
    )
    z = ip.site("z", 2)
    before, after = (wrapped.run(x, p, capture=z).tape[z] for p in (None, plan))
    want = before.clone()
    rows = told > told.median()
    want[rows, -1:, 0], want[rows, -1:, 3] = 0, 0
    assert torch.equal(after, want) and int(rows.sum()) == 1
    with pytest.raises(ip.PlanError, match="a direction"):
        wrapped.run(x, gated(ip.scale(ip.site("z", 2, pos=-1), 0.0), Detector(seen, direction[0], 0.0)))
    with pytest.raises(ip.PlanError, match="scores of some keys"):
        ShareBelow(ip.site("pattern", 0), 0.5)


def test_the_formulas_of_the_released_code():
    """Written out once more by hand, from what that code does."""
    own, visual, language = torch.randn(3, 2, 11, dtype=torch.float64)
    got = reference.contrasted(own, visual, language, gamma=0.5, epsilon=0.1)
    want = (1 + 2 * 0.5) * own - 0.5 * visual - 0.5 * language
    torch.testing.assert_close(got, cut(want, own, 0.1))
    torch.testing.assert_close(reference.contrasted(own, visual, gamma=2.0), cut(3 * own - 2 * visual, own, 0.1))
    weights = torch.rand(2, 3, 10, 10, dtype=torch.float64)
    assert torch.equal(reference.edited_attention(weights, "reversed")[1, 2], weights[1, 2].max() - weights[1, 2])
    torch.testing.assert_close(reference.edited_attention(weights, "uniform")[0, 1, 3, 4], weights[0, 1].mean())
    mixed = reference.edited_attention(weights, "shuffle", torch.Generator().manual_seed(0))
    assert not torch.equal(mixed, weights)
    for row in range(2):
        for head in range(3):
            assert torch.equal(mixed[row, head].flatten().sort().values, weights[row, head].flatten().sort().values)
    drawn = reference.edited_attention(weights, "random", torch.Generator().manual_seed(0))
    assert 1 < float(drawn.max()) < 2 and float(drawn.min()) >= 0
    features = torch.randn(2, 9, 5, dtype=torch.float64)
    resized = torch.nn.functional.interpolate(weights, size=(3, 3), mode="bilinear", align_corners=False).mean(1)
    want = torch.stack([features[:, 3 * i + j] * resized[:, i, j, None] for i in range(3) for j in range(3)], 1)
    torch.testing.assert_close(reference.weighted_features(features, weights), want)
    with pytest.raises(ip.PlanError, match="did you mean 'shuffle'"):
        reference.edited_attention(weights, "shuffled")


@torch.no_grad()
def test_reference_mode_differs_from_a_do_after_the_first_token():
    """With one cache for both, as in that code, the counterfactual of later steps is the fact; ours is not."""
    asked, wrapped = questions(), model()
    branch = Branch(ip.attention.attention(wrapped, "uniform"))
    steps = []
    with wrapped.fork(branch, combine=lambda worlds, moment: (steps.append(worlds[:, :, -1]), worlds[0])[1]):
        recorded(wrapped.module, lambda: generate(asked))
    assert all(float((step[0] - step[1]).abs().max()) > 1e-3 for step in steps) and len(steps) == 6
