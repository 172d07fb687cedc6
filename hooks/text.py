"""What stands in the columns of a batch that is decoded: which are real, which the prompt's, and whose each row is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .layout import Layout
from .plan.columns import Columns

PIECES, UNSEEN = "pieces", "unseen"


@dataclass(frozen=True, eq=False)
class Text:
    """Rows of tokens, of which some are fed in each call and the others are cached.

    Attributes:
        real: bool [B, C], False at padding.
        prompt: how many columns the prompt has, of which some may still come; what follows it is generated.
        lengths: int64 [B], the tokens of each row's prompt.
        rows: int64 [B], the row of the plan that each row goes on from, which is also its identity.
        total: how many rows the plan is for.
        several: whether the last call fed several tokens.
        image: int64 [B, C], the number of the image of its row that each is of, -1 of none; None where nobody knows.
        doubt: why nobody knows where the prompt ends: it comes in `PIECES`, or its beginning was `UNSEEN`; or nothing.
    """

    real: Tensor
    prompt: int
    lengths: Tensor
    rows: Tensor
    total: int
    several: bool = False
    doubt: str = ""
    image: Tensor | None = None

    @classmethod
    def of(cls, real: Tensor, image: Tensor | None = None) -> Text:
        """Prompts, one a row."""
        rows = torch.arange(len(real))
        return cls(real, real.shape[1], real.sum(1), rows, len(real), real.shape[1] > 1, image=image)

    @property
    def width(self) -> int:
        """Number of columns C."""
        return self.real.shape[1]

    @property
    def columns(self) -> Columns:
        """All tokens, as an axis of keys."""
        index = (self.real.long().cumsum(1) - 1).clamp_min(0)
        image = self.image
        if image is not None:
            image = torch.nn.functional.pad(image, (0, self.width - image.shape[1]), value=-1)
        return Columns(index, self.real, self.lengths, prompt=self.prompt, image=image)

    def cut(self, width: int) -> Text:
        """The first columns alone, as where tokens that were proposed are rejected."""
        return replace(self, real=self.real[:, :width], image=None if self.image is None else self.image[:, :width])

    def take(self, rows: Tensor) -> Text:
        """Other rows, each of which goes on from one of these."""
        rows = rows.to("cpu", torch.int64)
        image = None if self.image is None else self.image[rows]
        return replace(self, real=self.real[rows], lengths=self.lengths[rows], rows=self.rows[rows], image=image)

    def fed(self, real: Tensor) -> Text:
        """The text with the columns [B, T] of one more call: one is generated, several are a turn, with a new prompt.

        All that stands before the last token of a turn is then its prompt.
        """
        joined, several = torch.cat([self.real, real], 1), real.shape[1] > 1
        doubt = "" if self.doubt == PIECES else self.doubt
        if not several:
            return replace(self, real=joined, several=False, doubt=doubt)
        doubt = PIECES if self.several else ""
        return replace(self, real=joined, prompt=joined.shape[1], lengths=joined.sum(1), several=True, doubt=doubt)

    def layout(self, past: int, kept: int | None, windows: Mapping[int, tuple[int, int]]) -> Layout:
        """The layout of a call that feeds what comes after the first `past` columns; see `Layout`."""
        keys = self.columns
        if past == 0 and self.width == self.prompt:
            keys = replace(keys, prompt=None)
        queries = keys.between(past, self.width) if past else keys
        kept = None if kept is None or kept >= queries.width else kept
        same = self.total == len(self.rows) and torch.equal(self.rows, torch.arange(self.total))
        return Layout(
            self.rows,
            queries,
            keys,
            kept=kept,
            windows={layer: at for layer, at in windows.items() if at != (0, self.width)},
            origin=None if same else self.rows,
            given=None if same else self.total,
        )
