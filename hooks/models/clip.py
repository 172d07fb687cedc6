"""Blocks of CLIP and SigLIP: tokens of an image that all see each other (or of a text), LayerNorm before sublayers."""

from __future__ import annotations

from typing import Any

from ..errors import ModelError
from .blocks import Attention, Block, Mlp, Sublayer
from .projections import Projection


def blocks(tower: Any, causal: bool = False) -> tuple[Block, ...]:
    """The blocks of a tower that keeps them in ``encoder.layers``, whose tokens see all others, or those before them.

    Raises:
        ModelError: it is another kind of tower.
    """
    layers: Any = getattr(getattr(tower, "encoder", None), "layers", ())
    if not len(layers) or not all(hasattr(layers[0], name) for name in ("layer_norm1", "self_attn", "mlp")):
        raise ModelError(f"a {type(tower).__name__} is no tower of CLIP's or SigLIP's kind, which are known here")
    return tuple(_block(layer, causal) for layer in tower.encoder.layers)


def _block(layer: Any, causal: bool) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    heads, width = attention.num_heads, attention.head_dim
    attend = Attention(
        module=attention,
        q=Projection(attention.q_proj, heads, width),
        k=Projection(attention.k_proj, heads, width),
        v=Projection(attention.v_proj, heads, width),
        out=attention.out_proj,
        scaling=attention.scale,
        causal=causal,
    )
    feed = Mlp(mlp, mlp.fc1, mlp.fc2, mlp.activation_fn, width=mlp.fc1.out_features)
    return Block(layer, (Sublayer(layer.layer_norm1, attend), Sublayer(layer.layer_norm2, feed)))
