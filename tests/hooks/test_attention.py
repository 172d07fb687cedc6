"""The order and the factors of attention, where a mistake would change numbers and break nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import interp as ip
from tests import zoo

EXACT = {"rtol": 0.0, "atol": 1e-10}


def _scaled_by_layer() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": zoo.VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}
    config = GPT2Config(**sizes, **zoo.SPECIAL, scale_attn_by_inverse_layer_idx=True, attn_implementation="sdpa")
    return GPT2LMHeadModel(config)


def _gemma(cap: float | None) -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        **zoo.GROUPED,
        hidden_size=24,
        num_hidden_layers=3,
        head_dim=8,
        query_pre_attn_scalar=2,
        sliding_window=zoo.WINDOW,
        attn_logit_softcapping=cap,
        final_logit_softcapping=None,
        pad_token_id=None,
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(config)


SCALED = {"gpt2, by layer": _scaled_by_layer, "gemma2, without a cap": lambda: _gemma(None)}


def prompts(seed: int, lengths: tuple[int, ...] = (7, 5, 6)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, zoo.VOCAB, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("which", SCALED)
def test_scores_scaled_by_something_else_than_the_width_of_a_head(which, padding):
    """Without a cap and with nobody looking inside, the executors agree about what scales the scores."""
    model = ip.wrap(zoo.prepare(SCALED[which]()))
    clean, corrupt = (model.inputs(prompts(seed), padding=padding) for seed in (1, 2))
    metric = ip.logit_diff(7, 9)
    for grid in (ip.grid("resid_pre", layer="all", pos=[0, 2, -1]), ip.grid("z", layer="all", head="all")):
        results = {
            executor: ip.sweep(model, clean, corrupt, grid, metric=metric, executor=executor)
            for executor in ("sequential", "batched", "shared")
        }
        assert results["shared"].config["executor"] == "shared"
        oracle = results.pop("sequential").effect
        assert np.abs(oracle).max() > 1e-3 and (np.abs(oracle) > 1e-9).mean() > 0.6
        for executor, result in results.items():
            np.testing.assert_allclose(result.effect, oracle, rtol=0, atol=1e-9, err_msg=executor)
    # By looking inside too, and beside worlds that do.
    unedited = model.run(clean).logits
    looked = model.run(clean, ip.recompute(ip.site("scores", 1)) + ip.recompute(ip.site("scores", 2))).logits
    torch.testing.assert_close(looked[clean.mask], unedited[clean.mask], **EXACT)
    sites = ip.grid(["z", "pattern"], layer=[1, 2], pos=[-1])
    oracle, shared = (
        ip.sweep(model, clean, corrupt, sites, metric=metric, executor=e).effect for e in ("sequential", "shared")
    )
    np.testing.assert_allclose(shared, oracle, rtol=0, atol=1e-9)
    assert np.abs(oracle).min() > 1e-6


def _logits(model: ip.Model, ids: Tensor, mask: Tensor) -> Tensor:
    return model.module(input_ids=ids, attention_mask=mask, use_cache=False).logits


@torch.no_grad()
def test_scores_are_capped_before_anything_is_added_to_them():
    """A mask that is added, with more in it than what is forbidden: the model's own forward says in which order."""
    model = ip.wrap(zoo.prepare(_gemma(1.5)))
    ids = torch.tensor(prompts(1, (6, 6)))
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    added = torch.linspace(-3, 3, 36, dtype=torch.float64).reshape(6, 6).sin()
    bias = torch.where(causal, 4 * added, torch.finfo(torch.float32).min)[None, None].expand(2, 1, 6, 6)
    expected = _logits(model, ids, bias)
    without = _logits(model, ids, torch.where(causal, 0.0, bias))
    assert float((expected - without).abs().max()) > 1e-2
    seen: list[Tensor] = []

    def look(x: Tensor, ctx: ip.Context) -> Tensor:
        seen.append(x.clone())
        return x

    plan = ip.intervene(ip.site("scores", 0), look) + ip.recompute(ip.site("pattern", 1))
    with model.apply(plan + ip.recompute(ip.site("scores", 2))):
        torch.testing.assert_close(_logits(model, ids, bias), expected, **EXACT)
    # What is added can lift a score above the cap, which a cap that came last would not let it.
    assert float(seen[0].masked_fill(~causal, 0).max()) > 1.5


@pytest.mark.parametrize("way", ["applied", "captured"])
@torch.no_grad()
def test_the_pattern_that_is_seen_is_the_one_before_dropout(way):
    """In training mode: a pattern sums to one and is the pattern of evaluation; what is mixed by it is dropped of."""
    module = zoo.make("gpt2")
    model = ip.wrap(module)
    x = model.inputs(prompts(1, (6, 6)))
    place = ip.site("pattern", 0)
    expected = model.run(x, capture=place).tape[place]
    still = model.run(x).logits
    module.transformer.h[0].attn.attn_dropout.p = 0.5  # there alone, so that nothing else drops
    module.train()
    if way == "captured":
        run = model.run(x, capture=place)
        seen, logits = run.tape[place], run.logits
    else:
        kept: list[Tensor] = []

        def look(value: Tensor, ctx: ip.Context) -> Tensor:
            kept.append(value.clone())
            return value

        with model.apply(ip.intervene(place, look)):
            logits = module(x.ids).logits
        (seen,) = kept
    torch.testing.assert_close(seen.sum(-1), torch.ones_like(seen[..., 0]), **EXACT)
    torch.testing.assert_close(seen, expected, **EXACT)
    assert float((logits - still).abs().max()) > 1e-2, "nothing was dropped"
