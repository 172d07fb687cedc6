"""Interventions and plans: immutable statements of what to do where, to compose, restrict, compare, print and save."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, Union

import torch
from torch import Tensor

from .errors import PlanError, ShapeError
from .html import table
from .inputs import Inputs
from .sites import Site, describe_index, same
from .tape import Tape

if TYPE_CHECKING:
    from .context import Context


class Op:
    """A pure function ``f(x, *reads, ctx)``; subclasses are frozen dataclasses of its parameters.

    Attributes:
        name: what prints and saves.
        mixes: ``"row"`` and ``"pos"``, where these depend on one another.
        writes_inf: whether it writes -inf, so that it has no strength.
        always: whether what follows is computed again though the value did not change.
        reads_alike: whether what is read has to have x's shape.
        needs_full_rows: whether each row of a reference set must have every position that is edited.
        reads_constants: whether no gradient flows into what is read.
    """

    name: ClassVar[str]
    mixes: ClassVar[frozenset[str]] = frozenset()
    writes_inf: ClassVar[bool] = False
    always: ClassVar[bool] = False
    reads_alike: ClassVar[bool] = False
    needs_full_rows: ClassVar[bool] = False
    reads_constants: ClassVar[bool] = False

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        """Return the new value, of x's shape, dtype and device."""
        raise NotImplementedError

    def parameters(self) -> dict[str, Any]:
        """The function's parameters by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return False
        mine, theirs = self.parameters(), other.parameters()  # type: ignore[attr-defined]
        return all(same(mine[name], theirs[name]) for name in mine)

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        parts = []
        for name, value in self.parameters().items():
            text = (
                f"{value.dtype}{list(value.shape)}".removeprefix("torch.") if isinstance(value, Tensor) else repr(value)
            )
            parts.append(f"{name}={text}")
        return f"{self.name}({', '.join(parts)})" if parts else self.name


class Origin(enum.Enum):
    """Where a read takes its value from, when it is the world itself."""

    HERE = "this world"
    UNEDITED = "this world, unedited"


@dataclass(frozen=True, eq=False)
class World:
    """An input under a plan. The clean run is one, the corrupted run is one, and so is every cell of a sweep."""

    inputs: Inputs
    plan: Plan = field(default_factory=lambda: Plan())

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, Inputs):
            raise PlanError(f"a World takes Inputs (from model.inputs), not {type(self.inputs).__name__}")
        object.__setattr__(self, "plan", as_plan(self.plan))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, World):
            return NotImplemented
        mine, theirs = self.inputs, other.inputs
        return (
            same(mine.ids, theirs.ids)
            and same(mine.mask, theirs.mask)
            and same(mine.row_ids, theirs.row_ids)
            and same(mine.pixels, theirs.pixels)
            and self.plan == other.plan
        )

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
        source: a world (or inputs), a tape, a tensor, an `Origin`, or a plan: the inputs of the world that reads, under
            that plan.
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
    """A site, the values read, and a pure function of them: see `hooks.ops` for the functions.

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

    def at(self, **restrictions: Any) -> Plan:
        """Every intervention on a part of its site; see `Site.at`."""
        return Plan(tuple(i.at(**restrictions) for i in self))

    def where(self, mask: Tensor) -> Plan:
        """Every intervention on the rows or tokens of a mask; see `Intervention.where`."""
        return Plan(tuple(i.where(mask) for i in self))

    def strength(self, s: float | Tensor) -> Plan:
        """Every intervention at strength s; see `Intervention.strength`."""
        return Plan(tuple(i.strength(s) for i in self))

    def save(self, path: str | PathLike[str]) -> None:
        """Write ``path.json`` and, where the plan holds tensors, ``path.safetensors``; see `hooks.saving`."""
        from .saving import save_plan

        save_plan(self, path)

    @staticmethod
    def load(path: str | PathLike[str], model: Any = None) -> Plan:
        """Read what `save` wrote; with a model, check every site and shape against it. Runs no code from the file."""
        from .saving import load_plan

        plan = load_plan(path)
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
