"""What an executor is given, worlds and what to read of them, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from ..audit import FIRED, INERT, PRUNED, Audit
from ..meter import Meter
from ..models.network import Network
from ..plan.plan import Plan, World
from ..plan.sites import Site
from ..program import Program, State

Skip = Callable[[int, slice], bool]
"""Says of a world (by index) and a range of rows that they need not be run."""


@dataclass(frozen=True)
class Choice:
    """The executor that is used, and why it is not the one that was asked for (or the fastest)."""

    executor: str
    reason: str = ""


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
        skip: says what need not be run; None where all is.
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
    skip: Skip | None = None
    meter: Meter | None = None
    graph: bool = False
    through_reads: bool = False
    rows: slice | None = None

    def windows(self, total: int, step: int) -> Iterator[slice]:
        """The rows that are run, some at a time."""
        chosen = slice(0, total) if self.rows is None else self.rows
        for start in range(chosen.start, chosen.stop, step):
            yield slice(start, min(start + step, chosen.stop))


class Changes(Mapping[int, float]):
    """The changes of a pass, each read from the device when it is asked for."""

    def __init__(self, state: State) -> None:
        self.state = state

    def __getitem__(self, number: int) -> float:
        return float(self.state.changes[number])

    def __iter__(self) -> Iterator[int]:
        return iter(self.state.changes)

    def __len__(self) -> int:
        return len(self.state.changes)


@dataclass(frozen=True, eq=False)
class Record:
    """What the interventions of one world did on some rows.

    Attributes:
        plan: the world's.
        changes: the largest change that each made, by its place in the plan; those that were not applied are not there.
        pruned: those that were proved unable to reach anything that is read.
        note: writes all of it into an audit of the plan.
    """

    plan: Plan
    changes: Mapping[int, float]
    pruned: frozenset[int]
    note: Callable[[Audit], None]

    @classmethod
    def of(cls, program: Program, state: State) -> Record:
        """What one pass of a program did; sizes are read from the device when somebody asks."""

        def note(audit: Audit) -> None:
            program.report(state, audit)

        return cls(program.plan, Changes(state), frozenset(), note)

    def status(self, start: int = 0) -> str:
        """``pruned`` if every intervention from place `start` on was, ``inert`` if none changed anything, else
        ``fired``.
        """
        count = len(self.plan.interventions)
        if self.pruned and start < count and self.pruned.issuperset(range(start, count)):
            return PRUNED
        for n in range(start, count):
            if self.changes.get(n, 0.0) != 0.0 and n not in self.pruned:
                return FIRED
        return INERT

    @property
    def audit(self) -> Audit:
        """The record as an audit."""
        audit = Audit.of(self.plan)
        self.note(audit)
        return audit


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What was read of some worlds that were run together, for some of their rows.

    Attributes:
        indices: which worlds.
        rows: the rows, of those of their inputs.
        values: one tensor for each read, [W, b, ...].
        records: what the interventions of each did.
        output: the logits that the model itself returned, [W, b, T, V]; None where it was not called.
        starts: for each world the first of its plan's interventions that is its own; those before it are held on the
            model. None are where it is empty.
        own: of one world alone, its values [b, ...] as they were made.
        choice: the executor that ran them.
    """

    indices: tuple[int, ...]
    rows: slice
    values: tuple[Tensor, ...]
    records: tuple[Record, ...]
    output: Tensor | None = None
    starts: tuple[int, ...] = ()
    own: tuple[Tensor, ...] | None = None
    choice: Choice = Choice("")

    @classmethod
    def of_one(cls, index: int, rows: slice, values: tuple[Tensor, ...], record: Record, output: Tensor) -> Outcomes:
        """Those of one world, whose values [b, ...] stay the very tensors that gradients are taken by."""
        return cls((index,), rows, tuple(v[None] for v in values), (record,), output[None], own=values)

    def __len__(self) -> int:
        return len(self.indices)

    def one(self, world: int) -> Outcomes:
        """Those of one world alone."""
        here = slice(world, world + 1)
        output = None if self.output is None else self.output[here]
        values = tuple(value[here] for value in self.values)
        return replace(
            self,
            indices=self.indices[here],
            values=values,
            records=self.records[here],
            output=output,
            starts=self.starts[here],
        )

    @property
    def statuses(self) -> list[str]:
        """What became of each world; see `Outcome.status`."""
        starts = self.starts or (0,) * len(self)
        return [record.status(start) for record, start in zip(self.records, starts, strict=True)]

    def __iter__(self) -> Iterator[Outcome]:
        for w, index in enumerate(self.indices):
            output = None if self.output is None else self.output[w]
            values = tuple(value[w] for value in self.values) if self.own is None else self.own
            yield Outcome(index, self.rows, values, self.records[w], output, self.starts[w] if self.starts else 0)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What was read of one world, for some of its rows.

    Attributes:
        index: which world.
        rows: the rows, of those of its inputs.
        values: one tensor for each read, [b, ...].
        record: what its interventions did on these rows.
        output: the logits that the model itself returned, [b, T, V]; None where it was not called.
        start: the first of the plan's interventions that is the world's own; those before it are held on the model.
    """

    index: int
    rows: slice
    values: tuple[Tensor, ...]
    record: Record
    output: Tensor | None = None
    start: int = 0

    @cached_property
    def audit(self) -> Audit:
        """What its interventions did on these rows."""
        return Audit(self.record.audit.entries[self.start :])

    @property
    def status(self) -> str:
        """``pruned`` if every intervention was, ``inert`` if none changed anything, else ``fired``."""
        return self.record.status(self.start)
