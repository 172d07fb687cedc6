"""Gemma 3 with its SigLIP tower: tokens of one image see one another, later ones too."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..plan.pictures import Pictures
from . import clip
from .architecture import Architecture, Tower
from .huggingface import swap_attention
from .seeing import filled, given_images, require_sizes, tensor_of, with_tower


def describe(model: Any) -> Architecture:
    """Find the parts of a Gemma 3 that sees."""
    vision, config = model.model.vision_tower, model.config
    tower = Tower(
        embed=vision.embeddings,
        blocks=clip.blocks(vision),
        norm=vision.post_layernorm,
        width=config.vision_config.hidden_size,
        swap_attention=swap_attention,
        look=partial(_look, config),
        arguments=_arguments,
        token=config.image_token_id,
        nested=True,
        mutual=True,
    )
    return with_tower(model, model.model.language_model, tower)


def _arguments(ids: Tensor, mask: Tensor, pictures: Pictures | None) -> dict[str, Tensor]:
    """Without the kinds of its tokens the model would let those of an image see only what comes before them."""
    if not pictures:
        return {}
    return {**pictures.tensors, "token_type_ids": (pictures.image >= 0).long()}


def _look(config: Any, ids: Tensor, mask: Tensor, given: Mapping[str, Any]) -> Pictures | None:
    if not given_images(given):
        return None
    vision = config.vision_config
    pixels = tensor_of(given, "pixel_values", (4,))
    require_sizes("pixel_values", pixels, (vision.num_channels, vision.image_size, vision.image_size))
    each = torch.ones(len(pixels), dtype=torch.int64)
    return filled(
        ids,
        mask,
        config.image_token_id,
        [config.mm_tokens_per_image] * len(pixels),
        {"pixel_values": pixels},
        parts={"pixel_values": each},
        patches=each * (vision.image_size // vision.patch_size) ** 2,
    )
