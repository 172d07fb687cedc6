"""A model and a plan as one compiled graph, whatever the values, vectors, strengths, positions and heads."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .backends.job import Outcome, Record
from .backends.native import exposed_layers
from .backends.sources import all_reads
from .backends.traced import Traced
from .errors import InterpError, ModelError
from .hold import held
from .layout import Layout
from .lowering import Lowered, Lowering, skeleton
from .models.checks import check_inputs, check_norms, check_plan, check_site
from .models.network import Network
from .plan.operations.custom import Custom
from .plan.plan import World
from .plan.sites import Site
from .plan.tape import Tape
from .program import State
from .record import record
from .resolving import resolve

# Guards find another graph for other shapes, and functions of the user's; past this, something changes in every call.
_GRAPHS_OF_ONE_SKELETON, _GRAPHS_OF_ALL = 32, 1024
_LIMITS: dict[str, Any] = {}
if {"recompile_limit", "isolate_recompiles"} <= set(inspect.signature(torch.compile).parameters):
    _LIMITS = {"recompile_limit": _GRAPHS_OF_ONE_SKELETON, "isolate_recompiles": True}


@dataclass(frozen=True)
class Options:
    """What `torch.compile` is told.

    Attributes:
        backend: a compiler's name, or a function.
        mode: of inductor's; ``"reduce-overhead"`` replays CUDA graphs.
        dynamic: whether sizes are unknowns of the graph; None: once a second one is seen.
        options: more of the compiler's.
    """

    backend: str | Callable[..., Any] = "inductor"
    mode: str | None = None
    dynamic: bool | None = None
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def replays(self) -> bool:
        """Whether what a graph returns is overwritten by its next replay."""
        return self.mode in ("reduce-overhead", "max-autotune") or bool(dict(self.options).get("triton.cudagraphs"))


@dataclass(frozen=True, eq=False)
class _Graph:
    """A function that was compiled for one skeleton."""

    traced: Traced
    compiled: Callable[..., Any]


class Graphs:
    """The graphs of a model, by what is asked of it.

    Attributes:
        network: the model.
        count: how many graphs were compiled so far.
    """

    def __init__(self, network: Network, options: Options) -> None:
        self.network, self.options, self.count = network, options, 0
        self._graphs: dict[Any, _Graph] = {}
        self._lock = threading.RLock()
        self._stack = ExitStack()
        # Attention functions of transformers are found by their module, which would keep it for good.
        weakref.finalize(self, self._stack.close)

    def run(
        self, world: World, sites: Sequence[Site], *, grad: bool = False, seed: int = 0
    ) -> tuple[Outcome, tuple[Tensor, ...]]:
        """Run a world, under what is held on the model besides.

        Args:
            world: what to run.
            sites: what to keep.
            grad: keep the autograd graph.
            seed: of random interventions.

        Returns:
            What `record` gives, and what takes the gradient of each value that is kept (none without `grad`).

        Raises:
            ModelError: the model cannot be compiled under this plan.
        """
        network = self.network
        network.refresh()
        check_inputs(network, world.inputs)
        check_plan(network, world.plan)
        for place in sites:
            check_site(network, place)
        plan, record_of_held = held(network, world.inputs)
        mine = World(world.inputs, plan + world.plan) if len(plan) else world
        check_norms(network, mine.plan)
        try:
            with self._lock, torch.set_grad_enabled(grad):
                outcome, taps = self._run(mine, sites, exposed_layers([mine], sites), seed)
        except InterpError:
            raise
        except Exception as error:
            self._explain(world, sites, grad, seed, error)
            raise
        outcome.audit.split(len(plan), record_of_held)
        return replace(outcome, start=len(plan)), taps

    def _run(
        self, world: World, sites: Sequence[Site], expose: frozenset[int], seed: int
    ) -> tuple[Outcome, tuple[Tensor, ...]]:
        network, inputs, grad = self.network, world.inputs, torch.is_grad_enabled()
        if inputs.pictures is not None:
            raise ModelError("prompts with images run under run(), apply() and sweeps: a compiled graph has no tower")
        tapes: dict[Any, Tape] = {}
        for key, (source, wanted) in all_reads([world]).items():
            for place in wanted:
                check_site(network, place)
            read, _ = self._run(source, wanted, expose, seed)
            read.audit.require_fired()
            tapes[key] = Tape(source.inputs, tuple(zip(wanted, read.values, strict=True)), network.sizes)
        layout, device = Layout.of(inputs), network.device
        program = resolve(world, network.sizes, tapes, device=device, seed=seed)
        lowering = Lowering(layout, device, network.dtype, grad)
        lowered = lowering.program(program)
        captures, taps = [], []
        for place in sites:
            entries, shape = lowering.capture(place, network.sizes)
            if grad:
                # Its values are never read, so it has none of its own.
                taps.append(torch.zeros((), dtype=network.dtype, device=device).expand(shape).requires_grad_())
            captures.append((place.key, entries, taps[-1] if grad else None))
        arguments = network.arguments(inputs.ids, inputs.mask, inputs.positions, inputs.pixels)
        key = (skeleton((lowered, captures)), tuple(arguments), expose, grad)
        graph = self._graph(key, program.touched | {place.key for place in sites}, expose, world, seed)
        logits, kept, changes = self._called(graph, arguments, len(inputs), lowered, captures)
        if network.architecture.readout is not None:
            logits = logits.unsqueeze(1)
        lacking = [place for number, place in enumerate(sites) if number not in kept]
        if lacking:
            raise ModelError(f"{lacking[0]} was never computed: the compiled model did not go through it")
        values = tuple(kept[number] for number in range(len(sites)))
        record = Record.of(program, State({}, changes))
        return Outcome(0, slice(0, len(inputs)), values, record, logits), tuple(taps)

    def stepped(
        self,
        arguments: dict[str, Any],
        rows: int,
        touched: frozenset[Any],
        lowered: Lowered,
        tried: World,
        seed: int,
    ) -> tuple[Tensor, Mapping[int, Tensor]]:
        """One call of the model with a static cache; returns its logits and the changes that its steps made.

        Args:
            arguments: of the model.
            touched: the sites of the program, which is `lowered`.
            tried: a world in which functions of the user's may be tried before they are traced.
        """
        key = ("step", skeleton(lowered), tuple(arguments))
        with self._lock, torch.no_grad():
            graph = self._graph(key, touched, frozenset(), tried, seed)
            logits, _, changes = self._called(graph, arguments, rows, lowered, ())
        return logits, changes

    def _called(
        self, graph: _Graph, arguments: dict[str, Any], rows: int, lowered: Lowered, captures: Any
    ) -> tuple[Tensor, dict[int, Tensor], Mapping[int, Tensor]]:
        """Call a graph; what comes back is nobody else's."""
        cap = graph.traced.architecture.lift_cap() if ("logits", -1, None) in graph.traced.keys else nullcontext()
        with cap, self._counted():
            graph.traced.twin.follow()
            if self.options.replays:
                torch.compiler.cudagraph_mark_step_begin()
            logits, kept, changes = graph.compiled(arguments, rows, lowered, captures)
        if self.options.replays:
            logits, changes = logits.clone(), {number: change.clone() for number, change in changes.items()}
            kept = {number: value.clone() for number, value in kept.items()}
        return logits, kept, changes

    def _graph(self, key: Any, keys: frozenset[Any], expose: frozenset[int], world: World, seed: int) -> _Graph:
        """The function for a skeleton, compiled at its first call."""
        if any(graph.traced.twin.stale for graph in self._graphs.values()):
            self._graphs.clear()
            self._stack.close()
        if key not in self._graphs:
            if any(isinstance(item.op, Custom) for item in world.plan):
                # What a function of the user's returns and writes into is checked where it is not traced.
                tuple(record(self.network, [world], (), executor="sequential", seed=seed, together=True))
            traced = Traced(self.network, keys, expose)
            self._stack.callback(traced.hooks.close)
            told, options = dict(self.options.options), self.options
            compiled: Any = torch.compile(  # type: ignore[call-overload]
                traced.__call__,
                fullgraph=True,
                dynamic=options.dynamic,
                backend=options.backend,
                mode=options.mode,
                options=told or None,
                **_LIMITS,
            )
            self._graphs[key] = _Graph(traced, compiled)
        return self._graphs[key]

    @contextmanager
    def _counted(self):
        stats = torch._dynamo.utils.counters["stats"]
        before = stats["unique_graphs"]
        # An older torch counts the graphs of all skeletons as one function's.
        limit = nullcontext() if _LIMITS else torch._dynamo.config.patch(recompile_limit=_GRAPHS_OF_ALL)
        try:
            with limit:
                yield
        finally:
            self.count += stats["unique_graphs"] - before

    def _explain(self, world: World, sites: Sequence[Site], grad: bool, seed: int, error: Exception) -> None:
        """Raise what a plain run says is wrong, or that it is the compilation.

        Raises:
            ModelError: a plain run succeeds.
        """
        runs = record(
            self.network, [world], sites, executor="sequential", seed=seed, grad=grad, through_reads=grad, together=True
        )
        for outcome in runs:
            outcome.audit.require_fired()
        told = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"{self.network!r} cannot be compiled with this plan as one graph: {told}") from error
