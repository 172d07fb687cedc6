"""A plan held on a model while the user calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .audit import Audit, Entry
from .backends.checkpointing import uncheckpointed
from .backends.forward import exposed_layers
from .backends.session import Session, install
from .backends.sources import all_reads, read_tapes
from .errors import PlanError, UnfiredError
from .models.calls import arguments_of_call, inputs_of_call, keeps_some_logits
from .plan.inputs import Inputs
from .plan.plan import Plan, World, as_plan
from .plan.sites import Site
from .plan.tape import Tape
from .program import Edits

if TYPE_CHECKING:
    from .model import Model

PlanOf = Callable[[Inputs], Any]
"""A plan (or an intervention, or several) that depends on what the model is called with."""


@dataclass(eq=False)
class Held:
    """What one `apply` holds.

    Attributes:
        plan: a plan, or a function from the inputs of a call to one.
        audit: its record, which grows by entries where the plan is a function.
    """

    plan: Plan | PlanOf
    audit: Audit

    @classmethod
    def of(cls, plan: Any) -> Held:
        """Begin the record of a plan or of a function."""
        if callable(plan) and not isinstance(plan, type):
            return cls(plan, Audit())
        listed = as_plan(plan)  # type: ignore[arg-type]
        return cls(listed, Audit.of(listed))

    def on(self, inputs: Inputs, model: Model) -> tuple[Plan, tuple[Entry, ...]]:
        """The plan on these inputs, and the entry of the record that belongs to each of its interventions."""
        if isinstance(self.plan, Plan):
            return self.plan, self.audit.entries
        plan = as_plan(self.plan(inputs))
        model.check(plan)
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


def _kind(item: Any) -> Any:
    return (item.site.key, item.op.name, str(item.site.head))


class Applied:
    """Plans held on a model: each forward pass of the user's is one run of them together."""

    def __init__(self, model: Model, held: tuple[Held, ...], seed: int) -> None:
        self.model, self.held, self.seed = model, held, seed
        self.session = Session([], [])
        self.expose: frozenset[int] = frozenset()
        self.static = all(isinstance(one.plan, Plan) for one in held)
        self.hooks, self.stack = ExitStack(), ExitStack()
        if self.static:
            # The sites are needed to place the hooks; the inputs are known only when the user calls.
            empty = World(Inputs.of(torch.zeros(1, 1, dtype=torch.int64)), self.on(None)[0])
            self.expose = exposed_layers([empty], ())
            self.session.begin([Edits(empty, model.sizes, {}, seed)], [[]])
            self.session.open = False

    def on(self, inputs: Inputs | None) -> tuple[Plan, Audit]:
        """The plan on these inputs (which plans that are no functions do not need), and its record."""
        plan, entries = Plan(), ()
        for one in self.held:
            part, found = one.on(inputs, self.model)  # type: ignore[arg-type]
            plan, entries = plan + part, entries + found
        return plan, Audit(entries)

    def install(self) -> None:
        """Place the hooks; those of a plan that is a function are placed anew in every call."""
        with ExitStack() as stack:
            root = self.model.module
            stack.callback(root.register_forward_pre_hook(self.begin, with_kwargs=True).remove)
            stack.callback(root.register_forward_hook(self.end, always_call=True).remove)
            self.place()
            # Only now, so that an error in between takes away what was placed so far.
            self.stack = stack.pop_all()

    def place(self) -> None:
        """Place the hooks on the parts of the model."""
        self.hooks.close()
        if not self.session.worlds:
            return
        with ExitStack() as stack:
            install(self.session, self.model.architecture, stack, self.expose)
            self.hooks = stack.pop_all()

    def remove(self) -> None:
        """Take the hooks away."""
        self.hooks.close()
        self.stack.close()

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Learn what the user runs the model on, before it runs."""
        call = arguments_of_call(module, args, kwargs)
        inputs = inputs_of_call(call, self.model.architecture.images)
        plan, audit = self.on(inputs)
        world = World(inputs, plan)
        if not self.static:
            self.expose = exposed_layers([world], ())
        tapes: dict[Any, Tape] = {}
        if all_reads([world]):
            # Run anew for every call: in training the weights have changed since the last one.
            with self.model.suspended():
                tapes = self.read(world, lambda: module(*args, **kwargs))
        edits = Edits(world, self.model.sizes, tapes, self.seed)
        edits.audit = audit
        self.session.begin([edits], [[]])
        if keeps_some_logits(call) and ("logits", -1, None) in self.session.touched():
            raise PlanError("the plan edits the logits, and this call computes only some of them (logits_to_keep)")
        if not self.static:
            self.place()

    def end(self, *_: Any) -> None:
        """From here on, until the next call of the model, nothing says which rows and positions a value is of."""
        self.session.open = False

    def read(self, world: World, again: Callable[[], Any]) -> dict[Any, Tape]:
        """Run the worlds that a world reads: those on the inputs of the call by making the call again."""
        tapes: dict[Any, Tape] = {}
        constants = _read_as_constants(world)
        for key, (source, sites) in all_reads([world]).items():
            graph = torch.is_grad_enabled() and key not in constants
            if source.inputs is not world.inputs:
                tapes |= read_tapes(self.model, [world], self.seed, self.expose, only={key}, graph=graph)
                continue
            with torch.set_grad_enabled(graph):
                edits = Edits(source, self.model.sizes, self.read(source, again), self.seed)
                values = self.repeat(edits, sites, again, graph)
            edits.audit.require_fired()
            tapes[key] = Tape(source.inputs, values, self.model.sizes)
        return tapes

    def repeat(
        self, edits: Edits, sites: list[Site], again: Callable[[], Any], graph: bool
    ) -> tuple[tuple[Site, Tensor], ...]:
        """Make the call again under other edits, and keep the values at some sites."""
        session = Session([edits], [sites], graph)
        device = self.model.device
        with ExitStack() as stack:
            # The user's own pass is to draw the same numbers (dropout) as this one, and as it would have without it.
            stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
            if graph:
                stack.enter_context(uncheckpointed(self.model.module))
            install(session, self.model.architecture, stack, self.expose)
            again()
        return tuple((place, session.kept[0][i]) for i, place in enumerate(sites))


_STACKS: WeakKeyDictionary[nn.Module, list[Applied]] = WeakKeyDictionary()
"""What is held on each module at the moment, the outermost first; the last has the hooks, and the plans of all."""


def held_on(module: nn.Module) -> Applied | None:
    """All that is held on a module at the moment, by whichever wrapper of it."""
    stack = _STACKS.get(module)
    return stack[-1] if stack else None


@contextmanager
def hold(model: Model, plan: Any, seed: int) -> Iterator[Audit]:
    """Hold a plan on a model; see `Model.apply`."""
    mine = Held.of(plan)
    if isinstance(mine.plan, Plan):
        model.check(mine.plan)
    stack = _STACKS.setdefault(model.module, [])
    outer = held_on(model.module)
    # A plan inside another one is one plan, so that it sees what the outer one did, within a layer too.
    applied = Applied(model, (*(outer.held if outer else ()), mine), seed)
    if outer is not None:
        outer.remove()
    try:
        applied.install()
        stack.append(applied)
        try:
            yield mine.audit
        finally:
            stack.pop()
            applied.remove()
    finally:
        if outer is not None:
            outer.install()
    mine.require_fired()


@contextmanager
def suspend(module: nn.Module) -> Iterator[None]:
    """Take all that is held off a module, and put it back."""
    applied = held_on(module)
    if applied is None:
        yield
        return
    # All of it: with the last alone gone, a run inside would be under the plans further out.
    outside = _STACKS.pop(module)
    applied.remove()
    try:
        yield
    finally:
        _STACKS[module] = outside
        applied.install()


def _read_as_constants(world: World) -> set[Any]:
    """The worlds that are read by functions through which no gradient flows, and by no other."""
    constant: dict[Any, bool] = {}
    for item in world.plan:
        for key in all_reads([replace(world, plan=Plan((item,)))]):
            constant[key] = constant.get(key, True) and item.op.reads_constants
    return {key for key, every in constant.items() if every}
