"""Copy-on-write tensors: what worlds share with the base is kept once, and what they changed lies in one long row of
tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Packed:
    """One activation of W worlds of b rows and T columns, as the tokens at which it differs from the base.

    A *member* is one row of one world; member ``w * b + r`` is row r of world w.

    Attributes:
        dirty: bool [W * b, T] on the CPU, the tokens that are held.
        values: [N, ...] on the model's device, their values, ordered by member and then by column.
        rows: b.
    """

    dirty: Tensor
    values: Tensor
    rows: int

    @property
    def worlds(self) -> int:
        """Number of worlds W."""
        return len(self.dirty) // self.rows

    def flat(self) -> Tensor:
        """int64 [N] on the CPU: ``member * T + column`` of each token."""
        return self.dirty.flatten().nonzero().squeeze(1)

    def home(self) -> Tensor:
        """int64 [N] on the values' device: ``row * T + column``, where each token's base value is."""
        return (self.flat() % (self.rows * self.dirty.shape[1])).to(self.values.device)

    def to(self, dirty: Tensor, base: Tensor | None) -> Packed:
        """Hold other tokens: those not held so far get their base value [b, T, ...], those left out are dropped."""
        if torch.equal(dirty, self.dirty):
            return self
        device = self.values.device
        rank = self.dirty.flatten().long().cumsum(0) - 1
        kept = (dirty & self.dirty).flatten()
        if not bool((dirty & ~self.dirty).any()):
            return Packed(dirty, self.values.index_select(0, rank[kept].to(device)), self.rows)
        assert base is not None  # the base holds every real token, so only worlds are ever extended
        out = base.flatten(0, 1).index_select(0, Packed(dirty, self.values, self.rows).home())
        if bool(kept.any()):
            target = (dirty.flatten().long().cumsum(0) - 1)[kept].to(device)
            held = self.values
            if int(kept.sum()) != len(held):
                held = held.index_select(0, rank[kept].to(device))
            out = out.index_copy_(0, target, held)
        return Packed(dirty, out, self.rows)

    def offsets(self) -> list[int]:
        """Where each world's tokens start in `values`, and the total."""
        counts = self.dirty.reshape(self.worlds, -1).sum(1)
        return [0, *counts.cumsum(0).tolist()]

    def world(self, index: int, base: Tensor | None, start: int, stop: int) -> Tensor:
        """The whole activation [b, T, ...] of one world, whose tokens lie from `start` to `stop` (see `offsets`)."""
        width = self.dirty.shape[1]
        mine = self.dirty[index * self.rows : (index + 1) * self.rows]
        if base is None:
            base = self.values.new_zeros((self.rows, width, *self.values.shape[1:]))
        if start == stop:
            return base
        where = mine.flatten().nonzero().squeeze(1).to(self.values.device)
        flat = base.flatten(0, 1).index_copy(0, where, self.values[start:stop])
        return flat.unflatten(0, (self.rows, width))

    def with_worlds(self, changed: dict[int, tuple[Tensor, Tensor]]) -> Packed:
        """Replace the tokens of some worlds.

        Args:
            changed: for each world, its new dirty tokens bool [b, T] and its whole activation [b, T, ...].
        """
        offsets, pieces, dirty, last = self.offsets(), [], self.dirty.clone(), 0
        for index in sorted(changed):
            mine, whole = changed[index]
            dirty[index * self.rows : (index + 1) * self.rows] = mine
            pieces.append(self.values[offsets[last] : offsets[index]])
            where = mine.flatten().nonzero().squeeze(1).to(whole.device)
            pieces.append(whole.flatten(0, 1).index_select(0, where))
            last = index + 1
        pieces.append(self.values[offsets[last] :])
        return Packed(dirty, torch.cat([p for p in pieces if len(p)] or [self.values[:0]]), self.rows)


def tiled(function: Callable[[Tensor], Tensor], x: Tensor, tile: int) -> Tensor:
    """Apply a function of each token to [N, ...], `tile` tokens at a time: what lies in between stays in cache."""
    if not len(x):
        # One token, of which nothing is kept: what a model's own modules make of none is theirs to say.
        return function(x.new_zeros((1, *x.shape[1:])))[:0]
    if len(x) <= tile:
        return function(x)
    first = function(x[:tile])
    out = first.new_empty((len(x), *first.shape[1:]))
    out[:tile] = first
    for start in range(tile, len(x), tile):
        out[start : start + tile] = function(x[start : start + tile])
    return out
