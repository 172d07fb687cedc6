"""Which tokens of which worlds are held: masks on the CPU, and the indices that lead from one to another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .trace import Trace, Value


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of W worlds of b rows and T columns.

    A *member* is one row of one world; member ``w * b + r`` is row r of world w.

    Attributes:
        mask: bool [W * b, T] on the CPU, the tokens that are held, in this order: by member, then by column.
        rows: b.
    """

    mask: Tensor
    rows: int

    @property
    def width(self) -> int:
        """Number of columns T."""
        return self.mask.shape[1]

    @cached_property
    def flat(self) -> Tensor:
        """int64 [N]: ``member * T + column`` of each token."""
        return torch.from_numpy(self.mask.numpy().reshape(-1).nonzero()[0])

    def __len__(self) -> int:
        return len(self.flat)

    @cached_property
    def place(self) -> Tensor:
        """int64 [W * b * T]: the number of each token that is held; of others it means nothing."""
        return torch.from_numpy(self.mask.numpy().cumsum(dtype=np.int64) - 1)

    @cached_property
    def home(self) -> Tensor:
        """int64 [N]: ``row * T + column`` of each token, where its base value is."""
        return self.flat % (self.rows * self.width)

    @cached_property
    def counts(self) -> Tensor:
        """int64 [W * b]: how many tokens each member holds."""
        return torch.from_numpy(self.mask.numpy().sum(1, dtype=np.int64))

    def __and__(self, mask: Tensor) -> Tokens:
        return self.become(self.mask & mask)

    def __or__(self, mask: Tensor) -> Tokens:
        return self.become(self.mask | mask)

    def become(self, mask: Tensor) -> Tokens:
        """Tokens of a mask: these themselves where it is theirs, with all that is known of them."""
        return self if mask is self.mask or torch.equal(mask, self.mask) else Tokens(mask, self.rows)


@dataclass(frozen=True, eq=False)
class Packed:
    """One activation of some worlds, as the tokens at which it may differ from the base: a value [N, ...] of them."""

    tokens: Tokens
    value: Value


class Moves:
    """From some tokens to others, and from tokens to entries of an activation; what leads there is made once.

    Args:
        trace: takes what is to be done.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._known: dict[tuple[int, int], tuple[Tokens, Tokens, tuple[Tensor, ...]]] = {}

    def to(self, x: Packed, tokens: Tokens, base: Callable[[], Value] | None) -> Packed:
        """Hold other tokens: those not held so far get their base value [b * T, ...], those left out are dropped."""
        if tokens is x.tokens or torch.equal(tokens.mask, x.tokens.mask):
            return x
        known = (id(x.tokens), id(tokens))
        if known not in self._known:
            self._known[known] = (x.tokens, tokens, _way(x.tokens, tokens))
        at = self._known[known][2]
        if len(at) == 1:
            return Packed(tokens, self.trace.do(take, x.value, at=at))
        assert base is not None  # the base holds every real token, so only worlds are ever extended
        return Packed(tokens, self.trace.do(_extend, x.value, base(), at=at))

    def dense(self, x: Packed, members: Tensor, cols: Tensor, base: Callable[[], Value] | None) -> Value:
        """The value [m, n, ...] at columns [m, n] of some members [m]; the base's at tokens that are not held.

        What neither holds (padding of the base itself) is zero.
        """
        wide, width = x.tokens.mask.flatten(), x.tokens.width
        flat = (members[:, None] * width + cols).flatten()
        held = wide[flat]
        shape = tuple(cols.shape)
        if bool(held.all()):
            return self.trace.do(Shaped(take, shape), x.value, at=[x.tokens.place[flat]])
        where = held.nonzero().squeeze(1)
        source = x.tokens.place[flat[where]]
        if base is None:
            return self.trace.do(Shaped(_over_zeros, shape), x.value, at=[where, source])
        home = flat % (x.tokens.rows * width)
        if not len(where):
            return self.trace.do(Shaped(take, shape), base(), at=[home])
        return self.trace.do(Shaped(_over, shape), x.value, base(), at=[home, where, source])


@dataclass(frozen=True, eq=False)
class Shaped:
    """A function whose result [m * n, ...] is given the shape [m, n, ...]."""

    fn: Callable[..., Tensor]
    shape: tuple[int, ...]

    def __call__(self, *args: Tensor) -> Tensor:
        if self.fn is _over_zeros:
            return _over_zeros(*args, size=self.shape[0] * self.shape[1]).unflatten(0, self.shape)
        return self.fn(*args).unflatten(0, self.shape)


def _way(old: Tokens, new: Tokens) -> tuple[Tensor, ...]:
    """Which tokens to take; or, where some are new: the homes of all, and where those that are held go to."""
    kept = (new.mask.numpy() & old.mask.numpy()).reshape(-1).nonzero()[0]
    source = torch.from_numpy(old.place.numpy()[kept])
    if len(kept) == len(new):
        return (source,)
    return new.home, torch.from_numpy(new.place.numpy()[kept]), source


def take(x: Tensor, at: Tensor) -> Tensor:
    """Some tokens."""
    return x.index_select(0, at)


def _extend(x: Tensor, base: Tensor, home: Tensor, target: Tensor, source: Tensor) -> Tensor:
    # Tokens stand in order, so where all are kept each goes to its place as it is.
    kept = x if len(source) == len(x) else x.index_select(0, source)
    return base.index_select(0, home).index_copy_(0, target, kept)


def _over(x: Tensor, base: Tensor, home: Tensor, where: Tensor, source: Tensor) -> Tensor:
    return base.index_select(0, home).index_copy_(0, where, x.index_select(0, source))


def _over_zeros(x: Tensor, where: Tensor, source: Tensor, size: int = 0) -> Tensor:
    return x.new_zeros((size, *x.shape[1:])).index_copy_(0, where, x.index_select(0, source))


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
