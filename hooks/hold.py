"""Plans held on a model while the user calls it, and what is held on which model now."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from .audit import Audit
from .backends import frames
from .backends.gate import gate_of
from .errors import PlanError
from .fed import Decoding, Fed
from .forking import Begin, Branch, Combine, Fork
from .holding import Hold, Holding, applied_at
from .holds import Holds
from .keeping import Keeping
from .layout import Layout
from .models.checks import check_plan
from .models.network import Network
from .plan.inputs import Inputs
from .plan.plan import Plan
from .plan.spans import New

_HOLDS: WeakKeyDictionary[nn.Module, Holds] = WeakKeyDictionary()
"""What is held on each module at the moment, by whichever wrapper of it."""


def holds_on(module: nn.Module) -> Holds | None:
    """All that is held on a module, or None where nothing is, or this thread has suspended it."""
    holds = _HOLDS.get(module)
    return holds if holds is not None and holds.in_force() else None


def listing(module: nn.Module) -> tuple[Holding, ...]:
    """What is held on a module, by whichever wrapper of it, the outermost first; see `Holding`."""
    holds = _HOLDS.get(module)
    if holds is None:
        return ()
    force = holds.in_force()
    return tuple(Holding(one.plan, one.by, one.thread_name, one in force, one.audit) for one in holds.holds)


def held(network: Network, inputs: Inputs) -> tuple[Plan, Audit]:
    """The plan that is held on a model for a run on these inputs that is made now, and its record.

    Nothing is for a run within a call of the model, which its plans are part of.
    """
    holds = holds_on(network.module)
    if holds is None or frames.inside(network.module):
        return Plan(), Audit()
    plan, audit, _ = holds.on(inputs)
    if any(isinstance(index, New) for item in plan for index in (item.site.pos, item.site.key_pos)):
        # A run has no new tokens.
        live = Fed(inputs, Layout.of(inputs), Decoding()).live(plan, network.sizes)
        plan, audit = Plan(tuple(plan[n] for n in live)), Audit(tuple(audit[n] for n in live))
    return plan, audit


@contextmanager
def fork(
    network: Network, branches: Sequence[Branch], combine: Combine, seed: int, begin: Begin | None
) -> Iterator[tuple[Audit, ...]]:
    """Hold several worlds on a model; see `Model.fork`."""
    mine = Fork(branches, combine, seed, gate_of(network.module).depth, begin)
    mine.by = applied_at()
    found = _HOLDS.get(network.module)
    if found is not None and any(isinstance(one, Fork) for one in found.holds):
        raise PlanError("several worlds are held on this model already: give them all to one fork")
    if network.architecture.images is not None:
        raise PlanError("worlds are forked while a language model decodes, and this model takes images alone")
    with _holding(network, mine):
        yield tuple(one.audit for one in mine.holds)


@contextmanager
def hold(network: Network, plan: Any, seed: int, keeping: Keeping | None = None) -> Iterator[Audit]:
    """Hold a plan on a model; see `Model.apply`."""
    mine = Hold(plan, seed, gate_of(network.module).depth, applied_at(), keeping)
    with _holding(network, mine):
        yield mine.audit


@contextmanager
def _holding(network: Network, mine: Hold) -> Iterator[None]:
    network.refresh()
    for one in mine.holds if isinstance(mine, Fork) else (mine,):
        if isinstance(one.plan, Plan):
            check_plan(network, one.plan)
    if frames.inside(network.module):
        raise PlanError("a plan cannot be applied within a call of the model: apply it around the call")
    holds = _HOLDS.setdefault(network.module, Holds(network))
    holds.network = network
    try:
        holds.add(mine)
        try:
            yield
        finally:
            frames.drop_ended()
            holds.remove(mine)
    finally:
        if not holds.holds:
            _HOLDS.pop(network.module, None)
    mine.require_fired()
