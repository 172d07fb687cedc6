"""Attention that is forbidden: masks on keys for each head and query, which the kernels take as such."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Bans:
    """Products of heads, queries and keys between which members forbid attention, at most J for each.

    Attributes:
        of: int64 [members], which of the banning members each is; -1 where it bans nothing.
        heads: bool [B, J, H]; None where every ban is one of all heads.
        queries, keys: bool [B, J, T].
    """

    of: Tensor
    heads: Tensor | None
    queries: Tensor
    keys: Tensor

    def at(self, members: Tensor, cols: Tensor) -> list[Tensor]:
        """What `mask` is made of, for some members and the columns [m, n] of their queries; nothing without bans."""
        which = self.of[members]
        if not bool((which >= 0).any()):
            return []
        which = which.clamp_min(0)
        queries = self.queries[which].gather(2, cols[:, None].expand(-1, self.queries.shape[1], -1))
        found = [queries, self.keys[which]]
        return found if self.heads is None else [*found, self.heads[which]]

    @staticmethod
    def mask(bans: Sequence[Tensor], queries: slice, keys: int) -> Tensor:
        """bool [m, 1 or H, n, T]: the edges that are forbidden, of some queries and the first keys."""
        asking, asked, *heads = bans
        asking, asked = asking[:, :, None, queries, None], asked[:, :, None, None, :keys]
        product = asking & asked
        if heads:
            product = product & heads[0][..., None, None]
        return product.any(1) if product.shape[1] > 1 else product[:, 0]


def stacked_bans(total: int, found: Sequence[tuple[Tensor, Tensor, Tensor, Tensor | None]]) -> Bans | None:
    """All bans of some worlds as one.

    Args:
        total: number of members.
        found: for each ban of some members int64 [m]: queries and keys bool [m, T], and heads bool [m, H] or None for
            all.
    """
    if not found:
        return None
    count = torch.zeros(total, dtype=torch.int64)
    for members, *_ in found:
        count[members] += 1
    banning = (count > 0).nonzero().squeeze(1)
    of = torch.full((total,), -1)
    of[banning] = torch.arange(len(banning))
    most, width = int(count.max()), found[0][1].shape[1]
    queries, keys = (torch.zeros(len(banning), most, width, dtype=torch.bool) for _ in range(2))
    partly = next((heads for *_, heads in found if heads is not None), None)
    each = None if partly is None else torch.zeros(len(banning), most, partly.shape[1], dtype=torch.bool)
    used = torch.zeros(len(banning), dtype=torch.int64)
    for members, asking, asked, heads in found:
        at = of[members]
        queries[at, used[at]], keys[at, used[at]] = asking, asked
        if each is not None:
            each[at, used[at]] = True if heads is None else heads
        used[at] += 1
    return Bans(of, each, queries, keys)
