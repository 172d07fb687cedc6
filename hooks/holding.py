"""What one `apply` holds: a plan, or a function that gives one, and its record."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .audit import Audit, Entry
from .errors import UnfiredError
from .keeping import Keeping
from .models.checks import check_plan
from .models.network import Network
from .plan.inputs import Inputs
from .plan.plan import Plan, as_plan

PlanOf = Callable[[Inputs], Any]
"""A plan (or an intervention, or several) that depends on what the model is called with."""


@dataclass(frozen=True)
class Holding:
    """A plan that is held on a model.

    Attributes:
        plan: the plan, or the function that gives one for each call.
        by: where it was applied, as "file:line in function", outside of this package.
        thread: the name of the thread that applied it.
        in_force: False where the thread that asks has suspended it.
        audit: what it did so far.
    """

    plan: Plan | PlanOf
    by: str
    thread: str
    in_force: bool
    audit: Audit

    def __str__(self) -> str:
        what = (
            str(self.plan) if isinstance(self.plan, Plan) else f"a plan of {getattr(self.plan, '__name__', 'a call')}"
        )
        return f"{what} (applied at {self.by}, thread {self.thread}{'' if self.in_force else ', suspended here'})"

    __repr__ = __str__


def applied_at() -> str:
    """Where the caller's code is: the innermost frame outside of this package and of what it is called through."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("hooks", "contextlib"):
        frame = frame.f_back
    inner = frame
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("interp", "contextlib"):
        frame = frame.f_back
    name = inner.f_globals.get("__name__", "")
    via = f", by {name}" if name.startswith("interp.") else ""
    code = frame.f_code
    return f"{code.co_filename}:{frame.f_lineno} in {code.co_name}{via}"


class Hold:
    """What one `apply` holds on a model.

    Attributes:
        plan: a plan, or a function from the inputs of a call to one.
        audit: its record, which grows by entries where the plan is a function.
        seed: of its random interventions.
        thread, depth: who applied it, and how often that thread had suspended then what was held.
        by: where in the caller's code it was applied.
        read: other plans of the same text that were read, by how they were reached, and which of their interventions
            came to something.
        keeping: what is kept of every call in it, or None.
    """

    def __init__(self, plan: Any, seed: int, depth: int, by: str = "", keeping: Keeping | None = None) -> None:
        self.keeping = keeping
        self.seed, self.thread, self.depth = seed, threading.get_ident(), depth
        self.by, self.thread_name = by, threading.current_thread().name
        self.plan: Plan | PlanOf
        if callable(plan) and not isinstance(plan, type):
            self.plan, self.audit = plan, Audit()
        else:
            self.plan = as_plan(plan)  # type: ignore[arg-type]
            self.audit = Audit.of(self.plan)
        self.read: dict[Any, tuple[Plan, set[int]]] = {}

    def on(self, inputs: Inputs, network: Network) -> tuple[Plan, tuple[Entry, ...]]:
        """The plan on these inputs, and the entry of the record that belongs to each of its interventions."""
        if isinstance(self.plan, Plan):
            return self.plan, self.audit.entries
        plan = as_plan(self.plan(inputs))
        check_plan(network, plan)
        # The n-th intervention of a kind at a place is the same one from call to call, whatever its values are.
        left: dict[Any, list[Entry]] = {}
        for entry in self.audit.entries:
            left.setdefault(_kind(entry.intervention), []).append(entry)
        found = []
        for item in plan:
            same = left.get(_kind(item))
            found.append(same.pop(0) if same else Entry(item))
        known = {id(entry) for entry in self.audit.entries}
        self.audit.entries += tuple(entry for entry in found if id(entry) not in known)
        return plan, tuple(found)

    def require_fired(self) -> None:
        """Raise where something never fired, or where a function never gave anything to do."""
        if not isinstance(self.plan, Plan) and not len(self.audit):
            name = getattr(self.plan, "__name__", type(self.plan).__name__)
            raise UnfiredError(f"never fired: {name} was asked for no intervention while it was applied")
        self.audit.require_fired()
        for plan, live in self.read.values():
            Audit(tuple(Entry(item) for number, item in enumerate(plan) if number not in live)).require_fired()


def _kind(item: Any) -> Any:
    return (item.site.key, item.op.name, str(item.site.head))
