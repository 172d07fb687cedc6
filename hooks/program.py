"""Applying interventions to the values of one world: the one piece that every executor shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .audit import Audit, Entry
from .errors import PlanError, ShapeError
from .plan.context import Reference, context, fit, with_references
from .plan.inputs import Inputs
from .plan.plan import Intervention, Origin, Plan, Read, World
from .plan.region import Region, corresponding, listed, resolve
from .plan.sites import KEY, POS, ROW, Site
from .plan.tape import Tape

Key = tuple[str, int, str | None]
Sizes = Mapping[Key, dict[str, int]]
Guard = tuple[Tensor, float]


@dataclass(eq=False)
class Edits:
    """One world while it runs: its interventions by site, the values that they read, and the record of what they did.

    Attributes:
        world: the inputs and the plan.
        sizes: sizes of the head and last axes of every site of the model.
        sources: tapes of the worlds that the plan reads, by `source_id`.
        seed: seed of the run.
        window: the rows of the world's inputs that are run; None for all.
    """

    world: World
    sizes: Sizes
    sources: Mapping[Any, Tape]
    seed: int = 0
    window: slice | None = None
    audit: Audit = field(init=False)
    by_key: dict[Key, list[int]] = field(init=False, default_factory=dict)
    needs_here: set[Key] = field(init=False, default_factory=set)
    here: dict[Key, Tensor] = field(init=False, default_factory=dict)
    _regions: dict[Any, Region] = field(init=False, default_factory=dict)
    _full: dict[Any, Region] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.audit = Audit.of(self.world.plan)
        for index, item in enumerate(self.world.plan):
            self.by_key.setdefault(item.site.key, []).append(index)
            for read in item.reads:
                if read.source is Origin.HERE and read.site is not None:
                    self.needs_here.add(read.site.key)
        if self.window is None:
            self.window = slice(0, len(self.world.inputs))

    def visit(self, key: Key, x: Tensor, guard: Guard | None = None, again: bool = False) -> Tensor:
        """Apply the interventions at a site to its value (all rows of the window), in the order of the plan.

        Args:
            guard: bool of x's shape and a number: where it is False, x is that number whatever an intervention says.
            again: the value is computed a second time in the same pass, which the record does not count.
        """
        for index in self.by_key.get(key, ()):
            x = self._apply(self.world.plan[index], None if again else self.audit[index], x, guard)
        if key in self.needs_here:
            self.here[key] = x
        return x

    def region(self, site: Site, only: Tensor | None = None) -> Region:
        """Resolve a site on this world's rows."""
        memo = (id(site), id(only))
        if memo not in self._regions:
            self._full[memo] = resolve(site, self.world.inputs, self.sizes[site.key], only)
            assert self.window is not None
            self._regions[memo] = self._full[memo].rows(self.window)
        return self._regions[memo]

    def _apply(self, item: Intervention, entry: Entry | None, x: Tensor, guard: Guard | None) -> Tensor:
        assert self.window is not None
        region = self.region(item.site, item.only)
        old = part = region.get(x)
        if guard is not None:
            # Functions see the lowest number where attention is forbidden: an infinity would make their gradients NaN.
            lowest = torch.finfo(x.dtype).min if guard[1] == -torch.inf else guard[1]
            part = torch.where(region.get(guard[0]), part, lowest)
        ctx = context(region, self.world.inputs, self.seed, self.window, x.device)
        reads = [self._read(read, item, region, x) for read in item.reads]
        ctx = with_references(ctx, tuple(layout for _, layout in reads))
        for read, (value, _) in zip(item.reads, reads, strict=True):
            if item.op.reads_alike and value.shape != part.shape:
                raise ShapeError(f"{item}: {list(value.shape)} is read ({read}), the site has {list(part.shape)}")
        given = [part, *(value for value, _ in reads)]
        before = [_version(value) for value in given]
        new = item.op(*given, ctx=ctx)
        if [_version(value) for value in given] != before:
            raise PlanError(f"{item}: the function wrote into what it was given, which others use; return a new tensor")
        if (
            not isinstance(new, Tensor)
            or new.shape != part.shape
            or new.dtype != part.dtype
            or new.device != part.device
        ):
            got = f"{new.dtype} {list(new.shape)} on {new.device}" if isinstance(new, Tensor) else type(new).__name__
            raise ShapeError(
                f"{item}: the function returned {got}; expected {part.dtype} {list(part.shape)} on {part.device}"
            )
        new = blend(part, new, item.weight, len(self.world.inputs), self.window)
        if guard is not None:
            new = torch.where(region.get(guard[0]), new, guard[1])
        if entry is not None:
            entry.record(old, new, region)
        return region.put(x, new)

    def _read(self, read: Read, item: Intervention, region: Region, x: Tensor) -> tuple[Tensor, Reference | None]:
        """The value read, shaped for the function, and how it is laid out if it is a reference set."""
        assert self.window is not None
        place = item.site if read.site is None else read.site
        source = read.source
        if source is Origin.HERE:
            return self.region(place, item.only).get(self.here[place.key]), None
        if isinstance(source, Tensor) and read.aligned:
            return self._read_tensor(source, region, x), None
        if isinstance(source, Tensor):
            tape = _tensor_tape(source, place, item, self.sizes)
        else:
            tape = source if isinstance(source, Tape) else self.sources[source_id(source, self.world)]
        if not read.aligned:
            value, layout = _reference(tape, place, item, region, self.world.inputs, self.window, self.sizes)
            layout = Reference(None if layout.valid is None else layout.valid.to(x.device), layout.by_position)
        else:
            value, layout = self._read_tape(tape, read, item, region), None
        if value.device != x.device or value.dtype != x.dtype:
            raise ShapeError(
                f"{item}: the source holds {value.dtype} on {value.device}, the activation is {x.dtype} on {x.device}; "
                "convert the source with .to()"
            )
        return value, layout

    def _read_tape(self, tape: Tape, read: Read, item: Intervention, region: Region) -> Tensor:
        """What a tape holds for the rows of the window, with its positions laid where ours are."""
        window, inputs = self.window, self.world.inputs
        assert window is not None
        place = item.site if read.site is None else read.site
        if len(tape.inputs) != len(inputs):
            raise ShapeError(
                f"{item}: the source has {len(tape.inputs)} rows, these inputs {len(inputs)}; a row is a pair"
            )
        whole = tape.whole(place)
        if whole is None:
            return _checked(tape[place], item, region, len(inputs))[window]
        if read.site is None:
            there = corresponding(self._full[id(item.site), id(item.only)], inputs, tape.inputs, self.sizes[place.key])
        else:
            there = resolve(place, tape.inputs, self.sizes[place.key])
            for axis in (POS, KEY) if place.axes == item.site.axes else ():
                if there.shape.get(axis) != region.shape.get(axis):
                    raise ShapeError(
                        f"{item}: {there.shape[axis]} positions are read, the site has {region.shape[axis]}"
                    )
        if tape.window is None:
            return there.get(whole)[window]
        # A part of a larger batch, which is run against this world row by row.
        assert tape.window == window
        return there.rows(window).get(whole)

    def _read_tensor(self, source: Tensor, region: Region, x: Tensor) -> Tensor:
        window = self.window
        assert window is not None
        rows = len(self.world.inputs)
        if tuple(source.shape) == (rows, *x.shape[1:]) and source.dtype == x.dtype and source.device == x.device:
            return region.get(source[window])
        part = region.get(x)
        ctx = context(region, self.world.inputs, self.seed, window, x.device)
        value = fit(source, part, ctx, whole=True)
        assert isinstance(value, Tensor)
        return value


def source_id(source: World | Plan | Origin | Any, world: World) -> Any:
    """What identifies a world that is read: the object, or the plan under which this world's inputs are run instead."""
    if source is Origin.UNEDITED:
        return ("unedited", id(world.inputs))
    if isinstance(source, Plan):
        return ("plan", id(world.inputs), id(source))
    return ("world", id(source))


def blend(x: Tensor, y: Tensor, weight: float | Tensor, rows: int, window: slice) -> Tensor:
    """x + s (y - x), exactly x at s = 0 and exactly y at s = 1; differentiable in all three.

    Args:
        weight: a number, or a tensor [] or [B] over all rows of the world, of which `window` is run.
    """
    if not isinstance(weight, Tensor):
        if weight == 1.0:
            return y
        if weight == 0.0:
            return x
        weight = torch.tensor(weight, dtype=x.dtype, device=x.device)
    if weight.ndim == 1:
        if len(weight) != rows:
            raise ShapeError(f"a strength for {len(weight)} rows, the inputs have {rows}")
        weight = weight[window].reshape([-1] + [1] * (x.ndim - 1))
    weight = weight.to(device=x.device, dtype=x.dtype)
    # Where both are equal the difference is 0 even if both are infinite, which forbidden scores are.
    delta = torch.where(x == y, 0, y - x)
    finite = delta.isfinite()
    step = torch.where(finite, delta, 0)
    between = torch.where(weight < 0.5, x + weight * step, y - (1 - weight) * step)
    # Between a number and an infinity there is the infinity, and at the ends there is what stands there.
    ends = torch.where(weight == 0, x, torch.where(weight == 1, y, x + y))
    return torch.where(finite, between, ends)


def _version(x: Tensor) -> int:
    """How often a tensor was written into; 0 where torch does not count."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


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


def _reference(
    tape: Tape, place: Site, item: Intervention, region: Region, inputs: Inputs, window: slice, sizes: Sizes
) -> tuple[Tensor, Reference]:
    """A reference set: where the site lists positions the entries listed, elsewhere every position of its rows."""
    whole = tape.whole(place)
    if whole is None:
        return tape[place], Reference(None, ())
    given = {axis: getattr(place, axis) for axis in (POS, KEY) if axis in place.axes}
    loose = {axis: None for axis, index in given.items() if not listed(index)}
    there = resolve(place.at(**loose), tape.inputs, sizes[place.key])
    wanted = {POS: region.cols, KEY: region.key_cols}
    for axis in loose:
        cols = wanted[axis]
        assert cols is not None
        last = int(inputs.positions[window].gather(1, cols).max())
        lengths = tape.inputs.lengths
        every = item.op.needs_full_rows
        if last >= int(lengths.min() if every else lengths.max()):
            rows = "a row" if every else "every row"
            raise ShapeError(f"{item}: position {last} is wanted, and {rows} of the reference set ends before it")
    return there.get(whole), Reference(there.valid, tuple(sorted(place.axes.index(axis) for axis in loose)))
