"""LLaVA-NeXT and OneVision: a LLaVA whose images are seen whole and again in tiles, with marks at ends of lines."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import InputsError
from ..plan.pictures import Pictures
from . import llava
from .architecture import Architecture
from .seeing import filled, given_images, require_sizes, tensor_of, with_tower

_COUNTS = "batch_num_images"


def describe(model: Any) -> Architecture:
    """Find the parts of a LLaVA-NeXT or a LLaVA-OneVision."""
    tower = llava.tower(model, partial(_look, model), _arguments)
    return with_tower(model, model.model.language_model, tower)


def _arguments(ids: Tensor, mask: Tensor, pictures: Pictures | None) -> dict[str, Tensor]:
    if not pictures:
        return {}
    found = dict(pictures.tensors)
    if _COUNTS in found:
        found[_COUNTS] = torch.bincount(pictures.row, minlength=pictures.count)
    return found


def _look(model: Any, ids: Tensor, mask: Tensor, given: Mapping[str, Any]) -> Pictures | None:
    if not given_images(given):
        return None
    config, vision = model.config, model.config.vision_config
    sizes = tensor_of(given, "image_sizes", (2,), ", the height and width of each image")
    pixels = tensor_of(given, "pixel_values", (4, 5))
    require_sizes("pixel_values", pixels, (vision.num_channels, vision.image_size, vision.image_size))
    require_sizes("image_sizes", sizes, (2,))
    alone = _seen_alone(given.get(_COUNTS), len(sizes))
    home = sys.modules[type(model).__module__]
    tiles = torch.tensor(
        [
            home.image_size_to_num_patches(size, config.image_grid_pinpoints, vision.image_size) if one else 1
            for size, one in zip(sizes, alone, strict=True)
        ]
    )
    if pixels.ndim == 5 and (len(pixels) != len(sizes) or pixels.shape[1] < int(tiles.max())):
        raise InputsError(
            f"pixel_values is {list(pixels.shape)}, and image_sizes {sizes.tolist()} say that the images have "
            f"{tiles.tolist()} tiles"
        )
    if pixels.ndim == 4 and len(pixels) != int(tiles.sum()):
        raise InputsError(
            f"pixel_values has {len(pixels)} tiles, and image_sizes {sizes.tolist()} say {tiles.tolist()}"
        )
    each = torch.ones_like(tiles)
    tensors = {"pixel_values": pixels, "image_sizes": sizes}
    parts = {"pixel_values": each if pixels.ndim == 5 else tiles, "image_sizes": each}
    if given.get(_COUNTS) is not None:
        tensors[_COUNTS], parts[_COUNTS] = torch.where(alone, 1, 2), each
    patches, extra = llava.sequence(vision)
    return filled(
        ids,
        mask,
        config.image_token_id,
        _places(model, tiles, sizes, patches),
        tensors,
        parts=parts,
        patches=tiles * (patches + extra),
    )


def _places(model: Any, tiles: Tensor, sizes: Tensor, patches: int) -> list[int]:
    """How many tokens of the text each image takes, as the model itself packs features of as many tiles."""
    full = model.config.vision_feature_select_strategy == "full"
    kept = patches + llava.sequence(model.config.vision_config)[1] if full else patches
    features = [torch.zeros(int(count), kept, 1) for count in tiles]
    more: dict[str, Any] = {"image_newline": torch.zeros(1)}
    if hasattr(model.config, "vision_aspect_ratio"):
        more["vision_aspect_ratio"] = model.config.vision_aspect_ratio
    else:
        more["vision_feature_select_strategy"] = model.config.vision_feature_select_strategy
    _, lengths = model.model.pack_image_features(features, sizes, **more)
    return lengths.tolist()


def _seen_alone(counts: Any, images: int) -> Tensor:
    """Which images are cut into tiles: those that are their row's only one, where the processor counts them.

    Raises:
        InputsError: it counts another number.
    """
    if counts is None:
        return torch.ones(images, dtype=torch.bool)
    counts = torch.as_tensor(counts).flatten().to("cpu")
    if int(counts.sum()) != images:
        raise InputsError(f"{_COUNTS} is {counts.tolist()}, and there are {images} images")
    return (counts == 1).repeat_interleave(counts)
