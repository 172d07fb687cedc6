"""What an executor is given, worlds and what to read of them, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..audit import FIRED, INERT, PRUNED, Audit
from ..meter import Meter
from ..plan.plan import World
from ..plan.sites import Site

if TYPE_CHECKING:
    from ..model import Model

Skip = Callable[[int, slice], bool]
"""Says of a world (by index) and a range of rows that they need not be run."""


@dataclass(frozen=True, eq=False)
class Job:
    """Worlds to run.

    Attributes:
        model: the wrapped model, on which no plan is held.
        worlds: the worlds, whose plans fit the model.
        reads: the sites wanted of every world.
        limit: bytes that the activations of a chunk may take.
        seed: seed of random interventions.
        expose: layers whose attention is computed with its inside exposed, for every world alike.
        skip: says what need not be run.
        meter: counts the work of the worlds (not of those that they read).
    """

    model: Model
    worlds: Sequence[World]
    reads: Sequence[Site]
    limit: float
    seed: int
    expose: frozenset[int]
    skip: Skip
    meter: Meter | None = None


@dataclass(frozen=True, eq=False)
class Outcome:
    """What was read of one world, for some of its rows.

    Attributes:
        index: which world.
        rows: the rows, of those of its inputs.
        values: one tensor for each read, [b, ...].
        audit: what its interventions did on these rows.
    """

    index: int
    rows: slice
    values: tuple[Tensor, ...]
    audit: Audit

    @property
    def status(self) -> str:
        """``pruned`` if every intervention was, ``inert`` if none changed anything, else ``fired``."""
        found = {entry.status for entry in self.audit}
        if found and found <= {PRUNED}:
            return PRUNED
        return FIRED if FIRED in found else INERT
