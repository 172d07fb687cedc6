"""Llama, Mistral, Qwen 2 and 3: RMSNorm, rotary positions, grouped-query heads, a gated MLP; Qwen 3 norms q and k."""

from __future__ import annotations

from typing import Any

from .architecture import Architecture, Block, Mlp, Projection
from .huggingface import rotary, swap_attention, unembedding


def describe(model: Any) -> Architecture:
    """Find the parts of a decoder of the Llama family with a language-model head."""
    head = unembedding(model)
    body, config = model.model, model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    blocks = []
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        width = attention.head_dim
        blocks.append(
            Block(
                module=layer,
                norm1=layer.input_layernorm,
                attention=attention,
                q=Projection(attention.q_proj, heads, width),
                k=Projection(attention.k_proj, groups, width),
                v=Projection(attention.v_proj, groups, width),
                out=attention.o_proj,
                scaling=attention.scaling,
                q_norm=getattr(attention, "q_norm", None),
                k_norm=getattr(attention, "k_norm", None),
                window=_window(attention, config),
                norm2=layer.post_attention_layernorm,
                mlp=Mlp(mlp, mlp.gate_proj, mlp.down_proj, mlp.act_fn, up=mlp.up_proj, width=config.intermediate_size),
            )
        )
    return Architecture(
        family=config.model_type,
        embed=body.embed_tokens,
        pos_embed=None,
        blocks=tuple(blocks),
        norm=body.norm,
        unembed=head,
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        rotary=rotary(body.rotary_emb),
        swap_attention=swap_attention,
    )


def _window(attention: Any, config: Any) -> int | None:
    # Mistral slides in every layer and keeps the width in its config; Qwen says it for each attention module.
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return config.sliding_window if config.model_type == "mistral" else None
