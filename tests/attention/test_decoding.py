"""Debiased decoding: what its logits are, that worlds are separate runs, and what it refuses."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

import interp as ip
from interp.attention import (
    Branch,
    Decoder,
    Previous,
    Term,
    attention,
    debiased,
    entropy,
    gated,
    open_where,
    plausible,
    relatives,
    sampled,
)
from tests import zoo
from tests.attention.shapes import generate, image_of, model, questions
from tests.hooks.decoding import OPTIONS, assert_equal, recorded

INF = float("inf")


def by_hand(asked, decoder, steps):
    """Tokens and logits from separate runs of the whole text in every world, at every step."""
    wrapped = model()
    ids, mask, tokens, found = asked.input_ids, asked.attention_mask, [], []
    width = ids.shape[1]
    for _ in range(steps):
        worlds = []
        for branch in (Branch(), *decoder.branches):
            given = {"input_ids": ids, "attention_mask": mask, "pixel_values": asked.pixel_values}
            if branch.images is not None:
                given["pixel_values"] = branch.images(asked.pixel_values)
            if branch.hide is not None:
                hidden = torch.nn.functional.pad(branch.hide, (0, ids.shape[1] - width))
                worlds.append(
                    torch.stack([_alone(i, m.bool() & ~h) for i, m, h in zip(ids, mask, hidden, strict=True)])
                )
                continue
            worlds.append(wrapped.run(wrapped.inputs(given), branch.plan, seed=5).logits[:, -1])
        z = decoder.combine(torch.stack(worlds)[:, :, None], ip.attention.Moment(len(tokens), torch.arange(3), {}))
        found.append(z[:, -1])
        tokens.append(z[:, -1].argmax(-1))
        ids = torch.cat([ids, tokens[-1][:, None]], 1)
        mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
    return torch.stack(tokens, 1), found


def _alone(ids, real):
    """The last logits of a text of the real tokens alone."""
    return model().module(input_ids=ids[real][None]).logits[0, -1]


def worlds_of(asked):
    wrapped = model()
    return {
        "vision": Branch(attention(wrapped, "random", stack="vision")),
        "language": Branch(attention(wrapped, "shuffled", layers=(0, 2))),
        "to the image": Branch(attention(wrapped, "reversed", keys="image")),
        "no image": relatives.text_alone(image_of(asked)),
        "VCD": Branch(images=relatives.diffused(700)),
    }


@pytest.mark.parametrize(
    "names", [("vision",), ("language",), ("to the image", "VCD"), ("no image", "vision")], ids=str
)
@torch.no_grad()
def test_worlds_are_separate_runs_of_the_whole_text(names):
    asked = questions()
    decoder = Decoder(tuple(Term(worlds_of(asked)[name], 1.5) for name in names), 0.05)
    with debiased(model(), decoder, seed=5):
        got = recorded(model().module, lambda: generate(asked, max_new_tokens=4))
    tokens, logits = by_hand(asked, decoder, 4)
    assert torch.equal(got.tokens[:, -4:], tokens)
    for one, two in zip(got.logits, logits, strict=True):
        assert torch.equal(one.isinf(), two.isinf())
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    plain = recorded(model().module, lambda: generate(asked, max_new_tokens=4))
    assert float((plain.logits[0] - got.logits[0]).nan_to_num(0, 0, 0).abs().max()) > 0.01


@pytest.mark.parametrize(
    "mode", [{"num_beams": 2}, {"do_sample": True}, {"do_sample": True, "num_return_sequences": 2}]
)
@torch.no_grad()
def test_beams_and_samples_are_those_of_each_row_alone(mode):
    """With pictures, whose features `generate` makes before it widens the batch."""
    asked = questions()
    worlds = worlds_of(asked)
    decoder = Decoder((Term(worlds["vision"]), Term(worlds["language"], 6.0), Term(worlds["VCD"], 0.5)), 0.02)
    uncached = {"use_cache": False}
    outputs = []
    for extra in ({}, uncached):
        torch.manual_seed(0)
        with debiased(model(), decoder, seed=5):
            outputs.append(generate(asked, **mode, **extra))
    assert torch.equal(*outputs)
    torch.manual_seed(0)
    assert not torch.equal(generate(asked, **mode), outputs[0])


@torch.no_grad()
def test_rows_do_not_depend_on_the_batch_and_may_lack_images():
    mixed = questions((True, False, True))
    wrapped = model()
    decoder = Decoder(
        (Term(Branch(attention(wrapped, "uniform", stack="vision"))), Term(Branch(attention(wrapped, "uniform"))))
    )
    with debiased(wrapped, decoder):
        together = generate(mixed)
    pixels = list(mixed.pixel_values)
    for row, width in enumerate(mixed.attention_mask.sum(1).tolist()):
        own = image_of(mixed)[row].any()
        ids = mixed.input_ids[row : row + 1, -width:]
        images = pixels.pop(0)[None] if own else None
        alone = replace(mixed, input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=images)
        plans = decoder if own else Decoder(decoder.terms[1:])
        with debiased(wrapped, plans):
            got = generate(alone)
        if own:
            assert torch.equal(got[0, width:], together[row, -6:])


@torch.no_grad()
def test_at_weight_zero_and_with_identical_worlds_it_is_plain_decoding():
    asked = questions()
    plain = generate(asked, do_sample=False)
    for decoder in (
        Decoder((Term(worlds_of(asked)["language"], 0.0),)),
        Decoder((Term(Branch(), 3.0),), None),
        Decoder((), 0.1),
    ):
        with debiased(model(), decoder):
            assert torch.equal(generate(asked), plain)
    assert torch.equal(generate(asked), plain)


def test_the_formula():
    own, one, two = torch.randn(3, 2, 1, 50, dtype=torch.float64)
    worlds = torch.stack([own, one, two])
    moment = ip.attention.Moment(3, torch.arange(2), {})
    z = Decoder((Term(Branch(), 0.5), Term(Branch(), lambda logits, moment: moment.step / 3)), None).combine(
        worlds, moment
    )
    torch.testing.assert_close(z, own + 0.5 * (own - one) + (own - two))
    z = Decoder((Term((Branch(), Branch()), 2.0),), None).combine(worlds, moment)
    torch.testing.assert_close(z, own + 2 * (own - (one + two) / 2))
    z = Decoder((Term(Branch(), 2.0, added=True), Term(Branch(), 0.0)), None).combine(worlds, moment)
    torch.testing.assert_close(z, own + 2 * one)
    # A constant on a branch changes no probability, and the likeliest token is always kept.
    for eps in (1.0, 0.1, 1e-6):
        decoder = Decoder((Term(Branch(), 1.0), Term(Branch(), 1.0)), eps)
        z, moved = (
            decoder.combine(worlds, moment),
            decoder.combine(worlds + torch.tensor([0, 7.0, -3]).reshape(3, 1, 1, 1), moment),
        )
        torch.testing.assert_close(z.softmax(-1), moved.softmax(-1))
        assert bool(z.gather(-1, own.argmax(-1, keepdim=True)).isfinite().all())
        kept = own >= own.amax(-1, keepdim=True) + torch.log(torch.tensor(eps))
        assert torch.equal(z.isfinite(), kept) and (int(kept.sum()) < kept.numel()) == (eps > 1e-3)


def test_half_precision_is_combined_in_single_and_what_a_branch_forbids_says_nothing():
    own = torch.tensor([[[[3.0, 1.0, -INF, 2.0]]]]).half()
    branch = torch.tensor([[[[-INF, 1.0, 0.0, 1.0]]]]).half()
    z = Decoder((Term(Branch(), 1.0),), None).combine(
        torch.cat([own, branch]), ip.attention.Moment(0, torch.arange(1), {})
    )
    assert z.dtype == torch.float16 and z.flatten().tolist() == [3.0, 1.0, -INF, 3.0]
    assert plausible(own, own, 0.9).flatten().tolist() == [3.0, -INF, -INF, -INF]


@torch.no_grad()
def test_a_streamer_in_a_thread_and_stopping_criteria():
    from transformers import TextIteratorStreamer

    wrapped, asked = model(), questions()
    one = replace(asked, **{n: getattr(asked, n)[1:2] for n in ("input_ids", "attention_mask", "pixel_values")})
    streamer = TextIteratorStreamer(wrapped.tokenizer, skip_prompt=True)
    with debiased(wrapped, worlds_of(one)["language"]):
        whole = generate(one)
        thread = threading.Thread(target=generate, args=(one,), kwargs={"streamer": streamer})
        thread.start()
        streamed = "".join(streamer).split()
        thread.join()
    assert streamed == wrapped.tokenizer.decode(whole[0, one.input_ids.shape[1] :]).split()


@torch.no_grad()
def test_a_gate_opens_for_rows_and_tokens():
    wrapped = zoo.wrapped("llama")
    ids = torch.tensor([[6, 1, 5, 3, 8], [2, 7, 4, 1, 9]])
    branch = Branch(attention(wrapped, "uniform"))
    plain = recorded(wrapped.module, lambda: wrapped.module.generate(ids, **OPTIONS))
    level = sum(float(entropy(step).sum()) for step in plain.logits) / 8
    with debiased(wrapped, Term(branch, open_where(1.0, entropy, level)), eps=None):
        got = recorded(wrapped.module, lambda: wrapped.module.generate(ids, **OPTIONS))
    moved = (got.logits[0] - plain.logits[0]).abs().amax(-1) > 1e-6
    assert moved.tolist() == (entropy(plain.logits[0]) > level).tolist() and bool(moved.any())


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_an_intervention_gated_by_the_step_before(beams):
    """Equal to a loop that runs the whole text, in which the entropy of the step before decides."""
    wrapped = zoo.wrapped("llama")
    ids = torch.tensor([[6, 1, 5, 3, 8], [2, 7, 4, 1, 9]])
    item = ip.scale(ip.site("z", 1, pos="new", head=(0, 2)), -1.0)
    plain = recorded(wrapped.module, lambda: wrapped.module.generate(ids, num_beams=beams, **OPTIONS))
    level = float(torch.cat([entropy(step) for step in plain.logits]).median())
    gate = Previous(entropy, level)
    decoder = Decoder((), None, own=Branch(ip.Plan((gated(item, gate),))), gates=(gate,))
    with debiased(wrapped, decoder):
        got = recorded(wrapped.module, lambda: wrapped.module.generate(ids, num_beams=beams, **OPTIONS))
    assert float((got.logits[2] - plain.logits[2]).abs().max()) > 1e-6 or not torch.equal(got.tokens, plain.tokens)
    if beams > 1:
        with pytest.raises(ip.PlanError, match="key/value cache"), debiased(wrapped, decoder):
            wrapped.module.generate(ids, num_beams=beams, use_cache=False, **OPTIONS)
        return
    tokens = got.tokens
    for step in range(1, 4):
        real = torch.ones(2, 5 + step, dtype=torch.bool)
        mask = torch.zeros_like(real)
        for earlier in range(1, step + 1):
            mask[:, 4 + earlier] = entropy(got.logits[earlier - 1]) > level
        whole = wrapped.inputs(tokens[:, : 5 + step])
        edit = ip.scale(ip.site("z", 1, head=(0, 2)), -1.0).where(mask)
        want = wrapped.run(whole, edit if bool(mask.any()) else None).logits[:, -1]
        assert_equal([got.logits[step]], [want], 1e-8)


@torch.no_grad()
def test_a_gate_looks_at_the_models_own_logits():
    """Of the last token of each call, at every step, whatever is made of the worlds; and steps are counted from 0."""
    wrapped = zoo.wrapped("llama")
    ids = torch.tensor([[6, 1, 5, 3, 8], [2, 7, 4, 1, 9]])
    seen, steps = [], []

    def measure(own):
        seen.append(own)
        return entropy(own)

    def weight(own, moment):
        steps.append(moment.step)
        return 2.0

    gate = Previous(measure, 0.0)
    decoder = Decoder((Term(Branch(attention(wrapped, "uniform")), weight),), 0.1, gates=(gate,))
    with debiased(wrapped, decoder):
        got = recorded(wrapped.module, lambda: wrapped.module.generate(ids, **OPTIONS))
    assert steps == [0, 1, 2, 3]
    for step, own in enumerate(seen):
        whole = wrapped.run(wrapped.inputs(got.tokens[:, : 5 + step])).logits[:, -1]
        assert_equal([own], [whole], 1e-6)
        assert float((own - got.logits[step]).nan_to_num(0, 0, 0).abs().max()) > 1e-3


def test_samples_are_averaged_and_only_where_they_differ():
    wrapped = zoo.wrapped("llama")
    term = sampled(wrapped, "random", samples=3, weight=2.0)
    assert len(term.branches) == 3 and len({str(one.plan) for one in term.branches}) == 3
    assert len(sampled(wrapped, "uniform", samples=3).branches) == 1


def test_decoders_add():
    one, two = Decoder((Term(Branch()),), 0.1), Decoder((Term(Branch(), 2.0),), 0.3)
    both = one + two
    assert len(both.branches) == 2 and both.eps == 0.3
    with pytest.raises(ip.PlanError, match="rule of its own"):
        one + Decoder(rule=lambda worlds, moment: worlds[0])


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda m: Decoder(eps=0.0), ip.PlanError, r"in \(0, 1\]"),
        (lambda m: Decoder(eps=1.5), ip.PlanError, r"in \(0, 1\]"),
        (lambda m: Decoder(eps=float("nan")), ip.PlanError, r"in \(0, 1\]"),
        (lambda m: Term(()), ip.PlanError, "one Branch or several"),
        (lambda m: Term(Branch(), INF), ip.PlanError, "finite"),
        (lambda m: Term(Branch(), "much"), ip.PlanError, "a weight is a number"),
        (lambda m: attention(m, "randon"), ip.PlanError, "did you mean 'random'"),
        (lambda m: attention(m, stack="vision"), ip.SiteError, "no stack 'vision'"),
        (lambda m: attention(m, layers=7), ip.SiteError, "layers 0 to 2"),
        (lambda m: attention(m, heads=9), ip.SiteError, "head"),
        (lambda m: sampled(m, samples=0), ip.SiteError, "1 or more"),
        (
            lambda m: relatives.text_alone(torch.zeros(2, 3, dtype=torch.bool)),
            ip.InputsError,
            "no column is an image's",
        ),
        (lambda m: relatives.early_exit(m, 2), ip.SiteError, "an earlier layer"),
        (lambda m: gated(ip.knockout(ip.site("pattern", 0)), Previous(entropy, 1.0)), ip.PlanError, "forbids"),
        (lambda m: relatives.suppress([]), ip.PlanError, "no head"),
        (lambda m: relatives.diffused(1000), ip.PlanError, "step 1000"),
    ],
)
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make(zoo.wrapped("llama"))


def test_a_text_model_asked_for_its_image():
    wrapped = zoo.wrapped("llama")
    with pytest.raises(ip.InterpError), debiased(wrapped, Branch(attention(wrapped, "uniform", keys="image"))):
        wrapped.module(torch.tensor([[1, 2, 3]]))
    with pytest.raises(ip.PlanError, match=r"\[B, T\]"), debiased(wrapped, Term(Branch(), lambda own, moment: own)):
        wrapped.module(torch.tensor([[1, 2, 3]]))
    asked = questions()
    wrong = torch.zeros(3, 4, dtype=torch.bool)
    wrong[:, 1] = True
    with (
        debiased(model(), Branch(images=lambda pixels: pixels[:1])),
        pytest.raises(ip.InputsError, match="images= gave"),
    ):
        generate(asked)
    with debiased(model(), relatives.text_alone(torch.ones(2, 4, dtype=torch.bool))), pytest.raises(ip.ShapeError):
        generate(asked)


@torch.no_grad()
def test_a_cache_that_both_worlds_share_would_be_noticed(monkeypatch):
    """A mistake on purpose, as in the released code of CausalMM: the counterfactual goes on from the fact's cache."""
    from transformers import DynamicCache

    asked = questions()
    decoder = Decoder((Term(worlds_of(asked)["language"], 1.5),), 0.05)
    own = DynamicCache.update

    def update(cache, keys, values, layer, *args, **kwargs):
        half = len(keys) // 2
        keys, values = (torch.cat([x[:half], x[:half]]) for x in (keys, values))
        return own(cache, keys, values, layer, *args, **kwargs)

    tokens, logits = by_hand(asked, decoder, 4)
    monkeypatch.setattr(DynamicCache, "update", update)
    with debiased(model(), decoder, seed=5):
        got = recorded(model().module, lambda: generate(asked, max_new_tokens=4))
    far = [float((a - b).nan_to_num(0, 0, 0).abs().max()) for a, b in zip(got.logits, logits, strict=True)]
    assert max(far[1:]) > 1e-3 or not torch.equal(got.tokens[:, -4:], tokens)
