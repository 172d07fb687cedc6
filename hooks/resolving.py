"""From a plan to a program: every check made once, every index, mask and read placed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .errors import ShapeError, SiteError
from .layout import Layout
from .placed import placed
from .plan.columns import Columns
from .plan.context import Reference, with_references
from .plan.inputs import Inputs
from .plan.kinds import ROW
from .plan.plan import Intervention, Origin, Plan, Read, World
from .plan.region import Region, corresponding, listed
from .plan.region import resolve as resolve_site
from .plan.sites import KEY, POS, Index, Key, Site
from .plan.tape import Tape
from .program import Here, Program, Step, Whole

Sizes = Mapping[Key, dict[str, int]]


def source_id(source: Any, inputs: Inputs) -> Any:
    """What identifies a world that is read: its inputs and its plan, or the plan under which these inputs are run."""
    if source is Origin.UNEDITED:
        return ("unedited", id(inputs))
    if isinstance(source, Plan):
        return ("plan", id(inputs), id(source))
    if isinstance(source, World):
        return ("world", id(source.inputs), id(source.plan) if len(source.plan) else None)
    return ("values", id(source))


def resolve(
    world: World,
    sizes: Sizes,
    sources: Mapping[Any, Tape],
    *,
    device: torch.device,
    seed: int | Sequence[int] = 0,
    window: slice | None = None,
    layout: Layout | None = None,
) -> Program:
    """Resolve the plan of a world.

    Args:
        world: the inputs and the plan.
        sizes: sizes of the head and last axes of every site of the model.
        sources: tapes of the worlds that the plan reads, by `source_id`.
        device: the model's.
        seed: of random interventions, one for all or one for each.
        window: the rows that are run; None for all.
        layout: of all rows; default that of the inputs, without a past.

    Raises:
        SiteError, ShapeError: something does not fit the rows and positions, or what is read does not.
    """
    layout = Layout.of(world.inputs) if layout is None else layout
    window = slice(0, len(layout)) if window is None else window
    seeds = [seed] * len(world.plan) if isinstance(seed, int) else seed
    maker = Resolver(world.inputs, sizes, sources, layout, window)
    steps: dict[Key, list[Step]] = {}
    held_back = set()
    for number, item in enumerate(world.plan):
        steps.setdefault(item.site.key, []).append(maker.step(number, item, seeds[number]))
        held_back |= {r.site.key for r in item.reads if r.source is Origin.HERE and r.site is not None}
    program = Program(
        world.plan, {key: tuple(found) for key, found in steps.items()}, frozenset(held_back), layout, window
    )
    return placed(program, device)


class Resolver:
    """What resolving steps on one layout shares: sites, and where what is read lies.

    Args:
        inputs: of the world.
        sizes, sources, layout, window: as in `resolve`.
    """

    def __init__(
        self,
        inputs: Inputs,
        sizes: Sizes,
        sources: Mapping[Any, Tape],
        layout: Layout,
        window: slice,
    ) -> None:
        self.inputs, self.sizes, self.sources, self.layout = inputs, sizes, sources, layout
        self.window = window
        self.known: dict[tuple[int, int], tuple[Region, Region]] = {}
        self._alike: dict[tuple[int, int], tuple[Tape, bool]] = {}
        self._there: dict[tuple[int, Key], Tensor] = {}

    def region(self, site: Site, only: Tensor | None = None) -> tuple[Region, Region]:
        """A site on all rows, and on those that are run."""
        memo = (id(site), id(only))
        if memo not in self.known:
            full = self.layout.entries(site, self.sizes[site.key], only)
            self.known[memo] = (full, full.rows(self.window))
        return self.known[memo]

    def step(self, number: int, item: Intervention, seed: int) -> Step:
        _, region = self.region(item.site, item.only)
        ctx = self.layout.context(region, seed, self.window, None, item.site)
        found = [self.read(read, item, region) for read in item.reads]
        ctx = with_references(ctx, tuple(layout for _, layout in found))
        rows, positions = touched(region)
        return Step(number, item, region, ctx, tuple(value for value, _ in found), rows, positions)

    def read(self, read: Read, item: Intervention, region: Region) -> tuple[Tensor | Here | Whole, Reference | None]:
        """The value read, shaped for the function, and how it is laid out if it is a reference set."""
        place = item.site if read.site is None else read.site
        if read.source is Origin.HERE:
            return Here(place.key, self.region(place, item.only)[1]), None
        if not read.aligned:
            value, layout = self.reference(read, item, region)
            valid = None if layout.valid is None else layout.valid.to(value.device)
            return value, Reference(valid, layout.by_position)
        found = self.located(read, item, region)
        return (found if isinstance(found, (Tensor, Whole)) else found[1].get(found[0])), None

    def tape(self, read: Read, item: Intervention) -> Tape:
        """What is read of another world, as a tape."""
        source = read.source
        if isinstance(source, Tensor):
            return _tensor_tape(source, item.site if read.site is None else read.site, item, self.sizes)
        return source if isinstance(source, Tape) else self.sources[source_id(source, self.inputs)]

    def located(self, read: Read, item: Intervention, region: Region) -> tuple[Tensor, Region] | Tensor | Whole:
        """Where a value that is read row by row lies: in a whole activation of the rows of the window, and where in it.

        It is the value itself where a tape has kept no more, and a tensor of the region's shape is yet to be fitted.
        """
        if isinstance(read.source, Tensor):
            return self.tensor(read.source, item, region)
        return self.taped(self.tape(read, item), read, item, region)

    def tensor(self, source: Tensor, item: Intervention, region: Region) -> tuple[Tensor, Region] | Whole:
        """A tensor with every axis of the activation is taken at the region; one of the region's is fitted to it."""
        size, site = self.sizes[item.site.key], item.site
        queries, keys = self.layout.columns(site)
        prompt = queries.width if queries.prompt is None else queries.prompt
        widths = {ROW: self.layout.total, POS: prompt, KEY: keys.width} | size
        if tuple(source.shape) != tuple(widths[axis] for axis in site.axes):
            return Whole(source)
        if queries.prompt is not None:
            axis = site.axes.index(POS)
            filler = [0, 0] * (source.ndim - 1 - axis) + [0, max(0, queries.start + queries.width - prompt)]
            source = torch.nn.functional.pad(source, filler).narrow(axis, queries.start, queries.width)
        return self.layout.of_rows(source)[self.window], region

    def taped(self, tape: Tape, read: Read, item: Intervention, region: Region) -> tuple[Tensor, Region] | Tensor:
        """Where a tape holds what is read, with its positions laid where ours are."""
        known = self._there.get((id(tape), item.site.key)) if read.site is None else None
        if known is not None:
            return known, region
        place = item.site if read.site is None else read.site
        (there, there_keys), rows, layout = tape.inputs.tokens_of(place), self.layout.total, self.layout
        there_keys = None if there_keys is there else there_keys
        whole = tape.whole(place)
        if tape.inputs is self.inputs and tape.window is None and whole is not None:
            # Of this very pass, whatever part of a text it is of.
            found = region if read.site is None else self.region(place)[1]
            self.require_alike(item, region, place, found)
            return whole[self.window], found
        if len(tape.inputs) != rows:
            raise ShapeError(f"{item}: the source has {len(tape.inputs)} rows, these inputs {rows}; a row is a pair")
        if whole is None:
            return layout.of_rows(_checked(tape[place], item, region, rows))[self.window]
        if layout.origin is not None:
            there, whole = there.rows(layout.origin), layout.of_rows(whole)
            there_keys = None if there_keys is None else there_keys.rows(layout.origin)
        if read.site is None:
            full, _ = self.region(item.site, item.only)
            queries, keys = layout.columns(item.site)
            if there_keys is not None or not self.alike(tape, there, queries):
                mine, size = replace(full, site=item.site), self.sizes[place.key]
                full = corresponding(mine, queries, there, size, keys, there_keys)
            elif layout.origin is None and tape.window in (None, self.window):
                # Whatever else is read of it at this site: the same entries of the same activation.
                self._there[id(tape), place.key] = whole[self.window] if tape.window is None else whole
            found = full
        else:
            found = resolve_site(layout.for_rows(place), there, self.sizes[place.key], keys=there_keys)
            self.require_alike(item, region, place, found.rows(self.window))
        # A tape may hold a part of a larger batch, which is run against this world row by row.
        assert tape.window is None or tape.window == self.window
        return (whole[self.window] if tape.window is None else whole), found.rows(self.window)

    def alike(self, tape: Tape, there: Columns, here: Columns) -> bool:
        """Whether the same tokens stand in the same columns of a tape and here, found out once."""
        known = (id(tape), id(here))
        if known not in self._alike:
            self._alike[known] = (tape, there.laid_like(here))
        return self._alike[known][1]

    def require_alike(self, item: Intervention, region: Region, place: Site, found: Region) -> None:
        """Refuse a read of another number of positions than are edited, where that decides which belongs to which."""
        for axis in (POS, KEY) if place.axes == item.site.axes else ():
            if found.shape.get(axis) != region.shape.get(axis):
                raise ShapeError(f"{item}: {found.shape[axis]} positions are read, the site has {region.shape[axis]}")
            if axis not in item.site.axes:
                continue
            mine, theirs = (counted(one, axis) for one in (region, found))
            odd = ((mine != theirs) & (mine > 0)).nonzero().flatten().tolist()
            if odd:
                row, read, edited = odd[0], int(theirs[odd[0]]), int(mine[odd[0]])
                raise ShapeError(f"{item}: in row {row} {read} positions are read, the site has {edited}")

    def pooled(self, item: Intervention, index: Index, inputs: Inputs) -> dict[str, Index]:
        """The positions of a reference set that a mean over positions is over, where they are not those of the site."""
        but_bos = getattr(item.op, "but_bos", False)
        if but_bos and inputs.bos_id is None:
            raise SiteError(f"{item}: nobody knows of a BOS in the reference set; leave but_bos out")
        if but_bos and listed(index):
            raise SiteError(f"{item}: but_bos is for a mean over all positions, and this site lists its own")
        return {POS: inputs.but_bos} if but_bos else {}

    def reference(self, read: Read, item: Intervention, region: Region) -> tuple[Tensor, Reference]:
        """A reference set: where the site lists positions the entries listed, elsewhere every position of its rows."""
        place, tape = item.site if read.site is None else read.site, self.tape(read, item)
        whole = tape.whole(place)
        if whole is None:
            part, kept = tape[place], resolve_site(place, tape.inputs.along(place.stack), self.sizes[place.key])
            if kept.valid is not None and item.op.needs_full_rows:
                raise ShapeError(f"{item}: some rows of the tape have fewer of the positions that it kept, {place}")
            return part, Reference(kept.valid, ())
        given = {axis: getattr(place, axis) for axis in (POS, KEY) if axis in place.axes}
        pools = item.op.pools_positions
        loose: dict[str, Index] = {axis: None for axis, index in given.items() if not listed(index)}
        if pools and POS in given:
            loose |= self.pooled(item, given[POS], tape.inputs)
        along, seen = tape.inputs.tokens_of(place)
        if pools and POS in given and POS not in loose:
            there = pooled_entries(place, along, self.sizes[place.key], item)
        else:
            there = resolve_site(place.at(**loose), along, self.sizes[place.key], keys=None if seen is along else seen)
        queries, keys = self.layout.columns(item.site)
        wanted = {POS: (queries, region.cols), KEY: (keys, region.key_cols)}
        for axis in loose:
            if axis == POS and pools:
                continue
            columns, cols = wanted[axis]
            assert cols is not None
            last = int(columns.index[self.window].gather(1, cols).max())
            lengths = (along if axis == POS else seen).lengths
            every = item.op.needs_full_rows
            if last >= int(lengths.min() if every else lengths.max()):
                rows = "a row" if every else "every row"
                raise ShapeError(f"{item}: position {last} is wanted, and {rows} of the reference set ends before it")
        return there.get(whole), Reference(there.valid, tuple(sorted(place.axes.index(axis) for axis in loose)))


def pooled_entries(place: Site, tokens: Columns, sizes: dict[str, int], item: Intervention) -> Region:
    """The positions that a site lists in the rows of a reference set, of which each has what it has.

    Raises:
        SiteError: no row has any.
        ShapeError: positions for each of another number of rows.
    """
    region, rows = resolve_site(place.at(pos=None), tokens, sizes), len(tokens.real)
    if isinstance(place.pos, Tensor) and len(place.pos) != rows:
        raise ShapeError(
            f"{item}: pos is given for {len(place.pos)} rows, the reference set has {rows}: name its own positions "
            "with source_site="
        )
    index = place.pos if isinstance(place.pos, (Tensor, tuple)) else (place.pos,)
    at = index.long().cpu().reshape(rows, -1) if isinstance(index, Tensor) else torch.tensor(index).expand(rows, -1)
    numbers = torch.where(at < 0, at + tokens.lengths[:, None], at)
    cols, there = tokens.find(numbers)
    # A token that is listed twice, from either end of a short row, counts once.
    there &= ~((numbers[:, :, None] == numbers[:, None, :]).tril(-1).any(2))
    if not bool(there.any()):
        raise SiteError(f"{item}: no row of the reference set has position {place.pos}")
    axis = place.axes.index(POS)
    shape = [1] * len(place.axes)
    shape[0], shape[axis] = there.shape
    steps = ((axis, cols), *(step for step in region.steps if step[0] != axis))
    valid = None if bool(there.all()) else there.reshape(shape)
    return Region(place, region.shape | {POS: at.shape[1]}, steps, valid, cols, region.key_cols)


def touched(region: Region) -> tuple[int, int]:
    """How many rows a region has, and how many (row, position) pairs."""
    if region.valid is None:
        return region.shape[ROW], region.shape[ROW] * region.shape[POS]
    axes = [i for i, axis in enumerate(region.site.axes) if axis not in (ROW, POS)]
    marks = region.full_valid()
    marks = marks.amax(dim=axes) if axes else marks
    return int(marks.any(1).sum()), int(marks.sum())


def counted(region: Region, axis: str) -> Tensor:
    """How many positions each row of a region has along an axis, int64 [B]."""
    if region.valid is None:
        return torch.full((region.shape[ROW],), region.shape[axis])
    others = [i for i, name in enumerate(region.site.axes) if i and name != axis]
    return region.full_valid().amax(others).sum(1)


def _checked(value: Tensor, item: Intervention, region: Region, rows: int) -> Tensor:
    shape = [rows, *(region.shape[axis] for axis in region.site.axes[1:])]
    if list(value.shape) != shape:
        raise ShapeError(f"{item}: the tape holds {list(value.shape)}, the site needs {shape}")
    return value


def _tensor_tape(source: Tensor, place: Site, item: Intervention, sizes: Sizes) -> Tape:
    """A reference set given as a tensor [R, T, ...], as a tape of rows without padding."""
    size = sizes[place.key]
    width = source.shape[place.axes.index(POS)] if source.ndim == len(place.axes) else 0
    wanted = [n if axis in (ROW, POS, KEY) else size[axis] for axis, n in zip(place.axes, source.shape, strict=False)]
    if source.ndim != len(place.axes) or list(source.shape) != wanted or not width:
        text = ", ".join(
            {ROW: "rows", POS: "tokens", KEY: "tokens"}.get(axis, str(size.get(axis))) for axis in place.axes
        )
        raise ShapeError(f"{item}: a reference set for {place.whole} is [{text}], got {list(source.shape)}")
    inputs = Inputs.of(torch.zeros(source.shape[0], width, dtype=torch.int64))
    return Tape(inputs, ((place.whole, source),), sizes)
