"""What a user calls a model with, as far as a plan has to know it: the rows of the call and their positions."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputsError, PlanError
from ..plan.images import patch_grid
from ..plan.inputs import Inputs
from ..plan.pictures import Pictures, number_images
from .architecture import ImageFormat, Tower

_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx", "block_table", "read_index", "write_index")
"""Arguments that say which tokens of a row are of one text."""


def arguments_of_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a module by name, also those that its forward takes as ``**anything``."""
    bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
    found = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            found |= found.pop(name, {})
    return found


def require_apart(call: dict[str, Any]) -> None:
    """Refuse a call that says which tokens of a row belong together, and so has several texts in one row.

    Raises:
        PlanError: such a call.
    """
    odd = [name for name in _PACKED if call.get(name) is not None]
    if odd:
        raise PlanError(
            f"the call gives {', '.join(odd)}: texts that are packed in one row, or whose keys and values lie in pages "
            "(continuous batching), have no positions that a plan could mean; give each text its row"
        )


def encoded_of_call(call: dict[str, Any]) -> Inputs:
    """The text that a call encodes, or that was encoded before it.

    Raises:
        PlanError: it says of none.
    """
    mask, found = call.get("attention_mask"), call.get("encoder_outputs")
    ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
    states = embeds
    if found is not None:
        ids, states = None, found if isinstance(found, Tensor) else found[0]
    if isinstance(ids, Tensor):
        ids = ids if ids.ndim > 1 else ids[None]
    elif isinstance(states, Tensor):
        ids = torch.zeros(states.shape[:2], dtype=torch.int64)
    else:
        raise PlanError("the model is called without input_ids or encoder_outputs: there is nothing that it decodes")
    return Inputs.of(ids, mask if isinstance(mask, Tensor) else None)


def decoded_of_call(call: dict[str, Any]) -> dict[str, Any]:
    """A call of a model that decodes what it encodes, as one of the decoder alone."""
    labels, given = call.get("labels"), call.get("decoder_input_ids")
    if given is None and call.get("decoder_inputs_embeds") is None and isinstance(labels, Tensor):
        given = torch.zeros_like(labels)  # the model shifts the labels: as many tokens, whatever these are
    own = {
        "input_ids": given,
        "inputs_embeds": call.get("decoder_inputs_embeds"),
        "attention_mask": call.get("decoder_attention_mask"),
    }
    return {**call, **own}


def kept_logits(call: dict[str, Any]) -> int | None:
    """Of how many tokens, from the last on, a call computes the logits; None for all.

    Raises:
        PlanError: of tokens that are listed.
    """
    kept = call.get("logits_to_keep")
    return int(kept) if isinstance(kept, int) and kept else None


def keeps_listed_logits(call: dict[str, Any]) -> bool:
    """Whether a call asks for the logits of tokens that it lists."""
    return isinstance(call.get("logits_to_keep"), Tensor)


def tokens_of_call(call: dict[str, Any]) -> Tensor:
    """The token ids [B, T] of a call; zeros, where it gives embeddings in their place.

    Raises:
        PlanError: it gives neither.
    """
    ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
    if isinstance(ids, Tensor):
        return ids if ids.ndim > 1 else ids[None]
    if not isinstance(embeds, Tensor):
        raise PlanError("the model is called without input_ids or inputs_embeds: positions cannot be told")
    return torch.zeros(embeds.shape[:2], dtype=torch.int64)


def real_columns(call: dict[str, Any], ids: Tensor, past: int) -> Tensor:
    """Which columns [B, past + T] of a text are real, by the mask or the positions of a call that feeds the last T.

    Raises:
        PlanError: they do not say.
    """
    mask, positions = call.get("attention_mask"), call.get("position_ids")
    if isinstance(positions, Tensor) and positions.ndim == 3 and len(positions) == 4:
        positions = positions[0]  # of text, beside those in time, height and width
    rows, width = len(ids), past + ids.shape[1]
    if isinstance(mask, Tensor) and mask.ndim == 2:
        cached = call.get("past_key_values") is not None
        if len(mask) != rows or mask.shape[1] < width or (mask.shape[1] > width and not cached):
            raise PlanError(
                f"the attention mask is {list(mask.shape)}, and the call has {rows} rows of {width} columns"
                + (f", {past} of them cached" if past else "")
            )
        if bool((mask < 0).any()):
            raise InputsError(
                "a mask is nonzero at real tokens and 0 at padding; this one, with negative numbers, is added"
            )
        return mask[:, :width].to("cpu", torch.bool, copy=True)
    real = torch.ones(rows, width, dtype=torch.bool)
    if mask is None or not isinstance(positions, Tensor) or positions.ndim != 2:
        return real
    # A mask of queries and keys, as static caches have: the last token's position says what is before its row.
    padding = width - 1 - positions[:, -1:].to("cpu")
    if bool((padding < 0).any()):
        raise PlanError("the positions of the call go beyond its columns, so which of these are real cannot be told")
    return real & (torch.arange(width) >= padding)


def pictures_of_call(call: dict[str, Any], tower: Tower | None, ids: Tensor) -> tuple[Pictures | None, Tensor | None]:
    """The images that the model sees in a call that begins a text, and which of them each token is of [B, T].

    Where it is given their features in their place, only the second is known.

    Raises:
        InputsError: they do not fit the text.
        PlanError: the call reads others of the tower's layers than the config says.
    """
    if tower is None:
        return None, None
    for name, value in tower.chosen.items():
        if call.get(name) is not None and call[name] != value:
            raise PlanError(
                f"the call chooses {name}={call[name]!r}, and the model was described by its config, {value!r}: set it "
                "there, before the model is wrapped"
            )
    real, ids = real_columns(call, ids, 0), ids.to("cpu")
    pictures = tower.look(ids, real, call)
    if pictures is not None:
        return pictures, pictures.image
    features = getattr((call.get("mm_encoder_outputs") or {}).get("image"), "pooler_output", None)
    if features is None:
        return None, None
    image, _, _ = number_images(torch.where(real, ids, -1), tower.token, [len(one) for one in features])
    return None, image


def inputs_of_call(call: dict[str, Any], images: ImageFormat) -> Inputs:
    """The images of a call of the user's, given its arguments by name, as far as positions and rows go.

    Raises:
        PlanError: there are none.
        InputsError: patches of them are masked.
    """
    pixels, mask = call.get("pixel_values"), call.get("attention_mask")
    if not isinstance(pixels, Tensor) or pixels.ndim != 4:
        raise PlanError("the model is called without pixel_values [B, C, height, width]: positions cannot be told")
    if isinstance(mask, Tensor) and not bool(mask.bool().all()):
        raise InputsError("a plan counts every patch of an image, and this call masks some of them")
    down, across = patch_grid(pixels, images.patch)
    return Inputs.of(torch.zeros(len(pixels), images.prefix + down * across, dtype=torch.int64))
