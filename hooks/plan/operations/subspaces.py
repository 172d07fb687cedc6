"""The component of a value in the span of some directions, taken out or exchanged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import ShapeError
from ..context import Context
from ..operation import Op


def _orthonormal(directions: Tensor, x: Tensor) -> Tensor:
    """Rows of an orthonormal basis [k, D] of the span of `directions` [D] or [k, D], in x's dtype; differentiable."""
    if directions.device != x.device or directions.shape[-1] != x.shape[-1] or directions.ndim > 2:
        raise ShapeError(
            f"directions of shape {list(directions.shape)} on {directions.device} for an activation on {x.device} "
            f"whose last axis has {x.shape[-1]} entries; expected [{x.shape[-1]}] or [k, {x.shape[-1]}]"
        )
    wide = directions if directions.dtype == torch.float64 else directions.float()
    if wide.ndim == 1:
        return (wide / wide.norm())[None].to(x.dtype)
    return torch.linalg.qr(wide.T)[0].T.to(x.dtype)


@dataclass(frozen=True, eq=False)
class ProjectOut(Op):
    """x without its component in the span of the directions (Ravfogel et al. 2020)."""

    directions: Tensor
    name: ClassVar[str] = "project_out"
    stacks: ClassVar[bool] = True
    looks: ClassVar[bool] = False

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        basis = _orthonormal(self.directions, x)
        return x - (x @ basis.T) @ basis


@dataclass(frozen=True, eq=False)
class Interchange(Op):
    """x with its component in a subspace replaced by that of the value read (Geiger et al. 2024, DAS)."""

    directions: Tensor
    name: ClassVar[str] = "interchange"
    still: ClassVar[bool] = True
    stacks: ClassVar[bool] = True
    looks: ClassVar[bool] = False
    reads_alike: ClassVar[bool] = True

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        basis = _orthonormal(self.directions, x)
        return x + ((reads[0] - x) @ basis.T) @ basis
