"""A plan resolved on a layout: from here on there are only tensors.

`hooks.resolving` makes every check and places every index, mask and read on the model's device; `visit` is then a pure
function of tensors, the one piece that every backend shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from .audit import Audit
from .errors import PlanError, ShapeError
from .layout import Layout
from .plan.context import Context, beside, fit
from .plan.operation import Op
from .plan.plan import Intervention, Plan
from .plan.region import Entries, Region
from .plan.sites import Key

Guard = tuple[Tensor, float]
"""bool of a value's shape and a number: where it is False, the value is that number whatever an intervention says."""


_NO_KEY = {"scores": -torch.inf, "pattern": 0.0}
"""What a query has of a key that it may not see."""


@dataclass(frozen=True, eq=False)
class Here:
    """A read of this world's own value of a site, as edited, that is computed earlier."""

    key: Key
    region: Region | Entries


@dataclass(frozen=True, eq=False)
class Whole:
    """A tensor that is read at the site itself, to be shaped like what stands there."""

    value: Tensor


@dataclass(frozen=True, eq=False)
class Step:
    """One intervention, resolved.

    Attributes:
        number: its place in the plan.
        item: what was asked.
        region: the entries that it edits, of the rows that are run.
        ctx: what its function is told.
        reads: the values that it reads: tensors of other worlds, or what this world computes.
        rows, positions: how many it touches.
    """

    number: int
    item: Intervention
    region: Region
    ctx: Context
    reads: tuple[Tensor | Here | Whole, ...]
    rows: int
    positions: int


@dataclass(frozen=True, eq=False)
class Program:
    """A plan on a layout.

    Attributes:
        plan: what was resolved.
        steps: its interventions by the site that they edit, in the order of the plan.
        held_back: the sites whose values are read further on.
        layout: of all rows; `window` are those that are run.
    """

    plan: Plan
    steps: Mapping[Key, tuple[Step, ...]]
    held_back: frozenset[Key]
    layout: Layout
    window: slice

    @property
    def touched(self) -> frozenset[Key]:
        """The sites at which something is edited or read."""
        return self.held_back | frozenset(self.steps)

    def report(self, state: State, audit: Audit | None = None) -> Audit:
        """Note in a record of the plan (a new one, unless one is given) what the steps did in one pass."""
        audit = Audit.of(self.plan) if audit is None else audit
        for steps in self.steps.values():
            for step in steps:
                if step.number in state.changes:
                    audit[step.number].record(step.rows, step.positions, state.changes[step.number])
        return audit


@dataclass(frozen=True, eq=False)
class State:
    """What one pass of a program carries: new for every call, and held by whoever makes the call.

    Attributes:
        here: values that are read further on, by site.
        changes: the largest change that each step made, a tensor [] by its place in the plan.
    """

    here: Mapping[Key, Tensor] = field(default_factory=dict)
    changes: Mapping[int, Tensor] = field(default_factory=dict)


class Steps(Protocol):
    """What `visit` needs of a program."""

    @property
    def steps(self) -> Mapping[Key, tuple[Step, ...]]:
        """The interventions by the site that they edit."""
        ...

    @property
    def held_back(self) -> frozenset[Key]:
        """The sites whose values are read further on."""
        ...


def visit(program: Steps, state: State, key: Key, x: Tensor, guard: Guard | None = None) -> tuple[State, Tensor]:
    """Apply the steps at a site to its value (all rows of the window), in the order of the plan.

    Returns:
        The state after it, and the value to go on with: `x` itself where nothing is edited.
    """
    changes = dict(state.changes)
    for step in program.steps.get(key, ()):
        region, item = step.region, step.item
        part = region.get(x)
        reads = [_value(read, step, state, part) for read in step.reads]
        allowed = None if guard is None else (region.get(guard[0]), guard[1])
        new, change = edited(item, item.op, item.weight, part, reads, step.ctx, region.there(x), allowed)
        x, changes[step.number] = region.put(x, new), change
    here = {**state.here, key: x} if key in program.held_back else state.here
    return State(here, changes), x


def edited(
    item: Intervention,
    op: Op,
    weight: float | Tensor,
    part: Tensor,
    reads: Sequence[Tensor],
    ctx: Context,
    valid: Tensor | None = None,
    guard: Guard | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply one operation to the part of an activation that it edits.

    Args:
        item: what was asked, for messages and for what is read.
        op, weight: its operation and strength, as tensors where they differ from world to world.
        part: the entries that are edited; `reads`: the values that are read.
        ctx: what the operation is told.
        valid: bool, broadcastable to the part, the entries that count; None for all.
        guard: of the part.

    Returns:
        The new part, and the largest change [] of an entry that counts.
    """
    old = part
    if valid is not None and item.site.name in _NO_KEY:
        # Filler, and keys that a sliding window has left, are as keys that are forbidden.
        seen = valid.expand(part.shape) if guard is None else guard[0] & valid
        guard = seen, _NO_KEY[item.site.name]
    if guard is not None:
        # Functions see the lowest number where attention is forbidden: an infinity would make their gradients NaN.
        lowest = torch.finfo(part.dtype).min if guard[1] == -torch.inf else guard[1]
        part = torch.where(guard[0], part, lowest)
        if op.masked:
            ctx = replace(ctx, allowed=guard[0])
    for read, value in zip(item.reads, reads, strict=True):
        if value.device != part.device or value.dtype != part.dtype:
            raise ShapeError(
                f"{item}: the source holds {value.dtype} on {value.device}, the activation is {part.dtype} on "
                f"{part.device}; convert the source with .to()"
            )
        if op.reads_alike and value.shape != part.shape:
            raise ShapeError(f"{item}: {list(value.shape)} is read ({read}), the site has {list(part.shape)}")
    given = [part, *reads]
    before = [_version(value) for value in given]
    new = op(*given, ctx=ctx)
    if [_version(value) for value in given] != before:
        raise PlanError(f"{item}: the function wrote into what it was given, which others use; return a new tensor")
    if not isinstance(new, Tensor) or new.shape != part.shape or new.dtype != part.dtype or new.device != part.device:
        got = f"{new.dtype} {list(new.shape)} on {new.device}" if isinstance(new, Tensor) else type(new).__name__
        raise ShapeError(
            f"{item}: the function returned {got}; expected {part.dtype} {list(part.shape)} on {part.device}"
        )
    new = blend(part, new, weight, ctx.total, ctx.window)
    if guard is not None:
        new = torch.where(guard[0], new, guard[1])
    with torch.no_grad():
        change = torch.where(old == new, 0, (new - old).abs())
        if valid is not None:
            change = torch.where(valid, change, 0)
        change = change.amax()
    return new, change


def _value(read: Tensor | Here | Whole, step: Step, state: State, part: Tensor) -> Tensor:
    if isinstance(read, Here):
        whole = state.here[read.key]
        value = read.region.get(whole)
        there = read.region.there(whole) if read.key[0] in _NO_KEY else None
        return value if there is None else torch.where(there, value, _NO_KEY[read.key[0]])
    if isinstance(read, Whole):
        value = fit(read.value, part, step.ctx, whole=True)
        assert isinstance(value, Tensor)
        return value
    return read


def _version(x: Tensor) -> int:
    """How often a tensor was written into; 0 where torch does not count."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


def blend(x: Tensor, y: Tensor, weight: float | Tensor, rows: int, window: slice | Tensor) -> Tensor:
    """x + s (y - x), exactly x at s = 0 and exactly y at s = 1; differentiable in all three.

    Args:
        weight: a number, or a tensor [] or [B] over all rows of the world, of which `window` are run.
    """
    if not isinstance(weight, Tensor):
        if weight == 1.0:
            return y
        if weight == 0.0:
            return x
        weight = x.new_full((), weight)
    if weight.ndim == 1:
        if len(weight) != rows:
            raise ShapeError(f"a strength for {len(weight)} rows, the inputs have {rows}")
        weight = weight[window].reshape([-1] + [1] * (x.ndim - 1))
    weight = beside(weight, x.device, x.dtype)
    # Where both are equal the difference is 0 even if both are infinite, which forbidden scores are.
    delta = torch.where(x == y, 0, y - x)
    finite = delta.isfinite()
    step = torch.where(finite, delta, 0)
    between = torch.where(weight < 0.5, x + weight * step, y - (1 - weight) * step)
    # Between a number and an infinity there is the infinity, and at the ends there is what stands there.
    ends = torch.where(weight == 0, x, torch.where(weight == 1, y, x + y))
    return torch.where(finite, between, ends)
