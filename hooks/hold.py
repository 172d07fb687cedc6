"""Plans held on a model while the user calls it: each call is one pass, under all of them together."""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
from .backends.gate import Arguments, gate_of
from .backends.generating import Seen
from .backends.native import Pass, Placement, exposed_layers, touched
from .backends.sources import all_reads, read_as_constants, read_tapes
from .decoding import Decodings
from .errors import PlanError
from .fed import Decoding, Fed
from .forking import Begin, Branch, Combine, Fork
from .holding import Hold, Holding, applied_at
from .joining import joining
from .layout import Layout
from .models.calls import arguments_of_call, keeps_listed_logits
from .models.checks import check_plan
from .models.network import Network
from .plan.inputs import Inputs
from .plan.plan import Plan, World
from .plan.sites import Site
from .plan.spans import New
from .plan.tape import Tape
from .program import Program
from .resolved import Resolved
from .resolving import resolve


@dataclass(frozen=True, eq=False)
class Held:
    """What is held in one world, on the tokens of a call.

    Attributes:
        whole: the world; `now` is what of its plan is on tokens that are fed.
        audit, seeds: of the latter.
    """

    whole: World
    now: World
    audit: Audit
    seeds: tuple[int, ...]


class Holds:
    """All that is held on one model, the outermost first. Each may be taken away at any time, whatever came after it.

    Attributes:
        network: the model, as it was wrapped by whoever held the last.
        holds: what is held.
        placement: hooks at the sites of the plans that are no functions, which stay between calls.
        decodings: what is known of the texts that the model is fed meanwhile.
        resolved: makes the programs of calls, by the number of the world.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.holds: list[Hold] = []
        self.placement: Placement | None = None
        self.decodings: Decodings | None = None
        self.resolved: dict[int, Resolved] = defaultdict(Resolved)

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
                every = [each for one in holds for each in (one.holds if isinstance(one, Fork) else (one,))]
                plans = [World(_NOTHING, one.plan) for one in every if isinstance(one.plan, Plan)]
                placement = Placement(self.network, touched(plans), exposed_layers(plans, ()), held=True)
                placement.place()
            try:
                if holds and not self.holds:
                    self.decodings = Decodings(module, self.is_in_force, self.look)
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

    def in_force(self, number: int = 0) -> list[Hold]:
        """What is held in a world, by its number, but for what this thread has suspended since."""
        depth, me = gate_of(self.network.module).depth, threading.get_ident()
        found = [one for one in self.holds if depth <= (one.depth if one.thread == me else 0)]
        return [one.holds[number] if isinstance(one, Fork) else one for one in found] if number else found

    def fork(self) -> Fork | None:
        """The several worlds that are held, if any are."""
        return next((one for one in self.in_force() if isinstance(one, Fork)), None)

    def is_in_force(self) -> bool:
        """Whether anything is held, but for what this thread has suspended since."""
        return bool(self.in_force())

    @property
    def looks(self) -> bool:
        """Whether something in force may be at the sites of a tower."""
        placed = self.placement is not None and any(key[2] is not None for key in self.placement.keys)
        return placed or not all(isinstance(one.plan, Plan) for one in self.in_force())

    def on(self, inputs: Inputs, number: int = 0) -> tuple[Plan, Audit, tuple[int, ...]]:
        """All plans on these inputs as one, its record, and the seed of each intervention, of one of several worlds."""
        plan, entries, seeds = Plan(), (), ()
        for one in self.in_force(number):
            part, found = one.on(inputs, self.network)
            plan, entries, seeds = plan + part, entries + found, seeds + (one.seed,) * len(part)
        return plan, Audit(entries), seeds

    def start(self, call: frames.Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Begin the pass of a call of the user's, before the model runs; where several worlds are held, of them all.

        Returns:
            The arguments for all of these; None where they stay as they are.
        """
        module, decodings = call.module, self.decodings
        if not self.in_force():
            return None
        assert decodings is not None
        with ExitStack() as stack:
            lock = gate_of(module).lock
            lock.acquire()
            stack.callback(lock.release)
            given = arguments_of_call(module, args, kwargs)
            fed = decodings.fed(module, given, self.network.architecture)
            fork, changed, joined = self.fork(), None, 0
            views = (fed,) if fork is None else fork.views(fed, given)
            if fork is not None:
                joined = self.joined(fork, fed, given)
                changed = None if joined else ((), fork.arguments(given, views))
                fork.began(fed, joined)
                call.changed = partial(fork.returned, fed, joined)
            self.begin(call, views, partial(self.again, call, args, kwargs), partial(self.check, given=given))
            call.returned = partial(decodings.returned, fed)
            if call.close is not None:
                stack.callback(call.close)
            if joined:
                stack.enter_context(joining(call, self.network, joined, len(fed.layout), len(views)))
            call.close = stack.pop_all().close
            return changed

    def joined(self, fork: Fork, fed: Fed, given: dict[str, Any]) -> int:
        """The block before which a call is of one world, of several that are held; see `hooks.joining`."""
        found = [self.in_force(number) for number in range(len(fork))]
        plans = [one.plan for world in found for one in world if isinstance(one.plan, Plan)]
        if len(plans) < sum(map(len, found)):
            return 0
        return fork.joined(self.network, fed, given, plans)

    def look(self, encode: Callable[[dict[str, Any]], Any], ids: Tensor, given: dict[str, Any]) -> tuple[Any, Seen]:
        """Run the tower of a `generate`, which looks at the images before it calls the model.

        Args:
            encode: does that, given the arguments, which it changes.
        """
        module, decodings = self.network.module, self.decodings
        gate = gate_of(module)
        assert decodings is not None
        fed = decodings.looked({**given, "input_ids": ids}, self.network.architecture)
        if fed is None:
            return encode(given), Seen()
        call, seen = frames.Call(module, sys._getframe(0)), Seen()

        def again(_fed: Fed, path: tuple[Any, ...]) -> None:
            arguments = dict(given, mm_encoder_outputs=dict(given.get("mm_encoder_outputs") or {}))
            frames.push(frames.Call(module, sys._getframe(0), gate.claimed()))
            try:
                seen.encoded[path] = encode(arguments)["mm_encoder_outputs"]
            finally:
                frames.pop(module)

        with gate.lock:
            frames.push(call)
            try:
                fork = self.fork()
                seen.image = fed.inputs.columns.image
                if self.looks:
                    views = (fed,) * (1 if fork is None else len(fork))
                    self.begin(call, views, again, lambda fed, plan, number: None)
                if fork is None or not (self.looks or fork.changes_images):
                    return encode(given), seen
                return fork.looked(encode, given, seen.encoded), seen
            finally:
                frames.pop(module)
                del call  # it holds this frame, and this frame the caller's caches

    def begin(
        self,
        call: frames.Call,
        views: Sequence[Fed],
        again: Callable[[Fed, tuple[Any, ...]], Any],
        check: Callable[[Fed, Plan, int], None],
    ) -> None:
        """Begin the pass of a call, under all that is held.

        Args:
            views: the call as each of the worlds that are held sees it.
            again: makes the call once more, for the world that is reached by a path.
            check: refuses what a plan cannot do in it, in a world by its number.
        """
        module, network = call.module, self.network
        with ExitStack() as stack:
            worlds = [self.world(view, number, check) for number, view in enumerate(views)]
            placement = self.placement
            assert placement is not None
            if not all(isinstance(one.plan, Plan) for number in range(len(views)) for one in self.in_force(number)):
                wholes = [world.whole for world in worlds]
                placement = Placement(network, touched(wholes), exposed_layers(wholes, ()))
            programs = []
            for number, (world, view) in enumerate(zip(worlds, views, strict=True)):
                tapes: dict[Any, Tape] = {}
                if all_reads([world.whole]):
                    # Run anew for every call: in training the weights have changed since the last one.
                    tapes = self.read(world.whole, world.now, placement.expose, view, partial(again, view))
                resolved = self.resolved[number].program
                made = resolved(
                    world.now, network.sizes, tapes, device=network.device, seed=world.seeds, layout=view.layout
                )
                programs.append(view.counted(made, world.audit.entries, network.sizes))
            run = Pass(placement, programs, [()] * len(programs))
            if not placement.placed:
                stack.callback(placement.remove)
                placement.place()
            placement.swap(stack)
            if torch.is_grad_enabled() and module.training:
                stack.enter_context(checkpointing(module, run.bind))
            # Last, so that it comes first: what the interventions did is noted however the call ended.
            for number, (program, world) in enumerate(zip(programs, worlds, strict=True)):
                stack.callback(_report, program, run, number, world.audit)
            call.run, call.close = run, stack.pop_all().close

    def world(self, fed: Fed, number: int, check: Callable[[Fed, Plan, int], None]) -> Held:
        """What is held in one of several worlds, on the tokens of a call."""
        plan, audit, seeds = self.on(fed.inputs, number)
        check(fed, plan, number)
        # Tokens that an intervention means may be in other calls of the text.
        now = fed.live(plan, self.network.sizes)
        fed.note_gone(plan, audit.entries, self.network.sizes)
        return Held(
            World(fed.inputs, plan),
            World(fed.inputs, Plan(tuple(plan[n] for n in now))),
            Audit(tuple(audit[n] for n in now)),
            tuple(seeds[n] for n in now),
        )

    def check(self, fed: Fed, plan: Plan, number: int, given: dict[str, Any]) -> None:
        """Refuse what the plans in force in a world cannot do in a call.

        Raises:
            PlanError: something of that kind.
        """
        if keeps_listed_logits(given) and any(item.site.name == "logits" for item in plan):
            raise PlanError("the plan edits the logits, and this call computes only those it lists (logits_to_keep)")
        fed.require_known(plan)
        for one in self.in_force(number):
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

        own = {name: apart(value) for name, value in kwargs.items()}
        if fed.encoded is not None:
            own["mm_encoder_outputs"] = self.encoded(fed, path, own.get("mm_encoder_outputs"))
        output = call.module(*map(apart, args), **own)
        cache = cache_of(output)
        if fed.cache is None and cache is not None:
            fed.decoding.mirrors[path] = cache

    def encoded(self, fed: Fed, path: tuple[Any, ...], given: Any) -> Any:
        """What the tower makes of the images in a world that is read, for a call that is given the features of images.

        Raises:
            PlanError: nobody looked at them under that world's plan.
        """
        assert fed.encoded is not None
        if path in fed.encoded:
            if _places(fed.encoded[path]) != _places(given):
                raise PlanError(
                    "the prompt is fed in several calls, with a part of the images' features in each, and the plan "
                    "reads this world under another plan, or unedited: leave out prefill_chunk_size"
                )
            return dict(fed.encoded[path])
        if self.looks:
            raise PlanError(
                "the plan edits or reads the tower and reads this world under another plan, or unedited, in a call "
                "that is given the features of images (mm_encoder_outputs), which are one world's: give it the images"
            )
        return given

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


def _places(encoded: Any) -> int:
    """How many places of a text the features of images take, of those that a call is given."""
    found = getattr((encoded or {}).get("image"), "pooler_output", ())
    return sum(len(one) for one in found)


def _report(program: Program, run: Pass, number: int, audit: Audit) -> None:
    program.report(run.states[number], audit)


_NOTHING = Inputs.of(torch.zeros(1, 1, dtype=torch.int64))
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
def hold(network: Network, plan: Any, seed: int) -> Iterator[Audit]:
    """Hold a plan on a model; see `Model.apply`."""
    mine = Hold(plan, seed, gate_of(network.module).depth, applied_at())
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
