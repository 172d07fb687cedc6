"""Attention for worlds that share a base: the one step that has to know which world a token belongs to.

A world's keys and values are the base's, but for those that it has changed. Where it asks with few queries, the part
over the base's keys is computed for all worlds together and the part over its own beside it, in one softmax (`Merged`);
where it asks with many, its own are filled in among the base's (`Filled`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...layout import Layout
from ...models.blocks import Attention
from .bans import Bans
from .kernels import Filled, Merged
from .tokens import Moves, Packed, Tokens
from .trace import Trace, Value

SCRATCH = {"cpu": 1 << 24}
"""Bytes that the keys, values and scores of a group of members may take, by device type."""
SCRATCH_ELSEWHERE = 1 << 29
SHARE = 8
"""A member is merged whose queries are at most this part of the keys, and who has changed at most half of these."""
TILE = 256
"""Queries for which masks and scores of long texts are made at a time."""

Base = Callable[[], Value]


def reach(changed: Tensor, window: int | None, causal: bool) -> Tensor:
    """Tokens [members, T] whose attention sees a token with a changed key or value, given which those are."""
    if not causal:
        return changed.any(1, keepdim=True).expand_as(changed)
    seen = changed.long().cumsum(1)
    if window is not None:
        seen = seen - torch.nn.functional.pad(seen, (window, 0))[:, : seen.shape[1]]
    return seen > 0


def seen_by(asking: Tensor, causal: bool) -> Tensor:
    """Tokens [members, T] whose keys or values the attention of some token may see, given which tokens are meant."""
    if not causal:
        return asking.any(1, keepdim=True).expand_as(asking)
    return asking.flip(1).long().cumsum(1).flip(1) > 0


@dataclass(frozen=True, eq=False)
class Sharing:
    """Attention of one layer, written down for worlds on one base.

    Attributes:
        trace, moves: take what is to be done.
        layout: of the base's rows.
        attention: the layer.
        exposed: whether the kernel is used that shows its inside, as the worlds that look inside use it.
        device: type of the device.
    """

    trace: Trace
    moves: Moves
    layout: Layout
    attention: Attention
    exposed: bool
    device: str

    def mix(
        self,
        out: Tokens,
        qkv: tuple[Packed, Packed, Packed],
        bases: tuple[Base | None, Base | None, Base | None],
        bans: Bans | None = None,
    ) -> Packed:
        """Attention at given tokens, each against its own world's keys and values.

        Args:
            out: the tokens at which z is wanted.
            qkv: the queries, keys and values that may differ from the base's.
            bases: the base's, [b * T, heads, D]; None while the base itself is computed, when every token is changed.
            bans: keys that are forbidden besides.

        Returns:
            z at `out`, values [N, H, D].
        """
        asking = out.counts > 0
        q = self.moves.to(qkv[0], out, bases[0])
        own = (qkv[1].tokens | qkv[2].tokens.mask) & asking[:, None]
        k, v = (self.moves.to(x, own, base) for x, base in zip(qkv[1:], bases[1:], strict=True))
        pieces, order = [], []
        for members, merged in self.groups(out, own, bans):
            make = self.merged if merged else self.filled
            piece, tokens = make(members, out, own, (q, k, v), bases[1:], bans)
            pieces.append(piece)
            order.append(tokens)
        if not pieces:
            return Packed(out, q.value)
        if len(pieces) == 1 and _in_order(order[0]):
            return Packed(out, pieces[0])
        back = torch.empty(len(out), dtype=torch.int64)
        back[torch.cat(order)] = torch.arange(len(out))
        return Packed(out, self.trace.do(_joined, *pieces, at=[back]))

    def groups(self, out: Tokens, own: Tokens, bans: Bans | None) -> Iterator[tuple[Tensor, bool]]:
        """Members with about as many queries each, so that little of a group is filler; and whether they are merged."""
        q, k = self.attention.q, self.attention.k
        itemsize, width = 4, self.layout.keys.width
        scratch = SCRATCH.get(self.device, SCRATCH_ELSEWHERE)
        every, held = out.counts.numpy(), own.counts.numpy()
        members = every.nonzero()[0]
        asked, changed = every[members], held[members]
        few = (asked * SHARE <= width) & (changed * 2 <= width)
        # Sizes of a group are within a quarter of one another.
        kinds = 4 * np.ceil(np.log(asked) / np.log(1.25)).astype(np.int64) + 2 * ~few
        if bans is not None:
            kinds += bans.of.numpy()[members] >= 0
        for kind in np.unique(kinds):
            some, merged = kinds == kind, not kind & 2
            mine, high, most = members[some], int(asked[some].max()), int(changed[some].max())
            each = 3 * q.heads * high * (width + (most if merged else 0)) if merged or self.looks else 0
            each += 0 if merged else 2 * width * k.heads * k.width
            fit = max(1, scratch // (each * itemsize))
            for start in range(0, len(mine), fit):
                yield torch.from_numpy(mine[start : start + fit]), merged

    @property
    def looks(self) -> bool:
        """Whether scores are computed as such: no fused kernel of torch's caps them, or has sinks."""
        return self.exposed or self.attention.softcap is not None or self.attention.sinks is not None

    def filled(
        self,
        members: Tensor,
        out: Tokens,
        own: Tokens,
        qkv: tuple[Packed, Packed, Packed],
        bases: Sequence[Base | None],
        bans: Bans | None,
    ) -> tuple[Value, Tensor]:
        """Attention of some members over keys and values that are filled in."""
        ask, cols, real, tokens = _queries(members, out)
        rows, width = members % out.rows, out.width
        n, attention = cols.shape[1], self.attention
        source, target = _own(members, own)
        every, last = self.layout.keys.real.numpy(), int(cols.max()) + 1 + self.layout.offset
        # Members whose keys are all their own need none of the base's, which then may not even be there.
        seen = every[rows.numpy()] & ~own.mask.numpy()[members.numpy()]
        based = bases[0] is not None and bool((seen[:, :last] if attention.causal else seen).any())
        complete = len(source) == len(members) * width
        span = (int(source[0]), int(source[-1]) + 1) if complete and _consecutive(source) else None
        square = n == width and bool((cols.numpy() == np.arange(width)).all()) and bool(every.all())
        tiles = [(0, n, width)]
        if n * width > TILE * TILE:
            starts = range(0, n, TILE)
            last = [int(cols[:, at : at + TILE].max()) + 1 + self.layout.offset for at in starts]
            tiles = [(at, min(at + TILE, n), end if attention.causal else width)
                     for at, end in zip(starts, last, strict=True)]  # fmt: skip
        forbidden = [] if bans is None else bans.at(members, cols)
        kernel = Filled(
            attention, (len(members), n), width, out.rows, tuple(tiles), self.looks,
            whole=square and attention.causal and attention.window is None and not forbidden and not self.looks,
            based=based, shared=out.rows == 1 and not len(source), span=span,
            offset=self.layout.offset, padded=not real.numpy().all(), bans=len(forbidden),
        )  # fmt: skip
        at = [ask, rows, cols, self.layout.keys.real, source, target]
        at += [real.flatten().nonzero().squeeze(1)] if kernel.padded else []
        values = [x.value for x in qkv] + [base() for base in bases if base is not None and based]
        return self.trace.do(kernel, *values, at=[*at, *forbidden]), tokens

    def merged(
        self,
        members: Tensor,
        out: Tokens,
        own: Tokens,
        qkv: tuple[Packed, Packed, Packed],
        bases: Sequence[Base | None],
        bans: Bans | None,
    ) -> tuple[Value, Tensor]:
        """Attention of some members over the base's keys and values, and over their own."""
        rows = members % out.rows
        if bases[0] is None:
            return self.filled(members, out, own, qkv, bases, bans)
        turn = torch.argsort(rows, stable=True)
        members, rows = members[turn], rows[turn]
        counts = torch.bincount(rows, minlength=out.rows)
        used = counts.nonzero().squeeze(1)
        most = int(counts.max())
        # The members of each row that has some, [r, w]; those that fill up are the first, and of no account.
        slot = torch.arange(len(members)) - (counts.cumsum(0) - counts)[rows]
        line = torch.searchsorted(used, rows)
        place = line * most + slot
        every = members[:1].expand(len(used) * most).clone()
        every[place] = members
        there = torch.zeros(len(every), dtype=torch.bool)
        there[place] = True
        ask, cols, real, _ = _queries(every, out)
        real &= there[:, None]
        kept = real.flatten().nonzero().squeeze(1)
        tokens = ask[kept]
        shape = (len(used), most, cols.shape[1])
        changed = own.mask[every]
        at = [ask, used, cols.reshape(shape), self.layout.keys.real, kept]
        owned = int(changed.sum(1).max())
        if owned:
            mine, columns, held, _ = _queries(every, own)
            at += [mine, columns.reshape(*shape[:2], -1), held.reshape(*shape[:2], -1)]
            at += [changed.reshape(*shape[:2], -1)]
        forbidden = [] if bans is None else bans.at(every, cols)
        kernel = Merged(self.attention, shape, owned, self.layout.offset, len(forbidden))
        values = [x.value for x in qkv] + [base() for base in bases if base is not None]
        return self.trace.do(kernel, *values, at=[*at, *forbidden]), tokens


def _queries(members: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tokens of some members, padded to one number n.

    Returns:
        Their numbers int64 [m * n] (0 where there is none) and columns [m, n] (again the first of a member, where there
        is none), which are real, bool [m, n], and the numbers of the real ones.
    """
    counts, mask = tokens.counts.numpy()[members.numpy()], tokens.mask.numpy()[members.numpy()]
    n, (member, column) = int(counts.max()), mask.nonzero()
    slot = np.arange(len(member)) - (counts.cumsum() - counts)[member]
    cols, ask = np.zeros((2, len(counts), n), np.int64)
    cols += mask.argmax(1)[:, None]
    cols[member, slot] = column
    numbers = tokens.place.numpy()[members.numpy()[member] * tokens.width + column]
    ask[member, slot] = numbers
    real = np.arange(n) < counts[:, None]
    return torch.from_numpy(ask.reshape(-1)), torch.from_numpy(cols), torch.from_numpy(real), torch.from_numpy(numbers)


def _own(members: Tensor, own: Tokens) -> tuple[Tensor, Tensor]:
    """The numbers of the tokens that members hold, and where they go in [g * T]."""
    member, column = own.mask.numpy()[members.numpy()].nonzero()
    numbers = own.place.numpy()[members.numpy()[member] * own.width + column]
    return torch.from_numpy(numbers), torch.from_numpy(member * own.width + column)


def _consecutive(tokens: Tensor) -> bool:
    return bool((np.diff(tokens.numpy()) == 1).all())


def _in_order(tokens: Tensor) -> bool:
    return bool((tokens.numpy() == np.arange(len(tokens))).all())


def _joined(*args: Tensor) -> Tensor:
    *pieces, back = args
    return torch.cat(pieces).index_select(0, back)
