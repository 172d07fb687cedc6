"""What the built-in metrics compute of the logits: functions as data, at the positions that each row has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hooks import POS, Index, Inputs, MetricError, Model, Site, Span, resolve

Rows = slice | Tensor
"""Rows of the inputs: some in order, or int64 [n] on the CPU, in which a row stands once for each world."""


@dataclass(frozen=True, eq=False)
class RowMean:
    """The mean over the positions [b, n] that each row has: a row with fewer than the widest is filled up.

    Attributes:
        real: bool [B, n], False where a row is filled up; None where none is.
    """

    real: Tensor | None

    def __call__(self, rows: Rows, x: Tensor) -> Tensor:
        if self.real is None:
            return x.mean(1)
        counts = self.real[rows].to(x.device)
        return torch.where(counts, x, 0).sum(1) / counts.sum(1)


@dataclass(frozen=True, eq=False)
class Places:
    """The positions of the logits that a metric reads.

    Attributes:
        pos: as a site takes them.
        counts: int64 [B], how many each row has.
        mean: the mean over them.
        single: whether they are one position in every row, and meant to be.
    """

    pos: Index
    counts: Tensor
    mean: RowMean
    single: bool

    @classmethod
    def of(cls, model: Model, inputs: Inputs, pos: Index) -> Places:
        """Resolve positions on inputs.

        Raises:
            MetricError: a row has none of them.
            SiteError: a row lacks one that is listed.
        """
        # All positions as a slice: a site without restriction has the columns of the batch, padding and all.
        place = Site("logits", pos=Span() if pos is None else pos)
        model.require(place.whole)
        sizes = model.sizes[place.key]
        region = resolve(place, inputs.columns, sizes)
        real = None if region.valid is None else region.valid[..., 0]
        counts = torch.full((len(inputs),), region.shape[POS]) if real is None else real.sum(1)
        without = (counts == 0).nonzero().flatten().tolist()
        if without:
            raise MetricError(f"rows {without} have no position at {place}, so there is nothing to measure there")
        alone = sizes.get(POS) == 1 or _is_single(place.pos)
        return cls(place.pos, counts, RowMean(real), alone and bool((counts == 1).all()))

    def site(self, dim: Index = None) -> Site:
        """What is read there: all logits, or those of some tokens."""
        return Site("logits", pos=self.pos, dim=dim)

    def require(self, tokens: int) -> None:
        """Raise MetricError unless each row has as many positions as an answer has tokens, one for each."""
        if bool((self.counts != tokens).any()):
            low, high = int(self.counts.min()), int(self.counts.max())
            some = f"{low} positions" if low == high else f"{low} to {high} positions, depending on the row"
            raise MetricError(
                f"{tokens} answer tokens for {some}: an answer has one token for each position that is read; list the "
                "positions, as pos=(-3, -2), name one, pos=-1, at which several tokens are alternatives, or say "
                "pos='answer' of texts that end with it"
            )


def _is_single(pos: Index) -> bool:
    """Whether an index means one position whatever the lengths of the rows; a mask is what it selects."""
    if isinstance(pos, Tensor):
        return pos.dtype == torch.bool or pos.ndim == 1 or pos.shape[1] == 1
    if isinstance(pos, Span):
        if pos.stop is None:
            return pos.start == -1
        start = pos.start or 0
        return (start < 0) == (pos.stop < 0) and pos.stop - start == 1
    return isinstance(pos, int) or (isinstance(pos, tuple) and len(pos) == 1)


def wide(x: Tensor) -> Tensor:
    """At least float32: half-precision logits lose differences that matter."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True, eq=False)
class Own:
    """A function of the user's, of the values alone; it is given the rows of one world at a time."""

    fn: Callable[..., Any]
    alone: ClassVar[bool] = True

    def __call__(self, rows: Rows, *values: Tensor) -> Any:
        return self.fn(*values)


@dataclass(frozen=True, eq=False)
class LogitDiff:
    """The mean of the first `width` columns minus that of the others."""

    width: int
    mean: RowMean

    def __call__(self, rows: Rows, logits: Tensor) -> Tensor:
        x = wide(logits)
        return self.mean(rows, x[..., : self.width].mean(2) - x[..., self.width :].mean(2))


@dataclass(frozen=True, eq=False)
class Logit:
    """The mean of all columns that are read."""

    mean: RowMean

    def __call__(self, rows: Rows, logits: Tensor) -> Tensor:
        return self.mean(rows, wide(logits).mean(2))


@dataclass(frozen=True, eq=False)
class LogProb:
    """Log-probability of any of the tokens [B, n] at one position; one named `again`, bool [B, n], counts once."""

    chosen: Tensor
    again: Tensor | None
    exp: bool

    def __call__(self, rows: Rows, logits: Tensor) -> Tensor:
        found = wide(logits)[:, 0].log_softmax(-1).gather(1, self.chosen[rows].to(logits.device))
        if self.again is not None:
            found = found.masked_fill(self.again[rows].to(logits.device), -torch.inf)
        found = found.logsumexp(1)
        return found.exp() if self.exp else found


@dataclass(frozen=True, eq=False)
class Spelling:
    """The tokens [B, n] of answers, one at each of n positions.

    Attributes:
        chosen: int64 [B, n].
        real: bool [B, n], False where a row's answer is shorter, and so is filled up.
    """

    chosen: Tensor
    real: Tensor

    def of(self, rows: Rows, like: Tensor) -> tuple[Tensor, Tensor]:
        """Both for some rows, beside logits."""
        return self.chosen[rows].to(like.device), self.real[rows].to(like.device)

    def log_prob(self, rows: Rows, logp: Tensor) -> Tensor:
        """The summed log-probability [b] of the answers, of log-probabilities [b, m, V] at m >= n positions."""
        chosen, real = self.of(rows, logp)
        each = logp[:, : chosen.shape[1]].gather(2, chosen[:, :, None])[:, :, 0]
        return torch.where(real, each, 0).sum(1)


@dataclass(frozen=True, eq=False)
class SpelledLogProb:
    """Log-probability of answers of several tokens."""

    answer: Spelling
    exp: bool

    def __call__(self, rows: Rows, logits: Tensor) -> Tensor:
        found = self.answer.log_prob(rows, wide(logits).log_softmax(-1))
        return found.exp() if self.exp else found


@dataclass(frozen=True, eq=False)
class SpelledDiff:
    """Log-probability of answers of several tokens minus that of foils."""

    answer: Spelling
    foil: Spelling

    def __call__(self, rows: Rows, logits: Tensor) -> Tensor:
        logp = wide(logits).log_softmax(-1)
        return self.answer.log_prob(rows, logp) - self.foil.log_prob(rows, logp)


@dataclass(frozen=True, eq=False)
class SpelledRank:
    """How many logits are higher than that of an answer's token, for the token of which that is most."""

    answer: Spelling

    def __call__(self, rows: Rows, logits: Tensor) -> Tensor:
        chosen, real = self.answer.of(rows, logits)
        higher = _counted((logits > logits.gather(2, chosen[:, :, None])).sum(2), logits)
        return torch.where(real, higher, 0).amax(1)


@dataclass(frozen=True, eq=False)
class SpelledAccuracy:
    """Whether each of an answer's tokens has the highest logit in its turn."""

    answer: Spelling

    def __call__(self, rows: Rows, logits: Tensor) -> Tensor:
        chosen, real = self.answer.of(rows, logits)
        hit = _counted(logits.argmax(-1) == chosen, logits)
        return torch.where(real, hit, 1).amin(1)


@dataclass(frozen=True, eq=False)
class Rank:
    """How many logits are higher than the best of the tokens' [B, n]."""

    chosen: Tensor
    mean: RowMean

    def __call__(self, rows: Rows, logits: Tensor) -> Tensor:
        chosen = self.chosen[rows].to(logits.device)[:, None].expand(-1, logits.shape[1], -1)
        best = logits.gather(2, chosen).amax(2, keepdim=True)
        return self.mean(rows, _counted((logits > best).sum(2), logits))


@dataclass(frozen=True, eq=False)
class Accuracy:
    """Whether one of the tokens [B, n] has the highest logit."""

    chosen: Tensor
    mean: RowMean

    def __call__(self, rows: Rows, logits: Tensor) -> Tensor:
        top = logits.argmax(-1, keepdim=True)
        hit = (top == self.chosen[rows].to(logits.device)[:, None]).any(2)
        return self.mean(rows, _counted(hit, logits))


def _counted(counts: Tensor, logits: Tensor) -> Tensor:
    """Counts as numbers, nan where a logit is: a comparison with it does not tell."""
    return counts.to(wide(logits).dtype).masked_fill(logits.isnan().any(-1), torch.nan)


@dataclass(frozen=True, eq=False)
class Divergence:
    """KL(other || run) of the next token."""

    mean: RowMean

    def __call__(self, rows: Rows, logits: Tensor, other: Tensor) -> Tensor:
        ours, theirs = wide(logits).log_softmax(-1), wide(other).log_softmax(-1)
        # Where the other has probability 0 there is nothing to add, whatever the run has: 0 log 0 is 0.
        each = torch.where(theirs == -torch.inf, 0, theirs.exp() * (theirs - ours))
        return self.mean(rows, each.sum(-1))


@dataclass(frozen=True, eq=False)
class CrossEntropy:
    """Mean loss over the target tokens [B, n] that count, bool [B, n]."""

    target: Tensor
    counts: Tensor

    def __call__(self, rows: Rows, logits: Tensor) -> Tensor:
        chosen, counts = self.target[rows].to(logits.device), self.counts[rows].to(logits.device)
        loss = -wide(logits).log_softmax(-1).gather(2, chosen[:, :, None])[:, :, 0]
        return torch.where(counts, loss, 0).sum(1) / counts.sum(1)
