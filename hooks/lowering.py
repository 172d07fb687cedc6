"""A program as the inputs of a graph: its words left out, and each of its numbers, indices and masks a tensor.

Two programs of one skeleton are one graph: they differ in tensors alone. What a forward pass needs is said by the words
of a plan and never by the values of a batch, so positions that all rows share are indexed as those that they do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .layout import Layout
from .plan.context import Context, Reference
from .plan.kinds import ROW
from .plan.operation import Op
from .plan.operations.custom import Custom
from .plan.plan import Intervention, Origin, Read
from .plan.region import Entries, Region, listed
from .plan.sites import KEY, POS, Index, Key, Site
from .program import Here, Program, Step, Whole


@dataclass(frozen=True, eq=False)
class Lowered:
    """A program without words.

    Attributes:
        steps: its interventions by the site that they edit.
        held_back: the sites whose values are read further on.
    """

    steps: dict[Key, tuple[Step, ...]]
    held_back: frozenset[Key]


class Lowering:
    """What lowering the programs and captures of one call shares.

    Args:
        layout: of the rows that are run.
        device: the model's.
        dtype: the model's; numbers are as wide, and no narrower than float32.
        grad: whether the graph is differentiated, so that tensors which are learned stay attached.
    """

    def __init__(self, layout: Layout, device: torch.device, dtype: torch.dtype, grad: bool) -> None:
        self.layout, self.device, self.grad = layout, device, grad
        self.padded = not bool(layout.queries.real.all() and layout.keys.real.all())
        self.dtype = torch.promote_types(dtype, torch.float32)
        self._numbers: dict[tuple[type, Any], Tensor] = {}

    def program(self, program: Program) -> Lowered:
        """Lower a program."""
        steps = {key: tuple(self.step(step) for step in found) for key, found in program.steps.items()}
        return Lowered(steps, program.held_back)

    def step(self, step: Step) -> Step:
        item = step.item
        reads = tuple(self.read(value, item, read) for value, read in zip(step.reads, item.reads, strict=True))
        # What stands there of a read is how many there are.
        nameless = tuple(Read(Origin.UNEDITED) for _ in item.reads)
        weight = 1.0 if item.op.writes_inf else self.number(item.weight)
        plain = Intervention(item.site.whole, self.op(item.op), nameless, weight)
        region = self.region(step.region, item.only)
        # Of a region, `visit` needs the tensors alone.
        return Step(step.number, plain, region, self.context(step.ctx, item.op), reads, 0, 0)  # type: ignore[arg-type]

    def op(self, op: Op) -> Op:
        """An operation whose parameters are tensors where they may be."""
        placed: dict[str, Any] = {}
        for name, value in op.parameters().items():
            if isinstance(value, Tensor):
                placed[name] = self.tensor(value.to(self.device) if name in op.tables else value)
            elif name in op.numbers:
                placed[name] = self.number(value)
        return replace(op, **placed) if placed else op  # type: ignore[type-var]

    def number(self, value: Any) -> Tensor:
        """A number as a tensor [], floating point or int64; a tensor in the dtype of numbers."""
        if isinstance(value, Tensor):
            return self.tensor(value.to(self.dtype) if value.is_floating_point() else value)
        known = (type(value), value)
        if known not in self._numbers:
            dtype = self.dtype if isinstance(value, float) else torch.int64
            self._numbers[known] = torch.tensor(value, dtype=dtype, device=self.device)
        return self.tensor(self._numbers[known])

    def tensor(self, value: Tensor) -> Tensor:
        """A tensor that is no other's object and no parameter, which a graph would be made for."""
        value = value.contiguous()
        return value.view_as(value) if self.grad and value.requires_grad else value.detach()

    def index(self, value: Tensor) -> Tensor:
        return self.tensor(value.to(self.device))

    def context(self, ctx: Context, op: Op) -> Context:
        """What an operation is told. A function of the user's is told its heads as it always is."""
        head = ctx.head if isinstance(op, Custom) or ctx.head is None else torch.tensor(ctx.head)
        key_pos, dim = (None if one is None else self.index(one) for one in (ctx.key_pos, ctx.dim))
        return replace(
            ctx,
            row=self.index(ctx.row),
            pos=self.index(ctx.pos),
            key_pos=key_pos,
            dim=dim,
            head=self.index(head) if isinstance(head, Tensor) else head,
            seed=self.number(ctx.seed),
            references=tuple(None if one is None else self.reference(one) for one in ctx.references),
        )

    def reference(self, reference: Reference) -> Reference:
        valid = reference.valid
        return Reference(None if valid is None else self.index(valid), reference.by_position)

    def read(self, value: Tensor | Here | Whole, item: Intervention, read: Read) -> Tensor | Here | Whole:
        if isinstance(value, Here):
            assert read.site is not None and isinstance(value.region, Region)
            return Here(value.key, self.region(value.region, item.only))
        return Whole(self.tensor(value.value)) if isinstance(value, Whole) else self.tensor(value)

    def region(self, region: Region | Entries, only: Tensor | None = None) -> Entries:
        """The entries of a region, in a form that follows from its words and from whether there is padding."""
        assert isinstance(region, Region)
        site, axes, given = region.site, region.site.axes, dict(region.steps)
        steps: list[tuple[int, Tensor]] = []
        ragged = only is not None
        for axis, cols in ((POS, region.cols), (KEY, region.key_cols)):
            if cols is None:
                continue
            words: Index = getattr(site, axis)
            number = axes.index(axis)
            if words is not None or only is not None or self.padded or number in given:
                steps.append((number, self.index(cols)))
            ragged |= (words is not None or self.padded) and not listed(words)
        steps += [(number, self.index(index)) for number, index in region.steps if axes[number] not in (POS, KEY)]
        return Entries(tuple(steps), self.valid(region) if ragged else None)

    def valid(self, region: Region) -> Tensor:
        shape = [n if axis in (ROW, POS, KEY) else 1 for axis, n in ((a, region.shape[a]) for a in region.site.axes)]
        valid = torch.ones(shape, dtype=torch.bool) if region.valid is None else region.valid.expand(shape)
        return self.index(valid)

    def capture(self, place: Site, sizes: Mapping[Key, dict[str, int]]) -> tuple[Entries | None, tuple[int, ...]]:
        """The entries that a capture means (None for the whole activation), and the shape of their value."""
        size = sizes[place.key]
        region = self.layout.resolve(place, size) if place.restricted else self.layout.entire(place, size)
        shape = tuple(region.shape[axis] for axis in place.axes)
        return self.region(region) if place.restricted else None, shape


def skeleton(value: Any) -> Any:
    """All of a lowered program but its tensors, whose dtypes and ranks are kept, as something that hashes.

    Sizes are left out, which a graph may be made for anew.
    """
    if isinstance(value, Tensor):
        return (value.dtype, value.ndim, value.requires_grad)
    if isinstance(value, Custom):
        return (Custom, getattr(value.fn, "__code__", type(value.fn)))
    if isinstance(value, Context):
        kept = (value.site, value.layer, value.axes, value.single)
        return (*kept, skeleton((value.key_pos, value.dim, value.seed, value.references)))
    if is_dataclass(value) and not isinstance(value, type):
        return (type(value), *(skeleton(getattr(value, field.name)) for field in fields(value)))
    if isinstance(value, Mapping):
        return tuple((key, skeleton(one)) for key, one in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(skeleton(one) for one in value)
    return value


def leaves(value: Any) -> list[Tensor]:
    """The tensors of a lowered program, in an order of their own."""
    if isinstance(value, Tensor):
        return [value]
    return [leaf for _, part in _parts(value) for leaf in leaves(part)]


def rebuilt(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same with other tensors, in the order of `leaves`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if not leaves(value):
        return value
    parts = {name: rebuilt(part, tensors) for name, part in _parts(value)}
    if isinstance(value, Mapping):
        return parts
    return tuple(parts.values()) if isinstance(value, tuple) else replace(value, **parts)


def _parts(value: Any) -> list[tuple[Any, Any]]:
    """The named parts of something that may hold tensors. Those of a function of the user's are its own."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, tuple):
        return list(enumerate(value))
    if isinstance(value, Custom) or not is_dataclass(value) or isinstance(value, type):
        return []
    return [(field.name, getattr(value, field.name)) for field in fields(value)]
