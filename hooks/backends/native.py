"""Passes of the user's own model: what a program sees there, and the hooks that show it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from ..errors import PlanError, SiteError
from ..models.network import Network
from ..plan.kinds import ROW
from ..plan.plan import World
from ..plan.sites import KEY, KINDS, POS, Key, Site
from ..program import Guard, Program, State, visit
from . import frames, tiles
from .exposing import swap_functions
from .folding import Fold
from .gate import Gate, gate_of
from .placing import place_hooks


class Placement:
    """Hooks on the parts of a model at some sites. Each shows its value to the pass that is under way in its thread.

    Attributes:
        network: the model.
        keys: the sites.
        expose: layers whose attention is computed with its inside exposed though nothing is visited there, so that the
            worlds of one comparison use one kernel.
        held: whether the hooks stay between calls, so that a part that is called by itself is noticed.
    """

    def __init__(self, network: Network, keys: Iterable[Key], expose: Iterable[int] = (), held: bool = False) -> None:
        self.network, self.keys, self.expose, self.held = network, frozenset(keys), frozenset(expose), held
        self.gate: Gate = gate_of(network.module)
        self.by_hand: list[Pass] = []
        self._stack: ExitStack | None = None

    def place(self) -> None:
        """Place the hooks."""
        with ExitStack() as stack:
            place = getattr(self.network.tool, "place_hooks", place_hooks)
            place(self.network.architecture, self.keys, self.running, self.around, stack, self.held)
            self._stack = stack.pop_all()

    def remove(self) -> None:
        """Take the hooks away."""
        if self._stack is not None:
            self._stack.close()
            self._stack = None

    @property
    def placed(self) -> bool:
        """Whether the hooks are on the model."""
        return self._stack is not None

    def swap(self, stack: ExitStack) -> None:
        """Put in place what is there only while the model is called: attention functions, the cap of the logits."""
        swap = getattr(self.network.tool, "swap_functions", swap_functions)
        swap(self.network.architecture, self.keys, self.expose, self.running, stack)

    def running(self) -> Pass | None:
        """The pass that this thread is in, if the hooks were placed for it.

        Raises:
            PlanError: a part of the model is called by itself, or computed again for a call that nobody knows.
        """
        call = frames.innermost()
        if call is not None and call.module is self.network.module:
            run = call.run
            return run if run is not None and run.placement is self else None
        if not self.held or self.gate.holding is None or not self.gate.holding():
            return None
        if torch._C._current_graph_task_id() != -1:
            # A part that is checkpointed by hand, computed again in the backward pass.
            pending = [run for run in self.by_hand if not run.computed_again]
            last = self.by_hand[-1] if self.by_hand else None
            if last is not None and (pending == [last] or not pending):
                self.by_hand = [last]
                return last.again_by_hand()
            raise PlanError(
                "a part of the model is computed again in a backward pass, and nobody knows for which of several "
                "calls: checkpoint with the model's own gradient_checkpointing_enable()"
            )
        raise PlanError("a part of the model is called by itself, so rows and positions are unknown: call the model")

    def around(self) -> bool:
        """Whether this thread is within a pass that the hooks were placed for, however far out."""
        return any(getattr(run, "placement", None) is self for run in frames.runs(self.network.module))


class Pass:
    """One forward pass of the model: its programs, and what they have seen so far.

    Attributes:
        placement: the hooks that show it what it sees.
        programs: the worlds in the batch, one after another along the rows; each has as many rows.
        captures: for each world, the sites to keep.
        graph: keep values attached to the autograd graph (made to start at the first of them, if need be).
        states: of the programs.
        kept: for each world, the value of each of its captures.
        scratch: values that wait from one hook to the next.
        joined: the block before which the batch has the rows of one world, which are those of all.
    """

    def __init__(
        self,
        placement: Placement,
        programs: Sequence[Program],
        captures: Sequence[Sequence[Site]],
        graph: bool = False,
        here: Sequence[State] | None = None,
    ) -> None:
        self.placement, self.programs, self.captures, self.graph = placement, programs, captures, graph
        self.states = [State() for _ in programs] if here is None else [State(state.here) for state in here]
        self.kept: list[dict[int, Tensor]] = [{} for _ in programs]
        self.scratch: dict[Any, Any] = {}
        self.joined = 0
        self.tracking = torch.is_grad_enabled()
        self.packing = _packing()
        self.in_bound = 0
        self.checkpointed_by_hand = False
        self._again: Pass | None = None
        self._captured: dict[Key, list[tuple[int, int]]] = {}
        self._folds: dict[tuple[str, bool], Fold] = {}
        for world, sites in enumerate(captures):
            for index, place in enumerate(sites):
                self._captured.setdefault(place.key, []).append((world, index))

    @property
    def rows(self) -> int:
        """Rows of the whole batch."""
        return sum(len(p.layout.rows[p.window]) for p in self.programs)

    @property
    def computed_again(self) -> bool:
        """Whether a part that is checkpointed by hand was computed again for it."""
        return self._again is not None

    def again(self) -> Pass:
        """The pass for a part that is computed again: as this one, with the values that it has read so far."""
        again = Pass(self.placement, self.programs, [()] * len(self.programs), here=self.states)
        again.tracking = False
        return again

    def again_by_hand(self) -> Pass:
        """The one pass for all parts that are computed again by somebody who does not say for which call."""
        if self._again is None:
            self._again = self.again()
        return self._again

    def keys(self, layer: int) -> tuple[int, int | None]:
        """The key column of a layer's attention that is the first query's own, and how many there are to be."""
        layout = self.programs[0].layout
        return layout.first(layer), layout.windows.get(layer, (0, None))[1]

    @property
    def captured_keys(self) -> set[Key]:
        """The sites of which something is kept."""
        return set(self._captured)

    def in_tiles(self, *args: Any) -> Tensor | None:
        """z of a layer of a long text in which edges are forbidden and no more; see `tiles.in_tiles`."""
        return tiles.in_tiles(self, *args)

    def fold(self, stack: str, embedded: bool = False) -> Fold | None:
        """How a tower's values are rows of the batch; None where nobody knows which images it sees in this call."""
        if not all(stack in program.layout.towers for program in self.programs):
            return None
        if (stack, embedded) not in self._folds:
            towers = [(p.layout.of_stack(stack), p.window) for p in self.programs]
            pictures = [tower.pictures.rows(window) for tower, window in towers if tower.pictures is not None]
            width = max(tower.queries.width for tower, _ in towers)
            self._folds[stack, embedded] = Fold.of(pictures, width, self.placement.network.device, embedded)
        return self._folds[stack, embedded]

    def visit_nothing(self, stack: str) -> None:
        """Show it the values of a tower that no row of the batch has an image for, which are filler."""
        network = self.placement.network
        for key in sorted(self.placement.keys & {key for key in network.sizes if key[2] == stack}, key=str):
            layout, size = self.programs[0].layout.of_stack(stack), network.sizes[key]
            width = layout.queries.width
            named = {ROW: self.rows, POS: width, KEY: width, **size}
            shape = [named[axis] for axis in KINDS[key[0]].axes]
            self.visit(key, torch.zeros(shape, dtype=network.dtype, device=network.device))

    def visit(self, key: Key, x: Tensor, guard: Guard | None = None) -> Tensor:
        """Edit and keep the value of a site, all worlds of the batch at once; `x` itself if nothing is edited."""
        edited = [key in program.touched for program in self.programs]
        if 0 <= key[1] < self.joined or (self.joined and key[0] == "embed"):
            # Nothing is edited here: what is read further on is every world's.
            for w, program in enumerate(self.programs):
                if edited[w]:
                    self.states[w], _ = visit(program, self.states[w], key, x, guard)
            return x
        if self.tracking and any(edited):
            self.require_known(key)
        count = len(self.programs)
        parts = list(x.chunk(count)) if count > 1 else [x]
        guards = [None] * count if guard is None else [(g, guard[1]) for g in guard[0].chunk(count)]
        for w, program in enumerate(self.programs):
            if edited[w]:
                self.states[w], parts[w] = visit(program, self.states[w], key, parts[w], guards[w])
        if any(edited):
            x = torch.cat(parts) if count > 1 else parts[0]
            if self.checkpointed_by_hand and x.requires_grad:
                x.register_hook(self._require_in_force)
        for world, index in self._captured.get(key, ()):
            place, program = self.captures[world][index], self.programs[world]
            size = self.placement.network.sizes[key]
            region = program.layout.resolve(place, size).rows(program.window) if place.restricted else None
            part = parts[world] if region is None else region.get(parts[world])
            if self.graph:
                # Downstream must use the very tensor that is kept, or no gradient reaches it. Cloned, because some
                # models go on to change their residual in place.
                part = part.clone() if part.requires_grad else part.detach().clone().requires_grad_()
                parts[world] = part if region is None else region.put(parts[world], part)
                x = torch.cat(parts) if count > 1 else parts[0]
                self.kept[world][index] = part
            else:
                self.kept[world][index] = part.detach().clone()
        return x

    def values(self, world: int) -> tuple[Tensor, ...]:
        """What was kept of a world, in the order in which it was asked for.

        Raises:
            SiteError: the model did not compute a site.
        """
        for index, place in enumerate(self.captures[world]):
            if index not in self.kept[world]:
                raise SiteError(f"{place} was never computed: the model did not go through it in this call")
        return tuple(self.kept[world][i] for i in range(len(self.captures[world])))

    # Gradient checkpointing

    def bind(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """A checkpointing function whose parts, when they are computed again, find this pass."""

        def bound(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            first = [True]

            def part(*inner: Any, **named: Any) -> Any:
                if first:
                    first.clear()
                    self.in_bound += 1
                    try:
                        return function(*inner, **named)
                    finally:
                        self.in_bound -= 1
                return self._recompute(function, inner, named)

            return checkpoint(part, *args, **kwargs)

        return bound

    def _recompute(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        placement = self.placement
        module = placement.network.module
        with placement.gate.lock, ExitStack() as stack:
            if not placement.placed:
                # The plan is no longer held, and its hooks are gone.
                stack.callback(placement.remove)
                placement.place()
            placement.swap(stack)
            frames.push(frames.Call(module, sys._getframe(0), self.again()))
            try:
                return function(*args, **kwargs)
            finally:
                frames.pop(module)

    def require_known(self, key: Key) -> None:
        """Notice where parts will be computed again, and refuse what would then go wrong in silence.

        Raises:
            PlanError: reentrant checkpointing, where it would lose a gradient or is done by hand.
        """
        if not torch.is_grad_enabled():
            if any(key in program.held_back for program in self.programs):
                raise PlanError(
                    f"{key[0]} is read further on, and reentrant gradient checkpointing would let no gradient reach "
                    "it: set use_reentrant=False"
                )
            if not self.in_bound and _in_reentrant_checkpoint():
                raise PlanError(
                    "a part of the model is checkpointed by hand, and reentrantly, so nobody knows for which call it "
                    "is computed again: set use_reentrant=False"
                )
        elif not self.in_bound and not self.checkpointed_by_hand and _packing() != self.packing:
            self.checkpointed_by_hand = True
            self.placement.by_hand.append(self)

    def _require_in_force(self, _gradient: Tensor) -> None:
        if not self.placement.placed and not self.computed_again:
            raise PlanError(
                "a part of the model is checkpointed by hand, and the plan that it was computed under is no longer "
                "held: make the backward pass within apply()"
            )


def _packing() -> Any:
    """What autograd packs saved tensors with at the moment: something else within a checkpoint than around it."""
    try:
        return torch._C._autograd._top_saved_tensors_default_hooks(False)  # type: ignore[attr-defined]
    except RuntimeError:  # where packing is disabled, nothing is checkpointed
        return None


def _in_reentrant_checkpoint() -> bool:
    from torch.utils.checkpoint import CheckpointFunction

    here: FrameType | None = sys._getframe(1)
    while here is not None:
        if here.f_code is CheckpointFunction.forward.__code__:
            return True
        here = here.f_back
    return False


def touched(worlds: Iterable[World]) -> set[Key]:
    """The sites at which some worlds edit something, or read what they compute themselves."""
    keys = set()
    for world in worlds:
        for item in world.plan:
            keys.add(item.site.key)
            keys |= {read.site.key for read in item.own_reads if read.site is not None}
    return keys


def exposed_layers(worlds: Iterable[World], reads: Sequence[Site]) -> frozenset[Any]:
    """Layers whose attention shows its inside for some world, and so for all, because they are to share a kernel.

    Those of the language model are numbers, those of another stack pairs of its name and a number.
    """
    sites = [*reads]
    for world in worlds:
        for item in world.plan.interventions:
            sites.append(item.site)
            sites += [read.site for read in item.reads if read.site is not None]
    return frozenset(layer_of(s) for s in sites if s.name in ("scores", "pattern") and s.layer is not None)


def layer_of(where: Site) -> Any:
    """The layer of a site in a block, as `exposed_layers` names it."""
    return where.layer if where.key[2] is None else (where.key[2], where.layer)
