"""Vision transformers (`ViTForImageClassification`): patches and a class token that all see each other, LayerNorm.

The embeddings module adds the class token and the positions, so `embed` is all of it. The classifier reads the class
token.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import ModelError
from ..plan.images import ImageFormat
from .architecture import Architecture
from .blocks import Attention, Block, Mlp, Sublayer
from .huggingface import swap_attention
from .projections import Projection


def describe(model: Any) -> Architecture:
    """Find the parts of a vision transformer with a classifier."""
    if not isinstance(getattr(model, "classifier", None), nn.Linear):
        raise ModelError(
            f"{type(model).__name__} has no classifier; load it with AutoModelForImageClassification, and with labels"
        )
    body, config = model.vit, model.config
    if not hasattr(body, "layers"):
        raise ModelError("this version of transformers keeps the layers of a ViT elsewhere; 5.23 is known to fit")
    patches = body.embeddings.patch_embeddings
    return Architecture(
        family=config.model_type,
        embed=body.embeddings,
        pos_embed=None,
        blocks=tuple(_block(layer, config) for layer in body.layers),
        norm=body.layernorm,
        unembed=model.classifier,
        width=config.hidden_size,
        vocabulary=model.classifier.out_features,
        swap_attention=swap_attention,
        readout=0,
        images=ImageFormat(patches.num_channels, *patches.image_size, patch=tuple(patches.patch_size)),
    )


def _block(layer: Any, config: Any) -> Block:
    attention, mlp = layer.attention, layer.mlp
    heads, width = attention.num_attention_heads, attention.head_dim
    attend = Attention(
        module=attention,
        q=Projection(attention.q_proj, heads, width),
        k=Projection(attention.k_proj, heads, width),
        v=Projection(attention.v_proj, heads, width),
        out=attention.o_proj,
        scaling=attention.scaling,
        causal=False,
    )
    feed = Mlp(mlp, mlp.fc1, mlp.fc2, mlp.activation_fn, width=config.intermediate_size)
    sublayers = (
        Sublayer(layer.layernorm_before, attend, drop=layer.dropout),
        Sublayer(layer.layernorm_after, feed, drop=layer.dropout),
    )
    return Block(layer, sublayers)
