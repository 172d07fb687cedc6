"""The project's small transformer: what its config refuses, and what a causal model must satisfy."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

import interp as ip
from hooks.errors import InterpError
from interp.models import Transformer, TransformerConfig
from tests import oracle, zoo

SMALL = [family for family in zoo.FAMILIES if family.startswith("small")]
EXACT = {"rtol": 0.0, "atol": 1e-10}
each_family = pytest.mark.parametrize("family", SMALL)


def options(**changes: Any) -> dict[str, Any]:
    return {"vocab_size": 11, "n_layers": 2, "d_model": 12, "n_heads": 4, "d_mlp": 16, "n_ctx": 8} | changes


def ones(ids: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(ids, dtype=torch.bool)


# Config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a positive integer; got 0"),
        ({"n_layers": -1}, "n_layers must be a positive integer"),
        ({"d_model": 12.0}, "d_model must be a positive integer; got 12.0"),
        ({"n_ctx": True}, "n_ctx must be a positive integer; got True"),
        ({"n_kv_heads": 0}, "n_kv_heads must be a positive integer"),
        ({"d_mlp": 0}, "d_mlp must be a positive integer"),
        ({"n_heads": 5}, r"n_heads \(5\) does not divide d_model \(12\): give d_head"),
        ({"n_kv_heads": 3}, r"n_heads \(4\) must be a multiple of n_kv_heads \(3\)"),
        ({"positions": "rotary"}, "d_head must be even; got 3"),
        ({"positions": "rotery"}, "positions must be one of learned, rotary, none.*did you mean 'rotary'"),
        ({"norm": "layer_norm"}, "norm must be one of layernorm, rmsnorm, none.*did you mean 'layernorm'"),
        ({"activation": "swish"}, "activation must be one of gelu, gelu_tanh, relu, silu"),
        ({"norm_eps": 0.0}, "norm_eps must be positive"),
        ({"rotary_base": -1.0}, "rotary_base must be positive"),
        ({"gated": True, "d_mlp": None}, "gated=True needs an MLP"),
        ({"qk_norm": True, "norm": "none"}, "qk_norm=True needs a norm"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(InterpError, match=message) as error:
        TransformerConfig(**options(**changes))
    assert isinstance(error.value, ValueError)


def test_config_fills_in_defaults():
    config = TransformerConfig(**options())
    assert (config.n_kv_heads, config.d_head) == (4, 3)
    assert TransformerConfig(**options(n_heads=5, d_head=6, n_kv_heads=1)).d_head == 6


def test_config_survives_json():
    for family in SMALL:
        config = zoo.make(family).config
        assert TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_from_dict_refuses():
    with pytest.raises(InterpError, match="no option 'n_layer', did you mean 'n_layers'"):
        TransformerConfig.from_dict(options() | {"n_layer": 2})
    with pytest.raises(InterpError, match="needs vocab_size, n_heads"):
        TransformerConfig.from_dict({"n_layers": 1, "d_model": 4})


# Structure


@pytest.mark.parametrize("d_mlp", [None, 16])
@torch.no_grad()
def test_without_norms(d_mlp):
    """The residual goes as it is into the parts of a block and the unembedding, and the engine's sites say so."""
    module = zoo.prepare(Transformer(TransformerConfig(**options(norm="none", d_mlp=d_mlp))))
    assert not any("ln" in name for name in module.state_dict())
    ids, mask = zoo.random_inputs(11, [6, 4], "left")
    logits, cache = oracle.forward(module, ids, mask)
    torch.testing.assert_close(module(ids, mask)[mask], logits[mask], **EXACT)
    assert torch.equal(cache["ln_final", None], cache["resid_post", 1])

    model = ip.wrap(module)
    sites = [ip.site("q_input", 1), ip.site("attn_in", 1), ip.site("resid_post", 1), ip.site("ln_final")]
    run = model.run(model.inputs(ids, mask), capture=sites)
    for site in sites:
        torch.testing.assert_close(run.tape[site][mask], cache[site.name, site.layer][mask], **EXACT)


@torch.no_grad()
def test_without_norms_one_token_goes_through_a_linear_map():
    """A single key takes the whole pattern, so nothing in an attention-only model without norms or biases bends."""
    config = TransformerConfig(**options(norm="none", d_mlp=None, bias=False, positions="none"))
    model = zoo.prepare(Transformer(config))
    a, b = torch.randn(2, 3, 1, 12, dtype=torch.float64)
    logits = model(inputs_embeds=a), model(inputs_embeds=b)
    torch.testing.assert_close(model(inputs_embeds=2 * a - 3 * b), 2 * logits[0] - 3 * logits[1], **EXACT)
    assert logits[0].abs().max() > 1e-3


@each_family
def test_shapes(family):
    model = zoo.make(family)
    config = model.config
    ids, mask = zoo.random_inputs(zoo.VOCAB, [5, 3])
    assert model(ids).shape == (2, 5, zoo.VOCAB)
    assert model(ids, mask).dtype == torch.float64
    assert (model.pos_embed is None) == (config.positions != "learned")
    assert len(model.blocks) == config.n_layers
    for block in model.blocks:
        attn = block.attn
        assert (attn.num_heads, attn.num_kv_heads, attn.head_dim) == (config.n_heads, config.n_kv_heads, config.d_head)
        assert attn.scaling == config.d_head**-0.5
        assert attn.q_proj.weight.shape == (config.n_heads * config.d_head, config.d_model)
        assert (
            attn.k_proj.weight.shape == attn.v_proj.weight.shape == (config.n_kv_heads * config.d_head, config.d_model)
        )
        assert attn.o_proj.weight.shape == (config.d_model, config.n_heads * config.d_head)
        assert (attn.q_norm is None) == (attn.k_norm is None) == (not config.qk_norm)
        assert all(
            (linear.bias is None) != config.bias for linear in (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj)
        )


def test_attention_only():
    model = zoo.make("small_attn_only")
    assert all(block.ln2 is None and block.mlp is None for block in model.blocks)
    ids, _ = zoo.random_inputs(zoo.VOCAB, [6])
    block = model.blocks[0]
    with torch.no_grad():
        seen = []
        block.attn.register_forward_hook(lambda module, args, out: seen.append(out))
        block.register_forward_hook(lambda module, args, out: seen.append(out))
        model(ids)
        torch.testing.assert_close(seen[1], model.embed(ids) + seen[0], **EXACT)


@torch.no_grad()
def test_initial_weights():
    config = TransformerConfig(vocab_size=100, n_layers=8, d_model=64, n_heads=4, d_mlp=128)
    model = Transformer(config)
    for block in model.blocks:
        for linear in (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj, block.mlp.up):
            assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert (linear.bias == 0).all()
        for linear in (block.attn.o_proj, block.mlp.down):
            assert linear.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)
    for embedding in (model.embed, model.pos_embed, model.unembed):
        assert embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_tied_weights():
    model, copied = zoo.make("small_qk_norm"), copy.deepcopy(zoo.make("small_qk_norm"))
    for each in (model, copied):
        assert each.unembed.weight is each.embed.weight
    assert zoo.make("small_ln_learned").unembed.weight is not zoo.make("small_ln_learned").embed.weight
    untied = TransformerConfig.from_dict(model.config.to_dict() | {"tied": False})
    count = sum(parameter.numel() for parameter in Transformer(untied).parameters())
    assert count - sum(parameter.numel() for parameter in model.parameters()) == zoo.VOCAB * model.config.d_model


@each_family
@torch.no_grad()
def test_state_dict_roundtrip(family, tmp_path):
    """Also through safetensors, which stores tied weights once."""
    from safetensors.torch import load_model, save_model

    model = zoo.make(family)
    ids, mask = zoo.random_inputs(zoo.VOCAB, [5, 3], "left")
    for way in ("state_dict", "safetensors"):
        other = Transformer(TransformerConfig.from_dict(model.config.to_dict())).double().eval()
        assert not torch.allclose(other(ids, mask), model(ids, mask))
        if way == "state_dict":
            other.load_state_dict(model.state_dict())
        else:
            save_model(model, str(tmp_path / "model.safetensors"))
            load_model(other, tmp_path / "model.safetensors")
        assert torch.equal(other(ids, mask), model(ids, mask))


# Behaviour


@each_family
@torch.no_grad()
def test_causality(family):
    model = zoo.make(family)
    ids, _ = zoo.random_inputs(zoo.VOCAB, [8, 8])
    logits = model(ids)
    for position in range(8):
        changed = ids.clone()
        changed[:, position] = ids[:, position] % (zoo.VOCAB - 1) + 1
        after = model(changed)
        torch.testing.assert_close(after[:, :position], logits[:, :position], **EXACT)
        assert ((after - logits)[:, position:].abs().amax(-1) > 1e-3).all()


@each_family
@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_a_padded_row_equals_the_row_alone(family, padding):
    model = zoo.make(family)
    ids, mask = zoo.random_inputs(zoo.VOCAB, [8, 3, 5], padding)
    for dtype in (torch.bool, torch.long, torch.float64):
        logits = model(ids, attention_mask=mask.to(dtype))
        assert bool(logits.isfinite().all())
        for row in range(len(ids)):
            torch.testing.assert_close(logits[row, mask[row]], model(ids[row, mask[row]][None])[0], **EXACT)
    noise = torch.where(mask, ids, ids + 7)
    torch.testing.assert_close(model(noise, mask)[mask], logits[mask], **EXACT)


@each_family
@torch.no_grad()
def test_positions(family):
    """Given positions replace the default; only relative ones matter to rotary models."""
    model = zoo.make(family)
    ids, mask = zoo.random_inputs(zoo.VOCAB, [6, 6])
    logits = model(ids)
    for position_ids in (torch.arange(6), torch.arange(6)[None], torch.arange(6).expand(2, 6)):
        assert torch.equal(model(ids, position_ids=position_ids), logits)
    torch.testing.assert_close(model(ids, mask), logits, **EXACT)
    shifted, stretched = model(ids, position_ids=torch.arange(6) + 9), model(ids, position_ids=torch.arange(6) * 2)
    assert torch.allclose(shifted, logits, rtol=0.0, atol=1e-9) == (model.config.positions == "rotary")
    assert not torch.allclose(stretched, logits, atol=1e-3)


@torch.no_grad()
def test_without_positions_the_order_of_the_past_does_not_matter():
    config = TransformerConfig(**options(vocab_size=zoo.VOCAB, positions="none", n_layers=1))
    model = zoo.prepare(Transformer(config))
    ids, _ = zoo.random_inputs(zoo.VOCAB, [6])
    swapped = ids[:, [2, 0, 1, 4, 3, 5]]
    torch.testing.assert_close(model(ids)[:, -1], model(swapped)[:, -1], **EXACT)


@each_family
@torch.no_grad()
def test_embeddings_instead_of_ids(family):
    model = zoo.make(family)
    ids, mask = zoo.random_inputs(zoo.VOCAB, [5, 3], "left")
    assert torch.equal(model(inputs_embeds=model.embed(ids), attention_mask=mask), model(ids, mask))


def test_forward_refuses():
    model = Transformer(TransformerConfig(**options()))
    ids = torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(InterpError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(InterpError, match="either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=model.embed(ids))
    with pytest.raises(InterpError, match=r"attention_mask must be \[2, 4\]; got \[4\]"):
        model(ids, attention_mask=torch.ones(4))
    with pytest.raises(InterpError, match="9 tokens do not fit in the 8 learned positions"):
        model(torch.ones(1, 9, dtype=torch.long))


@each_family
@pytest.mark.parametrize("padding", ["left", "right"])
def test_gradients_reach_every_parameter(family, padding):
    model = zoo.make(family).train()
    ids, mask = zoo.random_inputs(zoo.VOCAB, [8, 3, 5], padding)
    model(ids, mask)[mask].logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        # One vector added to every key shifts a query's scores together, and softmax does not see it.
        invisible = name.endswith("k_proj.bias") and model.config.positions != "rotary" and not model.config.qk_norm
        assert (parameter.grad.abs().max() > 1e-4) != invisible, name


@each_family
@torch.no_grad()
def test_attention_that_writes_out_its_pattern_can_take_the_place_of_the_kernel(family):
    """`attend` is called with what it says, on the instance that it is set on, and comes back when that is deleted."""
    model = zoo.make(family)
    ids, mask = zoo.random_inputs(zoo.VOCAB, [8, 3, 5], "left")
    logits = model(ids, mask)
    patterns = []

    def attend(module, q, k, v, allowed, *, scaling):
        k, v = (x.repeat_interleave(module.num_heads // module.num_kv_heads, dim=1) for x in (k, v))
        scores = (q @ k.transpose(-1, -2) * scaling).masked_fill(~allowed, -torch.inf)
        patterns.append(scores.softmax(-1).nan_to_num(0.0))
        return (patterns[-1] @ v).transpose(1, 2), patterns[-1]

    for block in model.blocks:
        block.attn.attend = attend
    torch.testing.assert_close(model(ids, mask), logits, **EXACT)
    assert len(patterns) == model.config.n_layers
    assert patterns[0].shape == (3, model.config.n_heads, 8, 8)
    for block in model.blocks:
        del block.attn.attend
    assert torch.equal(model(ids, mask), logits)


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_narrower_dtypes(family, dtype):
    """Logits stay in the model's dtype and near those in float64, far positions included."""
    tolerance = {torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.5}[dtype]
    ids, mask = zoo.random_inputs(zoo.VOCAB, [60, 40], "left")
    logits, exact = zoo.make(family, dtype=dtype)(ids, mask), zoo.make(family)(ids, mask)
    assert logits.dtype == dtype
    assert (logits.double() - exact)[mask].pow(2).mean().sqrt() < tolerance
