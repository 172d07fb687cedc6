"""Plans of several members of one architecture, which are called together over a leading axis of members."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .backends.native import exposed_layers
from .backends.sources import all_reads
from .backends.traced import Traced
from .errors import PlanError, ShapeError, UnfiredError
from .layout import Layout
from .lowering import Lowered, Lowering, leaves, rebuilt, skeleton
from .models.checks import check_inputs, check_plan
from .models.network import Network
from .plan.inputs import Inputs
from .plan.plan import Origin, Plan, Read, World, as_plan
from .plan.sites import Key
from .program import Here, Program
from .resolving import resolve, source_id

Params = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class _Source:
    """A world that is read, by its place among those of its member: it is run anew with each call."""

    program: Lowered
    keys: tuple[Key, ...]
    rows: int
    arguments: tuple[tuple[str, Any], ...] | None


@dataclass(frozen=True, eq=False)
class _Member:
    """What one member holds: worlds that are read, the deepest first, and its own program."""

    sources: tuple[_Source, ...]
    program: Lowered


class Group:
    """Members whose plans have one skeleton, and differ in tensors alone.

    Attributes:
        index: int64 [m], which members they are.
        tensors: of their plans, those that differ [m, ...] and those that they share.
        axes: for each tensor 0, or None where it is shared.
    """

    def __init__(self, traced: Traced, numbers: Sequence[int], members: Sequence[_Member], shape: Any) -> None:
        self._traced, self._form, self._shape = traced, members[0], shape
        self.index = torch.tensor(numbers)
        self.tensors: list[Tensor] = []
        self.axes: list[int | None] = []
        for values in zip(*map(leaves, members), strict=True):
            if any(value.shape != values[0].shape for value in values):
                shapes = sorted({str(list(value.shape)) for value in values})
                raise ShapeError(f"members {list(numbers)} hold the same with values of other shapes: {shapes}")
            same = all(torch.equal(value, values[0]) for value in values)
            self.tensors.append(values[0] if same else torch.stack(values))
            self.axes.append(None if same else 0)

    def call(self, params: Params, tensors: Sequence[Tensor], inputs: tuple[Any, ...]) -> Any:
        """Run one member's model on inputs under its plan, as a function of its parameters and of its plan's tensors.

        Raises:
            ShapeError: inputs of other rows or positions than the plan was resolved for.
            UnfiredError: an intervention that the model does not come to.
        """
        first = next((value for value in inputs if isinstance(value, Tensor)), None)
        if first is not None and first.ndim == 2 and tuple(first.shape) != self._shape:
            raise ShapeError(f"the plans are for inputs {list(self._shape)}, and the model is called on {first.shape}")
        member = rebuilt(self._form, iter(tensors))
        here: dict[Any, Tensor] = {}
        for number, source in enumerate(member.sources):
            told = inputs if source.arguments is None else ()
            named = dict(source.arguments or ())
            captures = [(key, None, None) for key in source.keys]
            kept = self._run(params, told, named, source.rows, source.program, captures, here)[1]
            here = {**here, **{(number, key): kept[place] for place, key in enumerate(source.keys)}}
        return self._run(params, inputs, {}, self._shape[0], member.program, [], here)[0]

    def _run(
        self,
        params: Params,
        args: tuple[Any, ...],
        named: dict[str, Any],
        rows: int,
        program: Lowered,
        captures: Any,
        here: dict[Any, Tensor],
    ) -> tuple[Any, dict[int, Tensor]]:
        module = self._traced.module
        output, kept, changes = self._traced.call(
            lambda: torch.func.functional_call(module, dict(params), args, named), rows, program, captures, here
        )
        for steps in program.steps.values():
            for step in steps:
                if step.number not in changes:
                    raise UnfiredError(f"never fired: {step.item.op} at {step.item.site}")
        return output, kept


class Members:
    """Plans of members, resolved once: each is its own, and members whose plans are alike are run together.

    Args:
        network: the model that all members are copies of; its parameters are not used.
        plans: one a member; None for nothing.
        inputs: rows, positions and padding of every call; what the tokens are does not matter, but where a plan names
            a world of its own.
        seed: of random interventions, one for all or one a member.

    Raises:
        PlanError: a plan that depends on what the model is called with, or a reference set that is a world.
        SiteError, ShapeError: a plan that does not fit.

    Attributes:
        groups: of members whose plans have one skeleton.
    """

    def __init__(self, network: Network, plans: Sequence[Any], inputs: Inputs, seed: int | Sequence[int] = 0) -> None:
        network.refresh()
        check_inputs(network, inputs)
        if network.architecture.tower is not None:
            raise PlanError("members are one graph, and no graph has the sites of a model that sees")
        seeds = [seed] * len(plans) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(plans):
            raise ShapeError(f"give one seed, or one a member ({len(plans)}); got {len(seeds)}")
        self.network, self.inputs = network, inputs
        grouped: dict[Any, tuple[list[int], list[_Member], list[World]]] = {}
        for number, (plan, one) in enumerate(zip(plans, seeds, strict=True)):
            if callable(plan) and not isinstance(plan, Plan):
                raise PlanError(
                    f"member {number} has a function for a plan, and within a graph nobody looks at the batch: give a "
                    "plan with positions for each row of `inputs`"
                )
            world = World(inputs, as_plan(plan))
            check_plan(network, world.plan)
            worlds: list[World] = []
            member = self._member(world, one, worlds)
            found = grouped.setdefault(skeleton(member), ([], [], []))
            found[0].append(number)
            found[1].append(member)
            found[2].extend(worlds)
        stack = ExitStack()
        weakref.finalize(self, stack.close)
        self.groups = [self._group(stack, *found) for found in grouped.values()]

    def _group(self, stack: ExitStack, numbers: list[int], members: list[_Member], worlds: list[World]) -> Group:
        programs = [member.program for member in members]
        programs += [source.program for member in members for source in member.sources]
        keys = {key for program in programs for key in (*program.steps, *program.held_back)}
        keys |= {key for member in members for source in member.sources for key in source.keys}
        traced = Traced(self.network, keys, exposed_layers(worlds, ()))
        stack.callback(traced.hooks.close)
        return Group(traced, numbers, members, tuple(self.inputs.ids.shape))

    def _member(self, world: World, seed: int, worlds: list[World]) -> _Member:
        sources: list[_Source] = []
        program = self._program(world, seed, sources, {}, worlds)
        return _Member(tuple(sources), program)

    def _program(
        self, world: World, seed: int, sources: list[_Source], known: dict[Any, int], worlds: list[World]
    ) -> Lowered:
        """The program of a world, in which what is read of another is what that one computes in the same call."""
        network, device = self.network, self.network.device
        worlds.append(world)
        for key, (source, sites) in all_reads([world]).items():
            if not source.inputs.columns.laid_like(world.inputs.columns):
                raise PlanError(f"{source} is read by members, and its rows and positions are others than {world}'s")
            keys = tuple(place.key for place in sites)
            if key in known:
                before = sources[known[key]]
                sources[known[key]] = replace(before, keys=tuple(dict.fromkeys(before.keys + keys)))
            else:
                lowered = self._program(source, seed, sources, known, worlds)
                given = source.inputs
                arguments = None
                if given is not self.inputs:
                    arguments = tuple(network.arguments(given.ids, given.mask, given.positions, given.pixels).items())
                known[key] = len(sources)
                sources.append(_Source(lowered, keys, len(given), arguments))
        # What another world has is read as if this one had computed it; `here` of the call says under which name.
        items, names = [], []
        for item in world.plan:
            reads, named = [], []
            for read in item.reads:
                elsewhere = read.source is Origin.UNEDITED or isinstance(read.source, (Plan, World))
                if elsewhere and not read.aligned:
                    raise PlanError(f"{item}: members take a reference set as a tape or a tensor, not as a world")
                place = item.site if read.site is None else read.site
                reads.append(Read(Origin.HERE, place) if elsewhere else read)
                named.append(known[source_id(read.source, world.inputs)] if elsewhere else None)
            items.append(replace(item, reads=tuple(reads)))
            names.append(named)
        plain = World(world.inputs, Plan(tuple(items)))
        program = resolve(plain, network.sizes, {}, device=device, seed=seed)
        own = {read.site.key for item in world.plan for read in item.reads if read.source is Origin.HERE and read.site}
        program = replace(program, steps=_named(program, names), held_back=frozenset(own))
        return Lowering(Layout.of(world.inputs), device, network.dtype, False).program(program)


def _named(program: Program, names: Sequence[Sequence[int | None]]) -> dict[Key, tuple[Any, ...]]:
    """The steps of a program, whose reads of a source are of that source."""
    found: dict[Key, tuple[Any, ...]] = {}
    for key, steps in program.steps.items():
        renamed = []
        for step in steps:
            reads = tuple(
                value if name is None else Here((name, value.key), value.region)  # type: ignore[union-attr]
                for value, name in zip(step.reads, names[step.number], strict=True)
            )
            renamed.append(replace(step, reads=reads))
        found[key] = tuple(renamed)
    return found
