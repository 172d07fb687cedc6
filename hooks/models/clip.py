"""Towers of CLIP and SigLIP: tokens of an image that all see each other, LayerNorm before each sublayer."""

from __future__ import annotations

from typing import Any

from ..errors import ModelError
from .blocks import Attention, Block, Mlp, Sublayer
from .projections import Projection


def blocks(tower: Any) -> tuple[Block, ...]:
    """The blocks of a vision model that keeps them in ``encoder.layers``.

    Raises:
        ModelError: it is another kind of tower.
    """
    layers: Any = getattr(getattr(tower, "encoder", None), "layers", ())
    if not len(layers) or not all(hasattr(layers[0], name) for name in ("layer_norm1", "self_attn", "mlp")):
        raise ModelError(f"a {type(tower).__name__} is no tower of CLIP's or SigLIP's kind, which are known here")
    return tuple(_block(layer) for layer in tower.encoder.layers)


def _block(layer: Any) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    heads, width = attention.num_heads, attention.head_dim
    attend = Attention(
        module=attention,
        q=Projection(attention.q_proj, heads, width),
        k=Projection(attention.k_proj, heads, width),
        v=Projection(attention.v_proj, heads, width),
        out=attention.out_proj,
        scaling=attention.scale,
        causal=False,
    )
    feed = Mlp(mlp, mlp.fc1, mlp.fc2, mlp.activation_fn, width=mlp.fc1.out_features)
    return Block(layer, (Sublayer(layer.layer_norm1, attend), Sublayer(layer.layer_norm2, feed)))
