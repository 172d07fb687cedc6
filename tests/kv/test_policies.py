"""Policies against their definitions, on what a bare model attends to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp as ip
from interp.kv import policies
from tests import zoo

LENGTH = 12


@pytest.fixture(scope="module")
def seen():
    """A model, its inputs, and the pattern [H, T, S], keys [K, S, D] and values of its layer 1."""
    model = zoo.wrapped("llama")
    ids = torch.randint(2, zoo.VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    inputs = model.inputs(ids)
    names = [ip.site(n, layer=1) for n in ("pattern", "rot_k", "v", "q")]
    tape = model.run(inputs, capture=names).tape
    pattern, k, v, q = (tape[name][0] for name in names)
    return model, inputs, pattern, k.transpose(0, 1), v.transpose(0, 1), q.transpose(0, 1)


def scored(seen, policy, chunk=None):
    return torch.from_numpy(ip.kv.scores_of(seen[0], seen[1], policy, chunk)[1])


def groups(pattern):
    return pattern.unflatten(0, (2, 2)).mean(1)


@pytest.mark.parametrize("chunk", [None, 5])
def test_h2o_is_attention_received(seen, chunk):
    expected = groups(seen[2]).sum(1)
    torch.testing.assert_close(scored(seen, policies.h2o(), chunk), expected, rtol=0, atol=1e-5)


def test_tova_is_the_last_querys_attention(seen):
    expected = seen[2][:, -1].mean(0)
    for chunk in (None, 5):
        torch.testing.assert_close(scored(seen, policies.tova(), chunk)[0], expected, rtol=0, atol=1e-6)


def test_snapkv_pools_a_window(seen):
    received = groups(seen[2][:, -3:]).mean(1)
    padded = torch.nn.functional.pad(received, (1, 1))
    count = torch.tensor([2.0] + [3.0] * (LENGTH - 2) + [2.0])
    expected = (padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]) / count
    found = scored(seen, policies.snapkv(window=3, pool=3))
    torch.testing.assert_close(found[:, :-3], expected[:, :-3], rtol=0, atol=1e-6)
    assert found[:, -3:].isinf().all()


def test_norms_and_directions(seen):
    keys = seen[3]
    torch.testing.assert_close(scored(seen, policies.key_norm(), 5), -keys.norm(dim=-1), rtol=0, atol=1e-5)
    unit = keys / keys.norm(dim=-1, keepdim=True)
    anchor = unit.mean(1, keepdim=True)
    expected = -(unit * anchor).sum(-1) / anchor.norm(dim=-1)
    torch.testing.assert_close(scored(seen, policies.keydiff()), expected, rtol=0, atol=1e-5)


def test_streaming_llm_keeps_the_first_and_the_last(seen):
    model, inputs = seen[:2]
    cache = ip.kv.prefill(model, inputs, policies.streaming_llm(2), 5, chunk=4)
    assert cache.kept()[0, 0].nonzero().flatten().tolist() == [0, 1, 9, 10, 11]


def test_expected_attention_is_a_mean_over_future_queries(seen):
    """Against a sample of queries drawn from the normal distribution that it assumes."""
    model, _, _, keys, values, q = seen
    policy = policies.expected_attention(future=4, covariance=False, value_norm=False)
    rotary = model.architecture.blocks[1].attention.rotary
    mean = q.mean(1)
    cos, sin = rotary(torch.arange(LENGTH, LENGTH + 4)[None], torch.float64)
    assert rotary is not None
    rotate = rotary.turn
    turned = torch.stack([rotate(mean, cos[0, i], sin[0, i]) for i in range(4)]).mean(0)
    logits = torch.einsum("hd,hsd->hs", turned, keys.repeat_interleave(2, 0)) / keys.shape[-1] ** 0.5
    expected = logits.softmax(-1).unflatten(0, (2, 2)).mean(1)
    torch.testing.assert_close(scored(seen, policy), expected, rtol=0, atol=1e-5)
    whole = scored(seen, policies.expected_attention(future=4))
    spread = torch.stack([torch.cov(one.T, correction=0) for one in q])
    axes = torch.eye(keys.shape[-1], dtype=torch.float64)
    turn = torch.stack([rotate(axes[:, None], cos[0, i], sin[0, i])[:, 0] for i in range(4)]).mean(0)
    more = torch.einsum(
        "hsd,hde,hse->hs",
        *(x.double() for x in (keys.repeat_interleave(2, 0), turn.T @ spread @ turn, keys.repeat_interleave(2, 0))),
    )
    expected = (logits + more / keys.shape[-1] / 2).softmax(-1).unflatten(0, (2, 2)).mean(1) * values.norm(dim=-1)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)


def test_random_is_a_tokens_own(seen):
    one, two = scored(seen, policies.random(1)), scored(seen, policies.random(1), 5)
    assert torch.equal(one, two) and not torch.equal(one, scored(seen, policies.random(2)))
    assert len(one.unique()) == one.numel()


def test_value_gradient_is_attention_times_norms(seen):
    model, inputs, pattern, _, values, _ = seen
    policy = policies.value_gradient(model, inputs, window=4)
    run = model.run(inputs, capture=[ip.site("z", layer=1)], grad=True)
    ids = inputs.ids[0]
    loss = torch.nn.functional.cross_entropy(run.logits[0, -5:-1], ids[-4:], reduction="sum")
    (g,) = run.gradient(loss, ip.site("z", layer=1))
    size = g[0].norm(dim=-1).T  # [H, T]
    expected = groups((pattern * size[..., None])[:, -5:-1]).sum(1) * values.norm(dim=-1)
    torch.testing.assert_close(scored(seen, policy), expected.detach(), rtol=1e-5, atol=1e-7)


def test_scores_that_are_given():
    with pytest.raises(ip.ShapeError, match="nan"):
        policies.given(np.full((1, 1, 3), np.nan))
    with pytest.raises(ip.ShapeError, match="press"):
        ip.kv.press(3)
