"""An operation on several worlds at once: what differs between them has a leading axis, and it sees one at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...plan.context import Context, Reference, fit
from ...plan.plan import Intervention
from ...plan.region import replaced, taken
from ...program import Guard, edited
from .tokens import take


class Placed:
    """Tensors that go to the device with the indices of a step, by their place among them."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def add(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return len(self.tensors) - 1


@dataclass(frozen=True, eq=False)
class Given:
    """A tensor that is read as it is, or one for each world; `fitted` to the part when the operation is applied."""

    value: Tensor
    each: bool
    fitted: bool = False


@dataclass(frozen=True, eq=False)
class Parameter:
    """A parameter with one value for each world: a tensor, or the place of numbers among those that are placed."""

    value: Tensor | None = None
    at: int = -1


@dataclass(frozen=True, eq=False)
class ContextOf:
    """A context, and the places of its tensors: those that all worlds share, and those with one for each."""

    ctx: Context
    shared: dict[str, int]
    each: dict[str, int]


@dataclass(frozen=True, eq=False)
class Gathered:
    """Rows of a whole activation, taken along some axes."""

    whole: Tensor
    axes: tuple[int, ...]

    def __call__(self, rows: Tensor, *index: Tensor) -> Tensor:
        steps = list(zip(self.axes, index, strict=True))
        if steps and steps[0][0] == 1:
            # With the rows, so that what is not meant of a large activation is never copied.
            at = rows[:, None] * self.whole.shape[1] + steps.pop(0)[1]
            x = self.whole.flatten(0, 1).index_select(0, at.flatten()).unflatten(0, tuple(at.shape))
        else:
            x = take(self.whole, rows)
        return taken(x, tuple(steps))


@dataclass(frozen=True, eq=False)
class StackedEdit:
    """An operation on the activation of several worlds: returns their new value and the largest change of each."""

    item: Intervention
    worlds: int
    rows: int
    ctx: ContextOf
    params: dict[str, Parameter]
    weight: float | Tensor | Parameter
    axes: tuple[int, ...]
    valid: int | None
    reads: tuple[Given, ...]
    given: tuple[bool, ...]
    references: list[Reference | None]
    guarded: bool

    def __call__(self, x: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
        guard = args[0] if self.guarded else None
        args = args[1:] if self.guarded else args
        count = sum(self.given)
        values, index, placed = args[:count], args[count : count + len(self.axes)], args[count + len(self.axes) :]
        steps = tuple(zip(self.axes, index, strict=True))
        part = taken(x, steps)
        allowed = None if guard is None else taken(guard.expand_as(x), steps)
        each: dict[str, Tensor] = {"part": self.apart(part)}
        shared: dict[str, Tensor] = {}
        if allowed is not None:
            each["guard"] = self.apart(allowed)
        if self.valid is not None:
            each["valid"] = self.apart(placed[self.valid])
        given, held = iter(values), iter(self.reads)
        fitted = set()
        for number, computed in enumerate(self.given):
            name = f"read{number}"
            if computed:
                each[name] = self.apart(next(given))
                continue
            one = next(held)
            (each if one.each else shared)[name] = one.value
            if one.fitted:
                fitted.add(name)
            reference = self.references[number]
            if reference is not None and reference.valid is not None:
                (each if one.each else shared)[f"valid{number}"] = reference.valid
        for name, at in self.ctx.shared.items():
            shared[f"ctx.{name}"] = placed[at]
        for name, at in self.ctx.each.items():
            each[f"ctx.{name}"] = placed[at]
        for name, parameter in self.params.items():
            each[f"op.{name}"] = placed[parameter.at] if parameter.value is None else parameter.value
        if isinstance(self.weight, Parameter):
            each["weight"] = placed[self.weight.at] if self.weight.value is None else self.weight.value
        if self.worlds == 1:
            new, change = self.one({name: value[0] for name, value in each.items()}, shared, fitted)
            new, change = new[None], change[None]
        else:
            new, change = torch.vmap(lambda mine: self.one(mine, shared, fitted))(each)
        valid = None if self.valid is None else placed[self.valid]
        return replaced(x, new.flatten(0, 1), steps, valid), change

    def apart(self, x: Tensor) -> Tensor:
        """[m, ...] as [worlds, b, ...]."""
        return x.unflatten(0, (self.worlds, self.rows))

    def one(self, each: dict[str, Tensor], shared: dict[str, Tensor], fitted: set[str]) -> tuple[Tensor, Tensor]:
        """What the operation makes of one world."""
        every = {**shared, **each}
        told = {name.removeprefix("ctx."): value for name, value in every.items() if name.startswith("ctx.")}
        references = tuple(
            None if one is None else Reference(every.get(f"valid{number}"), one.by_position)
            for number, one in enumerate(self.references)
        )
        ctx = replace(self.ctx.ctx, references=references, **told)
        changed = {name.removeprefix("op."): value for name, value in each.items() if name.startswith("op.")}
        op = replace(self.item.op, **changed) if changed else self.item.op  # type: ignore[type-var]
        weight = each.get("weight", self.weight)
        part, guard = each["part"], each.get("guard")
        reads = []
        for number in range(len(self.given)):
            value = every[f"read{number}"]
            reads.append(fit(value, part, ctx, whole=True) if f"read{number}" in fitted else value)
        told_guard: Guard | None = None if guard is None else (guard, self.forbidden)
        return edited(self.item, op, weight, part, reads, ctx, each.get("valid"), told_guard)  # type: ignore[arg-type]

    @property
    def forbidden(self) -> float:
        """What stands where attention is forbidden."""
        return -torch.inf if self.item.site.name == "scores" else 0.0


def value_of(both: tuple[Tensor, Tensor]) -> Tensor:
    """The new value."""
    return both[0]


def change_of(both: tuple[Tensor, Tensor]) -> Tensor:
    """The largest change of each world."""
    return both[1]
