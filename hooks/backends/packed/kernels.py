"""Attention of some members at once: over keys that are filled in, or over shared keys and their own in one softmax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...models.attention import exposed_attention, softcap
from ...models.blocks import Attention
from .bans import Bans
from .tokens import take


def allowed_keys(cols: Tensor, real: Tensor, attention: Attention, offset: int = 0) -> Tensor:
    """Which keys queries may attend to.

    Args:
        cols: int64 [..., n], the columns of the queries.
        real: bool [..., S], the keys that are no padding.
        attention: the layer, for its window and whether it is causal.
        offset: the key column of the first query.

    Returns:
        bool [..., n, S] (n is 1 where all queries see the same).
    """
    real = real[..., None, :]
    if not attention.causal:
        return real
    keys, own = torch.arange(real.shape[-1], device=cols.device), cols[..., None] + offset
    allowed = (keys <= own) & real
    return allowed if attention.window is None else allowed & (keys > own - attention.window)


@dataclass(frozen=True, eq=False)
class Filled:
    """Attention of g members with n queries each, whose keys and values are filled in among the base's."""

    attention: Attention
    shape: tuple[int, int]
    width: int
    rows: int
    tiles: tuple[tuple[int, int, int], ...]
    looks: bool
    whole: bool
    based: bool
    shared: bool
    span: tuple[int, int] | None
    offset: int
    padded: bool
    bans: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        bases, rest = (rest[:2], rest[2:]) if self.based else ((None, None), rest)
        (ask, rows, cols, real, source, target), rest = rest[:6], rest[6:]
        keys, values = (self.fill(x, base, rows, source, target) for x, base in zip((k, v), bases, strict=True))
        queries = take(q, ask).unflatten(0, self.shape).transpose(1, 2)
        if self.whole:
            mixed = _fused(self.attention, queries, keys, values, None, causal=True)
        else:
            bans = rest[len(rest) - self.bans :] if self.bans else []
            real = real.index_select(0, rows)
            pieces = [self.tile(queries, keys, values, cols, real, bans, *tile) for tile in self.tiles]
            mixed = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        mixed = mixed.flatten(0, 1)
        return take(mixed, rest[0]) if self.padded else mixed

    def fill(self, x: Tensor, base: Tensor | None, rows: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """All keys or values [g, heads, T, D]: the base's, where the members have none of their own."""
        if self.span is not None:
            return x[slice(*self.span)].unflatten(0, (self.shape[0], self.width)).transpose(1, 2)
        if base is not None and self.shared:
            return base.unflatten(0, (1, self.width)).expand(self.shape[0], -1, -1, -1).transpose(1, 2)
        if base is None:
            whole = x.new_zeros((self.shape[0], self.width, *x.shape[1:]))
        else:
            whole = base.unflatten(0, (self.rows, self.width)).index_select(0, rows)
        whole.flatten(0, 1).index_copy_(0, target, x if len(source) == len(x) else take(x, source))
        return whole.transpose(1, 2)

    def tile(
        self, q: Tensor, k: Tensor, v: Tensor, cols: Tensor, real: Tensor, bans: Sequence[Tensor],
        start: int, stop: int, last: int,
    ) -> Tensor:  # fmt: skip
        q, k, v = q[:, :, start:stop], k[:, :, :last], v[:, :, :last]
        allowed = allowed_keys(cols[:, start:stop], real[:, :last], self.attention, self.offset)[:, None]
        if bans:
            allowed = allowed & ~Bans.mask(bans, slice(start, stop), last)
        if self.looks:
            scaling, cap = self.attention.scaling, self.attention.softcap
            sinks = self.attention.sink
            return exposed_attention(q, k, v, allowed, scaling, _unseen, cap=cap, sinks=sinks)[0]
        mixed = _fused(self.attention, q, k, v, allowed)
        if not bans:
            return mixed
        # What a kernel makes of a query that may attend to nothing differs from one to another.
        dead = ~allowed.any(-1).transpose(1, 2)[..., None]
        return torch.where(dead, 0, mixed)


@dataclass(frozen=True, eq=False)
class Merged:
    """Attention of [r, w] members with n queries each: one softmax over the base's keys and c of their own."""

    attention: Attention
    shape: tuple[int, int, int]
    own: int
    offset: int
    bans: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, base_k: Tensor, base_v: Tensor, *rest: Tensor) -> Tensor:
        (ask, rows, cols, real, kept), rest = rest[:5], rest[5:]
        (lines, worlds, n), heads = self.shape, self.attention.k.heads
        groups = self.attention.q.heads // heads
        bans = rest[len(rest) - self.bans :] if self.bans else []
        queries = take(q, ask).unflatten(0, self.shape).unflatten(3, (heads, groups))
        queries = queries.permute(0, 3, 1, 2, 4, 5)  # [r, K, w, n, G, D]
        width = real.shape[1]
        keys, values = (x.unflatten(0, (-1, width)).index_select(0, rows).transpose(1, 2) for x in (base_k, base_v))
        scores = queries.flatten(2, 4) @ keys.transpose(2, 3)
        scores = scores.unflatten(2, (worlds, n, groups))  # [r, K, w, n, G, T]
        allowed = allowed_keys(cols, real.index_select(0, rows)[:, None], self.attention, self.offset)
        mine = None
        if self.own:
            at, columns, held, changed = rest[:4]
            mine, own_values = (take(x, at).unflatten(0, (lines, worlds, self.own)).transpose(2, 3) for x in (k, v))
            inner = queries.permute(0, 2, 1, 3, 4, 5).flatten(3, 4) @ mine.transpose(3, 4)  # [r, w, K, n G, c]
            inner = inner.unflatten(3, (n, groups)).permute(0, 2, 1, 3, 4, 5)
            scores = torch.cat([scores, inner], -1)
            whole = allowed.expand(lines, worlds, n, width)
            within = whole.gather(3, columns[:, :, None].expand(-1, -1, n, -1)) & held[:, :, None]
            allowed = torch.cat([whole & ~changed[:, :, None], within], -1)
        allowed = allowed[:, None, :, :, None]
        if bans:
            banned = Bans.mask(bans, slice(0, n), width)  # [r w, H or 1, n, T]
            banned = banned.unflatten(0, (lines, worlds))
            if self.own:
                at = columns[:, :, None, None].expand(-1, -1, *banned.shape[2:4], -1)
                banned = torch.cat([banned, banned.gather(4, at)], -1)
            each = banned.shape[2] > 1
            banned = banned.unflatten(2, (heads, groups) if each else (1, 1)).permute(0, 2, 1, 4, 3, 5)
            allowed = allowed & ~banned
        scores = scores * self.attention.scaling
        if self.attention.softcap is not None:
            scores = softcap(scores, self.attention.softcap)
        scores = scores.masked_fill(~allowed, -torch.inf)
        pattern = self.softmax(scores).to(q.dtype)
        if bans:
            pattern = torch.where(allowed.any(-1, keepdim=True), pattern, 0)
        z = pattern[..., :width].flatten(2, 4) @ values
        z = z.unflatten(2, (worlds, n, groups))
        if mine is not None:
            inner = pattern[..., width:].permute(0, 2, 1, 3, 4, 5).flatten(3, 4) @ own_values
            z = z + inner.unflatten(3, (n, groups)).permute(0, 2, 1, 3, 4, 5)
        z = z.permute(0, 2, 3, 1, 4, 5).flatten(3, 4).flatten(0, 2)
        return z if len(kept) == len(z) else take(z, kept)

    def softmax(self, scores: Tensor) -> Tensor:
        """Over the last axis of scores [r, K, w, n, G, S], and over the sinks, which count once."""
        wide, sinks = torch.promote_types(scores.dtype, torch.float32), self.attention.sink
        if sinks is None:
            return scores.softmax(-1, dtype=wide)
        each = sinks.to(scores).view(scores.shape[1], 1, 1, scores.shape[4], 1)
        return torch.cat([scores, each.expand(*scores.shape[:-1], 1)], -1).softmax(-1, dtype=wide)[..., :-1]


def _fused(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, causal: bool = False
) -> Tensor:
    mixed = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, scale=attention.scaling, is_causal=causal,
        enable_gqa=attention.k.heads < attention.q.heads,
    )  # fmt: skip
    return mixed.transpose(1, 2)


def _unseen(_name: str, x: Tensor, _guard: object) -> Tensor:
    return x
