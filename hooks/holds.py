"""All that is held on one model: each call of it is one pass, under all the plans together."""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .audit import Audit
from .backends import frames
from .backends.checkpointing import checkpointing
from .backends.dynamo import HOOK_GUARDS, forget_graphs
from .backends.gate import Arguments, gate_of
from .backends.generating import Seen
from .backends.native import Pass, Placement, exposed_layers, touched
from .backends.sources import all_reads
from .decoding import Decodings
from .errors import PlanError
from .fed import Fed
from .forking import Fork
from .holding import Hold
from .joining import joining
from .models.calls import arguments_of_call, keeps_listed_logits
from .models.checks import check_norms
from .models.network import Network
from .plan.inputs import Inputs
from .plan.plan import Plan, World
from .plan.sites import ENCODER, VISION, Site
from .plan.tape import Tape
from .program import Program
from .rereading import ENCODED, Rereading
from .resolved import Resolved


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
                keeps = [place for one in holds if one.keeping is not None for place in one.keeping.sites]
                keys = touched(plans) | {place.key for place in keeps}
                placement = Placement(self.network, keys, exposed_layers(plans, keeps), held=True)
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
    def features(self) -> str:
        """The argument by which the model is given what was made before it is called: of images, or of a text."""
        return "mm_encoder_outputs" if self.network.architecture.encoder is None else ENCODED

    @property
    def looks(self) -> bool:
        """Whether something in force may be at the sites of a tower, or of an encoder."""
        placed = self.placement is not None and any(key[2] in (VISION, ENCODER) for key in self.placement.keys)
        return placed or not all(isinstance(one.plan, Plan) for one in self.in_force())

    def rereading(self) -> Rereading:
        """What makes the call that runs now again, for the worlds that it reads."""
        assert self.decodings is not None
        return Rereading(self.network, self.decodings, self.in_force(), self.looks, self.features)

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
            self.begin(
                call, views, partial(self.rereading().again, call, args, kwargs), partial(self.check, given=given)
            )
            call.returned = partial(self.returned, fed, call.run)
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

    def kept(self, number: int = 0) -> list[tuple[Hold, Site]]:
        """What is kept of every call, and by whom; of several worlds, the first is kept."""
        forced = [] if number else self.in_force()
        return [(one, place) for one in forced if one.keeping is not None for place in one.keeping.sites]

    def returned(self, fed: Fed, run: Pass, output: Any) -> None:
        """Note that a call has returned, and what is kept of it."""
        assert self.decodings is not None
        self.decodings.returned(fed, output)
        found = list(zip(self.kept(), run.values(0), strict=True)) if run.captures[0] else []
        for one in dict.fromkeys(one for (one, _), _ in found):
            assert one.keeping is not None
            one.keeping.note(fed, [value for (by, _), value in found if by is one])

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
        call, seen, name = frames.Call(module, sys._getframe(0)), Seen(), self.features

        def again(_fed: Fed, path: tuple[Any, ...]) -> None:
            arguments = dict(given)
            if name != ENCODED:
                arguments[name] = dict(given.get(name) or {})
            frames.push(frames.Call(module, sys._getframe(0), gate.claimed()))
            try:
                seen.encoded[path] = encode(arguments)[name]
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
                keeps = [place for _, place in self.kept()]
                keys = touched(wholes) | {place.key for place in keeps}
                placement = Placement(network, keys, exposed_layers(wholes, keeps))
            programs = []
            for number, (world, view) in enumerate(zip(worlds, views, strict=True)):
                tapes: dict[Any, Tape] = {}
                if all_reads([world.whole]):
                    # Run anew for every call: in training the weights have changed since the last one.
                    tapes = self.rereading().read(world.whole, world.now, placement.expose, view, partial(again, view))
                resolved = self.resolved[number].program
                made = resolved(
                    world.now, network.sizes, tapes, device=network.device, seed=world.seeds, layout=view.layout
                )
                programs.append(view.counted(made, world.audit.entries, network.sizes))
            captures = [[place for _, place in self.kept(number)] for number in range(len(programs))]
            run = Pass(placement, programs, captures)
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
        check_norms(self.network, plan)
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
        fed.require_own(plan)
        for one in self.in_force(number):
            mine, _ = one.on(fed.inputs, self.network) if isinstance(one.plan, Plan) else (plan, ())
            fed.require_reached(mine, one, self.network.sizes)


def _report(program: Program, run: Pass, number: int, audit: Audit) -> None:
    program.report(run.states[number], audit)


_NOTHING = Inputs.of(torch.zeros(1, 1, dtype=torch.int64))
