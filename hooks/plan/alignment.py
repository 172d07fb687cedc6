"""Two batches laid side by side: which rows and positions correspond, and where they differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputsError
from .inputs import Inputs


@dataclass(frozen=True)
class Alignment:
    """Two batches laid side by side, row by row and position by position.

    Attributes:
        clean, corrupt: the batches.
        differs: bool [B, P], True where the token at that position differs.
    """

    clean: Inputs
    corrupt: Inputs
    differs: Tensor

    @property
    def first_difference(self) -> Tensor:
        """int64 [B]: the first position at which a row differs, or its length where it does not."""
        never = ~self.differs.any(1)
        return torch.where(never, self.clean.lengths, self.differs.long().argmax(1))

    def __str__(self) -> str:
        lines = []
        for row in range(len(self.clean)):
            a, b = self.clean.labels(row), self.corrupt.labels(row)
            cells = []
            for x, y, other in zip(a, b, self.differs[row].tolist(), strict=False):
                cells.append(f"[{x} | {y}]" if x != y else f"[{x}]" if other else x)
            lines.append(f"row {row}: " + " ".join(repr(c)[1:-1] for c in cells))
        return "\n".join(lines)

    __repr__ = __str__


def align(clean: Inputs, corrupt: Inputs) -> Alignment:
    """Check that two batches have the same number of rows, and rows of the same length.

    Raises:
        InputsError: they do not; the message prints the tokens from the first difference on. Or prompts stand beside
            images, or images beside others of another size.
    """
    shapes = [None if x.pixels is None else (list(x.pixels.shape[1:]), x.patch, x.prefix) for x in (clean, corrupt)]
    if shapes[0] != shapes[1]:
        raise InputsError(f"rows that do not correspond: clean is {clean!r}, corrupt {corrupt!r}")
    if len(clean) != len(corrupt):
        raise InputsError(f"{len(clean)} clean prompts and {len(corrupt)} corrupt ones: a row is a pair")
    for row, (n, m) in enumerate(zip(clean.lengths.tolist(), corrupt.lengths.tolist(), strict=True)):
        if n != m:
            a, b = clean.labels(row), corrupt.labels(row)
            start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(n, m))
            raise InputsError(
                f"pair {row} has {n} clean tokens and {m} corrupt ones, so positions do not correspond.\n"
                f"  from position {start} on, clean:   {list(a[start:])}\n"
                f"  from position {start} on, corrupt: {list(b[start:])}\n"
                "Word the prompts so that they tokenize to the same length."
            )
    if (clean.source is None) != (corrupt.source is None):
        raise InputsError(f"rows that do not correspond: clean is {clean!r}, corrupt {corrupt!r}")
    if clean.source is not None and corrupt.source is not None:
        align(clean.source, corrupt.source)
    width = int(clean.lengths.max())
    a, b = (_in_order(x)[:, :width] for x in (clean, corrupt))
    real = torch.arange(width) < clean.lengths[:, None]
    return Alignment(clean, corrupt, (a != b).any(-1) & real)


def _in_order(inputs: Inputs) -> Tensor:
    """What stands in each column [B, T, n], the real ones first."""
    contents = inputs.contents()
    return contents.gather(1, inputs.order[..., None].expand_as(contents))
