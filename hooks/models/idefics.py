"""Idefics3 and SmolVLM: a tower whose patches are shuffled into fewer tokens, of images that are laid row by row.

Where a processor splits an image, each tile is an image here, as it is to the model, and the whole is the last of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import InputsError
from ..plan.pictures import Pictures
from . import clip
from .architecture import Architecture, Tower
from .huggingface import swap_attention
from .seeing import filled, given_images, tensor_of, with_tower


def describe(model: Any) -> Architecture:
    """Find the parts of an Idefics3 or a SmolVLM."""
    vision = model.model.vision_model
    tower = Tower(
        embed=vision.embeddings,
        blocks=clip.blocks(vision),
        norm=vision.post_layernorm,
        width=model.config.vision_config.hidden_size,
        swap_attention=swap_attention,
        look=partial(_look, model.config),
        arguments=_arguments,
        token=model.config.image_token_id,
        nested=True,
    )
    return with_tower(model, model.model.text_model, tower)


def _arguments(ids: Tensor, mask: Tensor, pictures: Pictures | None) -> dict[str, Tensor]:
    return dict(pictures.tensors) if pictures else {}


def _look(config: Any, ids: Tensor, mask: Tensor, given: Mapping[str, Any]) -> Pictures | None:
    if not given_images(given):
        return None
    vision = config.vision_config
    pixels = tensor_of(given, "pixel_values", (5,), ", [rows, images, channels, height, width]")
    tensors = {"pixel_values": pixels}
    if given.get("pixel_attention_mask") is not None:
        tensors["pixel_attention_mask"] = tensor_of(given, "pixel_attention_mask", (4,))
    if len(pixels) != len(ids) or any(v.shape[:2] != pixels.shape[:2] for v in tensors.values()):
        raise InputsError(
            f"pixel_values is {list(pixels.shape)}, and the text has {len(ids)} rows: an entry is a row's"
        )
    if pixels.shape[2] != vision.num_channels:
        raise InputsError(f"images of {pixels.shape[2]} channels, and the model takes {vision.num_channels}")
    down, across = (size // vision.patch_size for size in pixels.shape[-2:])
    if max(down, across) > vision.image_size // vision.patch_size or (down * across) % config.scale_factor**2:
        raise InputsError(f"images of {list(pixels.shape[-2:])}, and the model takes {vision.image_size} at most")
    # The model takes an image of zeros for padding of rows that have fewer.
    real = (pixels != 0).flatten(2).any(-1)
    counts = real.sum(1)
    if not bool((real == (torch.arange(real.shape[1]) < counts[:, None])).all()):
        raise InputsError("a row has an image of zeros before another one: to this model that is none, so it is lost")
    row = torch.arange(len(ids)).repeat_interleave(counts)
    places = down * across // config.scale_factor**2
    found = filled(
        ids,
        mask,
        config.image_token_id,
        [places] * len(row),
        tensors,
        parts={},
        patches=torch.full_like(row, down * across),
    )
    if not torch.equal(found.row, row):
        raise InputsError(f"rows have {counts.tolist()} images, and places for {found.row.bincount().tolist()}")
    return found
