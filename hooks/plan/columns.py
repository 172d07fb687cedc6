"""An axis of tokens: which of its columns are real, and the number of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

_NOWHERE = 1 << 62


@dataclass(frozen=True, eq=False)
class Columns:
    """The columns of an activation along queries or keys, on the CPU.

    Attributes:
        index: int64 [B, T], the number of each real token in its row: what positions of sites and random draws mean. It
            never moves, whatever is cached or evicted.
        real: bool [B, T], False at padding.
        lengths: int64 [B], the tokens of each row's prompt, from which negative positions count back.
        rotary: int64 [B, T] or [3, B, T], the positions by which queries and keys are turned; None where it is `index`.
        start: the column of the text that the first of these is, where they are a part of one.
        prompt: how many columns of that text are its prompt, what follows being generated; None where these are all
            that there is, a prompt alone.
        image: int64 [B, T], the number of the image of its row that each token is of, -1 of none; None where nobody
            knows of images.
    """

    index: Tensor
    real: Tensor
    lengths: Tensor
    rotary: Tensor | None = None
    start: int = 0
    prompt: int | None = None
    image: Tensor | None = None

    @property
    def width(self) -> int:
        """Number of columns T, padding included."""
        return self.real.shape[1]

    @property
    def turned(self) -> Tensor:
        """The positions by which queries and keys are turned."""
        return self.index if self.rotary is None else self.rotary

    def find(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Where tokens are.

        Args:
            index: int64 [B, n], their numbers.

        Returns:
            Their columns int64 [B, n], and which of them are there, bool [B, n].
        """
        numbers, columns = self._sorted
        at = torch.searchsorted(numbers, index.contiguous()).clamp_max(self.width - 1)
        return columns.gather(1, at), numbers.gather(1, at) == index

    @property
    def has_prompt(self) -> bool:
        """Whether the whole prompt is among these."""
        return self.prompt is None or (self.start == 0 and self.width >= self.prompt)

    def of_prompt(self, mask: Tensor) -> Tensor:
        """A mask [B, P] over the columns of the prompt as one [B, T] over these; False at what is generated."""
        if self.prompt is None:
            return mask
        filler = mask.new_zeros(len(mask), max(0, self.start + self.width - mask.shape[1]))
        return torch.cat([mask, filler], 1)[:, self.start : self.start + self.width]

    def rows(self, window: slice | Tensor) -> Columns:
        """The same for a range of rows, or for rows by their numbers."""
        rotary = None if self.rotary is None else self.rotary[..., window, :]
        image = None if self.image is None else self.image[window]
        return replace(
            self,
            index=self.index[window],
            real=self.real[window],
            lengths=self.lengths[window],
            rotary=rotary,
            image=image,
        )

    def between(self, start: int, stop: int) -> Columns:
        """The columns from one up to another of the text; those that are not here are nobody's."""
        first, last = start - self.start, min(stop - self.start, self.width)
        pad = (0, stop - self.start - last)
        index, real = (torch.nn.functional.pad(x[:, first:last], pad) for x in (self.index, self.real))
        rotary = None if self.rotary is None else torch.nn.functional.pad(self.rotary[..., first:last], pad)
        image = self.image
        if image is not None:
            image = torch.nn.functional.pad(image[:, first:last], pad, value=-1)
        return replace(self, index=index, real=real, rotary=rotary, start=start, image=image)

    def cut(self, width: int) -> Columns:
        """The first columns alone."""
        rotary = None if self.rotary is None else self.rotary[..., :width]
        image = None if self.image is None else self.image[:, :width]
        real = self.real[:, :width]
        return Columns(self.index[:, :width], real, real.sum(1), rotary, image=image)

    def laid_like(self, other: Columns) -> bool:
        """Whether the same tokens stand in the same columns."""
        if self is other:
            return True
        if self.real.shape != other.real.shape or not torch.equal(self.real, other.real):
            return False
        images = (self.image, other.image)
        if images[0] is not images[1] and not (
            images[0] is not None and images[1] is not None and torch.equal(images[0], images[1])
        ):
            return False
        rotary = (self.rotary, other.rotary)
        if rotary[0] is not rotary[1] and not torch.equal(self.turned, other.turned):
            return False
        return torch.equal(self.index, other.index)

    def like(self, other: Columns) -> bool:
        """Whether these are the same in every respect."""
        if self is other:
            return True
        if (self.start, self.prompt, self.rotary is None) != (other.start, other.prompt, other.rotary is None):
            return False
        alike = self.laid_like(other) and torch.equal(self.lengths, other.lengths)
        return alike and (self.rotary is None or torch.equal(self.rotary, other.turned))

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        """Numbers [B, T] in order, those of padding beyond all, and the columns that they stand in."""
        numbers, columns = torch.where(self.real, self.index, _NOWHERE).sort(dim=1, stable=True)
        return numbers, columns
