"""What a writer's output is replaced by: another run's, zero, a mean over reference prompts, or one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby

import torch
from torch import Tensor

from hooks import Inputs, Model, World, align
from hooks.errors import InputsError, PathError, nearest
from interp.paths.nodes import Writer
from interp.paths.streams import Streams, require_additive, streams
from interp.sweeps import check_model

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


@dataclass(frozen=True, eq=False)
class Pair:
    """The run that is edited, and what its writers' outputs are replaced by.

    Attributes:
        base: the edited run a.
        source: the values c.
        direction: "denoising", "noising" or "ablation".
    """

    base: Streams
    source: Source
    direction: str

    @property
    def other(self) -> World | None:
        """The world that values are patched from; None where they are no counterpart's, as in an ablation."""
        run = self.source.run
        return World(run.inputs) if run is not None and self.source.kind == "patch" else None

    def rows(self, window: slice) -> Pair:
        """The same for a range of rows."""
        return Pair(self.base.rows(window), self.source.rows(window), self.direction)

    def stack(self, writers: Sequence[Writer]) -> Tensor:
        """d_u = c_u - a_u of several writers, [U, B, T, M]; zero at padding."""
        real = self.base.inputs.mask.to(self.base.embedded.device)[..., None]
        found: dict[Writer, Tensor] = {}
        for layer, group in groupby(sorted(writers, key=lambda w: w.time), key=lambda w: w.layer):
            mine = list(group)
            heads = [w for w in mine if w.head is not None]
            if len(heads) > 2 and (self.source.run is not None or self.source.kind == "zero"):
                # All heads of a layer in one product.
                own = self.base.heads(layer)
                change = -own if self.source.run is None else self.source.run.heads(layer) - own
                found |= {w: change[:, :, w.head] for w in heads}
            for w in mine:
                if w not in found:
                    own = self.base.writer(w)
                    found[w] = self.source.writer(w, own) - own
        return torch.stack([torch.where(real, found[w], 0) for w in writers])


def pair_of(
    model: Model,
    clean: Inputs,
    corrupt: Inputs | None,
    direction: str,
    values: str,
    reference: Inputs | None,
    pooled: bool,
    seed: int,
    budget: int | None = None,
) -> Pair:
    """Run what is edited and what it is edited with, and check that the graph of a transformer describes the model.

    Raises:
        ModelError: the model is in training mode.
        InputsError: prompts that are missing or do not correspond.
        PathError: an unknown kind of values, or a residual stream that is not the sum of what the writers add.
    """
    check_model(model, direction)
    if values not in VALUES:
        raise PathError(f"values is one of {', '.join(VALUES)}, not {values!r}{nearest(str(values), VALUES)}")
    for name, given in (("clean", clean), ("corrupt", corrupt)):
        if not isinstance(given, Inputs) and (given is not None or name == "clean"):
            raise InputsError(f"{name} is {type(given).__name__}: prepare prompts with model.inputs(...)")
    check_reference(values, reference, pooled)
    edited = corrupt if corrupt is not None and direction == "denoising" else clean
    if values == "patch":
        if corrupt is None:
            raise InputsError("patching takes values from another run: give corrupt prompts, or values='zero'")
        align(clean, corrupt)
        other = laid_like(clean if edited is corrupt else corrupt, edited)
        source = Source(values, edited, run=streams(model, other, budget, seed))
    else:
        source, direction = _ablating(model, values, edited, reference, pooled, seed, budget), "ablation"
    base = streams(model, edited, budget, seed)
    require_additive(base)
    return Pair(base, source, direction)


def _ablating(
    model: Model, values: str, edited: Inputs, reference: Inputs | None, pooled: bool, seed: int, budget: int | None
) -> Source:
    if reference is None:
        return Source(values, edited)
    if values == "mean":
        return Source(values, edited, means=Means.over(streams(model, reference, budget, seed), pooled))
    drawn = torch.randint(len(reference), (len(edited),), generator=torch.Generator().manual_seed(seed))
    shortest, longest = int(reference.lengths.min()), int(edited.lengths.max())
    if shortest < longest:
        raise InputsError(
            f"a reference prompt of {shortest} tokens cannot stand for one of {longest}: give longer ones"
        )
    drawn_run = laid_like(_take(reference, drawn), edited)
    return Source(values, edited, run=streams(model, drawn_run, budget, seed))


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
    in_order = inputs.ids.gather(1, inputs.order)
    ids = torch.where(like.mask, in_order.gather(1, like.positions.clamp_max(inputs.width - 1)), 0)
    return replace(inputs, ids=ids, mask=like.mask)


def _take(inputs: Inputs, rows: Tensor) -> Inputs:
    tokens = None if inputs.tokens is None else tuple(inputs.tokens[i] for i in rows.tolist())
    pixels = None if inputs.pixels is None else inputs.pixels[rows]
    ids, mask, row_ids = inputs.ids[rows], inputs.mask[rows], inputs.row_ids[rows]
    return replace(inputs, ids=ids, mask=mask, row_ids=row_ids, tokens=tokens, pixels=pixels)
