"""AGLA (An et al. 2025, arXiv 2406.12718): a picture masked to what matters is added."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hooks import Branch, InputsError
from interp.attention.decoding import Decoder, Term, Weight


def masked(relevance: Tensor, kept: float = 0.5) -> Callable[[Tensor], Tensor]:
    """Pixels with all but the most relevant patches set to the picture's mean.

    Args:
        relevance: [N, h, w], of each patch of each picture to the question (`interp.attention.image_map` gives one).
        kept: share of the patches that stay.

    Raises:
        InputsError: no patch would stay, or the pictures are of another number.
    """
    if not 0 < kept <= 1:
        raise InputsError(f"kept is the share of the patches that stay, in (0, 1], not {kept!r}")
    flat = relevance.flatten(1)
    count = max(1, round(kept * flat.shape[1]))
    keep = torch.zeros_like(flat, dtype=torch.bool).scatter(1, flat.topk(count, 1).indices, True).reshape_as(relevance)

    def images(pixels: Tensor) -> Tensor:
        if len(pixels) % len(keep):
            raise InputsError(f"a relevance for {len(keep)} pictures, the call has {len(pixels)}")
        mask = keep.repeat_interleave(len(pixels) // len(keep), 0).to(pixels.device)
        mask = torch.nn.functional.interpolate(mask[:, None].to(pixels.dtype), size=pixels.shape[-2:], mode="nearest")
        return torch.where(mask > 0, pixels, pixels.mean((-2, -1), keepdim=True))

    return images


def agla(relevance: Tensor, alpha: Weight = 2.0, eps: float | None = 0.5, *, kept: float = 0.5) -> Decoder:
    """z = l(picture) + alpha l(masked picture).

    Args:
        relevance: [N, h, w], see `masked`.
        alpha: weight of the masked picture.
        eps: cut-off (beta in the paper).
        kept: share of the patches that stay.
    """
    return Decoder((Term((Branch(images=masked(relevance, kept)),), alpha, added=True),), eps)
