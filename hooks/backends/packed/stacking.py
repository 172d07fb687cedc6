"""Cells that do one operation at one site, as one step over a leading axis of worlds.

Worlds whose interventions at a site are alike but for their values, indices and strengths are applied together: what
differs is stacked, and the operation sees one world at a time under `torch.vmap`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...layout import Layout
from ...plan.context import Reference
from ...plan.inputs import Inputs
from ...plan.operation import Op
from ...plan.plan import Origin, Read, World
from ...plan.region import Region
from ...plan.sites import DIM, HEAD, Index, Key, Site
from ...plan.tape import Tape
from ...program import Whole
from ...resolving import Resolver, Sizes
from .cells import INSIDE, Cell, Stack, index_of, stacked_index
from .stacked import ContextOf, Gathered, Given, Parameter, Placed, StackedEdit, change_of, value_of
from .trace import Trace, Value


@dataclass(eq=False)
class Stacker:
    """Stacks the interventions of some worlds, and writes down how they are applied.

    Attributes:
        trace: takes what is to be done.
        worlds: the worlds.
        sizes: of the model's sites.
        tapes: of the worlds that plans read, by `source_id`.
        seed: of random interventions.
        layout: of all rows; `window` are those that are run.
        here: where a read of a world's own value of a site is made: from a stack, the read and its region to a value.
    """

    trace: Trace
    worlds: Sequence[World]
    sizes: Sizes
    tapes: Mapping[Any, Tape]
    seed: int
    layout: Layout
    window: slice
    here: Callable[[Stack, Read, Region], Value]
    asked: dict[Key, list[list[Cell]]] = field(default_factory=dict)
    own: set[Key] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.rows = len(self.layout.rows[self.window])
        self._resolvers: dict[int, Resolver] = {}
        self._kept: list[Any] = []
        self._shared: dict[Any, Tensor] = {}
        self._turns: dict[Key, list[list[Stack]]] = {}
        self._forms: dict[int, tuple[Region, Any]] = {}
        self._partly: dict[tuple[int, int, Key], tuple[int, bool]] = {}
        for w, world in enumerate(self.worlds):
            count: dict[Key, int] = {}
            for number, item in enumerate(world.plan.interventions):
                key = item.site.key
                at = count[key] = count.get(key, -1) + 1
                turns = self.asked.setdefault(key, [])
                if at == len(turns):
                    turns.append([])
                region = self.resolver(world.inputs).region(item.site, item.only)[1]
                turns[at].append(Cell(w, number, item, region))
                for read in item.reads:
                    if read.source is Origin.HERE and read.site is not None:
                        self.own.add(read.site.key)

    def resolver(self, inputs: Inputs) -> Resolver:
        """What resolves sites and reads of worlds on some inputs."""
        if id(inputs) not in self._resolvers:
            self._kept.append(inputs)
            layout = self.layout if Layout.of(inputs) is self.layout else Layout.of(inputs)
            self._resolvers[id(inputs)] = Resolver(
                inputs, self.sizes, self.tapes, layout, self.window
            )  # fmt: skip
        return self._resolvers[id(inputs)]

    @property
    def touched(self) -> set[Key]:
        """The sites at which something is edited, or read further on."""
        return set(self.asked) | self.own

    def turns(self, key: Key) -> list[list[Stack]]:
        """What is done at a site, in order: in each turn at most one intervention of every world."""
        if key not in self._turns:
            self._turns[key] = [self.stacks(cells) for cells in self.asked.get(key, [])]
        return self._turns[key]

    def stacks(self, cells: Sequence[Cell]) -> list[Stack]:
        """Interventions of different worlds, those that are alike together."""
        alike: dict[Any, list[Cell]] = {}
        for cell in cells:
            alike.setdefault(self.likeness(cell), []).append(cell)
        return [Stack(tuple(group), self.rows) for group in alike.values()]

    def likeness(self, cell: Cell) -> Any:
        """What interventions have in common that are stacked."""
        item, site = cell.item, cell.item.site
        if not item.op.stacks:
            return cell.world
        for read in item.reads:
            if read.source is Origin.HERE and read.site is not None and read.site.name in INSIDE:
                return cell.world
        reads = tuple(self._likeness_of_read(read, cell) for read in item.reads)
        weight = tuple(item.weight.shape) if isinstance(item.weight, Tensor) else None
        return type(item.op), _likeness_of_op(item.op), self._form(cell.region, site), weight, reads

    def _form(self, region: Region, site: Site) -> Any:
        """What regions have in common whose entries are stacked."""
        if id(region) not in self._forms:
            valid = None if region.valid is None else tuple(region.valid.shape[1:])
            kinds = (_kind(site.head), _kind(site.pos), _kind(site.key_pos), _kind(site.dim))
            # A slice of the last axis may mean all of it.
            parts = DIM in site.axes and index_of(region, site.axes.index(DIM)) is not None
            self._forms[id(region)] = (region, (tuple(region.shape.values()), valid, kinds, parts))
        return self._forms[id(region)][1]

    def _likeness_of_read(self, read: Read, cell: Cell) -> Any:
        source = read.source
        if source is Origin.HERE:
            assert read.site is not None
            return ("here", read.site.key, read.site.head is None, read.site.dim is None)
        if isinstance(source, Tensor):
            return ("tensor", tuple(source.shape), source.dtype, source.device, read.aligned)
        inputs, place = self.worlds[cell.world].inputs, cell.item.site if read.site is None else read.site
        known = (id(source), id(inputs), place.key)
        if known not in self._partly:
            tape = self.resolver(inputs).tape(read, cell.item)
            self._partly[known] = (id(tape), tape.whole(place) is None)
        told: Any = None
        if read.site is not None:
            told = (place.key, _kind(place.pos), _kind(place.key_pos), place.head is None, place.dim is None)
        return (*self._partly[known], read.aligned, told)

    def apply(self, stack: Stack, x: Value, axes: Sequence[str], guard: Value | None = None) -> tuple[Value, Value]:
        """Apply a stack to the activation [m, ...] of its members.

        Args:
            x: their value, taken along every axis that is not in `axes`.
            axes: those along which the stack is yet to be taken.
            guard: bool like x, where edits may change it.

        Returns:
            Their new value, and the largest change of each world [worlds].
        """
        reads, references = self.reads(stack)
        steps = stack.steps(axes)
        placed = Placed()
        ctx = self._context(stack, placed) if stack.item.op.looks else self._plain_context(stack)
        params = self._parameters(stack, placed)
        valid = placed.add(stack.valid) if stack.valid is not None else None
        fn = StackedEdit(
            item=stack.item, worlds=len(stack), rows=self.rows, ctx=ctx, params=params,
            weight=self._weight(stack, placed), axes=tuple(axis for axis, _ in steps), valid=valid,
            reads=tuple(read for read in reads if not isinstance(read, Value)),
            given=tuple(isinstance(read, Value) for read in reads), references=references, guarded=guard is not None,
        )  # fmt: skip
        values = [read for read in reads if isinstance(read, Value)]
        args = [x, *([guard] if guard is not None else []), *values]
        both = self.trace.do(fn, *args, at=[*(index for _, index in steps), *placed.tensors])
        return self.trace.do(value_of, both), self.trace.do(change_of, both)

    def reads(self, stack: Stack) -> tuple[list[Value | Given], list[Reference | None]]:
        """What each read of a stack gives: a value [m, ...], or tensors that are there already."""
        found: list[Value | Given] = []
        references: list[Reference | None] = []
        for number, read in enumerate(stack.item.reads):
            value, reference = self._read(stack, number, read)
            found.append(value)
            references.append(reference)
        return found, references

    def _read(self, stack: Stack, number: int, read: Read) -> tuple[Value | Given, Reference | None]:
        if read.source is Origin.HERE:
            return self.here(stack, read, stack.cells[0].region), None
        each = [(self.resolver(self.worlds[cell.world].inputs), cell.item.reads[number], cell) for cell in stack.cells]
        if not read.aligned:
            found = [self._once(maker.reference, read, cell) for maker, read, cell in each]
            values, layouts = [value for value, _ in found], [layout for _, layout in found]
            valid = [layout.valid for layout in layouts]
            alike = all(value is values[0] for value in values)
            reference = Reference(None if valid[0] is None else valid[0].to(values[0].device), layouts[0].by_position)
            some = next((v for v in valid if v is not None), None)
            if not alike and some is not None:
                # Rows of a reference set may all have one position, and not another.
                every = [torch.ones_like(some) if v is None else v for v in valid]
                flags = torch.stack(every).to(values[0].device)
                reference = Reference(flags, layouts[0].by_position)
            return Given(values[0] if alike else torch.stack(values), each=not alike), reference
        found = [maker.located(read, cell.item, cell.region) for maker, read, cell in each]
        first = found[0]
        if isinstance(first, Whole):
            values = [one.value for one in found if isinstance(one, Whole)]
            alike = all(value is values[0] for value in values)
            return Given(values[0] if alike else torch.stack(values), each=not alike, fitted=True), None
        if isinstance(first, Tensor):
            values = [one for one in found if isinstance(one, Tensor)]
            if all(value is values[0] for value in values):
                return Given(values[0], each=False), None
            return Given(torch.stack(values), each=True), None
        return self._gathered([one for one in found if isinstance(one, tuple)], stack), None

    def _once(self, make: Callable[..., tuple[Tensor, Reference]], read: Read, cell: Cell) -> tuple[Tensor, Reference]:
        """A reference set, read once for all cells that mean the same of it."""
        site = cell.item.site if read.site is None else read.site
        known = (id(read.source), str(site.head), str(site.dim), str(site.pos), str(site.key_pos), site.key)
        if isinstance(site.pos, Tensor) or isinstance(site.dim, Tensor) or cell.item.only is not None:
            return make(read, cell.item, cell.region)
        if known not in self._shared:
            self._shared[known] = make(read, cell.item, cell.region)  # type: ignore[assignment]
        return self._shared[known]  # type: ignore[return-value]

    def _gathered(self, found: list[tuple[Tensor, Region]], stack: Stack) -> Value:
        """What stands at regions of whole activations [b, ...]: a value [m, ...]."""
        wholes, regions = [whole for whole, _ in found], [region for _, region in found]
        axes = regions[0].site.axes
        steps = [
            (axis, stacked_index([index_of(r, axis) for r in regions], self.rows, regions[0].shape[axes[axis]]))
            for axis in range(1, len(axes))
            if any(index_of(r, axis) is not None for r in regions)
        ]
        shared = all(whole is wholes[0] or whole.data_ptr() == wholes[0].data_ptr() for whole in wholes)
        rows = torch.arange(self.rows).repeat(len(stack)) if shared else torch.arange(self.rows * len(stack))
        fn = Gathered(wholes[0] if shared else torch.cat(wholes), tuple(axis for axis, _ in steps))
        return self.trace.do(fn, at=[rows, *(index for _, index in steps)])

    def _plain_context(self, stack: Stack) -> ContextOf:
        cell = stack.cells[0]
        ctx = self.layout.context(cell.region, self.seed, self.window, None, cell.item.site)
        return ContextOf(replace(ctx, references=(None,) * len(stack.item.reads)), {}, {})

    def _context(self, stack: Stack, placed: Placed) -> ContextOf:
        """What the operation is told, with what differs between worlds stacked."""
        first = stack.cells[0]
        inputs = self.worlds[first.world].inputs
        ctx = self.resolver(inputs).layout.context(first.region, self.seed, self.window, None, first.item.site)
        layouts = [self.resolver(self.worlds[cell.world].inputs).layout for cell in stack.cells]
        shared, each = {"row": placed.add(ctx.row)}, {}
        regions = [cell.region for cell in stack.cells]
        for name, columns in (("pos", "queries"), ("key_pos", "keys")):
            found = [r.cols if name == "pos" else r.key_cols for r in regions]
            if found[0] is None:
                continue
            numbers = [getattr(layout, columns).index[self.window].gather(1, cols)
                       for layout, cols in zip(layouts, found, strict=True)]  # fmt: skip
            if all(torch.equal(one, numbers[0]) for one in numbers[1:]):
                shared[name] = placed.add(numbers[0])
            else:
                each[name] = placed.add(torch.stack(numbers))
        for name, axis in (("head", HEAD), ("dim", DIM)):
            if axis not in stack.site.axes:
                continue
            index = stacked_index([index_of(r, stack.site.axes.index(axis)) for r in regions], self.rows,
                                  regions[0].shape[axis])  # fmt: skip
            if name == "head" and index.ndim == 1:
                continue  # a tuple, as it stands in the context already
            if index.ndim == 1:
                shared[name] = placed.add(index)
            elif name == "head":
                each[name] = placed.add(index.reshape(len(stack), self.rows, -1)[:, 0])
            else:
                each[name] = placed.add(index.reshape(len(stack), self.rows, -1))
        return ContextOf(ctx, shared, each)

    def _parameters(self, stack: Stack, placed: Placed) -> dict[str, Parameter]:
        """The parameters of the operation that differ between worlds."""
        found: dict[str, Parameter] = {}
        for name, first in stack.item.op.parameters().items():
            values = [getattr(cell.item.op, name) for cell in stack.cells]
            if all(value is first for value in values):
                continue
            if isinstance(first, Tensor):
                found[name] = Parameter(value=torch.stack(values))
            elif any(value != first for value in values):
                dtype = torch.int64 if all(isinstance(value, int) for value in values) else torch.float64
                found[name] = Parameter(at=placed.add(torch.tensor(values, dtype=dtype)))
        return found

    def _weight(self, stack: Stack, placed: Placed) -> float | Tensor | Parameter:
        values = [cell.item.weight for cell in stack.cells]
        first = values[0]
        if isinstance(first, Tensor):
            return first if all(v is first for v in values) else Parameter(value=torch.stack(values))  # type: ignore[arg-type]
        if all(value == first for value in values):
            return first
        return Parameter(at=placed.add(torch.tensor(values, dtype=torch.float64)))


def _likeness_of_op(op: Op) -> Any:
    """The parameters of an operation that stacked ones share, and the form of the others."""
    if not op.__dataclass_fields__:  # type: ignore[attr-defined]
        return ()
    found = []
    for name, value in op.parameters().items():
        if isinstance(value, Tensor):
            found.append((name, tuple(value.shape), value.dtype, value.device))
        elif name in op.numbers and isinstance(value, (int, float)):
            found.append((name, "number"))
        else:
            found.append((name, value))
    return tuple(found)


def _kind(index: Index) -> Any:
    """How a site takes an axis: whole, one entry of it, listed entries, or others."""
    return (type(index), index.dtype) if isinstance(index, Tensor) else type(index)
