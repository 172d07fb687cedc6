"""GPT-NeoX and Pythia: parallel blocks, LayerNorm, partial rotary positions, q, k and v side by side for each head."""

from __future__ import annotations

from functools import partial
from typing import Any

from .architecture import Architecture
from .blocks import Attention, Block, Mlp, Sublayer
from .huggingface import headed, inner, swap_attention
from .positions import Rotary
from .projections import Projection


def describe(model: Any) -> Architecture:
    """Find the parts of a GPT-NeoX with a language-model head."""
    head = headed(model)
    body, config = inner(model, "gpt_neox"), model.config
    rotary = Rotary.of(body.rotary_emb)
    return Architecture(
        family="gpt_neox",
        embed=body.embed_in,
        pos_embed=None,
        blocks=tuple(_block(layer, config, rotary) for layer in body.layers),
        norm=body.final_layer_norm,
        **head,
        width=config.hidden_size,
        swap_attention=swap_attention,
    )


def _block(layer: Any, config: Any, rotary: Rotary) -> Block:
    attention, mlp = layer.attention, layer.mlp
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    part = partial(Projection, attention.query_key_value, heads, width, start=0, stride=3 * width)
    attend = Attention(
        module=attention,
        q=part(offset=0),
        k=part(offset=width),
        v=part(offset=2 * width),
        out=attention.dense,
        scaling=attention.scaling,
        rotary=rotary,
    )
    feed = Mlp(mlp, mlp.dense_h_to_4h, mlp.dense_4h_to_h, mlp.act, width=config.intermediate_size)
    sublayers = (
        Sublayer(layer.input_layernorm, attend, drop=layer.post_attention_dropout),
        Sublayer(layer.post_attention_layernorm, feed, drop=layer.post_mlp_dropout),
    )
    return Block(layer, sublayers, parallel=layer.use_parallel_residual)
