"""Images as inputs: a class token, and a token for every patch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputsError


@dataclass(frozen=True)
class ImageFormat:
    """The images that a model takes, which it cuts into patches from left to right and from top to bottom.

    Attributes:
        channels, height, width: of an image, in numbers and pixels.
        patch: height and width of a patch, in pixels; what is left over on the right and below belongs to none.
        prefix: how many tokens stand before the patches: one of class, or none.
    """

    channels: int
    height: int
    width: int
    patch: tuple[int, int]
    prefix: int = 1


def patch_grid(pixels: Tensor, patch: tuple[int, int]) -> tuple[int, int]:
    """How many patches of [height, width] pixels there are down and across images [B, C, height, width]."""
    return pixels.shape[-2] // patch[0], pixels.shape[-1] // patch[1]


def patch_pixels(pixels: Tensor, patch: tuple[int, int]) -> Tensor:
    """The pixels of every patch, [B, patches, C * height * width of one], row by row of patches."""
    (down, across), (height, width) = patch_grid(pixels, patch), patch
    cut = pixels[..., : down * height, : across * width].unflatten(3, (across, width)).unflatten(2, (down, height))
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def patch_labels(pixels: Tensor, patch: tuple[int, int], prefix: int = 1) -> tuple[str, ...]:
    """What the tokens of an image are called: the class token, if any, then each patch by its row and column."""
    down, across = patch_grid(pixels, patch)
    return (*("[cls]",) * prefix, *(f"{row},{column}" for row in range(down) for column in range(across)))


def check_pixels(given: Any, expected: ImageFormat) -> Tensor:
    """Pixels [B, C, height, width] on the CPU, of one image [C, height, width] or several.

    Raises:
        InputsError: anything else is given, or images of another size or number of channels.
    """
    size = f"[rows, {expected.channels}, {expected.height}, {expected.width}]"
    how = "the model's image processor makes them: processor(images, return_tensors='pt').pixel_values"
    if hasattr(given, "__array__") and not isinstance(given, Tensor) and hasattr(given, "dtype"):
        given = torch.as_tensor(given)
    if not isinstance(given, Tensor):
        raise InputsError(f"this model takes images, pixels {size}, not {_kind(given)}; {how}")
    if not given.is_floating_point():
        if given.ndim in (1, 2):
            raise InputsError(f"this model takes images, pixels {size}, not token ids {list(given.shape)}")
        raise InputsError(f"pixels are floating-point numbers, scaled as the model expects, not {given.dtype}; {how}")
    # A copy: what the caller does to the tensor later is not to reach the worlds made of it.
    pixels = given.detach().to("cpu", copy=True)
    if pixels.ndim == 3:
        pixels = pixels[None]
    if pixels.ndim != 4 or not len(pixels):
        raise InputsError(f"pixels are {size}, got shape {list(given.shape)}")
    require_size(pixels, expected)
    if not bool(pixels.isfinite().all()):
        rows = (~pixels.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        raise InputsError(f"rows {rows} have pixels that are not finite numbers")
    return pixels


def require_size(pixels: Tensor, expected: ImageFormat) -> None:
    """Check the channels and the size of images [B, C, height, width].

    Raises:
        InputsError: they are not the model's.
    """
    channels, height, width = pixels.shape[1:]
    if channels != expected.channels:
        raise InputsError(f"images of {channels} channels, and the model takes {expected.channels}")
    if (height, width) != (expected.height, expected.width):
        raise InputsError(f"images of {height} x {width}, and the model takes {expected.height} x {expected.width}")


def _kind(given: Any) -> str:
    if isinstance(given, str) or (isinstance(given, (list, tuple)) and given and isinstance(given[0], str)):
        return "text"
    return type(given).__name__
