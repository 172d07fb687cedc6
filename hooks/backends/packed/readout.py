"""What is read of the logits: only the tokens and the columns that are read are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ...models.architecture import Architecture
from ...models.projections import is_plain, linear_weight
from ...plan.region import Region
from ...plan.sites import DIM, HEAD, Key
from .cells import Stack
from .tokens import Packed, Tokens, take, tiled
from .trace import Value
from .visits import Visits


class Readout:
    """The reads of the logits in every world, and their edits.

    Args:
        visits: of the worlds.
        tile: tokens that are unembedded at a time.
    """

    def __init__(self, visits: Visits, tile: int) -> None:
        self.visits, self.tile = visits, tile

    def read(self, x: Packed) -> None:
        """Read the logits of final states."""
        edited = self.edited_logits(x)
        for index, site in enumerate(self.visits.base.reads):
            if site.name == "logits":
                self.visits.read[index] = self.visits.trace.keep(self.logits(index, x, edited))

    def edited_logits(self, x: Packed) -> tuple[Packed, set[int]] | None:
        """All logits of the worlds that edit them, where they are edited; and which worlds these are."""
        key: Key = ("logits", -1, None)
        turns = self.visits.stacker.asked.get(key)
        if not turns:
            return None
        worlds = {cell.world for cells in turns for cell in cells}
        mine = torch.zeros(len(self.visits.worlds), dtype=torch.bool)
        mine[list(worlds)] = True
        read = torch.zeros_like(self.visits.base.layout.queries.real)
        for site in self.visits.base.reads:
            if site.name == "logits":
                read.scatter_(1, self.visits.base.unembedded(self.visits.base.region(site)), True)
        mine = mine.repeat_interleave(self.visits.rows)[:, None]
        wanted = self.visits.real & mine
        if self.visits.arch.readout is None:
            wanted &= self.visits.edited_tokens(key)
        width = x.tokens.width
        if self.visits.arch.readout is not None:
            # A classifier's logits have one position, the first of as many columns as its tokens have.
            one = torch.zeros(width, dtype=torch.bool)
            one[self.visits.arch.readout] = True
            wanted &= one
        x = self.visits.moves.to(x, x.tokens.become(wanted), self.visits.plain(("ln_final", -1, None)))
        full = self.visits.trace.do(self.visits.arch.logits, x.value)
        tokens = x.tokens
        if self.visits.arch.readout is not None:
            tokens = Tokens(wanted.any(1, keepdim=True), self.visits.rows)
        full_logits = Packed(tokens, full)
        needed = read if self.visits.arch.readout is None else torch.ones(len(read), 1, dtype=torch.bool)
        needed = needed.repeat(len(self.visits.worlds), 1)
        for stacks in self.visits.stacker.turns(key):
            full_logits = self.edit_logits(full_logits, stacks, needed)
        return full_logits, worlds

    def edit_logits(self, x: Packed, stacks: Sequence[Stack], needed: Tensor) -> Packed:
        parts = []
        for stack in stacks:
            part = self.visits.part(x, stack.members, stack.cols, None)
            new, change = self.visits.stacker.apply(stack, part, (HEAD, DIM))
            changed = torch.zeros_like(needed[stack.members])
            counts = stack.tokens_valid
            self.visits.effects.note(
                stack, change, changed.scatter_(1, stack.cols, True if counts is None else counts), needed
            )
            parts.append((stack.members, stack.cols, stack.tokens_valid, new))
        return self.visits.written(x, parts)

    def logits(self, index: int, x: Packed, edited: tuple[Packed, set[int]] | None) -> Value:
        """One read of the logits, in every world."""
        base, site = self.visits.base, self.visits.base.reads[index]
        region = base.region(site)
        cols, rows, width = base.unembedded(region), self.visits.rows, x.tokens.width
        n, worlds = cols.shape[1], len(self.visits.worlds)
        columns = partial(columns_of, self.visits.arch, region, self.tile)
        per_row = [i for axis, i in region.steps if region.site.axes[axis] == DIM and i.ndim == 2]
        if self.visits.is_base:
            part = self.visits.part(x, self.visits.everyone, cols, None)
            return self.unembedded(part, cols, columns, bool(per_row))
        slot = torch.full(base.layout.queries.real.shape, -1).scatter_(1, cols, torch.arange(n).expand_as(cols))
        flat = x.tokens.flat
        place = slot.flatten()[x.tokens.home]
        chosen = (place >= 0).nonzero().squeeze(1)
        members = flat[chosen] // width
        if base.meter is not None:
            base.meter.unembedding(len(chosen), region.shape[DIM])
        at = [chosen, members * n + place[chosen], *([members % rows] if per_row else [])]
        many = (worlds * rows, n)

        def overlaid(v: Tensor, plain: Tensor, chosen: Tensor, target: Tensor, *home: Tensor) -> Tensor:
            out = plain.repeat(worlds, *[1] * (plain.ndim - 1)).flatten(0, 1)
            return out.index_copy_(0, target, columns(take(v, chosen), *home)).unflatten(0, many)

        value = self.visits.trace.do(overlaid, x.value, self.base_logits(index, cols, columns, bool(per_row)), at=at)
        if edited is None:
            return value
        full, which = edited
        members = torch.cat([torch.arange(w * rows, (w + 1) * rows) for w in sorted(which)])
        part = self.visits.part(full, members, region.cols.repeat(len(which), 1), None)
        part = self.visits.narrowed(part, region, len(which))
        # What is not edited stays as it was computed, bit for bit.
        there = full.tokens.mask[members].gather(1, region.cols.repeat(len(which), 1)).flatten()
        source = there.nonzero().squeeze(1)
        target = (members[:, None] * n + torch.arange(n)).flatten()[source]

        def put(a: Tensor, b: Tensor, target: Tensor, source: Tensor) -> Tensor:
            return a.flatten(0, 1).index_copy(0, target, take(b.flatten(0, 1), source)).view_as(a)

        return self.visits.trace.do(put, value, part, at=[target, source])

    def base_logits(self, index: int, cols: Tensor, columns: Callable[..., Tensor], each: bool) -> Value:
        """A read of the base's logits [b, n, C]: as it was made in its own run, or of its final states."""
        if index in self.visits.base.logits:
            return self.visits.trace.do(partial(self.visits.base.logits.__getitem__, index))
        at = (cols + torch.arange(self.visits.rows)[:, None] * self.visits.base.layout.queries.width).flatten()
        final = self.visits.trace.do(take, self.visits.base_value(("ln_final", -1, None)), at=[at])
        return self.unembedded(
            self.visits.trace.do(lambda v: v.unflatten(0, tuple(cols.shape)), final), cols, columns, each
        )

    def unembedded(self, final: Value, cols: Tensor, columns: Callable[..., Tensor], each: bool) -> Value:
        """Logits [b, n, C] of final states [b, n, M]."""
        rows, n = cols.shape
        at = [torch.arange(rows).repeat_interleave(n)] if each else []
        return self.visits.trace.do(lambda v, *i: columns(v.flatten(0, 1), *i).unflatten(0, (rows, n)), final, at=at)


def columns_of(arch: Architecture, region: Region, tile: int, final: Tensor, rows: Tensor | None = None) -> Tensor:
    """Logits [N, C] of the final norm's output [N, M], in the columns of a region.

    Args:
        rows: int64 [N], the base row that each belongs to, where columns differ between rows.
    """
    if region.site.dim is None:
        return tiled(arch.logits, final, tile)
    index = next(i for axis, i in region.steps if region.site.axes[axis] == DIM)
    if not is_plain(arch.unembed):  # quantised, or with an adapter: all columns are computed, and those taken
        full = tiled(arch.logits, final, tile)
        if index.ndim == 1 or len(index) == 1:
            return full.index_select(1, index.flatten().to(final.device))
        assert rows is not None
        return full.gather(1, index.to(final.device)[rows])
    weight, bias = linear_weight(arch.unembed)
    if index.ndim == 1 or len(index) == 1:
        index = index.flatten().to(final.device)
        bias = None if bias is None else bias[index]
        return arch.capped(torch.nn.functional.linear(final, weight[index], bias))
    assert rows is not None
    index = index.to(final.device)[rows]
    out = torch.einsum("nm,ncm->nc", final, weight[index])
    return arch.capped(out if bias is None else out + bias[index])
