"""Falcon: one projection to q, k and v in three layouts, blocks in parallel or not, rotary positions or ALiBi.

Its attention computes scores in its own forward, where no function of ours is called: what is inside is refused.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from .architecture import Architecture
from .blocks import Attention, Block, Mlp, Sublayer
from .huggingface import headed, inner, swap_attention
from .positions import Rotary
from .projections import Projection, linear_outputs

OPAQUE = "{}'s attention computes its scores by itself, and calls no attention function that could be put in its place"
ALIBI = "its attention adds a bias by distance (ALiBi) to the scores, which this executor does not compute"


def describe(model: Any) -> Architecture:
    """Find the parts of a Falcon with a language-model head."""
    head = headed(model)
    body, config = inner(model, "transformer"), model.config
    rotary = None if config.alibi else Rotary.of(body.rotary_emb)
    return Architecture(
        family=config.model_type,
        embed=body.word_embeddings,
        pos_embed=None,
        blocks=tuple(_block(layer, config, rotary) for layer in body.h),
        norm=body.ln_f,
        **head,
        width=config.hidden_size,
        swap_attention=swap_attention,
        unshared=ALIBI if config.alibi else "",
    )


def _block(layer: Any, config: Any, rotary: Rotary | None) -> Block:
    attention, mlp = layer.self_attention, layer.mlp
    parallel = config.new_decoder_architecture or config.parallel_attn
    q, k, v = _projections(attention)
    attend = Attention(
        module=attention,
        q=q,
        k=k,
        v=v,
        out=attention.dense,
        scaling=attention.inv_norm_factor,
        rotary=rotary,
        opaque=OPAQUE.format("Falcon"),
    )
    feed = Mlp(mlp, mlp.dense_h_to_4h, mlp.dense_4h_to_h, mlp.act, width=linear_outputs(mlp.dense_h_to_4h))
    norms: tuple[nn.Module, nn.Module]
    if hasattr(layer, "ln_attn"):
        norms = (layer.ln_attn, layer.ln_mlp)
    else:
        norms = (layer.input_layernorm, layer.input_layernorm if parallel else layer.post_attention_layernorm)
    return Block(layer, (Sublayer(norms[0], attend), Sublayer(norms[1], feed)), parallel=parallel)


def _projections(attention: Any) -> tuple[Projection, Projection, Projection]:
    heads, groups, width = attention.num_heads, attention.num_kv_heads, attention.head_dim
    part = partial(Projection, attention.query_key_value)
    if attention.new_decoder_architecture:  # for each key/value head its queries, its key and its value
        each = heads // groups
        stride = (each + 2) * width
        return (part(heads, width, 0, stride, each=each), part(groups, width, 0, stride, each * width),
                part(groups, width, 0, stride, (each + 1) * width))  # fmt: skip
    if attention.multi_query:
        return part(heads, width, 0), part(1, width, heads * width), part(1, width, (heads + 1) * width)
    q, k, v = (part(heads, width, 0, 3 * width, at * width) for at in range(3))
    return q, k, v
