"""Plans held on a model while the user calls it: each call is one pass, under all of them together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .audit import Audit
from .backends import frames
from .backends.caching import cache_of
from .backends.checkpointing import buffers_kept, checkpointing, uncheckpointed
from .backends.dynamo import HOOK_GUARDS, forget_graphs
from .backends.gate import gate_of
from .backends.native import Pass, Placement, exposed_layers, touched
from .backends.sources import all_reads, read_as_constants, read_tapes
from .decoding import Decodings
from .errors import PlanError
from .fed import Decoding, Fed
from .holding import Held, Hold, applied_at
from .layout import Layout
from .models.calls import arguments_of_call, keeps_listed_logits
from .models.checks import check_plan
from .models.network import Network
from .plan.inputs import Inputs
from .plan.plan import Plan, World
from .plan.sites import Site
from .plan.spans import New
from .plan.tape import Tape
from .resolving import resolve


class Holds:
    """All that is held on one model, the outermost first. Each may be taken away at any time, whatever came after it.

    Attributes:
        network: the model, as it was wrapped by whoever held the last.
        holds: what is held.
        placement: hooks at the sites of the plans that are no functions, which stay between calls.
        decodings: what is known of the texts that the model is fed meanwhile.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.holds: list[Hold] = []
        self.placement: Placement | None = None
        self.decodings: Decodings | None = None

    def add(self, hold: Hold) -> None:
        """Hold one more plan."""
        self._change([*self.holds, hold])

    def remove(self, hold: Hold) -> None:
        """Take one away, and leave the others as they are."""
        self._change([one for one in self.holds if one is not hold])
        if self.decodings is not None:
            self.decodings.forget(hold)

    def _change(self, holds: list[Hold]) -> None:
        """Hold other plans: hooks are placed anew, and where that fails those of before stay."""
        gate, module = gate_of(self.network.module), self.network.module
        with gate.lock:
            before, placement = self.placement, None
            if holds:
                plans = [World(_NOTHING, one.plan) for one in holds if isinstance(one.plan, Plan)]
                placement = Placement(self.network, touched(plans), exposed_layers(plans, ()), held=True)
                placement.place()
            try:
                if holds and not self.holds:
                    self.decodings = Decodings(module, self.is_in_force)
                    gate.open(module)
                if placement is not None:
                    forget_graphs(module)
            except BaseException:
                assert placement is not None
                placement.remove()
                self._forget()
                raise
            if before is not None:
                before.remove()
            if holds and not self.holds:
                HOOK_GUARDS.open()
            if self.holds and not holds:
                gate.close()
                self._forget()
                HOOK_GUARDS.close()
            self.holds, self.placement = holds, placement
            gate.start = self.start if holds else None
            gate.holding = self.is_in_force if holds else None

    def _forget(self) -> None:
        if self.decodings is not None:
            self.decodings.close()
            self.decodings = None

    def in_force(self) -> list[Hold]:
        """What is held, but for what this thread has suspended since."""
        depth, me = gate_of(self.network.module).depth, threading.get_ident()
        return [one for one in self.holds if depth <= (one.depth if one.thread == me else 0)]

    def is_in_force(self) -> bool:
        """Whether anything is held, but for what this thread has suspended since."""
        return bool(self.in_force())

    def on(self, inputs: Inputs) -> tuple[Plan, Audit, tuple[int, ...]]:
        """All plans on these inputs as one, its record, and the seed of each intervention."""
        plan, entries, seeds = Plan(), (), ()
        for one in self.in_force():
            part, found = one.on(inputs, self.network)
            plan, entries, seeds = plan + part, entries + found, seeds + (one.seed,) * len(part)
        return plan, Audit(entries), seeds

    def start(self, call: frames.Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin the pass of a call of the user's, before the model runs."""
        module, network = call.module, self.network
        gate, decodings = gate_of(module), self.decodings
        if not self.in_force():
            return
        assert decodings is not None
        with ExitStack() as stack:
            gate.lock.acquire()
            stack.callback(gate.lock.release)
            given = arguments_of_call(module, args, kwargs)
            fed = decodings.fed(module, given, network.architecture)
            plan, audit, seeds = self.on(fed.inputs)
            whole = World(fed.inputs, plan)
            self.check(fed, given, plan)
            # Tokens that an intervention means may be in other calls of the text.
            now = fed.live(plan, network.sizes)
            fed.note_gone(plan, audit.entries, network.sizes)
            world = World(fed.inputs, Plan(tuple(plan[n] for n in now)))
            audit, seeds = Audit(tuple(audit[n] for n in now)), tuple(seeds[n] for n in now)
            placement = self.placement
            assert placement is not None
            if not all(isinstance(one.plan, Plan) for one in self.in_force()):
                placement = Placement(network, touched([whole]), exposed_layers([whole], ()))
            tapes: dict[Any, Tape] = {}
            if all_reads([whole]):
                # Run anew for every call: in training the weights have changed since the last one.
                again = partial(self.again, call, args, kwargs, fed)
                tapes = self.read(whole, world, placement.expose, fed, again)
            program = resolve(world, network.sizes, tapes, device=network.device, seed=seeds, layout=fed.layout)
            program = fed.counted(program, audit.entries)
            run = Pass(placement, [program], [()])
            if not placement.placed:
                stack.callback(placement.remove)
                placement.place()
            placement.swap(stack)
            if torch.is_grad_enabled() and module.training:
                stack.enter_context(checkpointing(module, run.bind))
            # Last, so that it comes first: what the interventions did is noted however the call ended.
            stack.callback(lambda: program.report(run.states[0], audit))
            call.run, call.returned = run, partial(decodings.returned, fed)
            call.close = stack.pop_all().close

    def check(self, fed: Fed, given: dict[str, Any], plan: Plan) -> None:
        """Refuse what the plans in force cannot do in a call.

        Raises:
            PlanError: something of that kind.
        """
        if keeps_listed_logits(given) and any(item.site.name == "logits" for item in plan):
            raise PlanError("the plan edits the logits, and this call computes only those it lists (logits_to_keep)")
        fed.require_known(plan)
        for one in self.in_force():
            mine, _ = one.on(fed.inputs, self.network) if isinstance(one.plan, Plan) else (plan, ())
            fed.require_reached(mine, one, self.network.sizes)

    def again(
        self, call: frames.Call, args: tuple[Any, ...], kwargs: dict[str, Any], fed: Fed, path: tuple[Any, ...]
    ) -> None:
        """Make a call once more for a world that is read, with that world's own cache in place of the caller's."""
        assert self.decodings is not None
        mirror = self.decodings.mirror(fed, path)

        def apart(value: Any) -> Any:
            return value if fed.cache is None or value is not fed.cache else mirror

        output = call.module(*map(apart, args), **{name: apart(value) for name, value in kwargs.items()})
        cache = cache_of(output)
        if fed.cache is None and cache is not None:
            fed.decoding.mirrors[path] = cache

    def read(
        self,
        world: World,
        now: World,
        expose: frozenset[int],
        fed: Fed,
        again: Callable[[tuple[Any, ...]], Any],
        path: tuple[Any, ...] = (),
    ) -> dict[Any, Tape]:
        """Run the worlds that a world reads: those on the inputs of the call by making the call again.

        Args:
            world: the world, and `now` what of its plan is on tokens that are fed now. Where the text goes on, worlds
                of it are run in every call, for their caches.
            again: makes the call, for the world that is reached by a path.
            path: how this one was.
        """
        tapes: dict[Any, Tape] = {}
        constants, wanted = read_as_constants(now), all_reads([now])
        seed = self.in_force()[-1].seed
        for key, (source, _) in all_reads([world if fed.caches else now]).items():
            sites = wanted[key][1] if key in wanted else []
            graph = torch.is_grad_enabled() and key not in constants
            if source.inputs is not world.inputs:
                if key in wanted:
                    tapes |= read_tapes(self.network, [now], seed, expose, only={key}, graph=graph)
                continue
            mine = (*path, key[0], *key[2:])
            live = fed.live(source.plan, self.network.sizes)
            # Held, so that no other plan takes the identity by which it is reached.
            fed.decoding.sources[mine] = source.plan
            if all(isinstance(one.plan, Plan) for one in self.in_force()):
                self.in_force()[0].read.setdefault(mine, (source.plan, set()))[1].update(live)
            part = World(source.inputs, Plan(tuple(source.plan[n] for n in live)))
            with torch.set_grad_enabled(graph):
                deeper = self.read(source, part, expose, fed, again, mine)
                values = self.repeat(part, deeper, sites, expose, seed, partial(again, mine), graph, fed.layout)
            tapes[key] = Tape(source.inputs, values, self.network.sizes)
        return tapes

    def repeat(
        self,
        world: World,
        tapes: dict[Any, Tape],
        sites: list[Site],
        expose: frozenset[int],
        seed: int,
        again: Callable[[], Any],
        graph: bool,
        layout: Layout,
    ) -> tuple[tuple[Site, Tensor], ...]:
        """Make the call again under other edits, and keep the values at some sites."""
        network, device = self.network, self.network.device
        program = resolve(world, network.sizes, tapes, device=device, seed=seed, layout=layout)
        placement = Placement(network, program.touched | {place.key for place in sites}, expose)
        run = Pass(placement, [program], [sites], graph)
        with ExitStack() as stack:
            # The user's own pass is to draw the same numbers (dropout) as this one, and as it would have without it.
            stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
            stack.enter_context(buffers_kept(network.module))
            if graph:
                stack.enter_context(uncheckpointed(network.module))
            stack.callback(placement.remove)
            placement.place()
            placement.swap(stack)
            stack.enter_context(placement.gate.expecting(network.module, run))
            again()
        program.report(run.states[0]).require_fired()
        return tuple(zip(sites, run.values(0), strict=True))


_NOTHING = Inputs.of(torch.zeros(1, 1, dtype=torch.int64))
_HOLDS: WeakKeyDictionary[nn.Module, Holds] = WeakKeyDictionary()
"""What is held on each module at the moment, by whichever wrapper of it."""


def holds_on(module: nn.Module) -> Holds | None:
    """All that is held on a module, or None where nothing is, or this thread has suspended it."""
    holds = _HOLDS.get(module)
    return holds if holds is not None and holds.in_force() else None


def listing(module: nn.Module) -> tuple[Held, ...]:
    """What is held on a module, by whichever wrapper of it, the outermost first; see `Held`."""
    holds = _HOLDS.get(module)
    if holds is None:
        return ()
    force = holds.in_force()
    return tuple(Held(one.plan, one.by, one.thread_name, one in force, one.audit) for one in holds.holds)


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
def hold(network: Network, plan: Any, seed: int) -> Iterator[Audit]:
    """Hold a plan on a model; see `Model.apply`."""
    network.refresh()
    mine = Hold(plan, seed, gate_of(network.module).depth, applied_at())
    if isinstance(mine.plan, Plan):
        check_plan(network, mine.plan)
    if frames.inside(network.module):
        raise PlanError("a plan cannot be applied within a call of the model: apply it around the call")
    holds = _HOLDS.setdefault(network.module, Holds(network))
    holds.network = network
    try:
        holds.add(mine)
        try:
            yield mine.audit
        finally:
            frames.drop_ended()
            holds.remove(mine)
    finally:
        if not holds.holds:
            _HOLDS.pop(network.module, None)
    mine.require_fired()
