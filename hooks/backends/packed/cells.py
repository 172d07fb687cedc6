"""Interventions of different worlds that are alike, and where each of them is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...plan.plan import Intervention
from ...plan.region import Region
from ...plan.sites import POS, Site

INSIDE = ("scores", "pattern")
"""Sites inside of attention, which have queries and keys."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One intervention of one world: `number` is its place in the plan, `region` what it edits of the rows run."""

    world: int
    number: int
    item: Intervention
    region: Region


@dataclass(frozen=True, eq=False)
class Stack:
    """Interventions of different worlds, alike but for values, indices and strengths.

    Attributes:
        cells: one for each world.
        rows: b, of every world.
    """

    cells: tuple[Cell, ...]
    rows: int

    @property
    def item(self) -> Intervention:
        """One of them, which stands for all."""
        return self.cells[0].item

    @property
    def site(self) -> Site:
        """Its site."""
        return self.item.site

    def __len__(self) -> int:
        return len(self.cells)

    @cached_property
    def members(self) -> Tensor:
        """int64 [m]: the members of the worlds, m = worlds * b."""
        first = torch.tensor([cell.world * self.rows for cell in self.cells])
        return (first[:, None] + torch.arange(self.rows)).flatten()

    @cached_property
    def cols(self) -> Tensor:
        """int64 [m, n]: the columns that each edits."""
        return torch.cat([cell.region.cols for cell in self.cells])

    @cached_property
    def key_cols(self) -> Tensor:
        """int64 [m, k]: the columns of the keys, at a site that has them."""
        found = [cell.region.key_cols for cell in self.cells]
        return torch.cat(found)  # type: ignore[arg-type]

    @cached_property
    def valid(self) -> Tensor | None:
        """bool [m, ...], broadcastable to the part: the entries that count; None for all."""
        flags = [cell.region.valid for cell in self.cells]
        if flags[0] is None:
            return None
        return torch.cat([flag.expand(self.rows, *flag.shape[1:]) for flag in flags if flag is not None])

    @cached_property
    def tokens_valid(self) -> Tensor | None:
        """bool [m, n]: the tokens that count; None for all."""
        if self.valid is None:
            return None
        flags = self.valid.movedim(self.site.axes.index(POS), 1)
        return flags.flatten(2).any(2).expand(-1, self.cols.shape[1])

    def steps(self, axes: Sequence[str]) -> list[tuple[int, Tensor]]:
        """The indices along some axes, [k] where all worlds share them, else [m, k]."""
        found = []
        for number, axis in enumerate(self.site.axes):
            if axis not in axes:
                continue
            each = [index_of(cell.region, number) for cell in self.cells]
            if all(index is None for index in each):
                continue
            found.append((number, stacked_index(each, self.rows, self.cells[0].region.shape[axis])))
        return found


def stacked_index(each: Sequence[Tensor | None], rows: int, size: int) -> Tensor:
    """Indices along one axis [k] or [b, k] of several worlds: [k] where all are the same, else [m, k]."""
    whole = torch.arange(size)
    given = [whole if index is None else index for index in each]
    first, flat = given[0], all(index.ndim == 1 for index in given)
    if all(index is first for index in given[1:]):
        return first if flat else first.repeat(len(given), 1)
    together = torch.stack(given) if flat else torch.stack([index.expand(rows, -1) for index in given])
    if bool((together == together[:1]).all()):
        return first if flat else together.flatten(0, 1)
    return together.repeat_interleave(rows, 0) if flat else together.flatten(0, 1)


def index_of(region: Region, axis: int) -> Tensor | None:
    """The index of a region along an axis, or None where it takes all of it."""
    for at, index in region.steps:
        if at == axis:
            return index
    return None
