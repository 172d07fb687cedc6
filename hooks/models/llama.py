"""Llama and what is made like it: Mistral, Qwen 2 and 3, Gemma 1, OLMo 2 and 3, Granite, Phi-3, StableLM, SmolLM 3.

RMSNorm or LayerNorm, rotary positions, grouped-query heads. What differs is read off the modules that are there: norms
before or after sublayers, norms of queries and keys, fused projections, multipliers, experts in the place of the MLP.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import ModelError
from . import moe
from .architecture import Architecture
from .blocks import Attention, Block, Feed, Map, Mlp, Sublayer
from .huggingface import headed, inner, swap_attention
from .positions import Rotary
from .projections import Outputs, Projection, is_plain, linear_outputs


def describe(model: Any) -> Architecture:
    """Find the parts of a decoder of the Llama family with a language-model head.

    Raises:
        ModelError: it attends to later tokens too.
    """
    head = headed(model)
    body, config = inner(model, "model"), model.config
    if getattr(config, "use_bidirectional_attention", False):
        raise ModelError(
            f"this {type(model).__name__} attends to later tokens too (use_bidirectional_attention); "
            "a decoder is causal"
        )
    return Architecture(
        family=config.model_type,
        embed=body.embed_tokens,
        pos_embed=None,
        blocks=tuple(block(layer, config, _rotary(body, layer)) for layer in body.layers),
        norm=body.norm,
        **head,
        width=config.hidden_size,
        swap_attention=swap_attention,
        embed_scale=getattr(body, "embedding_multiplier", 1.0),
        logit_scale=1.0 / getattr(config, "logits_scaling", 1.0) if hasattr(model, "lm_head") else 1.0,
    )


def block(layer: Any, config: Any, rotary: Rotary | None) -> Block:
    """A block with a norm before each of its sublayers, after each, or both."""
    mlp = feed(next(part for name in FEEDS if (part := getattr(layer, name, None)) is not None))
    scale = float(getattr(layer, "residual_multiplier", 1.0))
    drops = (getattr(layer, "resid_attn_dropout", None), getattr(layer, "resid_mlp_dropout", None))
    pre, between, after = (getattr(layer, name, None) for name in NORMS)
    if hasattr(layer, "pre_feedforward_layernorm"):  # four norms, two around each
        norms = ((pre, between), (layer.pre_feedforward_layernorm, after))
    elif pre is None:  # OLMo 2: the stream is read as it is
        norms = ((None, between), (None, after))
    else:
        norms = ((pre, None), (between, None))
    return Block(
        layer,
        (
            Sublayer(norms[0][0], attention(layer.self_attn, config, rotary), norms[0][1], drops[0], scale=scale),
            Sublayer(norms[1][0], mlp, norms[1][1], drops[1], scale=scale),
        ),
    )


NORMS = ("input_layernorm", "post_attention_layernorm", "post_feedforward_layernorm")
FEEDS = ("mlp", "block_sparse_moe", "feed_forward")


def attention(module: Any, config: Any, rotary: Rotary | None) -> Attention:
    """Attention with three projections or one, of grouped-query heads where there are fewer of keys than of queries."""
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, module.head_dim
    if hasattr(module, "qkv_proj"):
        part = partial(Projection, module.qkv_proj)
        q, k = part(heads, width, 0), part(groups, width, heads * width)
        v = part(groups, width, (heads + groups) * width)
    else:
        q, k, v = (Projection(module.q_proj, heads, width), Projection(module.k_proj, groups, width),
                   Projection(module.v_proj, groups, width))  # fmt: skip
    return Attention(
        module=module,
        q=q,
        k=k,
        v=v,
        out=module.o_proj,
        scaling=module.scaling,
        q_norm=_norm(getattr(module, "q_norm", None), width),
        k_norm=_norm(getattr(module, "k_norm", None), width),
        rotary=rotary,
        window=_window(module, config),
        softcap=getattr(module, "attn_logit_softcapping", None),
        sinks="sinks" if hasattr(module, "sinks") else None,
    )


def feed(module: Any) -> Feed:
    """An MLP, or a mixture of experts."""
    return moe.experts(module) if hasattr(module, "experts") else gated(module)


def gated(module: Any) -> Mlp:
    """An MLP whose hidden values are act(gate) * up; Phi-3 keeps both in one weight, the gate first."""
    act = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    if act is None:
        raise ModelError(f"{type(module).__name__} has no activation that is known")
    if hasattr(module, "gate_up_proj"):
        width = linear_outputs(module.gate_up_proj) // 2
        pre, up = (Outputs(module.gate_up_proj, start, width) for start in (0, width))
        return Mlp(module, pre, module.down_proj, act, up=up, width=width)
    # A layer that was put in the place of one of them may not say how wide it is.
    wide = next((part for part in (module.up_proj, module.gate_proj) if is_plain(part)), module.up_proj)
    return Mlp(module, module.gate_proj, module.down_proj, act, up=module.up_proj, width=linear_outputs(wide))


def over_heads(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm over the queries or keys [..., heads, D] of all heads at once."""
    return norm(x.flatten(-2)).view_as(x)


def _norm(norm: nn.Module | None, width: int) -> Map | None:
    if norm is None:
        return None
    weight = getattr(norm, "weight", None)
    return partial(over_heads, norm) if isinstance(weight, Tensor) and weight.numel() != width else norm


def _rotary(body: Any, layer: Any) -> Rotary | None:
    attention, module = layer.self_attn, body.rotary_emb
    if not getattr(attention, "use_rope", True):  # SmolLM 3 leaves some layers without positions
        return None
    if not isinstance(getattr(module, "rope_type", None), dict):
        return Rotary.of(module)
    return Rotary.of(module, body.config.layer_types[attention.layer_idx])


WINDOWED = frozenset({"mistral", "mixtral", "phi3"})
"""Families that slide in every layer and keep the width in their config; others say it for each attention module."""


def _window(attention: Any, config: Any) -> int | None:
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return config.sliding_window if config.model_type in WINDOWED else None
