"""Towers of CLIP and SigLIP by themselves (`CLIPVisionModel`, `CLIPTextModel`, `SiglipVisionModel`, `SiglipTextModel`),
with or without the projection of what they pool.

They have no head: what they return are states, and one pooled vector for each row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import ModelError
from ..plan.images import ImageFormat
from . import clip
from .architecture import Architecture
from .huggingface import headless, inner, swap_attention
from .projections import linear_outputs

_PROJECTED = "similarity() measures what it pools beside another tower's"
_AT_END = "its pooled vector is that of the end token, which no module computes: read ln_final there"
_AT_CLASS = "the norm after the last block reads the class token alone, and what it returns is pooled"


def describe(model: Any) -> Architecture:
    """Find the parts of a tower.

    Raises:
        ModelError: it is both towers, or one that classifies.
    """
    kind = model.config.model_type
    if kind in ("clip", "siglip"):
        raise ModelError(
            f"a {type(model).__name__} is two towers, each of which sees inputs of its own: wrap one of them "
            "(model.vision_model or model.text_model); similarity() measures what it pools beside the other's"
        )
    return _vision(model) if kind.endswith("vision_model") else _text(model)


def _vision(model: Any) -> Architecture:
    body, config = inner(model, "vision_model"), model.config
    embeddings, first = body.embeddings, getattr(body, "pre_layrnorm", None)
    prefix = int(hasattr(embeddings, "class_embedding"))
    size = (config.image_size, config.image_size)
    patch = (config.patch_size, config.patch_size)
    arch = Architecture(
        family=config.model_type,
        embed=embeddings if first is None else first,
        pos_embed=None,
        blocks=clip.blocks(body),
        norm=body.post_layernorm,
        **headless(model, _PROJECTED),
        width=config.hidden_size,
        swap_attention=swap_attention,
        images=ImageFormat(config.num_channels, *size, patch=patch, prefix=prefix),
        look=None if first is None else lambda pixels: first(embeddings(pixels)),
    )
    head, projection = getattr(body, "head", None), getattr(model, "visual_projection", None)
    if prefix:  # CLIP's
        missing = {**arch.missing, "ln_final": _AT_CLASS}
        arch = replace(arch, norm=nn.Identity(), missing=missing)
        head = body.post_layernorm
    return _pooling(arch, head, projection)


def _text(model: Any) -> Architecture:
    body, config = inner(model, "text_model"), model.config
    causal = config.model_type == "clip_text_model"
    blocks = clip.blocks(body, causal)
    arch = Architecture(
        family=config.model_type,
        embed=body.embeddings,
        pos_embed=None,
        blocks=blocks,
        norm=body.final_layer_norm,
        **headless(model, _PROJECTED, body.embeddings.token_embedding.num_embeddings),
        width=config.hidden_size,
        swap_attention=swap_attention,
        positioned=True,
        pools_last=not causal,
    )
    head, projection = getattr(body, "head", None), getattr(model, "text_projection", None)
    if head is None and projection is None:
        return replace(arch, missing={**arch.missing, "pooled": _AT_END})
    return _pooling(arch, head, projection)


def _pooling(arch: Architecture, head: Any, projection: Any) -> Architecture:
    """A tower with what makes its pooled vector: the projection, where there is one, else the head."""
    last = head if projection is None else projection
    if last is None:
        return replace(arch, missing={**arch.missing, "pooled": "this tower was made without its pooling head"})
    linear = isinstance(last, nn.Linear) or projection is not None
    return replace(arch, pooler=last, pooled_width=linear_outputs(last) if linear else arch.width)
