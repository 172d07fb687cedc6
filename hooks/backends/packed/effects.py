"""What the interventions of worlds did, counted on the device and read once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .cells import Cell, Stack
from .trace import Trace, Value


class Effects:
    """The largest change that each intervention of some worlds made, and which can reach nothing that is read.

    Args:
        trace: keeps the changes.
        worlds: how many there are, of `rows` rows each.

    Attributes:
        cells: the interventions that were applied, by world and place in the plan.
        pruned: those that were proved unable to reach anything that is read.
    """

    def __init__(self, trace: Trace, worlds: int, rows: int) -> None:
        self.trace, self.rows = trace, rows
        self.cells: list[dict[int, Cell]] = [{} for _ in range(worlds)]
        self.pruned: list[set[int]] = [set() for _ in range(worlds)]
        self._changes: list[tuple[list[tuple[int, int]], Value]] = []
        self._known: list[tuple[int, int, float]] = []

    def note(self, stack: Stack, change: Value, changed: Tensor, needed: Tensor) -> None:
        """Note what a stack does.

        Args:
            change: the largest change of each world.
            changed: bool [m, T], the tokens that it may change; `needed`: [members, T], those that can matter.
        """
        self._changes.append(([(cell.world, cell.number) for cell in stack.cells], self.trace.keep(change)))
        self.reach(stack, changed, needed)

    def note_known(self, stack: Stack, changes: Iterable[float], changed: Tensor, needed: Tensor) -> None:
        """Note what a stack does where that follows from masks."""
        for cell, change in zip(stack.cells, changes, strict=True):
            self._known.append((cell.world, cell.number, change))
        self.reach(stack, changed, needed)

    def reach(self, stack: Stack, changed: Tensor, needed: Tensor) -> None:
        """Prune the interventions of a stack that change only what cannot matter."""
        some = changed.reshape(len(stack), -1).any(1)
        useful = (changed & needed[stack.members]).reshape(len(stack), -1).any(1)
        for cell in stack.cells:
            self.cells[cell.world][cell.number] = cell
        for at in (some & ~useful).nonzero().flatten().tolist():
            cell = stack.cells[at]
            self.pruned[cell.world].add(cell.number)

    def prune(self, cells: Iterable[Cell]) -> None:
        """Interventions that come after everything that is read."""
        for cell in cells:
            if cell.number not in self.cells[cell.world]:
                self.cells[cell.world][cell.number] = cell
                self.pruned[cell.world].add(cell.number)

    def read(self, values: dict[Value, Tensor]) -> list[dict[int, float]]:
        """The largest change of each intervention of each world, by its place in the plan, in one transfer."""
        found: list[dict[int, float]] = [{} for _ in self.cells]
        if self._changes:
            whole = torch.cat([values[change].double() for _, change in self._changes]).tolist()
            places = (place for names, _ in self._changes for place in names)
            for (world, number), change in zip(places, whole, strict=True):
                found[world][number] = change
        for world, number, change in self._known:
            found[world][number] = change
        return found
