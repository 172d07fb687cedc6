"""Attention scores and patterns: edges forbidden, patterns given.

Positions here are absolute: position p is the p-th real token of its row, whatever the padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import ShapeError, SiteError
from ..context import Context, beside
from ..operation import Op


@dataclass(frozen=True, eq=False)
class Knockout(Op):
    """-inf on attention scores: the query cannot attend to the key (Geva et al. 2023)."""

    name: ClassVar[str] = "knockout"
    stacks: ClassVar[bool] = True
    looks: ClassVar[bool] = False
    writes_inf: ClassVar[bool] = True

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        return torch.full_like(x, -torch.inf)


def _edges(x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
    """Absolute positions of queries [B, T, 1] and keys [B, 1, S] of a square site.

    Raises:
        SiteError: the site has no queries and keys.
    """
    if ctx.key_pos is None or x.ndim != 4:
        raise SiteError(f"a function of queries and keys applies at scores or pattern, not at {ctx.site!r}")
    return ctx.pos[:, :, None], ctx.key_pos[:, None, :]


@dataclass(frozen=True, eq=False)
class Attend(Op):
    """A given pattern, float [P, P] or [B, P, P], by absolute query and key position.

    A query whose row is all zero, or whose position is P or later, keeps the pattern it has.
    """

    pattern: Tensor
    name: ClassVar[str] = "attend"
    stacks: ClassVar[bool] = True
    tables: ClassVar[frozenset[str]] = frozenset({"pattern"})

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        query, key = _edges(x, ctx)
        pattern = beside(self.pattern, x.device, x.dtype)
        if pattern.ndim == 3:
            if len(pattern) != ctx.total:
                raise ShapeError(f"{ctx.site}: a pattern for {len(pattern)} rows, the inputs have {ctx.total}")
            pattern = pattern[ctx.window]
        pattern = pattern.expand(len(x), -1, -1)
        size = pattern.shape[-1]
        queries = query.clamp_max(size - 1).expand(-1, -1, size)
        keys = key.clamp_max(size - 1).expand(-1, query.shape[1], -1)
        wanted = pattern.gather(1, queries).gather(2, keys)
        wanted = torch.where((query < size) & (key < size), wanted, 0)
        # Whether a query is given a pattern at all is told by its whole row, which the site may show only in part.
        given = (pattern.gather(1, queries) != 0).any(-1, keepdim=True) & (query < size)
        return torch.where(given[:, None], wanted[:, None], x)


@dataclass(frozen=True, eq=False)
class AttendBack(Op):
    """All attention on the key `offset` positions before the query; on the query itself where there is none."""

    offset: int | Tensor = 1
    name: ClassVar[str] = "attend_back"
    stacks: ClassVar[bool] = True
    numbers: ClassVar[frozenset[str]] = frozenset({"offset"})

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        query, key = _edges(x, ctx)
        target = torch.where(query >= self.offset, query - self.offset, query)
        return (key == target)[:, None].to(x.dtype).expand_as(x)


@dataclass(frozen=True, eq=False)
class ForbidBack(Op):
    """-inf on the scores from every query to the key `offset` positions before it, in which nothing else is changed."""

    offset: int | Tensor = 1
    name: ClassVar[str] = "forbid_back"
    stacks: ClassVar[bool] = True
    numbers: ClassVar[frozenset[str]] = frozenset({"offset"})
    writes_inf: ClassVar[bool] = True

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        query, key = _edges(x, ctx)
        return torch.where((key == query - self.offset)[:, None], -torch.inf, x)
