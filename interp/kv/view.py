"""What a policy sees of a layer: its keys, values, queries and attention, after some tokens were fed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

TILE = 1 << 24
"""Entries of attention that are held at a time."""


@dataclass(frozen=True, eq=False)
class View:
    """One layer after a chunk of T tokens was fed, which N keys are kept or new for.

    Attributes:
        owner: the seam.
        layer: which; module: its attention.
        queries: [B, H, T, D], keys and values: [B, K, N, D], as they attend; the last T are the new ones.
        scaling, cap, window: of the layer's attention; sinks: [H], a score that queries have besides those of keys.
    """

    owner: Any
    layer: int
    module: Any
    queries: Tensor
    keys: Tensor
    values: Tensor
    scaling: float
    cap: float | None
    window: int | None
    sinks: Tensor | None = None

    @property
    def new(self) -> int:
        """How many tokens T were fed."""
        return self.queries.shape[2]

    @property
    def groups(self) -> int:
        """Query heads for each key/value head, G."""
        return self.queries.shape[1] // self.keys.shape[1]

    @property
    def index(self) -> Tensor:
        """int64 [B, K, N], the number of each key's token in its row."""
        return self._kept.index

    @property
    def valid(self) -> Tensor:
        """bool [B, K, N], keys of real tokens."""
        return self._kept.valid

    @property
    def real(self) -> Tensor:
        """bool [B, T], which of the new tokens are no padding."""
        return self.owner.real

    @property
    def scores(self) -> Tensor:
        """[B, K, N], what keys were scored before; zero for new ones."""
        return self._kept.scores

    @property
    def _kept(self) -> Any:
        return self.owner.cache.layers[self.layer]

    @cached_property
    def raw_queries(self) -> Tensor:
        """[B, H, T, D], the new queries before rotation."""
        return self.owner.turned(self.layer, self.queries, self.owner.positions, back=True)

    @cached_property
    def raw_new_keys(self) -> Tensor:
        """[B, K, T, D], the new keys before rotation."""
        new = self.keys[:, :, -self.new :]
        return self.owner.turned(self.layer, new, self.owner.positions, back=True)

    @property
    def new_values(self) -> Tensor:
        """[B, K, T, D]."""
        return self.values[:, :, -self.new :]

    def later(self, x: Tensor, positions: Tensor) -> Tensor:
        """[B, h, P, D]: vectors x [B, h, P, D] turned to positions int [P], counted from the last token that was
        fed.
        """
        last = self.owner.positions[:, -1:]
        return self.owner.turned(self.layer, x, last + positions.to(last.device))

    def attention(self, last: int | None = None) -> Tensor:
        """[B, H, w, N]: the attention of the last w queries (all by default), zero for those of padding.

        Quadratic in memory: of a window, not of a chunk of a long text; see `received`.
        """
        count = self.new if last is None else min(last, self.new)
        return torch.cat(list(self._tiles(self.new - count)), 2)

    def received(self) -> Tensor:
        """[B, K, N]: attention that each key receives from the new queries, summed over them and averaged over
        the group.
        """
        total = self.keys.new_zeros(self.keys.shape[:3], dtype=torch.float32)
        for tile in self._tiles(0):
            total += tile.sum(2).unflatten(1, (-1, self.groups)).mean(2)
        return total

    def _tiles(self, start: int) -> Iterator[Tensor]:
        step = max(1, TILE // (self.queries.shape[0] * self.queries.shape[1] * self.keys.shape[2]))
        keys = self.keys.repeat_interleave(self.groups, 1).transpose(2, 3)
        for first in range(start, self.new, step):
            some = slice(first, min(first + step, self.new))
            allowed = self.owner.allowed(self._kept, self.window, some)
            if allowed.shape[1] > 1:
                allowed = allowed.repeat_interleave(self.groups, 1)
            scores = self.queries[:, :, some] @ keys * self.scaling
            yield pattern_of(scores, allowed, self.cap, self.sinks).float() * self.real[:, None, some, None]


def pattern_of(scores: Tensor, allowed: Tensor, cap: float | None, sinks: Tensor | None) -> Tensor:
    """Softmax, in float32 at least, of scores [B, H, t, N] where attention is allowed, every query to some key.

    Args:
        cap: c of c tanh(scores / c); sinks: [H], a score that each query has besides, which mixes nothing in.
    """
    wide = torch.promote_types(scores.dtype, torch.float32)
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~allowed, -torch.inf)
    if sinks is None:
        return scores.softmax(-1, dtype=wide)
    each = sinks.to(scores)[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, each], -1).softmax(-1, dtype=wide)[..., :-1]
