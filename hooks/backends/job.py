"""What an executor is given, worlds and what to read of them, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..audit import FIRED, INERT, PRUNED, Audit
from ..meter import Meter
from ..models.network import Network
from ..plan.plan import World
from ..plan.sites import Site

Skip = Callable[[int, slice], bool]
"""Says of a world (by index) and a range of rows that they need not be run."""


@dataclass(frozen=True, eq=False)
class Job:
    """Worlds to run.

    Attributes:
        network: the model.
        worlds: the worlds, whose plans fit the model.
        reads: the sites wanted of every world.
        limit: bytes that the activations of a chunk may take; None for as many as they take.
        seed: of random interventions.
        expose: layers whose attention is computed with its inside exposed, for every world alike.
        skip: says what need not be run.
        meter: counts the work of the worlds (not of those that they read).
        graph: keep what is read attached to the autograd graph; `through_reads`: and what the plans read.
        rows: the rows that are run; None for all.
    """

    network: Network
    worlds: Sequence[World]
    reads: Sequence[Site]
    limit: float | None
    seed: int
    expose: frozenset[int]
    skip: Skip
    meter: Meter | None = None
    graph: bool = False
    through_reads: bool = False
    rows: slice | None = None

    def windows(self, total: int, step: int) -> Iterator[slice]:
        """The rows that are run, some at a time."""
        chosen = slice(0, total) if self.rows is None else self.rows
        for start in range(chosen.start, chosen.stop, step):
            yield slice(start, min(start + step, chosen.stop))


@dataclass(frozen=True, eq=False)
class Outcome:
    """What was read of one world, for some of its rows.

    Attributes:
        index: which world.
        rows: the rows, of those of its inputs.
        values: one tensor for each read, [b, ...].
        audit: what its interventions did on these rows.
        output: the logits that the model itself returned, [b, T, V]; None where it was not called.
    """

    index: int
    rows: slice
    values: tuple[Tensor, ...]
    audit: Audit
    output: Tensor | None = None

    @property
    def status(self) -> str:
        """``pruned`` if every intervention was, ``inert`` if none changed anything, else ``fired``."""
        found = {entry.status for entry in self.audit}
        if found and found <= {PRUNED}:
            return PRUNED
        return FIRED if FIRED in found else INERT
