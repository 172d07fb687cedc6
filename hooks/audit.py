"""What each intervention of a run did: the difference between "nothing happened" and "nothing was there to happen"."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import UnfiredError
from .html import table
from .plan.plan import Intervention, Plan

FIRED, INERT, PRUNED, UNFIRED = "fired", "inert", "pruned", "unfired"


@dataclass
class Entry:
    """The record of one intervention.

    Attributes:
        intervention: what was asked.
        calls: how many forward passes it was applied in.
        rows: rows that it touched, over all calls; `positions`: (row, position) pairs.
        pruned: whether it was proved unable to reach anything that is read.
    """

    intervention: Intervention
    calls: int = 0
    rows: int = 0
    positions: int = 0
    pruned: bool = False
    _sizes: list[Tensor | float] = field(default_factory=list)

    def record(self, rows: int, positions: int, change: Tensor | float) -> None:
        """Note an application, with the largest change [] on its device, which is read only when somebody asks."""
        self.calls += 1
        self.rows += rows
        self.positions += positions
        self._sizes.append(change)
        if len(self._sizes) > 64:
            self._sizes = [torch.stack([torch.as_tensor(size) for size in self._sizes]).amax()]

    def absorb(self, other: Entry) -> None:
        """Count what another record of the same intervention counted; pruned is what was pruned everywhere."""
        if other.calls or other.pruned:
            fresh = not self.calls and not self.pruned
            self.pruned = other.pruned and (fresh or self.pruned)
        self.calls += other.calls
        self.rows += other.rows
        self.positions += other.positions
        self._sizes += other._sizes

    @property
    def change(self) -> float:
        """The largest absolute change that it made to any number (inf for a knock-out)."""
        return max((float(size) for size in self._sizes), default=0.0)

    @property
    def status(self) -> str:
        """``fired``, ``inert`` (fired, and the value was equal), ``pruned`` or ``unfired``."""
        if self.pruned:
            return PRUNED
        if not self.calls:
            return UNFIRED
        return INERT if self.change == 0.0 else FIRED


@dataclass
class Audit:
    """One entry for each intervention of a plan, in its order.

    Of a plan that is a function of the inputs there is one for each intervention that it has given so far.
    """

    entries: tuple[Entry, ...] = ()

    @classmethod
    def of(cls, plan: Plan) -> Audit:
        """An empty record of a plan."""
        return cls(tuple(Entry(item) for item in plan))

    def __iter__(self):
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Entry:
        return self.entries[index]

    def split(self, count: int, into: Audit | None) -> Audit:
        """The record without its first `count` entries, which `into` absorbs."""
        for mine, theirs in zip(self.entries[:count], into.entries if into else (), strict=False):
            theirs.absorb(mine)
        return Audit(self.entries[count:])

    def require_fired(self) -> None:
        """Raise where an intervention never fired.

        Raises:
            UnfiredError: naming each of them.
        """
        idle = [str(e.intervention) for e in self.entries if e.status == UNFIRED]
        if idle:
            raise UnfiredError(
                "never fired: " + "; ".join(idle) + ". The model did not compute that site while the plan was applied."
            )

    def __str__(self) -> str:
        if not self.entries:
            return "Audit(no interventions)"
        lines = [
            f"  {e.status:7} rows {e.rows}, positions {e.positions}, largest change {e.change:.3g}: {e.intervention}"
            for e in self.entries
        ]
        return "Audit(\n" + "\n".join(lines) + "\n)"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [(e.status, e.rows, e.positions, f"{e.change:.3g}", e.intervention) for e in self.entries]
        return table(("status", "rows", "positions", "largest change", "intervention"), rows)
