"""The images of a batch of prompts: which row each is of, which tokens of the text and of the tower are its own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .columns import Columns
from .encoding import Put, Record


@dataclass(frozen=True, eq=False)
class Pictures:
    """The images of a batch of prompts as their processor made them, on the CPU.

    Attributes:
        tensors: what the model is called with besides tokens, by name.
        parts: for each of those, int64 [n], how many entries of its first axis each image has; where it is not named,
            its first axis is rows, and the second the images of a row.
        row: int64 [n], the row that each image is of, in ascending order.
        patches: int64 [n], how many tokens it has in the tower.
        image: int64 [B, T], the number of the image of its row that each token of the text is of; -1 of none.
        order: int64 [N], where the tower keeps each of its tokens, these counted row by row, image by image and from
            the left and the top of each; None where that is how it keeps them. `embedded`: the same of what its
            embedding returns.
        rotary: int64 [3, B, T], positions of the text in time, height and width; None where they are one number.
    """

    tensors: Mapping[str, Tensor]
    parts: Mapping[str, Tensor]
    row: Tensor
    patches: Tensor
    image: Tensor
    order: Tensor | None = None
    embedded: Tensor | None = None
    rotary: Tensor | None = None

    def __len__(self) -> int:
        return len(self.row)

    @property
    def count(self) -> int:
        """Number of rows B of the batch, with images or without."""
        return len(self.image)

    @cached_property
    def lengths(self) -> Tensor:
        """int64 [B], the tokens of the tower that each row has."""
        return torch.zeros(self.count, dtype=torch.int64).scatter_add(0, self.row, self.patches)

    @cached_property
    def number(self) -> Tensor:
        """int64 [n], the number of each image in its row."""
        before = torch.arange(len(self)) - torch.searchsorted(self.row, self.row)
        return before

    @cached_property
    def columns(self) -> Columns:
        """The tokens of the tower, a row of them for each row of the text."""
        width = int(self.lengths.max()) if self.count else 0
        index = torch.arange(width).expand(self.count, -1)
        real = index < self.lengths[:, None]
        image = torch.full((self.count, width), -1)
        image[real] = self.number.repeat_interleave(self.patches)
        return Columns(torch.where(real, index, 0), real, self.lengths, image=image)

    @cached_property
    def marks(self) -> Tensor:
        """int64 [n], a number for what each image shows: alike images have the same."""
        found = []
        for number in range(len(self)):
            digest = hashlib.blake2b(digest_size=7)
            for name, value in sorted(self._tensors_of(number).items()):
                digest.update(name.encode() + str((value.dtype, tuple(value.shape))).encode())
                digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
            found.append(int.from_bytes(digest.digest(), "little"))
        return torch.tensor(found, dtype=torch.int64)

    def seen(self) -> Tensor:
        """int64 [B, T], what the image shows that each token of the text is of (see `marks`); -1 of none."""
        table = torch.full((self.count, int(self.number.max()) + 1 if len(self) else 1), -1)
        table[self.row, self.number] = self.marks
        return torch.where(self.image >= 0, table.gather(1, self.image.clamp_min(0)), -1)

    def _tensors_of(self, number: int) -> dict[str, Tensor]:
        return {name: self._entries(name, [number]) for name in self.tensors}

    def _entries(self, name: str, images: Sequence[int]) -> Tensor:
        """What a tensor holds of some images, along its first axis."""
        value = self.tensors[name]
        if name not in self.parts:
            return value[self.row[list(images)], self.number[list(images)]]
        ends = self.parts[name].cumsum(0)
        return torch.cat([value[:0], *(value[int(ends[i] - self.parts[name][i]) : int(ends[i])] for i in images)])

    def rows(self, index: Any) -> Pictures:
        """The images of some rows, which are numbered anew in that order."""
        chosen = torch.arange(self.count)[index]
        images = [i for row in chosen.tolist() for i in (self.row == row).nonzero().flatten().tolist()]
        if images == list(range(len(self))) and len(chosen) == self.count:
            return self
        where = torch.tensor(images, dtype=torch.int64)
        tensors = {n: self._entries(n, images) if n in self.parts else v[chosen] for n, v in self.tensors.items()}
        count = torch.bincount(self.row, minlength=self.count)[chosen]
        orders = {}
        for name in ("order", "embedded"):
            orders[name] = _order_of(getattr(self, name), self.patches, where)
        return Pictures(
            tensors,
            {name: part[where] for name, part in self.parts.items()},
            torch.arange(len(chosen)).repeat_interleave(count),
            self.patches[where],
            self.image[chosen],
            rotary=None if self.rotary is None else self.rotary[:, chosen],
            **orders,
        )

    def stand_like(self, other: Pictures) -> bool:
        """Whether other images have as many tokens of the tower in each row, in the same places."""
        mine, its = ((one.patches, one.row, one.order, one.embedded) for one in (self, other))
        return self.count == other.count and all(
            a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(mine, its, strict=True)
        )

    def encoded(self, put: Put) -> dict[str, Any]:
        """The images as data."""
        return PICTURES.encoded(self, put)

    @property
    def named_tensors(self) -> tuple[tuple[str, Tensor], ...]:
        """`tensors`, as a tuple."""
        return tuple(sorted(self.tensors.items()))

    @property
    def named_parts(self) -> tuple[tuple[str, Tensor], ...]:
        """`parts`, as a tuple."""
        return tuple(sorted(self.parts.items()))


def joined(several: Sequence[Pictures]) -> Pictures:
    """The images of several batches, one after another along the rows. Rows of the text are as wide in all."""
    if len(several) == 1:
        return several[0]
    first = several[0]
    starts = torch.tensor([0, *(p.count for p in several)]).cumsum(0).tolist()
    orders: dict[str, Tensor | None] = {}
    for name in ("order", "embedded"):
        found = [getattr(p, name) for p in several]
        ends = torch.tensor([0, *(int(p.patches.sum()) for p in several)]).cumsum(0).tolist()
        orders[name] = (
            None
            if all(order is None for order in found)
            else torch.cat(
                [
                    at + (torch.arange(int(p.patches.sum())) if order is None else order)
                    for p, order, at in zip(several, found, ends, strict=False)
                ]
            )
        )
    names = {name for p in several for name in p.tensors}
    return Pictures(
        {name: _stacked([p.tensors[name] for p in several if name in p.tensors]) for name in names},
        {name: torch.cat([p.parts[name] for p in several if name in p.parts]) for name in first.parts},
        torch.cat([p.row + at for p, at in zip(several, starts, strict=False)]),
        torch.cat([p.patches for p in several]),
        torch.cat([p.image for p in several]),
        rotary=None if first.rotary is None else torch.cat([p.rotary for p in several if p.rotary is not None], 1),
        **orders,
    )


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """Tensors along their first axis; those smaller elsewhere (images of fewer tiles) are filled with zeros."""
    shape = [max(sizes) for sizes in zip(*(v.shape[1:] for v in values), strict=True)]
    return torch.cat(
        [
            torch.nn.functional.pad(
                v, [n for size, whole in zip(v.shape[:0:-1], shape[::-1], strict=True) for n in (0, whole - size)]
            )
            for v in values
        ]
    )


def _order_of(order: Tensor | None, patches: Tensor, images: Tensor) -> Tensor | None:
    """The order of tokens in a tower that is given some of the images alone, each of which it keeps together."""
    if order is None:
        return None
    starts = patches.cumsum(0) - patches
    new = patches[images].cumsum(0) - patches[images]
    pieces = [
        order[int(starts[i]) : int(starts[i] + patches[i])] - starts[i] + at
        for i, at in zip(images.tolist(), new, strict=True)
    ]
    return torch.cat([order[:0], *pieces])


def number_images(ids: Tensor, token: int, tokens: Sequence[int]) -> tuple[Tensor, Tensor, int]:
    """Which image each token of a text is of, given how many tokens each has.

    Args:
        ids: int64 [B, T].
        token: the id that stands where an image's features go.
        tokens: of each image, in the order in which they fill the places.

    Returns:
        The number of the image of its row [B, T] (-1 of none), the row of each image [n], and how many places are
        left, negative where there are too few, or where an image would go on in the next row.
    """
    places = (ids == token).to("cpu")
    image, rows = torch.full(ids.shape, -1), []
    at, left = 0, 0
    for row, mine in enumerate(places):
        columns, number = mine.nonzero().flatten(), 0
        while len(columns) and at < len(tokens) and tokens[at] <= len(columns):
            image[row, columns[: tokens[at]]] = number
            columns, number = columns[tokens[at] :], number + 1
            rows.append(row)
            at += 1
        left += len(columns)
        if len(columns):
            break
    if at < len(tokens):
        left = -1
    return image, torch.tensor(rows, dtype=torch.int64), left


def _pictures(named_tensors: tuple, named_parts: tuple, **rest: Any) -> Pictures:
    return Pictures(dict(named_tensors), dict(named_parts), **rest)


_MAYBE = (Tensor, type(None))
PICTURES = Record(
    "pictures",
    {"named_tensors": (tuple,), "named_parts": (tuple,)}
    | {name: (Tensor,) for name in ("row", "patches", "image")}
    | {name: _MAYBE for name in ("order", "embedded", "rotary")},
    _pictures,
)
"""How images of prompts stand in a file."""
