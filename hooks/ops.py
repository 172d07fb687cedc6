"""What is done at a site: pure functions ``f(x, *reads, ctx)`` of the value there and of values read elsewhere.

Each returns a new tensor of the shape, dtype and device of `x`, reads nothing on the host, and acts on every row and
position by itself, unless it says that it mixes them. They are frozen dataclasses, so that a plan can be printed,
compared and saved. Those of attention patterns are in `hooks.patterns`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .context import Context, Reference, fit
from .errors import ShapeError
from .patterns import Attend, AttendBack, CopyScores, ForbidBack, FromPositions
from .plan import Op
from .random import choice, normal

Value = Tensor | float


@dataclass(frozen=True, eq=False)
class Patch(Op):
    """The value read, in place of x (Vig et al. 2020; Meng et al. 2022)."""

    name: ClassVar[str] = "patch"
    reads_alike: ClassVar[bool] = True

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        return reads[0].expand_as(x)


@dataclass(frozen=True, eq=False)
class PatchConstant(Patch):
    """The value read, in place of x, as a constant: no gradient flows into what is read."""

    name: ClassVar[str] = "patch_constant"
    reads_constants: ClassVar[bool] = True

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        return reads[0].detach().expand_as(x)


@dataclass(frozen=True, eq=False)
class Freeze(Patch):
    """The value that this world has without any intervention."""

    name: ClassVar[str] = "freeze"


@dataclass(frozen=True, eq=False)
class Clamp(Op):
    """A given value, in place of x."""

    value: Value
    name: ClassVar[str] = "clamp"

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        return torch.zeros_like(x) + fit(self.value, x, ctx)


@dataclass(frozen=True, eq=False)
class Zero(Op):
    """Zero ablation."""

    name: ClassVar[str] = "zero"

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        return torch.zeros_like(x)


@dataclass(frozen=True, eq=False)
class Mean(Op):
    """Mean ablation: the mean over the rows of a reference set, for each position, or pooled over positions too."""

    pooled: bool = False
    name: ClassVar[str] = "mean"

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

    seed: int = 0
    name: ClassVar[str] = "resample"
    needs_full_rows: ClassVar[bool] = True

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        layout = ctx.references[0]
        assert layout is not None
        donor = choice(len(reads[0]), ctx.seed, self.seed, ctx.row)
        return layout.pick(reads[0].index_select(0, donor), ctx).expand_as(x)


@dataclass(frozen=True, eq=False)
class Noise(Op):
    """x + std * standard normal noise, a function of seed, site, row, position and entry (Meng et al. 2022)."""

    std: Value
    seed: int = 0
    name: ClassVar[str] = "noise"

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        draw = normal(ctx.seed, self.seed, ctx.salt, *ctx.counters(x.ndim))
        return x + fit(self.std, x, ctx) * draw.to(x.dtype)


@dataclass(frozen=True, eq=False)
class Steer(Op):
    """x + scale * vector (Turner et al. 2023)."""

    vector: Tensor
    scale: Value = 1.0
    name: ClassVar[str] = "steer"

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        return x + fit(self.scale, x, ctx) * fit(self.vector, x, ctx)


@dataclass(frozen=True, eq=False)
class Scale(Op):
    """factor * x."""

    factor: Value
    name: ClassVar[str] = "scale"

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        return x * fit(self.factor, x, ctx)


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

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        basis = _orthonormal(self.directions, x)
        return x - (x @ basis.T) @ basis


@dataclass(frozen=True, eq=False)
class Interchange(Op):
    """x with its component in a subspace replaced by that of the value read (Geiger et al. 2024, DAS)."""

    directions: Tensor
    name: ClassVar[str] = "interchange"
    reads_alike: ClassVar[bool] = True

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        basis = _orthonormal(self.directions, x)
        return x + ((reads[0] - x) @ basis.T) @ basis


@dataclass(frozen=True, eq=False)
class Knockout(Op):
    """-inf on attention scores: the query cannot attend to the key (Geva et al. 2023)."""

    name: ClassVar[str] = "knockout"
    writes_inf: ClassVar[bool] = True

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        return torch.full_like(x, -torch.inf)


@dataclass(frozen=True, eq=False)
class Recompute(Op):
    """x itself, but all that follows is computed again: what that changes is rounding, the noise floor of an effect."""

    name: ClassVar[str] = "recompute"
    always: ClassVar[bool] = True

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        return x


@dataclass(frozen=True, eq=False)
class Custom(Op):
    """A function of the user's. It cannot be saved, because loading a plan runs no code."""

    fn: Callable[..., Tensor]
    mixing: frozenset[str] = field(default=frozenset())
    name: ClassVar[str] = "intervene"

    @property
    def mixes(self) -> frozenset[str]:  # type: ignore[override]
        return self.mixing

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        return self.fn(x, *reads, ctx=ctx)

    def __str__(self) -> str:
        return getattr(self.fn, "__name__", type(self.fn).__name__)


OPS: dict[str, type[Op]] = {
    op.name: op
    for op in (
        Patch, PatchConstant, Freeze, Clamp, Zero, Mean, Resample, Noise, Steer, Scale, ProjectOut, Interchange,
        Knockout, Recompute, Attend, AttendBack, ForbidBack, CopyScores, FromPositions,
    )
}  # fmt: skip
"""The functions that a saved plan may name."""
