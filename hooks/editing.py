"""Applying interventions to the values of one world: the one piece that every executor shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .audit import Audit, Entry
from .context import context, fit, with_reads
from .errors import CycleError, PlanError, ShapeError
from .inputs import Inputs
from .plan import Intervention, Origin, Plan, Read, World
from .region import Region, resolve
from .sites import KEY, POS, Site, execution_order
from .tape import Tape

Key = tuple[str, int, str | None]
Sizes = Mapping[Key, dict[str, int]]


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

    def __post_init__(self) -> None:
        self.audit = Audit.of(self.world.plan)
        for index, item in enumerate(self.world.plan):
            self.by_key.setdefault(item.site.key, []).append(index)
            for read in item.reads:
                if read.source is Origin.HERE and read.site is not None:
                    self.needs_here.add(read.site.key)
        if self.window is None:
            self.window = slice(0, len(self.world.inputs))

    def visit(self, key: Key, x: Tensor) -> Tensor:
        """Apply the interventions at a site to its value (all rows of the window), in the order of the plan."""
        for index in self.by_key.get(key, ()):
            x = self._apply(self.world.plan[index], self.audit[index], x)
        if key in self.needs_here:
            self.here[key] = x
        return x

    def region(self, site: Site, only: Tensor | None = None) -> Region:
        """Resolve a site on this world's rows."""
        memo = (id(site), id(only))
        if memo not in self._regions:
            full = resolve(site, self.world.inputs, self.sizes[site.key], only)
            assert self.window is not None
            self._regions[memo] = full_rows(full, self.window)
        return self._regions[memo]

    def _apply(self, item: Intervention, entry: Entry, x: Tensor) -> Tensor:
        assert self.window is not None
        region = self.region(item.site, item.only)
        part = region.get(x)
        ctx = context(region, self.world.inputs, self.seed, self.window, x.device)
        reads = [self._read(read, item, region, x) for read in item.reads]
        ctx = with_reads(ctx, tuple(valid for _, valid in reads))
        new = item.op(part, *(value for value, _ in reads), ctx=ctx)
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
        entry.record(part, new, region)
        return region.put(x, new)

    def _read(self, read: Read, item: Intervention, region: Region, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The value read, shaped for the function, and for a reference set which entries of it are real."""
        assert self.window is not None
        place = item.site if read.site is None else read.site
        source = read.source
        if source is Origin.HERE:
            return self.region(place).get(self.here[place.key]), None
        if isinstance(source, Tensor):
            return self._read_tensor(source, read, item, region, x), None
        tape = source if isinstance(source, Tape) else self.sources[source_id(source, self.world)]
        if not read.aligned:
            return _reference(tape, place, self.sizes)
        value = tape_value(tape, place, item, region, self.world.inputs, self.window, self.sizes)
        if value.device != x.device or value.dtype != x.dtype:
            raise ShapeError(
                f"{item}: the source holds {value.dtype} on {value.device}, the activation is {x.dtype} on {x.device}; "
                "convert the source with .to()"
            )
        return value, None

    def _read_tensor(self, source: Tensor, read: Read, item: Intervention, region: Region, x: Tensor) -> Tensor:
        if not read.aligned:
            return source
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


def source_id(source: World | Origin | Any, world: World) -> Any:
    """What identifies a world that is read: the object, or for the unedited world its inputs."""
    return ("unedited", id(world.inputs)) if source is Origin.UNEDITED else ("world", id(source))


def source_world(source: World | Origin, world: World) -> World:
    """The world that is read."""
    return World(world.inputs) if source is Origin.UNEDITED else source  # type: ignore[return-value]


def world_reads(plan: Plan, world: World) -> dict[Any, tuple[World, list[Site]]]:
    """The worlds that a plan reads, each with the whole sites that it reads there, by `source_id`."""
    found: dict[Any, tuple[World, list[Site]]] = {}
    for item in plan:
        for read in item.reads:
            if isinstance(read.source, World) or read.source is Origin.UNEDITED:
                place = (item.site if read.site is None else read.site).whole
                _, sites = found.setdefault(source_id(read.source, world), (source_world(read.source, world), []))
                if place not in sites:
                    sites.append(place)
    return found


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
    return torch.where(weight < 0.5, x + weight * delta, y - (1 - weight) * delta)


def full_rows(region: Region, window: slice) -> Region:
    """A region restricted to a range of rows."""
    if window.start == 0 and window.stop >= region.shape["row"]:
        return region
    shape = dict(region.shape, row=window.stop - window.start)
    steps = tuple((axis, index if index.ndim == 1 else index[window]) for axis, index in region.steps)
    valid = region.valid if region.valid is None or len(region.valid) == 1 else region.valid[window]
    # The columns stay those of all rows: a context is made from them, and cut to the window there.
    return Region(region.site, shape, steps, valid, region.cols, region.key_cols)


def tape_value(
    tape: Tape, place: Site, item: Intervention, region: Region, inputs: Inputs, window: slice, sizes: Sizes
) -> Tensor:
    """What a tape holds at a site, with position p of its row laid where position p of ours is."""
    if tape.window is not None:
        # A part of a larger batch: its rows are the rows of the window already.
        assert tape.window == window
        inputs, place, window = inputs.rows(window), place.rows(window), slice(0, len(tape.inputs))
    if len(tape.inputs) != len(inputs):
        raise ShapeError(f"{item}: the source has {len(tape.inputs)} rows, these inputs {len(inputs)}; a row is a pair")
    whole = tape.whole(place)
    if whole is None:
        return _checked(tape[place], item, region, len(inputs))[window]
    there = resolve(place, tape.inputs, sizes[place.key])
    if place.axes == item.site.axes:
        _check_positions(there, region, item, inputs, tape.inputs)
    return there.get(whole)[window]


def _check_positions(there: Region, region: Region, item: Intervention, inputs: Inputs, source: Inputs) -> None:
    """Refuse a source whose positions do not correspond to the site's, one by one."""
    unequal = inputs.lengths != source.lengths
    if there.site.pos is None and item.site.pos is None and bool(unequal.any()):
        row = int(unequal.nonzero()[0])
        raise ShapeError(
            f"{item}: row {row} has {int(source.lengths[row])} tokens in the source, {int(inputs.lengths[row])} here; "
            "clean and corrupt of different lengths do not correspond"
        )
    for axis in (POS, KEY):
        if there.shape.get(axis) != region.shape.get(axis):
            raise ShapeError(f"{item}: {there.shape[axis]} positions are read, the site has {region.shape[axis]}")


def _checked(value: Tensor, item: Intervention, region: Region, rows: int) -> Tensor:
    shape = [rows, *(region.shape[axis] for axis in region.site.axes[1:])]
    if list(value.shape) != shape:
        raise ShapeError(f"{item}: the tape holds {list(value.shape)}, the site needs {shape}")
    return value


def _reference(tape: Tape, place: Site, sizes: Sizes) -> tuple[Tensor, Tensor | None]:
    whole = tape.whole(place)
    if whole is None:
        return tape[place], None
    region = resolve(place, tape.inputs, sizes[place.key])
    valid = None
    if region.valid is not None:
        valid = region.valid.flatten(1)
    return region.get(whole), valid


def check_reads(plan: Plan, n_layers: int) -> None:
    """Refuse a read of this world's own value that is not computed before the site that reads it.

    Raises:
        CycleError: such a read.
    """
    for item in plan:
        for read in item.reads:
            if read.source is Origin.HERE:
                if read.site is None:
                    raise PlanError(f"{item}: a read of this world needs the site that it reads")
                if execution_order(read.site.key, n_layers) >= execution_order(item.site.key, n_layers):
                    raise CycleError(
                        f"{item}: {read.site} is computed from {item.site}, so it cannot be read there; "
                        "read it from another World, or with freeze() from this one unedited"
                    )
