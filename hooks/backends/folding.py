"""A tower's values, in which images come one after another, as rows of the text and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan.pictures import Pictures, joined


@dataclass(frozen=True, eq=False)
class Fold:
    """Where each token of a tower stands in a batch of rows [B, T], of which a row's images fill the first places.

    Attributes:
        rows, width: B and T.
        source: int64 [B * T], the tower's token that stands in each place; filler where there is none.
        place: int64 [N], the place of each of its tokens.
        real: bool [B, T].
        even: whether the tower has the same tokens in the same order, so that a view of them does.
    """

    rows: int
    width: int
    source: Tensor
    place: Tensor
    real: Tensor
    even: bool

    @classmethod
    def of(cls, pictures: Sequence[Pictures], width: int, device: torch.device, embedded: bool = False) -> Fold:
        """The fold of the images of worlds that are run one after another along the rows.

        Args:
            pictures: of each, on the rows that are run.
            width: T, which may be more than these rows need.
            embedded: of what the tower's embedding returns, and not of its blocks.
        """
        whole = joined(pictures)
        real = torch.arange(width) < whole.lengths[:, None]
        order = whole.embedded if embedded else whole.order
        order = torch.arange(int(whole.lengths.sum())) if order is None else order
        place = torch.empty_like(order)
        place[order] = real.flatten().nonzero().flatten()
        source = torch.zeros(real.numel(), dtype=torch.int64)
        source[place] = torch.arange(len(place))
        even = torch.equal(place, torch.arange(real.numel()))
        return cls(len(real), width, source.to(device), place.to(device), real.to(device), even)

    def lay(self, x: Tensor) -> Tensor:
        """Values [N, ...] of the tower as rows [B, T, ...]; what stands where a row has no token is filler."""
        x = x if self.even else x.index_select(0, self.source.to(x.device))
        return x.unflatten(0, (self.rows, self.width))

    def back(self, x: Tensor) -> Tensor:
        """Rows [B, T, ...] as values [N, ...] of the tower."""
        x = x.flatten(0, 1)
        return x if self.even else x.index_select(0, self.place.to(x.device))

    def among(self, sequence: Tensor) -> Tensor:
        """bool [B, 1, T, T], which tokens are of one sequence, given the number int64 [N] of each one's."""
        laid = torch.where(self.real, self.lay(sequence), -1)
        return ((laid[:, :, None] == laid[:, None, :]) & self.real[:, None, :])[:, None]

    def spread(self, mask: Tensor) -> Tensor:
        """What is said of queries and keys [n, 1 or H, L, L] of n sequences of L tokens, as rows [B, 1 or H, T, T].

        Where a query and a key are of different sequences, filler stands.
        """
        count, _, each, _ = mask.shape
        queries = self.lay(mask.transpose(1, 2).flatten(0, 1))  # [B, T, H, L]
        column = self.lay(torch.arange(each, device=mask.device).repeat(count))  # [B, T]
        index = column[:, None, None, :].expand(*queries.shape[:3], -1)
        return queries.gather(-1, index).transpose(1, 2)

    def gathered(self, pattern: Tensor, count: int) -> Tensor:
        """A pattern of rows [B, H, T, T] as that of the tower's sequences [n, H, L, L]."""
        each = len(self.place) // count
        queries = self.back(pattern.transpose(1, 2)).unflatten(0, (count, each))  # [n, L, H, T]
        column = (self.place % self.width).unflatten(0, (count, each))
        index = column[:, None, None, :].expand(*queries.shape[:3], -1)
        return queries.gather(-1, index).transpose(1, 2)
