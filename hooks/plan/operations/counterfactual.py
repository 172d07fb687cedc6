"""Attention as it would be if it did not look: four patterns in place of the model's own (CausalMM, Zhou et al. 2025).

Each gives the weights of a query to the keys that the masks allow, and keeps their sum. What is random is a function of
seed, layer, head, row and absolute positions, so it is the same alone, batched, padded or cached.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import SiteError
from ...random import uniform
from ..context import Context
from ..operation import Op


@dataclass(frozen=True, eq=False)
class _Pattern(Op):
    """Another pattern; it has to know which keys are allowed."""

    stacks: ClassVar[bool] = True
    masked: ClassVar[bool] = True


@dataclass(frozen=True, eq=False)
class _Drawn(_Pattern):
    """One that is drawn."""

    seed: int | Tensor = 0
    numbers: ClassVar[frozenset[str]] = frozenset({"seed"})

    def drawn(self, x: Tensor, ctx: Context) -> Tensor:
        """Float64 numbers in (0, 1) for each entry of x."""
        return uniform(ctx.seed, self.seed, ctx.salt, *ctx.counters(x.ndim))


@dataclass(frozen=True, eq=False)
class RandomPattern(_Drawn):
    """Independent uniform weights on the allowed keys, normalised."""

    name: ClassVar[str] = "random_pattern"

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        allowed = _allowed(x, ctx)
        return _like(x, torch.where(allowed, self.drawn(x, ctx).to(x.dtype), 0), allowed)


@dataclass(frozen=True, eq=False)
class UniformPattern(_Pattern):
    """Equal weight on every allowed key."""

    name: ClassVar[str] = "uniform_pattern"

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        allowed = _allowed(x, ctx)
        return _like(x, allowed.to(x.dtype), allowed)


@dataclass(frozen=True, eq=False)
class ReversedPattern(_Pattern):
    """The row's largest weight minus each weight, on the allowed keys, normalised; equal weights stay equal."""

    name: ClassVar[str] = "reversed_pattern"

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        allowed = _allowed(x, ctx)
        most = torch.where(allowed, x, -torch.inf).amax(-1, keepdim=True)
        most = torch.where(most.isfinite(), most, 0)
        return _like(x, torch.where(allowed, most - x, 0), allowed)


@dataclass(frozen=True, eq=False)
class ShuffledPattern(_Drawn):
    """The row's weights permuted among its allowed keys."""

    name: ClassVar[str] = "shuffled_pattern"

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        allowed, drawn = _allowed(x, ctx), self.drawn(x, ctx)
        # Forbidden keys come last in both orders. The first is by absolute position, which padding does not move.
        number = ctx.counters(x.ndim)[ctx.axes.index("key_pos")].to(drawn.dtype).expand_as(drawn)
        source = torch.where(allowed, number, torch.inf).argsort(dim=-1, stable=True)
        target = torch.where(allowed, drawn, torch.inf).argsort(dim=-1, stable=True)
        return torch.zeros_like(x).scatter(-1, target, torch.where(allowed, x, 0).gather(-1, source))


FORMS: dict[str, Callable[[int], Op]] = {
    "random": RandomPattern,
    "uniform": lambda _seed: UniformPattern(),
    "reversed": lambda _seed: ReversedPattern(),
    "shuffled": ShuffledPattern,
}
"""From a seed to the operation, by the name of the form."""


def _allowed(x: Tensor, ctx: Context) -> Tensor:
    """Where attention is allowed, bool of x's shape.

    Raises:
        SiteError: the site is none of attention patterns.
    """
    if ctx.site != "pattern" or ctx.key_pos is None:
        raise SiteError(f"counterfactual attention replaces a pattern: its site is 'pattern', not {ctx.site!r}")
    return torch.ones_like(x, dtype=torch.bool) if ctx.allowed is None else ctx.allowed.expand_as(x)


def _like(x: Tensor, weights: Tensor, allowed: Tensor) -> Tensor:
    """Weights with the sum that x has; equal ones on the allowed keys where all are zero but for rounding."""
    mass = torch.where(allowed, x, 0).sum(-1, keepdim=True)
    total, count = weights.sum(-1, keepdim=True), allowed.sum(-1, keepdim=True).clamp_min(1)
    flat = total <= 8 * torch.finfo(x.dtype).eps * mass.abs()
    share = torch.where(flat, allowed.to(x.dtype) / count, weights / torch.where(flat, 1, total))
    return mass * share
