"""Families whose attention has windows, caps, fused weights, norms of queries and keys, or sinks."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

import interp as ip
from interp.kv import policies
from tests import zoo
from tests.kv.test_eviction import ids, logits_of, scores_for, streamed
from tests.kv.test_gradients import gated

KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": zoo.WINDOW}
SMALL = {**zoo.GROUPED, "num_hidden_layers": 2, "pad_token_id": None, "attn_implementation": "sdpa"}


def phi3():
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM(Phi3Config(**SMALL, hidden_size=32))


def gemma3():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, **KINDS, hidden_size=24, head_dim=8, query_pre_attn_scalar=5))


def gpt_oss():
    from transformers import GptOssConfig, GptOssForCausalLM

    rope = {"rope_type": "default", "rope_theta": 10000.0}
    more = {"attn_implementation": "eager", "num_local_experts": 2, "experts_implementation": "eager"}
    config = GptOssConfig(
        **SMALL | KINDS | more, hidden_size=24, head_dim=8, num_experts_per_tok=1, rope_parameters=rope
    )
    return GptOssForCausalLM(config)


MADE = {"phi3": phi3, "gemma3": gemma3, "gpt_oss": gpt_oss}


@cache
def model_of(family: str) -> ip.Model:
    return ip.wrap(zoo.prepare(MADE[family]())) if family in MADE else zoo.wrapped(family)


@pytest.mark.parametrize("family", MADE)
@pytest.mark.parametrize("positions", ["absolute", "slot"])
def test_a_budget_that_holds_everything_is_the_full_cache(family, positions):
    model, tokens = model_of(family), ids(2)
    heads = ip.kv.RetainingHeads.for_model(model, 16)
    whole = ip.kv.prefill(model, model.inputs(tokens[:, :15]), heads.policy(), 15, chunk=4, positions=positions)
    expected = logits_of(model, tokens)
    # Rotary angles are rounded to float32 by transformers: keys that are turned back and forth agree to that.
    close = 1e-10 if positions == "absolute" or family != "gpt_oss" else 1e-5
    torch.testing.assert_close(ip.kv.follow(model, whole, tokens[:, 15:]), expected[:, 15:], rtol=0, atol=close)


@pytest.mark.parametrize("estimand", ["post_prefill", "streaming"])
@pytest.mark.parametrize("family", MADE)
def test_effects_are_those_of_the_models_own_forward(family, estimand):
    model, tokens = model_of(family), ids()
    context, suffix = tokens[0, :9].tolist(), tokens[0, 9:13].tolist()
    options = {"estimand": estimand, "chunk": 4}
    fast = ip.kv.kv_effects(model, context, suffix, **options)
    slow = ip.kv.kv_effects(model, context, suffix, executor="batched", **options)
    assert fast.config["executor"] == "shared" and abs(slow.effect).max() > 1e-2
    assert abs(fast.effect - slow.effect).max() < 1e-10
    # A key that no query of the suffix has in its window causes nothing there, in either estimand's last chunk.
    windows = [block.attention.window for block in model.architecture.blocks]
    for layer, window in enumerate(windows):
        if window is not None and estimand == "post_prefill":
            assert (fast.effect[layer, :, : 9 - window + 1] == 0).all() and (fast.effect[layer, :, -1] != 0).any()


def test_sinks_are_counted_once():
    """They take part in the removal, in its gradient, and where nearly all attention is on one key."""
    model = ip.wrap(zoo.prepare(gpt_oss()))
    tokens = ids(seed=3)
    context, suffix = tokens[0, :9].tolist(), tokens[0, 9:13].tolist()
    found = ip.kv.kv_effects(model, context, suffix, how="gradient").effect[..., 0]
    at, step = np.unravel_index(np.abs(found).argmax(), found.shape), 1e-5
    gates = [torch.ones(found.shape, dtype=torch.float64) for _ in range(2)]
    gates[0][at], gates[1][at] = 1 + step, 1 - step
    up, down = (gated(model, context, suffix, gate) for gate in gates)
    assert -(up - down) / (2 * step) == pytest.approx(found[at], rel=1e-5) and abs(found[at]) > 1e-2
    before = ip.kv.kv_effects(model, context, suffix).effect
    with torch.no_grad():
        for block in model.module.model.layers:
            block.self_attn.sinks.add_(1.5)
            block.self_attn.q_proj.weight.mul_(5)
            block.self_attn.k_proj.weight.mul_(5)
    fast = ip.kv.kv_effects(model, context, suffix)
    slow = ip.kv.kv_effects(model, context, suffix, executor="sequential")
    assert fast.config["executor"] == "shared" and np.abs(fast.effect - before).max() > 1e-2
    np.testing.assert_allclose(fast.effect, slow.effect, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
def test_chunks_equal_knockouts(family):
    model, tokens = ip.wrap(zoo.prepare(MADE[family]())), ids(seed=1)
    scores = scores_for(model, 15)
    expected, kept = streamed(model, tokens, scores, 5, 4)
    cache = ip.kv.prefill(model, model.inputs(tokens[:, :15]), policies.given(scores), 5, chunk=4)
    assert torch.equal(cache.kept(), kept)
    torch.testing.assert_close(ip.kv.follow(model, cache, tokens[:, 15:]), expected[:, 15:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["phi3", "gemma3", "gpt_oss", "mistral", "gemma2", "qwen3"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_policies_see_the_models_own_attention(family, chunk):
    """Which comes from no weights of a kernel: SDPA has none to show."""
    model, tokens = model_of(family), ids(length=12)
    inputs = model.inputs(tokens)
    pattern = model.run(inputs, capture=[ip.site("pattern", layer=0)]).tape[ip.site("pattern", layer=0)][0]
    found = ip.kv.scores_of(model, inputs, policies.h2o(), chunk)[0]
    heads = model.architecture.blocks[0].attention.k.heads
    expected = pattern.detach().unflatten(0, (heads, -1)).mean(1).sum(1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    assert expected.std() > 0.1
