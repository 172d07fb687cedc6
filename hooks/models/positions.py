"""Rotary positions: the angles of a layout, and the turning of queries and keys by them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

Angles = Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]
"""From the positions int [B, T] of a whole layout and a dtype to (cos, sin), each [B, T, R]."""


@dataclass(frozen=True)
class Rotary:
    """The angles of rotary positions.

    Attributes:
        angles: of all tokens of a layout at once.
        by_length: whether they depend on the longest position among those ("dynamic", "longrope"), so that a batch's
            angles are not those of its rows alone.
        length: the number of positions past which they are others; None where there is none.
        turn: what turns x [..., heads, D] by cos and sin [..., R].
    """

    angles: Angles
    by_length: bool = False
    length: int | None = None
    turn: Callable[[Tensor, Tensor, Tensor], Tensor] = field(default_factory=lambda: rotate)

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, T, R] of positions int [B, T]."""
        return self.angles(positions, dtype)

    @classmethod
    def of(cls, module: nn.Module, layer_type: str | None = None) -> Rotary:
        """Those that a model's own rotary module gives, called as the model calls it.

        Args:
            layer_type: which of several angles, in a model whose layers differ in them.
        """
        angles = partial(_angles_of, module, () if layer_type is None else (layer_type,))
        kinds = getattr(module, "rope_type", "default")
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        if not any(kind in ("dynamic", "longrope") for kind in kinds):
            return cls(angles)
        config = getattr(module, "config", None)
        told = getattr(config, "rope_parameters", None) or {}
        length = told.get("original_max_position_embeddings", getattr(config, "max_position_embeddings", None))
        return cls(angles, by_length=True, length=length)


def _angles_of(
    module: nn.Module, more: tuple[str, ...], positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return module(torch.empty((), dtype=dtype, device=positions.device), positions, *more)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split convention: x [..., heads, D], cos and sin [..., R] (Su et al. 2021).

    Where R is less than D, the dimensions from R on stay as they are (Black et al. 2022).
    """
    first, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    half = first.shape[-1] // 2
    turned = torch.cat([-first[..., half:], first[..., :half]], -1)
    first = first * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)
    return torch.cat([first, rest], -1) if rest.shape[-1] else first


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of neighbouring pairs: x [..., heads, D], cos and sin [..., R / 2] (Su et al. 2021)."""
    width = 2 * cos.shape[-1]
    first, rest = x[..., :width].unflatten(-1, (-1, 2)), x[..., width:]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    one, two = first[..., 0], first[..., 1]
    turned = torch.stack([one * cos - two * sin, two * cos + one * sin], -1).flatten(-2)
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned
