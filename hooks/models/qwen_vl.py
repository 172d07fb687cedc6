"""Qwen 2-VL and 2.5-VL: a tower of packed patches, in 2.5 window by window, and positions in time, height and width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import InputsError
from ..plan.pictures import Pictures
from . import llama
from .architecture import Architecture, Tower
from .blocks import Attention, Block, Mlp, Sublayer
from .huggingface import swap_packed_attention
from .positions import Rotary
from .projections import Projection
from .seeing import filled, given_images, require_sizes, tensor_of, with_tower


def describe(model: Any) -> Architecture:
    """Find the parts of a Qwen 2-VL or 2.5-VL."""
    visual, config = model.model.visual, model.config
    rotary = Rotary.of(visual.rotary_pos_emb)
    tower = Tower(
        embed=visual.patch_embed,
        blocks=tuple(_block(block, rotary) for block in visual.blocks),
        norm=visual.merger.ln_q,
        width=visual.blocks[0].attn.qkv.in_features,
        swap_attention=swap_packed_attention,
        look=partial(_look, model),
        arguments=_arguments,
        token=config.image_token_id,
        packed=True,
    )
    return with_tower(model, model.model.language_model, tower, llama.describe)


def _block(block: Any, rotary: Rotary) -> Block:
    attention, mlp = block.attn, block.mlp
    heads = attention.num_heads
    dim = attention.qkv.out_features // 3
    q, k, v = (Projection(attention.qkv, heads, dim // heads, start=at * dim) for at in range(3))
    attend = Attention(
        module=attention,
        q=q,
        k=k,
        v=v,
        out=attention.proj,
        scaling=(dim // heads) ** -0.5,
        rotary=rotary,
        causal=False,
    )
    if hasattr(mlp, "gate_proj"):
        feed = Mlp(mlp, mlp.gate_proj, mlp.down_proj, mlp.act_fn, up=mlp.up_proj, width=mlp.gate_proj.out_features)
    else:
        feed = Mlp(mlp, mlp.fc1, mlp.fc2, mlp.act, width=mlp.fc1.out_features)
    return Block(block, (Sublayer(block.norm1, attend), Sublayer(block.norm2, feed)))


def _arguments(ids: Tensor, mask: Tensor, pictures: Pictures | None) -> dict[str, Tensor]:
    """Positions are given, or the model would find and keep some of its own, for later calls."""
    if not pictures:
        return {}
    assert pictures.rotary is not None
    return {**pictures.tensors, "position_ids": pictures.rotary}


def _look(model: Any, ids: Tensor, mask: Tensor, given: Mapping[str, Any]) -> Pictures | None:
    if not given_images(given):
        return None
    config, vision = model.config, model.config.vision_config
    grid = tensor_of(given, "image_grid_thw", (2,), ", how many patches an image has in time, height and width")
    pixels = tensor_of(given, "pixel_values", (2,), ", a row for each patch")
    require_sizes("image_grid_thw", grid, (3,))
    channels = getattr(vision, "in_channels", getattr(vision, "in_chans", 3))
    require_sizes("pixel_values", pixels, (channels * vision.temporal_patch_size * vision.patch_size**2,))
    merge = vision.spatial_merge_size
    patches = grid.prod(-1)
    if int(patches.sum()) != len(pixels) or bool((grid[:, 1:] % merge).any()):
        raise InputsError(
            f"pixel_values has {len(pixels)} patches, and image_grid_thw {grid.tolist()} says {int(patches.sum())}, "
            f"in blocks of {merge} x {merge}"
        )
    sizes: list[Any] = grid.tolist()
    arrived = [_arrived(size[0], size[1], size[2], merge) for size in sizes]
    window = getattr(vision, "window_size", None)
    kept = arrived
    if window is not None:
        side = window // merge // vision.patch_size
        kept = [
            one[_in_windows(size[0], size[1], size[2], merge, side)] for one, size in zip(arrived, sizes, strict=True)
        ]
    found = filled(
        ids,
        mask,
        config.image_token_id,
        (patches // merge**2).tolist(),
        {"pixel_values": pixels, "image_grid_thw": grid},
        parts={"pixel_values": patches, "image_grid_thw": torch.ones_like(patches)},
        patches=patches,
        order=_order(kept),
        embedded=_order(arrived),
    )
    _require_apart(found.image)
    kinds = (found.image >= 0).long()
    positions, _ = model.model.get_rope_index(
        ids, mm_token_type_ids=kinds, image_grid_thw=grid, attention_mask=mask.long()
    )
    return replace(found, rotary=positions.to(torch.int64))


def _require_apart(image: Tensor) -> None:
    """Refuse images without text between them, which the model takes for one.

    Raises:
        InputsError: there are such.
    """
    both = (image[:, 1:] >= 0) & (image[:, :-1] >= 0)
    rows = (both & (image[:, 1:] != image[:, :-1])).any(1).nonzero().flatten().tolist()
    if rows:
        raise InputsError(f"rows {rows} have two images with no text between them, which this model takes for one")


def _arrived(time: int, height: int, width: int, merge: int) -> Tensor:
    """The place, row by row of each frame, of every patch in the order in which a processor makes them: by blocks."""
    place = torch.arange(time * height * width).reshape(time, height // merge, merge, width // merge, merge)
    return place.transpose(2, 3).flatten()


def _in_windows(time: int, height: int, width: int, merge: int, side: int) -> Tensor:
    """Which patch, of those that arrive, stands in each place of the tower, whose windows are `side` blocks wide."""
    down, across = height // merge, width // merge
    t, y, x = (
        axis.flatten()
        for axis in torch.meshgrid(torch.arange(time), torch.arange(down), torch.arange(across), indexing="ij")
    )
    window = (t * down + y // side) * across + x // side
    blocks = torch.argsort(window, stable=True)
    return (blocks[:, None] * merge**2 + torch.arange(merge**2)).flatten()


def _order(places: list[Tensor]) -> Tensor:
    """Where each patch stands, row by row, image after image."""
    starts = torch.tensor([0, *(len(one) for one in places)]).cumsum(0).tolist()
    return torch.cat([at + torch.argsort(one) for one, at in zip(places, starts, strict=False)])
