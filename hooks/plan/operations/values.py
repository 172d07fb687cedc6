"""A value set, scaled, added to or disturbed, whatever other worlds have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...random import normal
from ..context import Context, fit, times
from ..operation import Op, Value


@dataclass(frozen=True, eq=False)
class Clamp(Op):
    """A given value, in place of x."""

    value: Value
    name: ClassVar[str] = "clamp"
    stacks: ClassVar[bool] = True
    looks: ClassVar[bool] = False
    numbers: ClassVar[frozenset[str]] = frozenset({"value"})

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        return torch.zeros_like(x) + fit(self.value, x, ctx)


@dataclass(frozen=True, eq=False)
class Zero(Op):
    """Zero ablation."""

    name: ClassVar[str] = "zero"
    stacks: ClassVar[bool] = True
    looks: ClassVar[bool] = False

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        return torch.zeros_like(x)


@dataclass(frozen=True, eq=False)
class Steer(Op):
    """x + scale * vector (Turner et al. 2023)."""

    vector: Tensor
    scale: Value = 1.0
    name: ClassVar[str] = "steer"
    stacks: ClassVar[bool] = True
    looks: ClassVar[bool] = False
    numbers: ClassVar[frozenset[str]] = frozenset({"scale"})

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        return x + times(self.scale, fit(self.vector, x, ctx), x, ctx)


@dataclass(frozen=True, eq=False)
class Scale(Op):
    """factor * x."""

    factor: Value
    name: ClassVar[str] = "scale"
    stacks: ClassVar[bool] = True
    looks: ClassVar[bool] = False
    numbers: ClassVar[frozenset[str]] = frozenset({"factor"})

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        return times(self.factor, x, x, ctx)


@dataclass(frozen=True, eq=False)
class Noise(Op):
    """x + std * standard normal noise, a function of seed, site, row, position and entry (Meng et al. 2022)."""

    std: Value
    seed: int | Tensor = 0
    name: ClassVar[str] = "noise"
    stacks: ClassVar[bool] = True
    numbers: ClassVar[frozenset[str]] = frozenset({"std", "seed"})

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        draw = normal(ctx.seed, self.seed, ctx.salt, *ctx.counters(x.ndim))
        return x + times(self.std, draw.to(x.dtype), x, ctx)


@dataclass(frozen=True, eq=False)
class Recompute(Op):
    """x itself, but all that follows is computed again: what that changes is rounding, the noise floor of an effect."""

    name: ClassVar[str] = "recompute"
    stacks: ClassVar[bool] = True
    looks: ClassVar[bool] = False

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        return x
