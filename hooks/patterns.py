"""Functions at attention patterns and scores, and functions that move values between positions or sites.

Positions here are absolute: position p is the p-th real token of its row, whatever the padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .context import Context
from .errors import ShapeError, SiteError
from .plan import Op


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

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        query, key = _edges(x, ctx)
        pattern = self.pattern.to(device=x.device, dtype=x.dtype)
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

    offset: int = 1
    name: ClassVar[str] = "attend_back"

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        query, key = _edges(x, ctx)
        target = torch.where(query >= self.offset, query - self.offset, query)
        return (key == target)[:, None].to(x.dtype).expand_as(x)


@dataclass(frozen=True, eq=False)
class ForbidBack(Op):
    """-inf on the scores from every query to the key `offset` positions before it, in which nothing else is changed."""

    offset: int = 1
    name: ClassVar[str] = "forbid_back"
    writes_inf: ClassVar[bool] = True

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        query, key = _edges(x, ctx)
        return torch.where((key == query - self.offset)[:, None], -torch.inf, x)


@dataclass(frozen=True, eq=False)
class CopyScores(Op):
    """Logits that are scores: those read [B, 1, n, m], written onto the tokens int [n, m] or [B, n, m]; the others
    `rest`.

    The scores are those of one head, for n queries and m keys; x is [B, n, V].
    """

    tokens: Tensor
    rest: float = -1e9
    name: ClassVar[str] = "copy_scores"

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        scores = reads[0]
        tokens = self.tokens.to(x.device)
        if tokens.ndim == 3:
            if len(tokens) != ctx.total:
                raise ShapeError(f"{ctx.site}: tokens for {len(tokens)} rows, the inputs have {ctx.total}")
            tokens = tokens[ctx.window]
        tokens = tokens.expand(len(x), -1, -1)
        shape = (len(x), 1, x.shape[1], tokens.shape[-1])
        if scores.shape != shape or tokens.shape[1] != x.shape[1]:
            raise ShapeError(
                f"{ctx.site}: scores {list(scores.shape)} and tokens {list(tokens.shape)} for {list(x.shape)}; "
                f"expected the scores of one head {list(shape)}, one key for each token"
            )
        rest = torch.full_like(x, max(self.rest, torch.finfo(x.dtype).min))
        return rest.scatter(2, tokens, scores[:, 0].to(x.dtype))


@dataclass(frozen=True, eq=False)
class FromPositions(Op):
    """The value read [B, n, M] of other positions: place i gets that of place `source[i]`, int [n], for every head."""

    source: Tensor
    name: ClassVar[str] = "from_positions"
    mixes: ClassVar[frozenset[str]] = frozenset({"pos"})

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        moved = reads[0].index_select(1, self.source.to(x.device))
        if moved.ndim == x.ndim - 1:
            moved = moved.unsqueeze(2)
        return moved.to(x.dtype).expand_as(x)
