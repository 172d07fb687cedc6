"""Llama, Mistral, Qwen 2 and 3: RMSNorm, rotary positions, grouped-query heads, a gated MLP; Qwen 3 norms q and k."""

from __future__ import annotations

from typing import Any

from .architecture import Architecture
from .blocks import Attention, Block, Mlp, Sublayer
from .huggingface import swap_attention, unembedding
from .positions import Rotary
from .projections import Projection


def describe(model: Any) -> Architecture:
    """Find the parts of a decoder of the Llama family with a language-model head."""
    head = unembedding(model)
    body, config = model.model, model.config
    rotary = Rotary.of(body.rotary_emb)
    return Architecture(
        family=config.model_type,
        embed=body.embed_tokens,
        pos_embed=None,
        blocks=tuple(
            Block(
                layer,
                (
                    Sublayer(layer.input_layernorm, attention(layer.self_attn, config, rotary)),
                    Sublayer(layer.post_attention_layernorm, gated(layer.mlp)),
                ),
            )
            for layer in body.layers
        ),
        norm=body.norm,
        unembed=head,
        width=config.hidden_size,
        vocabulary=head.weight.shape[0],
        swap_attention=swap_attention,
    )


def attention(module: Any, config: Any, rotary: Rotary) -> Attention:
    """Attention with three projections, of grouped-query heads where the config has fewer of keys than of queries."""
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, module.head_dim
    return Attention(
        module=module,
        q=Projection(module.q_proj, heads, width),
        k=Projection(module.k_proj, groups, width),
        v=Projection(module.v_proj, groups, width),
        out=module.o_proj,
        scaling=module.scaling,
        q_norm=getattr(module, "q_norm", None),
        k_norm=getattr(module, "k_norm", None),
        rotary=rotary,
        window=_window(module, config),
    )


def gated(module: Any) -> Mlp:
    """An MLP whose hidden values are act(gate) * up."""
    width = getattr(module, "intermediate_size", module.config.intermediate_size)
    return Mlp(module, module.gate_proj, module.down_proj, module.act_fn, up=module.up_proj, width=width)


def _window(attention: Any, config: Any) -> int | None:
    # Mistral slides in every layer and keeps the width in its config; Qwen says it for each attention module.
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return config.sliding_window if config.model_type == "mistral" else None
