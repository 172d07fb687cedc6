"""What one call of a model feeds of a text that is decoded, and which interventions mean something of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .audit import Entry
from .backends import caching
from .errors import ElsewhereError, PlanError, ShapeError, SiteError
from .layout import Layout
from .plan.inputs import KEYS_OF_CROSS, Inputs
from .plan.plan import Intervention, Plan, World
from .plan.region import Region, listed
from .plan.sites import CROSS, KEY, POS, Index, Key, Site, Span, same
from .plan.spans import Image, New
from .plan.tape import Tape
from .program import Program
from .text import PIECES, UNSEEN, Text

_BESIDE = (
    "generate() calls the model on another text besides (guidance_scale: the negative prompt), on which the plan "
    "holds, too, and whose tokens are others"
)


@dataclass(eq=False)
class Decoding:
    """What is known of the rows in one cache, or of a generation that has none.

    Attributes:
        text: what it holds, after the last call; None before the first, and after a reset.
        since: for each hold (by id), how many columns it held when that hold first saw it.
        counted: the columns that audits have counted.
        touched: for each entry of an audit (by id), bool [B], the rows that it has counted.
        memory: tensors [B, ...] that somebody keeps from call to call, by name.
        mirrors: caches of the worlds that the plan reads of this text, by how they are reached; `sources`: their plans.
    """

    text: Text | None = None
    since: dict[int, int] = field(default_factory=dict)
    counted: int = 0
    touched: dict[int, Tensor] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)
    mirrors: dict[Any, Any] = field(default_factory=dict)
    sources: dict[Any, Plan] = field(default_factory=dict)

    def copied(self) -> Decoding:
        """What is known of a copy of the cache, which may go on otherwise."""
        mirrors = {path: caching.apart(mirror) for path, mirror in self.mirrors.items()}
        kept = {name: dict(getattr(self, name)) for name in ("since", "touched", "memory", "sources")}
        return replace(self, mirrors=mirrors, **kept)

    def note(self, operation: str, argument: Any) -> None:
        """Follow what is done to the cache: its mirrors and its text change as it does."""
        for mirror in self.mirrors.values():
            method = getattr(mirror, operation)
            method() if argument is None else method(argument)
        if operation == "reset":
            self.text, self.counted = None, 0
            self.since, self.touched, self.mirrors, self.sources = {}, {}, {}, {}
            self.memory.clear()
        elif self.text is not None:
            rows = caching.rows_after(operation, argument, len(self.text.rows))
            if rows is not None:
                self.text = self.text.take(rows)
                self.touched = {entry: marks[rows] for entry, marks in self.touched.items()}
                self.memory.update({name: kept[rows.to(kept.device)] for name, kept in self.memory.items()})


@dataclass(frozen=True, eq=False)
class Fed:
    """One call of the model, as a part of a text.

    Attributes:
        inputs: the tokens that it feeds.
        layout: of these, and of the keys that they may see.
        decoding: what is known of their text, which is to be `text` after the call.
        cache: the caller's cache, or None.
        caches: whether a later call may go on from this one.
        generated: whether it is one of several of a `generate`.
        beside: whether it is on another text than that of the `generate` that makes it, as guidance makes some.
        only: the one stack that runs, where a `generate` looks at the images before it calls the model; else None.
        encoded: what the tower makes of the images in worlds that are read of the same text, by how they are reached,
            for a call that is given the features of images and not the images. None where it is not.
    """

    inputs: Inputs
    layout: Layout
    decoding: Decoding
    text: Text | None = None
    cache: Any = None
    caches: bool = False
    generated: bool = False
    beside: bool = False
    only: str | None = None
    encoded: dict[Any, Any] | None = None

    @property
    def past(self) -> int:
        """How many columns are cached."""
        return self.layout.offset

    @property
    def whole(self) -> bool:
        """Whether it feeds all of the text that there is, and the whole prompt."""
        return self.past == 0 and self.layout.queries.has_prompt

    def live(self, plan: Plan, sizes: dict[Key, dict[str, int]]) -> list[int]:
        """Which interventions of a plan, by their places, mean tokens that are fed now.

        Raises:
            PlanError: one of them needs tokens that are not.
        """
        return [number for number, item in enumerate(plan) if self._is_live(item, sizes)]

    def _is_live(self, item: Intervention, sizes: dict[Key, dict[str, int]]) -> bool:
        if self.only is not None and item.site.key[2] != self.only:
            return False
        region = self._region(self.layout, item, sizes)
        if region is None:
            return False
        if self.whole or not bool(region.full_valid().any()):
            return True
        if "pos" in item.op.mixes:
            raise PlanError(f"{item} mixes positions, and this call feeds only some: decode with use_cache=False")
        for read in item.own_reads:
            assert read.site is not None
            if not self._is_fed(read.site, item, sizes):
                raise PlanError(
                    f"{item}: tokens are read at {read.site} that are not fed in this call, but were in an earlier "
                    "one, and their values are gone: decode with use_cache=False"
                )
        return True

    def _region(self, layout: Layout, item: Intervention, sizes: dict[Key, dict[str, int]]) -> Region | None:
        """What an intervention edits, or None where that is in other calls."""
        try:
            return layout.resolve(item.site, sizes[item.site.key], item.only)
        except ElsewhereError:
            return None
        except (SiteError, ShapeError) as error:
            if self.beside:
                raise PlanError(f"{item}: {_BESIDE}: {error}") from error
            raise

    def note_gone(self, plan: Plan, entries: Sequence[Entry], sizes: dict[Key, dict[str, int]]) -> None:
        """Note in an audit the edits of scores whose keys a sliding window has left, where they change nothing."""
        if not self.layout.windows:
            return
        full = replace(self.layout, windows={}, _known={})
        for item, entry in zip(plan, entries, strict=True):
            if KEY not in item.site.axes or self._region(self.layout, item, sizes) is not None:
                continue
            region = self._region(full, item, sizes)
            if region is not None:
                entry.record(*self._count(region, entry, {}), torch.zeros(()))

    def _is_fed(self, place: Site, item: Intervention, sizes: dict[Key, dict[str, int]]) -> bool:
        """Whether what is read of this pass is, for the tokens that an intervention edits in it."""
        if same(place.pos, item.site.pos):
            return True
        try:
            region = self.layout.resolve(place, sizes[place.key], item.only)
        except ElsewhereError:
            return False
        return listed(place.pos) and not region.elsewhere

    def require_own(self, plan: Plan) -> None:
        """Refuse values of one text in a call on another that a `generate` makes besides.

        Raises:
            PlanError: such an intervention.
        """
        for item in plan if self.beside else ():
            where = (getattr(item.site, axis) for axis in (POS, KEY) if axis in item.site.axes)
            if not self.caches and any(map(_from_end, where)):
                why = "without a cache nobody knows where its prompt ends: leave out use_cache=False"
                raise PlanError(f"{item}: {_BESIDE}, and {why}")
            if any(read.aligned and isinstance(read.source, (World, Tape)) for read in item.reads):
                raise PlanError(f"{item}: {_BESIDE}, and the values that it puts in are for those of the prompt")

    def require_known(self, plan: Plan) -> None:
        """Refuse what depends on where the prompt ends, if nobody knows.

        Raises:
            PlanError: such an intervention.
        """
        doubt = "" if self.text is None else self.text.doubt
        for item in plan if doubt else ():
            for axis in (POS, KEY):
                index = getattr(item.site, axis) if axis in item.site.axes else None
                if doubt == UNSEEN and (_from_end(index) or (index is not None and axis == POS)):
                    raise PlanError(
                        f"{item}: this call goes on from a key/value cache that was filled before the plan was "
                        "applied, with one token, of which nobody knows whether it is the prompt's last or a new one: "
                        "apply the plan around the whole decoding"
                    )
                if doubt == PIECES and _from_end(index) and not isinstance(index, New):
                    raise PlanError(
                        f"{item}: several tokens are fed after several others, and nobody knows whether they are the "
                        "rest of a prompt or another turn, so none is the last: feed a prompt in one call, or give "
                        "generate() a prefill_chunk_size"
                    )

    def require_reached(self, plan: Plan, hold: Any, sizes: dict[Key, dict[str, int]]) -> None:
        """Refuse an intervention on tokens that were cached before the plan was held.

        Raises:
            PlanError: such an intervention.
        """
        if id(hold) in self.decoding.since:
            return
        self.decoding.since[id(hold)] = self.past
        if not self.past:
            return
        earlier = replace(self.layout, queries=self.layout.keys.between(0, self.past), kept=None, _known={})
        for item in plan:
            if item.site.pos is None or isinstance(item.site.pos, New):
                continue
            if self._region(earlier, item, sizes) is None:
                continue
            raise PlanError(
                f"{item}: some of these tokens are in a key/value cache that was filled before the plan was applied, "
                "where it cannot reach them: apply it around the call that feeds them, or leave pos out for all that "
                "is fed from now on"
            )

    def counted(self, program: Program, entries: Sequence[Entry], sizes: dict[Key, dict[str, int]]) -> Program:
        """The program, whose steps count only tokens and rows of the text that audits have not counted."""
        if not self.caches and not self.generated:
            return program
        steps: dict[Key, tuple[Any, ...]] = {}
        known: dict[Any, tuple[Region, Tensor, int]] = {}
        for key, found in program.steps.items():
            # As it lies on the CPU: the program's own regions may be on the device.
            regions = [self.layout.resolve(step.item.site, sizes[key], step.item.only) for step in found]
            counts = [self._count(region, entries[s.number], known) for region, s in zip(regions, found, strict=True)]
            steps[key] = tuple(replace(s, rows=r, positions=p) for s, (r, p) in zip(found, counts, strict=True))
        return replace(program, steps=steps)

    def note_counted(self, plan: Plan, entries: Sequence[Entry], sizes: dict[Key, dict[str, int]]) -> None:
        """Note which rows an audit has counted, where another account of the text did so."""
        known: dict[Any, tuple[Region, Tensor, int]] = {}
        for item, entry in zip(plan, entries, strict=True):
            region = self._region(self.layout, item, sizes)
            if region is not None:
                self._count(region, entry, known)

    def _count(self, region: Region, entry: Entry, known: dict[Any, tuple[Region, Tensor, int]]) -> tuple[int, int]:
        """How many rows a region has, and how many tokens, that an audit's entry has not counted.

        Args:
            known: the rows and the number of tokens of regions that were asked for, as those of other layers are alike.
        """
        tokens = self.layout.columns(region.site)[0]
        once = region.site.stack == CROSS and region.site.name in KEYS_OF_CROSS
        like = (id(region.cols), id(region.valid), region.site.axes, tokens.start, tokens.width, once)
        if like not in known:
            marks = self._marks(region)
            rows = marks.any(1)
            # What is made of the encoded text is the same in every call.
            counted = self.decoding.counted
            marks[:, : marks.shape[1] if once and counted else max(0, counted - tokens.start)] = False
            known[like] = region, rows, int(marks.sum())
        _, rows, count = known[like]
        touched = self.decoding.touched.get(id(entry))
        self.decoding.touched[id(entry)] = rows if touched is None else rows | touched
        return int((rows if touched is None else rows & ~touched).sum()), count

    def _marks(self, region: Region) -> Tensor:
        """bool [B, T], the tokens of which a region holds something."""
        axes = region.site.axes
        valid = region.full_valid()
        others = [number for number, axis in enumerate(axes) if number and axis != POS]
        valid = valid.amax(dim=others) if others else valid
        width = self.layout.columns(region.site)[0].width
        return torch.zeros(len(valid), width, dtype=torch.int64).scatter_add(1, region.cols, valid.long()) > 0


def _from_end(index: Index) -> bool:
    """Whether it depends on where the prompt ends which positions are meant."""
    if isinstance(index, New):
        return True
    if isinstance(index, Image):
        return False
    if isinstance(index, Span):
        return any(bound is not None and bound < 0 for bound in (index.start, index.stop))
    if isinstance(index, Tensor):
        return index.dtype != torch.bool and bool((index < 0).any())
    return any(i < 0 for i in (index if isinstance(index, tuple) else (index,))) if index is not None else False
