"""What a user calls a model with, as far as a plan has to know it: the rows of the call and their positions."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputsError, PlanError
from ..plan.images import patch_grid
from ..plan.inputs import Inputs
from .architecture import ImageFormat


def arguments_of_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a module by name, also those that its forward takes as ``**anything``."""
    bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
    found = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            found |= found.pop(name, {})
    return found


def keeps_some_logits(call: dict[str, Any]) -> bool:
    """Whether a call asks for the logits of some positions only; 0 means all of them."""
    kept = call.get("logits_to_keep")
    return isinstance(kept, Tensor) or bool(kept)


def inputs_of_call(call: dict[str, Any], images: ImageFormat | None) -> Inputs:
    """The inputs of a call of the user's, given its arguments by name, as far as positions and rows go.

    Raises:
        PlanError: positions cannot be told, as in a call that continues from a key/value cache.
        InputsError: rows that hold several sequences, or images of which patches are masked.
    """
    if images is not None:
        return _images_of_call(call, images)
    cache = call.get("past_key_values")
    if cache is not None and (not hasattr(cache, "get_seq_length") or cache.get_seq_length() > 0):
        raise PlanError(
            "this call continues from a key/value cache, which plans do not support yet; pass the whole text"
        )
    ids, embeds, mask = (call.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
    if not isinstance(ids, Tensor):
        if not isinstance(embeds, Tensor):
            raise PlanError("the model is called without input_ids or inputs_embeds: positions cannot be told")
        ids = torch.zeros(embeds.shape[:2], dtype=torch.int64)
    inputs = Inputs.of(ids, mask if isinstance(mask, Tensor) and mask.ndim == 2 else None)
    positions = call.get("position_ids")
    if isinstance(positions, Tensor) and positions.ndim == 2 and positions.shape[1] == inputs.width > 1:
        both = inputs.mask[:, 1:] & inputs.mask[:, :-1]
        if bool(((positions.cpu().diff(dim=1) != 1).expand_as(both) & both).any()):
            raise InputsError(
                "the positions start anew within a row: packed sequences are not supported; give each its row"
            )
    return inputs


def _images_of_call(call: dict[str, Any], images: ImageFormat) -> Inputs:
    pixels, mask = call.get("pixel_values"), call.get("attention_mask")
    if not isinstance(pixels, Tensor) or pixels.ndim != 4:
        raise PlanError("the model is called without pixel_values [B, C, height, width]: positions cannot be told")
    if isinstance(mask, Tensor) and not bool(mask.bool().all()):
        raise InputsError("a plan counts every patch of an image, and this call masks some of them")
    down, across = patch_grid(pixels, images.patch)
    return Inputs.of(torch.zeros(len(pixels), 1 + down * across, dtype=torch.int64))
