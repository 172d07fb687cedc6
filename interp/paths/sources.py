"""What a writer's output is replaced by: another run's, zero, a mean over reference prompts, or one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor

from hooks import Inputs, Model, align
from hooks.errors import InputsError, PathError, nearest
from interp.paths.nodes import Writer
from interp.paths.streams import Streams, streams
from interp.sweeps import DIRECTIONS

VALUES = ("patch", "zero", "mean", "resample")


@dataclass(frozen=True, eq=False)
class Source:
    """The values c_u that writers' outputs are replaced by.

    Attributes:
        kind: one of `VALUES`.
        inputs: of the run that is edited.
        run: the run that values are taken from, where there is one (patch, resample).
        reference: the reference prompts' run, for means; `pooled`: over all their positions.
    """

    kind: str
    inputs: Inputs
    run: Streams | None = None
    reference: Streams | None = None
    pooled: bool = False
    _means: dict[Writer, Tensor] = field(default_factory=dict)

    def rows(self, window: slice) -> Source:
        """The same for a range of rows."""
        run = None if self.run is None else self.run.rows(window)
        return Source(self.kind, self.inputs.rows(window), run, self.reference, self.pooled)

    def writer(self, writer: Writer, base: Tensor) -> Tensor:
        """c_u [B, T, M], given the edited run's own a_u (for its shape)."""
        if self.kind == "zero":
            return torch.zeros_like(base)
        if self.run is not None:
            return self.run.writer(writer)
        return self.mean(writer).expand_as(base)

    def mean(self, writer: Writer) -> Tensor:
        """The mean over the reference prompts: [B, T, M] laid where the edited run's positions are, or [M] pooled."""
        assert self.reference is not None
        if writer not in self._means:
            value, ref = self.reference.writer(writer), self.reference.inputs
            real = ref.mask.to(value.device)[..., None]
            if self.pooled:
                mean = (value * real).sum((0, 1)) / real.sum()
            else:
                # Row by row the columns are put in the order of positions, so that padding on either side is the same.
                order = ref.order.to(value.device)
                by_pos = (value * real).gather(1, order[..., None].expand_as(value)).sum(0)
                counts = torch.zeros(ref.width, device=value.device, dtype=value.dtype)
                counts[: int(ref.lengths.max())] = torch.stack(
                    [(ref.lengths > p).sum() for p in range(int(ref.lengths.max()))]
                ).to(value)
                mean = (by_pos / counts.clamp_min(1)[:, None])[self.inputs.positions.to(value.device)]
            self._means[writer] = mean
        return self._means[writer]


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
    """Run what is edited and what it is edited with.

    Raises:
        InputsError: prompts that are missing or do not correspond.
        PathError: an unknown kind of values.
    """
    if direction not in DIRECTIONS:
        raise InputsError(f"direction is 'denoising' or 'noising', not {direction!r}{nearest(direction, DIRECTIONS)}")
    if values not in VALUES:
        raise PathError(f"values is one of {', '.join(VALUES)}, not {values!r}{nearest(str(values), VALUES)}")
    for name, given in (("clean", clean), ("corrupt", corrupt), ("reference", reference)):
        if not isinstance(given, Inputs) and (given is not None or name == "clean"):
            raise InputsError(f"{name} is {type(given).__name__}: prepare prompts with model.inputs(...)")
    if values in ("mean", "resample") and reference is None:
        raise InputsError(f"values={values!r} takes them from reference prompts: give reference=model.inputs(...)")
    if values not in ("mean", "resample") and reference is not None:
        raise InputsError(f"values={values!r} takes nothing from reference prompts; 'mean' and 'resample' do")
    if values == "patch":
        if corrupt is None:
            raise InputsError("patching takes values from another run: give corrupt prompts, or values='zero'")
        edited, other = (corrupt, clean) if direction == "denoising" else (clean, corrupt)
        align(clean, corrupt)
        other = laid_like(other, edited)
        source = Source("patch", edited, run=streams(model, other, budget))
        return Pair(streams(model, edited, budget), source, direction)
    edited = corrupt if corrupt is not None and direction == "denoising" else clean
    base = streams(model, edited, budget)
    if values == "zero":
        return Pair(base, Source("zero", edited), "ablation")
    assert reference is not None
    if values == "resample":
        drawn = torch.randint(len(reference), (len(edited),), generator=torch.Generator().manual_seed(seed))
        shortest, longest = int(reference.lengths.min()), int(edited.lengths.max())
        if shortest < longest:
            raise InputsError(
                f"a reference prompt of {shortest} tokens cannot stand for one of {longest}: give longer ones"
            )
        other = laid_like(_take(reference, drawn), edited)
        return Pair(base, Source("resample", edited, run=streams(model, other, budget)), "ablation")
    if not pooled and int(reference.lengths.max()) < int(edited.lengths.max()):
        raise InputsError(
            f"the reference prompts have at most {int(reference.lengths.max())} tokens, and position "
            f"{int(edited.lengths.max()) - 1} needs a mean: give longer ones, or pooled=True"
        )
    return Pair(base, Source("mean", edited, reference=streams(model, reference, budget), pooled=pooled), "ablation")


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
