"""BLOOM: ALiBi, q, k and v side by side for each head, sublayers that add what they make to the stream themselves.

Its attention computes scores in its own forward, where no function of ours is called: what is inside is refused.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ..errors import ModelError
from .architecture import Architecture
from .blocks import Attention, Block, Mlp, Sublayer
from .falcon import ALIBI, OPAQUE
from .huggingface import headed, inner, swap_attention
from .projections import Projection, linear_outputs


def describe(model: Any) -> Architecture:
    """Find the parts of a BLOOM with a language-model head.

    Raises:
        ModelError: its residual stream goes on from the norms, or its products are sliced.
    """
    head = headed(model)
    body, config = inner(model, "transformer"), model.config
    if config.apply_residual_connection_post_layernorm or (config.pretraining_tp > 1 and config.slow_but_exact):
        raise ModelError(
            "a BLOOM is known whose residual stream goes on from before the norms, and whose products are whole "
            "(apply_residual_connection_post_layernorm and slow_but_exact are off)"
        )
    return Architecture(
        family=config.model_type,
        embed=body.word_embeddings_layernorm,
        pos_embed=None,
        blocks=tuple(_block(layer) for layer in body.h),
        norm=body.ln_f,
        **head,
        width=config.hidden_size,
        swap_attention=swap_attention,
        unshared=ALIBI,
    )


def _block(layer: Any) -> Block:
    attention, mlp = layer.self_attention, layer.mlp
    heads, width = attention.num_heads, attention.head_dim
    part = partial(Projection, attention.query_key_value, heads, width, 0, 3 * width)
    attend = Attention(
        module=attention,
        q=part(0),
        k=part(width),
        v=part(2 * width),
        out=attention.dense,
        scaling=attention.inv_norm_factor,
        opaque=OPAQUE.format("BLOOM"),
    )
    feed = Mlp(mlp, mlp.dense_h_to_4h, mlp.dense_4h_to_h, mlp.gelu_impl, width=linear_outputs(mlp.dense_h_to_4h))
    # What the sublayers return is the stream already, so what they add is their last projection's.
    sublayers = (
        Sublayer(layer.input_layernorm, attend, ends=attention.dense),
        Sublayer(layer.post_attention_layernorm, feed, ends=mlp.dense_4h_to_h),
    )
    return Block(layer, sublayers)
