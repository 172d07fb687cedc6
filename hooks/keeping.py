"""What is kept of a generation: values of some sites, call by call, and put together by the columns of its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .fed import Fed
from .plan.sites import KEY, POS, Site


@dataclass(frozen=True, eq=False)
class Kept:
    """What one call showed.

    Attributes:
        start, stop: the columns of the text that it fed; `prompt`: how many of those the prompt has.
        windows: for each site the column of the text that its first key is.
        values: of the sites, [R, ...].
    """

    start: int
    stop: int
    prompt: int
    windows: tuple[int, ...]
    values: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Keeping:
    """Keeps the values of sites, as edited, of every call that a `generate` makes of its own text.

    Attributes:
        sites: which, with all positions.
        calls: what came so far.
    """

    sites: tuple[Site, ...]
    calls: list[Kept] = field(default_factory=list)

    def note(self, fed: Fed, values: Sequence[Tensor]) -> None:
        """Keep what a call showed."""
        if not fed.generated or fed.text is None:
            return  # of a text of its own, as guidance has one
        windows = fed.layout.windows
        starts = tuple(0 if place.layer is None else windows.get(place.layer, (0, 0))[0] for place in self.sites)
        self.calls.append(Kept(fed.past, fed.text.width, fed.text.prompt, starts, tuple(values)))

    def values(self, width: int, beams: Tensor | None, real: Tensor) -> tuple[Tensor, ...]:
        """The values of each site along a text.

        A column that is fed again, as where tokens that were proposed are rejected, has what came last.

        Args:
            width: the columns of the text that were fed, C.
            beams: int64 [R, S], the row of the batch that each row of the text was in each step; None where these are
                the same. -1 once a row has ended.
            real: bool [R, C], False at padding.
        """
        return tuple(self._of(number, width, beams, real) for number in range(len(self.sites)))

    def _of(self, number: int, width: int, beams: Tensor | None, real: Tensor) -> Tensor:
        place = self.sites[number]
        pos, key = (place.axes.index(axis) if axis in place.axes else None for axis in (POS, KEY))
        assert pos is not None
        first = self.calls[0].values[number]
        shape = [len(real), *first.shape[1:]]
        shape[pos] = width
        if key is not None:
            shape[key] = width
        # Between tokens of different calls there is no attention.
        empty = -torch.inf if place.name == "scores" else 0.0
        whole = first.new_full(shape, empty)
        for call in self.calls:
            value, stop = call.values[number], min(call.stop, width)
            rows = torch.arange(len(real))
            if beams is not None:
                step = min(max(0, call.stop - call.prompt), beams.shape[1] - 1)
                rows = beams[:, step]
            there = (rows >= 0).nonzero()[:, 0].to(value.device)
            part = value[rows.clamp_min(0).to(value.device)[there]].narrow(pos, 0, stop - call.start)
            target = whole[there] if beams is not None else whole
            into = target.narrow(pos, call.start, stop - call.start)
            if key is not None:
                begin = call.windows[number]
                seen = min(part.shape[key], stop - begin)
                into.fill_(empty)
                into, part = into.narrow(key, begin, seen), part.narrow(key, 0, seen)
            into.copy_(part)
            if beams is not None:
                whole[there] = target
        mask = real.to(whole.device)
        mask = mask.reshape([*(len(mask) if n == 0 else width if n == pos else 1 for n in range(whole.ndim))])
        return torch.where(mask, whole, empty)
