"""Ranges of positions: of the prompt, and of the tokens that a generation adds to it."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

from torch import Tensor

from ..errors import SiteError
from .encoding import Put, Record


@dataclass(frozen=True)
class Span:
    """Positions from `start` up to but not including `stop` (None: open); negative numbers count from the end."""

    start: int | None = None
    stop: int | None = None

    def __post_init__(self) -> None:
        for name in ("start", "stop"):
            bound = getattr(self, name)
            if bound is not None and (not isinstance(bound, Integral) or isinstance(bound, bool)):
                raise SiteError(f"the ends of a slice are ints or open, not {bound!r}")
            object.__setattr__(self, name, None if bound is None else int(bound))

    def encoded(self, put: Put) -> dict[str, Any]:
        """The span as data."""
        return SPAN.encoded(self, put)

    def __str__(self) -> str:
        return f"{'' if self.start is None else self.start}:{'' if self.stop is None else self.stop}"


@dataclass(frozen=True)
class New:
    """Generated tokens, numbered from 0, as positions of a site: from `start` up to but not including `stop`.

    The first of them is the token that the prompt's last one predicts, and it is edited when it is fed in its turn.

    Attributes:
        start: the first that is meant.
        stop: the first that no longer is; None for all that come.
        step: every how many.
    """

    start: int = 0
    stop: int | None = None
    step: int = 1

    def __post_init__(self) -> None:
        for name in ("start", "stop", "step"):
            bound = getattr(self, name)
            if bound is None and name == "stop":
                continue
            if not isinstance(bound, Integral) or isinstance(bound, bool):
                raise SiteError(f"new tokens are counted by ints, not {name}={bound!r}")
            object.__setattr__(self, name, int(bound))
        if self.start < 0 or self.step < 1 or (self.stop is not None and self.stop <= self.start):
            raise SiteError(
                f"{self}: new tokens are counted from 0 on, up to a later one; nobody knows how many will come, so "
                "none is counted from the end"
            )

    def holds(self, number: Tensor) -> Tensor:
        """Which of some tokens are meant, given the number of each (that of the first generated one is 0)."""
        chosen = (number >= self.start) & ((number - self.start) % self.step == 0)
        return chosen if self.stop is None else chosen & (number < self.stop)

    def encoded(self, put: Put) -> dict[str, Any]:
        """The schedule as data."""
        return NEW.encoded(self, put)

    def __str__(self) -> str:
        if self == New():
            return "new"
        step = "" if self.step == 1 else f":{self.step}"
        return f"new[{self.start}:{'' if self.stop is None else self.stop}{step}]"


def new(start: int = 0, stop: int | None = None, step: int = 1) -> New:
    """The tokens that a generation adds, as positions of a site: ``site("resid_post", 3, pos=new(0, 5))``.

    Args:
        start: number of the first that is meant; that of the first generated token is 0.
        stop: the first that no longer is; None for all that come. ``pos="new"`` is ``pos=new()``.
        step: every how many.

    Raises:
        SiteError: they are counted from the end, which nobody knows, or none is meant.
    """
    return New(start, stop, step)


SPAN = Record("span", {"start": (int, type(None)), "stop": (int, type(None))}, Span)
NEW = Record("new", {"start": (int,), "stop": (int, type(None)), "step": (int,)}, New)
"""How they stand in a file."""
