"""LLaVA: the features of a CLIP or SigLIP tower, of one of its last layers, through two linear layers into the text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..plan.pictures import Pictures
from . import clip
from .architecture import Architecture, Tower
from .blocks import Block
from .huggingface import swap_attention
from .seeing import filled, given_images, require_sizes, tensor_of, with_tower


def describe(model: Any) -> Architecture:
    """Find the parts of a LLaVA."""
    return with_tower(model, model.model.language_model, tower(model, partial(_look, model.config)))


def tower(model: Any, look: Callable[..., Pictures | None], called: Callable[..., Any] | None = None) -> Tower:
    """The tower of a model that reads the features of one of its layers, or of several, and nothing after those."""
    config, vision = model.config, model.model.vision_tower
    blocks, unread = live(clip.blocks(vision), config.vision_feature_layer)
    return Tower(
        embed=vision.embeddings,
        blocks=blocks,
        norm=None,
        width=config.vision_config.hidden_size,
        swap_attention=swap_attention,
        look=look,
        arguments=arguments if called is None else called,
        token=config.image_token_id,
        chosen={
            name: getattr(config, name, None)
            for name in ("vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio")
        },
        unread=unread,
    )


def live(blocks: tuple[Block, ...], layers: int | list[int]) -> tuple[tuple[Block, ...], str]:
    """The blocks that features are read from, given by the numbers of hidden states, and why others are left out."""
    chosen = [layers] if isinstance(layers, int) else list(layers)
    # Hidden state 0 is what goes into the first block.
    last = max(layer if layer >= 0 else len(blocks) + 1 + layer for layer in chosen)
    unread = "" if last == len(blocks) else f"nothing reads what the later ones compute (vision_feature_layer={layers})"
    return blocks[:last], unread


def arguments(ids: Tensor, mask: Tensor, pictures: Pictures | None) -> dict[str, Tensor]:
    """What the model is called with besides tokens."""
    return {} if not pictures else dict(pictures.tensors)


def _look(config: Any, ids: Tensor, mask: Tensor, given: Mapping[str, Any]) -> Pictures | None:
    if not given_images(given):
        return None
    vision = config.vision_config
    pixels = tensor_of(given, "pixel_values", (4,))
    require_sizes("pixel_values", pixels, (vision.num_channels, vision.image_size, vision.image_size))
    patches, extra = sequence(vision)
    kept = patches if config.vision_feature_select_strategy == "default" else patches + extra
    if config.vision_feature_select_strategy == "default" and not extra:
        # The first token is dropped whatever it is.
        kept = patches - 1
    each = torch.ones(len(pixels), dtype=torch.int64)
    return filled(
        ids,
        mask,
        config.image_token_id,
        [kept] * len(pixels),
        {"pixel_values": pixels},
        parts={"pixel_values": each},
        patches=each * (patches + extra),
    )


def sequence(vision: Any) -> tuple[int, int]:
    """How many patches an image of a tower has, and how many tokens besides: CLIP has one of class, SigLIP none."""
    side = vision.image_size // vision.patch_size
    return side * side, 0 if "siglip" in vision.model_type else 1
