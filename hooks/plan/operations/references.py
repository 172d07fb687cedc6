"""Ablations by a reference set, which has rows of its own: its mean, or one of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...random import choice
from ..context import Context, Reference
from ..operation import Op


@dataclass(frozen=True, eq=False)
class Mean(Op):
    """Mean ablation: the mean over the rows of a reference set, for each position, or pooled over positions too, with
    or without that of BOS.
    """

    pooled: bool = False
    but_bos: bool = False
    name: ClassVar[str] = "mean"
    stacks: ClassVar[bool] = True

    @property
    def pools_positions(self) -> bool:
        """Whether positions are averaged over."""
        return self.pooled

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        reference, layout = reads[0], ctx.references[0]
        assert layout is not None
        dims = (0, ctx.axes.index("pos")) if self.pooled else (0,)
        if layout.valid is None:
            mean = reference.mean(dim=dims, keepdim=True)
        else:
            real = layout.valid.expand_as(reference)
            mean = torch.where(real, reference, 0).sum(dims, keepdim=True) / real.sum(dims, keepdim=True).clamp_min(1)
        kept = Reference(None, tuple(axis for axis in layout.by_position if axis not in dims))
        return torch.zeros_like(x) + kept.pick(mean, ctx)


@dataclass(frozen=True, eq=False)
class Resample(Op):
    """Resample ablation: the value of a random row of a reference set, one row for each row of x (Chan et al. 2022)."""

    seed: int | Tensor = 0
    name: ClassVar[str] = "resample"
    stacks: ClassVar[bool] = True
    numbers: ClassVar[frozenset[str]] = frozenset({"seed"})
    needs_full_rows: ClassVar[bool] = True

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        layout = ctx.references[0]
        assert layout is not None
        donor = choice(len(reads[0]), ctx.seed, self.seed, ctx.row)
        return layout.pick(reads[0].index_select(0, donor), ctx).expand_as(x)
