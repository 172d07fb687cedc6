"""What a writer's output is replaced by: another run's, zero, a mean over reference prompts, or one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from hooks import Inputs, InputsError, choice
from interp.paths.nodes import Writer
from interp.paths.streams import Streams

VALUES = ("patch", "zero", "mean", "resample")


@dataclass(frozen=True, eq=False)
class Means:
    """What writers add on average over reference prompts.

    Attributes:
        of: from a writer to its mean, [P, M] at each position, or [M] over all of them.
        positions: P; None where all positions have one mean.
    """

    of: Callable[[Writer], Tensor]
    positions: int | None

    @classmethod
    def over(cls, reference: Streams, pooled: bool) -> Means:
        """The means over a run of reference prompts, each computed when it is first asked for."""
        longest = None if pooled else int(reference.inputs.lengths.max())
        return cls(cache(lambda writer: _mean(reference, writer, longest)), longest)

    def only(self, writers: Iterable[Writer]) -> Means:
        """Those of some writers, computed now, so that the reference run need not be kept."""
        return Means({writer: self.of(writer) for writer in writers}.__getitem__, self.positions)

    def require(self, inputs: Inputs) -> None:
        """Raise InputsError unless every position of these prompts has a mean."""
        longest = int(inputs.lengths.max())
        if self.positions is not None and self.positions < longest:
            raise InputsError(
                f"the reference prompts have at most {self.positions} tokens, and position {longest - 1} needs a mean: "
                "give longer ones, or pooled=True"
            )


def _mean(run: Streams, writer: Writer, positions: int | None) -> Tensor:
    value, inputs = run.writer(writer), run.inputs
    value = value * inputs.mask.to(value.device)[..., None]
    if positions is None:
        return value.sum((0, 1)) / inputs.lengths.sum().to(value)
    # Row by row the columns are put in the order of positions, so that padding on either side is the same.
    order = inputs.order[:, :positions, None].to(value.device)
    by_position = value.gather(1, order.expand(-1, -1, value.shape[-1])).sum(0)
    counts = (inputs.lengths[:, None] > torch.arange(positions)).sum(0)
    return by_position / counts.to(value)[:, None]


@dataclass(frozen=True, eq=False)
class Source:
    """The values c_u that writers' outputs are replaced by.

    Attributes:
        kind: one of `VALUES`.
        inputs: of the run that is edited.
        run: the run that values are taken from, where there is one (patch, resample).
        means: of "mean".

    Raises:
        InputsError: a position has no mean.
    """

    kind: str
    inputs: Inputs
    run: Streams | None = None
    means: Means | None = None

    def __post_init__(self) -> None:
        if self.means is not None:
            self.means.require(self.inputs)

    def rows(self, window: slice) -> Source:
        """The same for a range of rows."""
        run = None if self.run is None else self.run.rows(window)
        return Source(self.kind, self.inputs.rows(window), run, self.means)

    def writer(self, writer: Writer, base: Tensor) -> Tensor:
        """c_u [B, T, M], given the edited run's own a_u (for its shape)."""
        if self.run is not None:
            return self.run.writer(writer)
        if self.means is None:
            return torch.zeros_like(base)
        mean = self.means.of(writer)
        return mean.expand_as(base) if mean.ndim == 1 else mean[self.inputs.positions.to(mean.device)]


def check_reference(values: str, reference: Inputs | None, pooled: bool) -> None:
    """Raise InputsError unless there are reference prompts exactly where values are taken from some."""
    takes = values in ("mean", "resample")
    if takes and reference is None:
        raise InputsError(f"values={values!r} takes them from reference prompts: give reference=model.inputs(...)")
    if not takes and reference is not None:
        raise InputsError(f"values={values!r} takes nothing from reference prompts; 'mean' and 'resample' do")
    if takes and not isinstance(reference, Inputs):
        raise InputsError(f"reference is {type(reference).__name__}: prepare prompts with model.inputs(...)")
    if pooled and values != "mean":
        raise InputsError(f"pooled=True is of a mean over all positions, and values={values!r}")


def laid_like(inputs: Inputs, like: Inputs) -> Inputs:
    """The rows of one batch, as long as those of another and padded where it is; longer ones are cut short."""
    if inputs.mask.shape == like.mask.shape and bool((inputs.mask == like.mask).all()):
        return inputs
    if inputs.pictures is not None or like.pictures is not None:
        raise InputsError("reference prompts with images stand for rows of their own length alone")
    in_order = inputs.ids.gather(1, inputs.order)
    ids = torch.where(like.mask, in_order.gather(1, like.positions.clamp_max(inputs.width - 1)), 0)
    return replace(inputs, ids=ids, mask=like.mask)


def _take(inputs: Inputs, rows: Tensor) -> Inputs:
    tokens = None if inputs.tokens is None else tuple(inputs.tokens[i] for i in rows.tolist())
    pixels = None if inputs.pixels is None else inputs.pixels[rows]
    ids, mask, row_ids = inputs.ids[rows], inputs.mask[rows], inputs.row_ids[rows]
    pictures = None if inputs.pictures is None else inputs.pictures.rows(rows)
    return replace(inputs, ids=ids, mask=mask, row_ids=row_ids, tokens=tokens, pixels=pixels, pictures=pictures)


def donors(reference: Inputs, edited: Inputs, seed: int) -> Inputs:
    """A reference row for each row that is edited, drawn by that row's id and the seed, and laid as it is.

    Raises:
        InputsError: a reference row is shorter than one that it may stand for.
    """
    shortest, longest = int(reference.lengths.min()), int(edited.lengths.max())
    if shortest < longest:
        raise InputsError(
            f"a reference prompt of {shortest} tokens cannot stand for one of {longest}: give longer ones"
        )
    # Not by the row's place in the batch: alone, or in another batch, it has the same donor.
    return laid_like(_take(reference, choice(len(reference), seed, edited.row_ids)), edited)
