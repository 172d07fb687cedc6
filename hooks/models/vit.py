"""Vision transformers (`ViTForImageClassification`, `ViTModel`): patches and a class token that all see each other,
LayerNorm.

The embeddings module adds the class token and the positions, so `embed` is all of it. The classifier reads the class
token.
"""

from __future__ import annotations

from typing import Any

from ..errors import ModelError
from ..plan.images import ImageFormat
from .architecture import Architecture
from .blocks import Attention, Block, Mlp, Sublayer
from .huggingface import headless, inner, swap_attention
from .projections import Projection, has_outputs


def describe(model: Any) -> Architecture:
    """Find the parts of a vision transformer with a classifier, or with no head.

    Raises:
        ModelError: it has another head.
    """
    body, config = inner(model, "vit"), model.config
    bare = model is body
    if not bare and not has_outputs(getattr(model, "classifier", None)):
        raise ModelError(
            f"{type(model).__name__} has no classifier; load it with AutoModelForImageClassification, and with labels"
        )
    if not hasattr(body, "layers"):
        raise ModelError("this version of transformers keeps the layers of a ViT elsewhere; 5.23 is known to fit")
    patches = body.embeddings.patch_embeddings
    return Architecture(
        family=config.model_type,
        embed=body.embeddings,
        pos_embed=None,
        blocks=tuple(_block(layer, config) for layer in body.layers),
        norm=body.layernorm,
        **(headless(model, "load it with AutoModelForImageClassification") if bare else _classifier(model)),
        width=config.hidden_size,
        swap_attention=swap_attention,
        images=ImageFormat(patches.num_channels, *patches.image_size, patch=tuple(patches.patch_size)),
        pooler=getattr(model, "pooler", None),
        pooled_width=getattr(config, "pooler_output_size", config.hidden_size),
    )


def _classifier(model: Any) -> dict[str, Any]:
    return {"unembed": model.classifier, "vocabulary": model.classifier.out_features, "readout": 0}


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
