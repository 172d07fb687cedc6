"""Interventions and plans: immutable statements of what to do where, to compose, restrict, compare, print and save."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any, Union

import torch
from torch import Tensor

from ..errors import PlanError, ShapeError
from ..html import table
from .encoding import Put, Record
from .inputs import INPUTS_RECORDS, Inputs
from .moving import mover
from .operation import Op
from .operations.table import OPERATIONS
from .saving import load_plan, save_plan
from .sites import SITE_RECORDS, Site, describe_index, same
from .tape import TAPE_RECORD, Tape


class Origin(enum.Enum):
    """Where a read takes its value from, when it is the world itself."""

    HERE = "this world"
    UNEDITED = "this world, unedited"

    def encoded(self, put: Put) -> dict[str, Any]:
        """The origin as data."""
        return {"type": "origin", "name": put(self.name)}


@dataclass(frozen=True, eq=False)
class World:
    """An input under a plan. The clean run is one, the corrupted run is one, and so is every cell of a sweep."""

    inputs: Inputs
    plan: Plan = field(default_factory=lambda: Plan())

    def encoded(self, put: Put) -> dict[str, Any]:
        """The world as data."""
        return WORLD.encoded(self, put)

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, Inputs):
            raise PlanError(f"a World takes Inputs (from model.inputs), not {type(self.inputs).__name__}")
        object.__setattr__(self, "plan", as_plan(self.plan))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, World):
            return NotImplemented
        return self.inputs.same_as(other.inputs) and self.plan == other.plan

    def __hash__(self) -> int:
        return hash((self.inputs.ids.shape, len(self.plan)))

    def __str__(self) -> str:
        return f"World({self.inputs!r}{f', {len(self.plan)} interventions' if len(self.plan) else ''})"

    __repr__ = __str__


Source = Union["World", "Plan", "Intervention", Tape, Inputs, Tensor, Origin]


@dataclass(frozen=True, eq=False)
class Read:
    """A value that an intervention reads.

    Attributes:
        source: a world (or inputs), a tape, a tensor, this world (see `here`), or a plan: the inputs of the world that
            reads, under that plan.
        site: the site read; None for the intervention's own.
        aligned: whether row i of the source belongs to row i of the world. If not, the source is a reference set of any
            number of rows, and the function gets all of them.
    """

    source: Source
    site: Site | None = None
    aligned: bool = True

    def __post_init__(self) -> None:
        source = self.source
        if isinstance(source, Inputs):
            source = World(source)
        if isinstance(source, Intervention):
            source = Plan((source,))
        if not isinstance(source, (World, Plan, Tape, Tensor, Origin)):
            given = "nothing" if source is None else type(source).__name__
            raise PlanError(f"values are read from a World, a Plan, a Tape or a tensor, not from {given}")
        if isinstance(source, Tensor) and self.aligned and self.site is not None:
            raise PlanError(
                f"a tensor has no site {self.site}: only a World, a Plan or a Tape has others; index it first"
            )
        object.__setattr__(self, "source", source)

    def encoded(self, put: Put) -> dict[str, Any]:
        """The read as data."""
        return READ.encoded(self, put)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Read):
            return NotImplemented
        return self.aligned == other.aligned and self.site == other.site and same(self.source, other.source)

    def __hash__(self) -> int:
        return hash((self.site, self.aligned))

    def __str__(self) -> str:
        source = self.source
        if isinstance(source, Tensor):
            text = f"tensor{list(source.shape)}"
        elif isinstance(source, Plan):
            text = f"this world under another plan of {len(source)}"
        else:
            text = source.value if isinstance(source, Origin) else str(source)
        return text if self.site is None else f"{text} at {self.site}"


@dataclass(frozen=True, eq=False)
class Intervention:
    """A site, the values read, and a pure function of them, as `patch`, `zero` and others make it.

    Attributes:
        site: where.
        op: the function.
        reads: what it reads besides the value at the site.
        weight: the strength s: x + s (f(x) - x), a number, or a tensor with one number for each row.
        only: bool [B] or [B, T], the rows or tokens to which it is restricted; None for all.
    """

    site: Site
    op: Op
    reads: tuple[Read, ...] = ()
    weight: float | Tensor = 1.0
    only: Tensor | None = None

    @property
    def own_reads(self) -> tuple[Read, ...]:
        """What it reads of this world as it is edited."""
        return tuple(read for read in self.reads if read.source is Origin.HERE)

    @property
    def read_sites(self) -> tuple[Site, ...]:
        """The sites that it reads, where they are named."""
        return tuple(read.site for read in self.reads if read.site is not None)

    def encoded(self, put: Put) -> dict[str, Any]:
        """The intervention as data."""
        return INTERVENTION.encoded(self, put)

    def at(self, **restrictions: Any) -> Intervention:
        """The same intervention on a part of its site; see `Site.at`. Reads of the same site follow."""
        return replace(self, site=self.site.at(**restrictions))

    def where(self, mask: Tensor) -> Intervention:
        """The same intervention on the rows (bool [B]) or tokens (bool [B, T]) of a mask, besides earlier masks."""
        mask = torch.as_tensor(mask)
        if mask.dtype != torch.bool or mask.ndim not in (1, 2):
            raise ShapeError(f"where() takes a bool mask [B] or [B, T], got {mask.dtype} of shape {list(mask.shape)}")
        if self.only is not None:
            if len(mask) != len(self.only) or (mask.ndim == self.only.ndim and mask.shape != self.only.shape):
                raise ShapeError(
                    f"where() is given a mask {list(mask.shape)}, and the mask before it is {list(self.only.shape)}"
                )
            one, two = (m if m.ndim == 2 else m[:, None] for m in (self.only, mask))
            mask = one & two if max(self.only.ndim, mask.ndim) == 2 else self.only & mask
        return replace(self, only=mask)

    def strength(self, s: float | Tensor) -> Intervention:
        """The same intervention at strength s (times its present one): x at 0 and f(x) at 1, both exactly.

        Raises:
            PlanError: the function writes -inf, between which and a number there is nothing.
        """
        if self.op.writes_inf:
            raise PlanError(f"{self.op.name} writes -inf and has no strength in between")
        if isinstance(s, Tensor) and s.ndim > 1:
            raise ShapeError(f"a strength is a number or one number a row, got shape {list(s.shape)}")
        # The tensor itself, where there is none yet: one that is learned changes under a plan that is held.
        plain = not isinstance(self.weight, Tensor) and self.weight == 1.0
        return replace(self, weight=s if plain else self.weight * s)

    def __add__(self, other: Plan | Intervention) -> Plan:
        return as_plan(self) + other

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Intervention):
            return NotImplemented
        return (
            self.site == other.site
            and self.op == other.op
            and self.reads == other.reads
            and same(self.weight, other.weight)
            and same(self.only, other.only)
        )

    def __hash__(self) -> int:
        return hash((self.site, self.op))

    def __str__(self) -> str:
        text = f"{self.op} at {self.site}"
        if self.reads:
            text += " from " + ", ".join(map(str, self.reads))
        if isinstance(self.weight, Tensor) or self.weight != 1.0:
            weight = torch.as_tensor(self.weight)
            text += f", strength {list(weight.shape)}" if weight.ndim else f", strength {weight.item():g}"
        return text if self.only is None else f"{text}, where {describe_index(self.only)}"

    __repr__ = __str__


@dataclass(frozen=True, eq=False)
class Plan:
    """An immutable sequence of interventions.

    Distinct sites apply in the order in which the model computes them; within a site the plan's order decides, and an
    intervention that stands in it twice is applied twice.
    """

    interventions: tuple[Intervention, ...] = ()

    def __post_init__(self) -> None:
        listed = tuple(self.interventions)
        for item in listed:
            if not isinstance(item, Intervention):
                raise PlanError(f"a plan holds interventions, not {type(item).__name__}")
        object.__setattr__(self, "interventions", listed)

    def encoded(self, put: Put) -> dict[str, Any]:
        """The plan as data."""
        return PLAN.encoded(self, put)

    def at(self, **restrictions: Any) -> Plan:
        """Every intervention on a part of its site; see `Site.at`."""
        return Plan(tuple(i.at(**restrictions) for i in self))

    def where(self, mask: Tensor) -> Plan:
        """Every intervention on the rows or tokens of a mask; see `Intervention.where`."""
        return Plan(tuple(i.where(mask) for i in self))

    def strength(self, s: float | Tensor) -> Plan:
        """Every intervention at strength s; see `Intervention.strength`."""
        return Plan(tuple(i.strength(s) for i in self))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Plan:
        """The same plan with its values, tapes and the plans that it reads on another device or in another dtype."""
        return mover(device, dtype)(self)

    def save(self, path: str | PathLike[str]) -> None:
        """Write ``path.json`` and, where the plan holds tensors, ``path.safetensors``.

        Raises:
            PlanError: the plan holds a function of the user's.
        """
        save_plan(self, path)

    @staticmethod
    def load(path: str | PathLike[str], model: Any = None, *, operations: Iterable[type[Op]] = ()) -> Plan:
        """Read what `save` wrote. Runs no code from the file.

        Args:
            path: as it was given to `save`.
            model: check every site and shape against it.
            operations: classes of operations that the file may name besides those that ship here.

        Raises:
            PlanError: there is none, it holds anything but a plan, or an operation that nobody knows.
        """
        known = OPERATIONS | {op.name: op for op in operations}
        plan = load_plan(path, RECORDS, known)
        if not isinstance(plan, Plan):
            raise PlanError(f"{path} holds a {type(plan).__name__}, not a plan")
        if not all(isinstance(read, Read) for item in plan for read in item.reads):
            raise PlanError(f"{path} reads something that is not a read")
        if model is not None:
            model.check(plan)
        return plan

    def __add__(self, other: Plan | Intervention) -> Plan:
        return Plan(self.interventions + as_plan(other).interventions)

    def __iter__(self) -> Iterator[Intervention]:
        return iter(self.interventions)

    def __len__(self) -> int:
        return len(self.interventions)

    def __getitem__(self, index: int) -> Intervention:
        return self.interventions[index]

    def __eq__(self, other: object) -> bool:
        return self.interventions == other.interventions if isinstance(other, Plan) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.interventions)

    def __str__(self) -> str:
        if not len(self):
            return "Plan(empty)"
        return "Plan(\n" + "".join(f"  {n}. {item}\n" for n, item in enumerate(self, 1)) + ")"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [(n, item.site, item.op, ", ".join(map(str, item.reads))) for n, item in enumerate(self, 1)]
        return table(("", "site", "what", "reads"), rows, caption=f"Plan of {len(self)} interventions")


def as_plan(value: Plan | Intervention | Iterable[Intervention] | None) -> Plan:
    """Make a plan of a plan, an intervention, several, or None (the empty plan)."""
    if isinstance(value, Plan):
        return value
    if value is None:
        return Plan()
    if isinstance(value, Intervention):
        return Plan((value,))
    if isinstance(value, (list, tuple)):
        return Plan(tuple(value))
    raise PlanError(f"expected a Plan or an Intervention, got {type(value).__name__}")


WORLD = Record("world", {"inputs": (Inputs,), "plan": (Plan,)}, World)
READ = Record(
    "read", {"source": (World, Plan, Tape, Tensor, Origin), "site": (Site, type(None)), "aligned": (bool,)}, Read
)
INTERVENTION = Record(
    "intervention",
    {
        "site": (Site,),
        "op": (Op,),
        "reads": (tuple,),
        "weight": (int, float, Tensor),
        "only": (Tensor, type(None)),
    },
    Intervention,
)
PLAN = Record("plan", {"interventions": (tuple,)}, Plan)
ORIGIN = Record("origin", {"name": (str,)}, Origin.__getitem__)
RECORDS: dict[str, Record] = {
    record.name: record
    for record in (PLAN, INTERVENTION, READ, WORLD, ORIGIN, *SITE_RECORDS, *INPUTS_RECORDS, TAPE_RECORD)
}
"""What may stand in the file of a plan."""
