"""Ranges of positions: of the prompt, of its images, and of the tokens that a generation adds to it."""

from __future__ import annotations

import re
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


@dataclass(frozen=True)
class Image:
    """The tokens of images, as positions of a site, in each row those that it has: ``pos="image"`` all, ``"image 0"``
    those of its first.

    In a tower these are an image's patches, with its class token where it has one; in the language model the tokens
    that the image's features stand at. A k-th token of an image corresponds to the k-th of an image in another row,
    wherever in the text either is.

    Attributes:
        number: which image of the row, from 0; None for all.
    """

    number: int | None = None

    def __post_init__(self) -> None:
        if self.number is not None and (not isinstance(self.number, int) or self.number < 0):
            raise SiteError(f"images of a row are numbered from 0 on, not {self.number!r}")

    @classmethod
    def named(cls, name: str) -> Image | None:
        """The span that a name says, as ``"image"`` or ``"image 1"``; None where it says something else."""
        match = re.fullmatch(r"image(?: (\d+))?", name)
        return None if match is None else cls(None if match[1] is None else int(match[1]))

    def holds(self, image: Tensor) -> Tensor:
        """Which tokens are meant, given the number of the image that each is of (-1 of none)."""
        return image >= 0 if self.number is None else image == self.number

    def encoded(self, put: Put) -> dict[str, Any]:
        """The span as data."""
        return IMAGE.encoded(self, put)

    def __str__(self) -> str:
        return "image" if self.number is None else f"image {self.number}"


SPAN = Record("span", {"start": (int, type(None)), "stop": (int, type(None))}, Span)
NEW = Record("new", {"start": (int,), "stop": (int, type(None)), "step": (int,)}, New)
IMAGE = Record("image", {"number": (int, type(None))}, Image)
"""How they stand in a file."""
