"""What vision-language models have in common: a language model within, and images that fill places in its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputsError, ModelError
from ..models import adapter_named
from ..plan.pictures import Pictures, number_images
from .architecture import Architecture, Tower
from .huggingface import unembedding


def with_tower(model: Any, body: Any, tower: Tower, adapter: Any = None) -> Architecture:
    """The language model of a vision-language model, with the tower that sees for it.

    Args:
        model: the whole, with its head; `body` is the language model in it.
        tower: the tower.
        adapter: from the language model to its description; by default that of its family.

    Raises:
        ModelError: nobody knows that family.
    """
    kind = body.config.model_type
    adapter = adapter_named(kind) if adapter is None else adapter
    if adapter is None:
        raise ModelError(f"no adapter knows the language model {kind!r} in this {model.config.model_type!r}")
    within = SimpleNamespace(
        model=body,
        config=body.config,
        lm_head=unembedding(model),
        get_input_embeddings=body.get_input_embeddings,
    )
    found = adapter(within)
    if found.cap is not None:
        raise ModelError(f"this {model.config.model_type!r} caps its logits, which is not known of such models")
    return replace(found, family=model.config.model_type, tower=tower)


def tensor_of(given: Mapping[str, Any], name: str, dims: Sequence[int], why: str = "") -> Tensor:
    """One of the tensors that a processor made, on the CPU.

    Raises:
        InputsError: it is not there, or has another number of axes.
    """
    value = given.get(name)
    if not isinstance(value, Tensor):
        have = ", ".join(sorted(given)) or "nothing"
        raise InputsError(f"this model's processor gives {name}{why}, and there is {have}")
    if value.ndim not in dims:
        wanted = " or ".join(map(str, dims))
        raise InputsError(f"{name} has {wanted} axes as this model's processor makes it, not {list(value.shape)}")
    if value.is_floating_point() and not bool(value.isfinite().all()):
        raise InputsError(f"{name} holds pixels that are not finite numbers")
    return value.detach().to("cpu", copy=True)


def require_sizes(name: str, value: Tensor, expected: Sequence[int]) -> None:
    """Check the last sizes of a tensor that a processor made.

    Raises:
        InputsError: they are others.
    """
    if list(value.shape[-len(expected) :]) != list(expected):
        raise InputsError(
            f"{name} ends in sizes {list(value.shape[-len(expected) :])}, and this model takes {list(expected)}: these "
            "are images of another model's processor"
        )


def filled(
    ids: Tensor, mask: Tensor, token: int, tokens: Sequence[int], tensors: Mapping[str, Tensor], **rest: Any
) -> Pictures:
    """The images of a text that has places for them.

    Args:
        ids, mask: of the text, [B, T].
        token: the id of a place.
        tokens: how many places each image takes.
        tensors, rest: as of `Pictures`.

    Raises:
        InputsError: there are more or fewer places.
    """
    places = torch.where(mask, ids, -1)
    image, row, left = number_images(places, token, tokens)
    if left:
        count = int((places == token).sum())
        raise InputsError(
            f"the text has {count} tokens of id {token}, which images take the place of, and the {len(tokens)} images "
            f"take {sum(tokens)} of them ({', '.join(map(str, tokens[:8]))}{', ...' if len(tokens) > 8 else ''}): a "
            "row's images fill its own places; give the model's processor the texts and the images together"
        )
    return Pictures(tensors, rest.pop("parts"), row, rest.pop("patches"), image, **rest)


def given_images(given: Mapping[str, Any], *others: str) -> bool:
    """Whether a processor was given images.

    Raises:
        InputsError: it was given videos, or sounds.
    """
    for name in ("pixel_values_videos", "video_grid_thw", "input_features"):
        if given.get(name) is not None:
            raise InputsError(f"{name}: only images and text are known here")
    return any(given.get(name) is not None for name in ("pixel_values", *others))
