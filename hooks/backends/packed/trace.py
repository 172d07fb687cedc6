"""A computation written down before it is done: which functions of which values, with every index in one place.

What worlds change is known from their plans, so all that a chunk of worlds computes is decided first, without a number
of the model's. Its indices and masks then go to the device in one transfer, and what runs is tensors only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...placed import place


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor that will be there when the trace runs."""

    slot: int


@dataclass(frozen=True, eq=False)
class Instruction:
    """``fn(*values, *indices)``, kept in a slot."""

    fn: Callable[..., Any]
    args: tuple[int, ...]
    at: tuple[int, ...]
    slot: int


@dataclass(eq=False)
class Trace:
    """Instructions in order.

    Attributes:
        instructions: what is computed.
        indices: int64 or bool tensors on the CPU, which instructions take as they are on the device.
        kept: values that are wanted in the end.
    """

    instructions: list[Instruction] = field(default_factory=list)
    indices: list[Tensor] = field(default_factory=list)
    kept: list[Value] = field(default_factory=list)
    _handles: dict[int, int] = field(default_factory=dict)
    _slots: int = 0

    def do(self, fn: Callable[..., Any], *args: Value, at: Sequence[Tensor] = ()) -> Value:
        """Note that a function is to be called on values, and on indices that follow them."""
        handles = tuple([self._handle(index) for index in at]) if at else ()
        value = Value(self._slots)
        self._slots += 1
        self.instructions.append(Instruction(fn, tuple([a.slot for a in args]), handles, value.slot))
        return value

    def keep(self, value: Value) -> Value:
        """Want a value in the end."""
        self.kept.append(value)
        return value

    def run(self, device: torch.device) -> dict[Value, Tensor]:
        """Compute everything, hold each value no longer than it is needed, and return what is kept."""
        placed = place(self.indices, device)
        last = {slot: number for number, step in enumerate(self.instructions) for slot in step.args}
        wanted = {value.slot for value in self.kept}
        values: dict[int, Tensor] = {}
        for number, step in enumerate(self.instructions):
            values[step.slot] = step.fn(*(values[slot] for slot in step.args), *(placed[handle] for handle in step.at))
            for slot in (*step.args, step.slot):
                if last.get(slot, number) == number and slot not in wanted:
                    values.pop(slot, None)
        return {value: values[value.slot] for value in self.kept}

    def _handle(self, index: Tensor) -> int:
        if id(index) not in self._handles:
            self._handles[id(index)] = len(self.indices)
            self.indices.append(index)
        return self._handles[id(index)]
