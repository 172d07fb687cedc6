"""What users do to caches and policies: padding, copies, other models, infinite scores, calls that end halfway."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import interp as ip
from interp.kv import policies
from tests import zoo
from tests.kv.test_effects import texts
from tests.kv.test_eviction import LENGTH, ids, scores_for

POLICIES = [
    policies.streaming_llm(2), policies.h2o(), policies.snapkv(3, 3), policies.tova(), policies.key_norm(),
    policies.keydiff(), policies.expected_attention(8),
]  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_a_padded_row_keeps_what_it_keeps_alone(policy):
    model, tokens = zoo.wrapped("llama"), ids(2, seed=3)
    contexts = [tokens[0, :12].tolist(), tokens[1, :8].tolist()]  # padded by a whole chunk, so that chunks are the same
    batch = model.inputs(contexts, padding="left")
    settings = {"chunk": 4, "stabilizers": 1}
    together = ip.kv.prefill(model, batch, policy, 5, **settings)
    after = ip.kv.follow(model, together, tokens[:, 15:])
    whole = ip.kv.prefill(model, batch, policy, 12, **settings).layers[0].scores
    for row, context in enumerate(contexts):
        scores = ip.kv.prefill(model, model.inputs([context]), policy, 12, **settings).layers[0].scores[0]
        torch.testing.assert_close(whole[row, :, -len(context) :], scores, rtol=0, atol=1e-5)
        alone = ip.kv.prefill(model, model.inputs([context]), policy, 5, **settings)
        assert torch.equal(together.kept(row)[..., : len(context)], alone.kept()) and not alone.kept().all()
        found = ip.kv.follow(model, alone, tokens[row : row + 1, 15:])
        torch.testing.assert_close(after[row : row + 1], found, rtol=0, atol=1e-10)


def test_beams_go_on_from_padded_rows():
    model, tokens = zoo.wrapped("llama"), ids(2, seed=5)
    contexts, rest = [tokens[0, :12].tolist(), tokens[1, :8].tolist()], tokens[:, 15:18]
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    found = []
    for rows in ([0, 1], [0], [1]):
        inputs = model.inputs([contexts[r] for r in rows], padding="left")
        cache = ip.kv.prefill(model, inputs, policies.h2o(), 5, chunk=4)
        whole = model.inputs([contexts[r] + rest[r].tolist() for r in rows], padding="left")
        found.append(ip.kv.generate(model, cache, whole, **options)[:, -4:])
    assert torch.equal(found[0], torch.cat(found[1:]))


def test_what_is_kept_in_any_case_comes_before_infinite_scores():
    model, tokens = zoo.wrapped("llama"), ids(length=12)
    inputs = model.inputs(tokens)
    cache = ip.kv.prefill(model, inputs, policies.streaming_llm(4), 5, chunk=4, stabilizers=3, local=4)
    kept = cache.kept()[0, 0].nonzero().flatten().tolist()
    assert kept == [0, 1, 2, 3, 7, 8, 9, 10, 11]  # the last chunk of the context has no stabilizers: sinks and one more
    seen = ip.kv.prefill(model, inputs, policies.given(torch.full((3, 2, 12), -torch.inf)), 3, chunk=12)
    assert (seen.kept().sum(-1) == 3).all()
    batch = model.inputs([tokens[0].tolist(), tokens[0, :9].tolist()], padding="left")
    padded = ip.kv.prefill(model, batch, policies.given(torch.full((3, 2, 12), -torch.inf)), 3, chunk=12)
    assert (padded.kept(1).sum(-1) == 3).all()
    forced = ip.kv.prefill(model, inputs, policies.given(torch.full((3, 2, 12), torch.inf)), 3, chunk=12, sinks=1)
    assert forced.kept()[..., 0].all()


def test_stabilizers_stay_while_scores_are_infinite():
    model, tokens = zoo.wrapped("llama"), ids(length=12)
    widths = []

    def infinite(view):
        widths.append(view.index[0, 0].tolist())
        return torch.full(view.keys.shape[:3], torch.inf)

    ip.kv.prefill(model, model.inputs(tokens), ip.kv.Policy("infinite", infinite), 4, chunk=4, stabilizers=3)
    assert widths[3] == [0, 1, 2, 3, 4, 5, 6, 7] and widths[6] == [0, 5, 6, 7, 8, 9, 10, 11]


def test_scores_are_ranked_as_they_are_given():
    """In their own precision, and cut off from any graph."""
    model, tokens = zoo.wrapped("llama"), ids(length=12)
    close = 1 + torch.randperm(12, generator=torch.Generator().manual_seed(0)).double().expand(3, 2, 12) * 1e-12
    cache = ip.kv.prefill(model, model.inputs(tokens), policies.given(close), 4, chunk=12)
    assert torch.equal(cache.kept(), close.argsort(-1).argsort(-1) >= 8)
    weight = torch.ones((), requires_grad=True)
    attached = ip.kv.Policy("attached", lambda view: -view.keys.norm(dim=-1) * weight)
    with torch.enable_grad():
        found = ip.kv.prefill(model, model.inputs(tokens), attached, 4, chunk=5)
    assert not found.layers[0].scores.requires_grad and not found.logits.requires_grad
    plain = ip.kv.prefill(model, model.inputs(tokens), policies.key_norm(), 4, chunk=5)
    assert torch.equal(found.kept(), plain.kept())


def test_several_questions_are_asked_of_one_context():
    model, tokens = zoo.fresh("llama"), ids(seed=4)
    cache = ip.kv.prefill(model, model.inputs(tokens[:, :15]), policies.h2o(), 6, chunk=5)
    copies = [deepcopy(cache), deepcopy(cache)]
    assert all(one.model is model and one.layers[0].owner is one and one.policy is cache.policy for one in copies)
    asked = [
        ip.kv.follow(model, one, question) for one, question in zip(copies, (tokens[:, 15:], ids(seed=6)), strict=True)
    ]
    assert cache.seen == 15
    torch.testing.assert_close(ip.kv.follow(model, cache, tokens[:, 15:]), asked[0], rtol=0, atol=0)
    assert not torch.equal(asked[1][:, : LENGTH - 15], asked[0])
    with ip.kv.attending(cache), pytest.raises(ip.ModelError, match="copied"):
        deepcopy(cache)


def test_another_model_of_the_same_sizes_is_refused():
    model, other, tokens = zoo.fresh("llama"), ip.wrap(zoo.make("llama", seed=1)), ids()
    cache = ip.kv.prefill(model, model.inputs(tokens[:, :15]), policies.key_norm(), 6, chunk=5)
    with pytest.raises(ip.ModelError, match="another model"):
        ip.kv.follow(other, cache, tokens[:, 15:])
    with pytest.raises(ip.ModelError, match="another model"):
        ip.kv.generate(other, cache, model.inputs(tokens), max_new_tokens=1)
    with ip.kv.attending(cache), pytest.raises(ip.ModelError, match="another one is called"):
        other.module(tokens[:, 15:], past_key_values=cache)
    with pytest.raises(ip.ModelError, match="not DynamicCache"):
        ip.kv.follow(model, DynamicCache(config=model.module.config), tokens)
    assert cache.seen == 15
    again = ip.wrap(model.module)  # the same model, wrapped a second time
    assert ip.kv.follow(again, cache, tokens[:, 15:]).isfinite().all()


def test_a_call_that_ends_halfway_is_noticed():
    model, tokens = zoo.fresh("llama"), ids()
    cache = ip.kv.prefill(model, model.inputs(tokens[:, :15]), policies.key_norm(), 6, chunk=5)

    def stop(*_):
        raise KeyboardInterrupt

    handle = model.module.model.layers[1].mlp.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        ip.kv.follow(model, cache, tokens[:, 15:])
    handle.remove()
    with pytest.raises(ip.ModelError, match="halfway"):
        ip.kv.follow(model, cache, tokens[:, 15:])


def test_layers_that_keep_different_numbers_need_the_context():
    model, tokens = zoo.wrapped("llama"), ids()

    def make():
        policy = policies.given(scores_for(model, 15))
        return ip.kv.prefill(model, model.inputs(tokens[:, :15]), policy, [3, 4, 5], chunk=15)

    with pytest.raises(ip.ModelError, match="different numbers"):
        model.module(tokens[:, 15:], past_key_values=make())
    assert ip.kv.follow(model, make(), tokens[:, 15:]).isfinite().all()


def test_crop_is_as_in_transformers():
    model, tokens = zoo.wrapped("llama"), ids()
    cache = ip.kv.prefill(model, model.inputs(tokens[:, :15]), policies.key_norm(), 6, chunk=5)
    ip.kv.follow(model, cache, tokens[:, 15:])
    with pytest.raises(ip.ModelError, match="positive"):
        cache.layers[0].crop(2)
    cache.crop(-2)
    assert cache.seen == LENGTH - 2


@pytest.mark.parametrize("policy", [policies.key_norm(), policies.h2o()], ids=lambda policy: policy.name)
def test_local_tokens_have_scores_of_their_own_while_decoding(policy):
    model, tokens = zoo.wrapped("llama"), ids(seed=7)
    settings = {"chunk": 4, "decoding": True, "local": 3}
    cache = ip.kv.prefill(model, model.inputs(tokens[:, :15]), policy, 6, **settings)
    local = cache.layers[1].scores[0, :, -3:]
    assert cache.layers[1].width == 9 and (local != 0).all()
    if policy.name == "key norm":
        torch.testing.assert_close(local, -cache.layers[1].keys[0, :, -3:].float().norm(dim=-1).to(local))
    ip.kv.follow(model, cache, tokens[:, 15:16])
    assert cache.layers[1].width == 6


def test_effects_in_low_precision_are_near_those_in_full():
    (context,), (suffix,) = texts(1)
    full = ip.kv.kv_effects(zoo.wrapped("llama"), context, suffix, metric=("nll", "kl"))
    for dtype, near in ((torch.bfloat16, 0.2), (torch.float32, 1e-3)):
        model = ip.wrap(zoo.make("llama", dtype=dtype))
        found = ip.kv.kv_effects(model, context, suffix, metric=("nll", "kl"))
        assert np.isfinite(found.effect).all() and found.config["dtype"] == str(dtype)
        assert np.abs(found.effect - full.effect).max() < near * np.abs(full.effect).max()
        streamed = ip.kv.kv_effects(model, context, suffix, unit=("layer", "head"), estimand="streaming", chunk=4)
        for how in ("gradient", "integrated"):
            assert np.isfinite(ip.kv.kv_effects(model, context, suffix, how=how).effect).all()
        assert np.abs(streamed.effect).max() > 1e-3
