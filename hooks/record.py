"""The one way in which anything runs a model: it knows of what is held, of gradients, chunks, executors and kernels.

Three executors give the same values. ``sequential`` runs one world at a time through the user's own model, under
forward hooks: the oracle. ``batched`` stacks worlds along the rows of one such pass. ``shared`` computes each value
once however many worlds have it, where the model's description can be believed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .audit import Audit
from .backends.gate import gate_of
from .backends.hooked import run_hooked
from .backends.job import Choice, Job, Outcome, Outcomes, Skip
from .backends.native import exposed_layers
from .backends.packed.shared import run_shared
from .backends.sources import all_reads, read_tapes
from .budget import budget_of
from .certificate import distrust
from .errors import ModelError, PlanError, nearest
from .hold import held
from .meter import Meter
from .models.checks import NORMED, check_norms, check_plan, check_site, check_worlds, norms_twice
from .models.network import Network
from .plan.plan import World
from .plan.sites import TEXT, Site, sites_of
from .plan.tape import Tape
from .program import State, visit
from .resolving import resolve

EXECUTORS = ("auto", "sequential", "batched", "shared")


def choose(network: Network, worlds: Sequence[World], executor: str = "auto", reads: Sequence[Site] = ()) -> Choice:
    """Decide how worlds are run. The first time that a model is shared in some regime, this compares it with itself.

    Raises:
        ModelError: the executor's name is unknown.
    """
    if executor not in EXECUTORS:
        raise ModelError(
            f"unknown executor {executor!r}{nearest(executor, EXECUTORS)}; there are {', '.join(EXECUTORS)}"
        )
    mixing = "" if executor == "sequential" else network.mixing()
    if mixing:
        return Choice("sequential", f"sequential instead of {'shared' if executor == 'auto' else executor}: {mixing}")
    if executor in ("sequential", "batched"):
        return Choice(executor)
    network.refresh()
    everything = [*worlds, *(source for source, _ in all_reads(worlds).values())]
    reason = network.unshareable() or _looks(network, worlds, reads) or _one_norm(network, everything, reads)
    mixes = next((item for w in everything for item in w.plan.interventions if item.op.mixes), None)
    if not reason and mixes is not None:
        reason = f"{mixes} mixes {' and '.join(sorted(mixes.op.mixes))}"
    seen: set[int] = set()
    for world in worlds:
        if reason:
            break
        if id(world.inputs) not in seen:
            seen.add(id(world.inputs))
            reason = distrust(network, world.inputs)
    return Choice("shared") if not reason else Choice("batched", f"batched instead of shared: {reason}")


def _one_norm(network: Network, worlds: Sequence[World], reads: Sequence[Site]) -> str:
    """Why worlds that look at a norm of both attention and MLP, or edit one and have it computed anew, are run beside
    one another; empty where none does.
    """
    blocks = network.architecture.blocks
    sites = [*reads, *(item.site for world in worlds for item in world.plan.interventions)]
    if not any(site.name in NORMED for site in sites):
        return ""
    for site in sites:
        if site.name in NORMED and site.stack in (None, TEXT) and blocks[site.layer or 0].shares_norm:
            return f"{site.whole} is read by attention and MLP alike"
    return next(filter(None, (norms_twice(network, world.plan) for world in worlds)), "")


def _looks(network: Network, worlds: Sequence[World], reads: Sequence[Site]) -> str:
    """Why worlds that look at what is outside the language model are not shared; empty where they may be."""
    tower = network.architecture.tower
    if tower is None and network.architecture.pooler is None:
        return ""
    sites, everything = [*reads], [*worlds]
    for source, found in all_reads(worlds).values():
        sites += found
        everything.append(source)
    sites += [site for world in everything for item in world.plan for site in (item.site, *item.read_sites)]
    if any(site.name == "pooled" for site in sites):
        return "the pooled vector is made by a module of the model's own, of whole rows"
    if tower is None:
        return ""
    there = next((site for site in sites if site.key[2] is not None), None)
    if there is not None:
        return f"{there} is in the tower, which has no keys and values to share"
    if tower.mutual and any(world.inputs.pictures for world in worlds):
        return "tokens of an image see later ones, so a world differs from its base before what it edits"
    return ""


def record(network: Network, worlds: Sequence[World], reads: Sequence[Site], **options: Any) -> Iterator[Outcome]:
    """Run worlds and yield what is read of each; see `record_chunks` for the arguments."""
    return _each(record_chunks(network, worlds, reads, **options))


def _each(chunks: Iterator[Outcomes]) -> Iterator[Outcome]:
    for chunk in chunks:
        yield from chunk


def record_chunks(
    network: Network,
    worlds: Sequence[World],
    reads: Sequence[Site],
    *,
    executor: str = "auto",
    budget: float | None = None,
    seed: int = 0,
    skip: Skip | None = None,
    meter: Meter | None = None,
    grad: bool = False,
    through_reads: bool = False,
    rows: slice | None = None,
    together: bool = False,
    alongside: Sequence[World] = (),
) -> Iterator[Outcomes]:
    """Run worlds and yield what is read of them, as chunks of worlds and rows are done.

    What is held on the model comes first in every world.

    Args:
        network: the wrapped model.
        worlds: the worlds; those with one `Inputs` object share its base.
        reads: the sites wanted of every world.
        executor: one of `EXECUTORS`.
        budget: bytes that the activations of a chunk may take; what is read does not depend on it beyond rounding.
        seed: seed of random interventions.
        skip: says of a world (by index) and a range of rows that they need not be run.
        meter: counts the work of the worlds (not of those that they read).
        grad: keep what is read attached to the autograd graph, in passes of the model itself.
        through_reads: let gradients flow into the worlds that plans read, too.
        rows: run these rows only.
        together: run all rows in one pass, whatever the budget.
        alongside: worlds that these are compared with, whose attention kernels they are to share.

    Raises:
        PlanError, SiteError, ShapeError: a plan that does not fit the model or the inputs.
    """
    network.refresh()
    check_worlds(network, [*worlds, *alongside])
    for read in reads:
        check_site(network, read)
    limit = None if together else budget_of(network, budget)
    if grad and limit is not None:
        # The graph keeps every layer's activations, where an executor keeps one's.
        limit = limit / network.n_layers
    holding = {id(inputs): held(network, inputs) for inputs in {id(w.inputs): w.inputs for w in worlds}.values()}
    under = [holding[id(world.inputs)] for world in worlds]
    mine = [World(w.inputs, plan + w.plan) if len(plan) else w for (plan, _), w in zip(under, worlds, strict=True)]
    if any(len(plan) for plan, _ in holding.values()):
        for world in mine:
            check_norms(network, world.plan)
    gate = gate_of(network.module)
    with gate.suspended():
        choice = (
            Choice("sequential" if executor == "sequential" else "batched")
            if grad
            else choose(network, mine, executor, reads)
        )
    job = Job(
        network=network,
        worlds=mine,
        reads=reads,
        limit=limit,
        seed=seed,
        expose=exposed_layers([*mine, *alongside], reads),
        skip=skip,
        meter=meter,
        graph=grad,
        through_reads=grad and through_reads,
        rows=rows,
    )
    outcomes = run_shared(job) if choice.executor == "shared" else run_hooked(job, choice.executor == "batched")
    while True:
        # The caller's code runs between two chunks, on a model as the caller knows it.
        with gate.lock, gate.suspended(), torch.set_grad_enabled(grad):
            chunk = next(outcomes, None)
        if chunk is None:
            return
        starts = tuple(len(under[index][0]) for index in chunk.indices)
        if any(starts):
            for index, one in zip(chunk.indices, chunk.records, strict=True):
                plan, into = under[index]
                one.audit.split(len(plan), into)
            chunk = replace(chunk, starts=starts)
        yield replace(chunk, choice=choice)


def run_worlds(
    model: Network,
    worlds: Sequence[World],
    reads: Sequence[Site | str] | Site | str,
    *,
    executor: str = "auto",
    budget: float | None = None,
    seed: int = 0,
    skip: Skip | None = None,
    meter: Meter | None = None,
) -> Iterator[Outcome]:
    """Run worlds and yield what is read of each, as chunks of worlds and rows are done (without gradients).

    Args:
        model: the wrapped model.
        worlds: the worlds; those with one `Inputs` object share its base.
        reads: the sites wanted of every world.
        executor: "sequential" (one world at a time through the model itself: the oracle), "batched" (one row a world),
            "shared" (what worlds have in common is computed once), or "auto", the last of these that is exact.
        budget: bytes that the activations of a chunk may take; what is read does not depend on it beyond rounding.
        seed: seed of random interventions.
        skip: says of a world (by index) and a range of rows that they need not be run.
        meter: counts the work of the worlds (not of those that they read).

    Raises:
        PlanError, SiteError, ShapeError: a plan that does not fit the model or the inputs.
    """
    return _each(run_chunks(model, worlds, reads, executor=executor, budget=budget, seed=seed, skip=skip, meter=meter))


def run_chunks(
    model: Network,
    worlds: Sequence[World],
    reads: Sequence[Site | str] | Site | str,
    *,
    executor: str = "auto",
    budget: float | None = None,
    seed: int = 0,
    skip: Skip | None = None,
    meter: Meter | None = None,
) -> Iterator[Outcomes]:
    """Run worlds as `run_worlds` does, and yield what is read of those that were run together as one, [W, b, ...]."""
    if isinstance(worlds, World):
        raise PlanError("run_worlds runs several Worlds: put the one in a list")
    for world in worlds:
        if not isinstance(world, World):
            raise PlanError(f"run_worlds runs Worlds (inputs under a plan), not {type(world).__name__}")
    return record_chunks(
        model, worlds, sites_of(reads), executor=executor, budget=budget, seed=seed, skip=skip, meter=meter
    )


class Edits:
    """What the plans of worlds make of given values, without running the model on them.

    Args:
        network: the wrapped model.
        worlds: the worlds, whose plans may read others, which are run once.
        alongside: worlds and `reads` whose attention kernels those are to share.
        seed, budget: as in `record`.
    """

    def __init__(
        self,
        network: Network,
        worlds: Sequence[World],
        *,
        alongside: Sequence[World] = (),
        reads: Sequence[Site] = (),
        seed: int = 0,
        budget: float | None = None,
    ) -> None:
        network.refresh()
        self.network, self.worlds, self.seed = network, worlds, seed
        for world in worlds:
            check_plan(network, world.plan)
        expose = exposed_layers([*worlds, *alongside], reads)
        gate = gate_of(network.module)
        with gate.lock, gate.suspended(), torch.no_grad():
            self.tapes: dict[Any, Tape] = read_tapes(network, worlds, seed, expose, budget_of(network, budget))

    def at(self, world: int, rows: slice, values: Mapping[Site, Tensor]) -> tuple[dict[Site, Tensor], Audit]:
        """The values [b, T, ...] of whole sites after a world's plan, and what it did.

        Args:
            world: which, by its place.
            rows: the rows that the values are of.
            values: what stands at the sites that the plan edits.
        """
        device = self.network.device
        program = resolve(
            self.worlds[world], self.network.sizes, self.tapes, device=device, seed=self.seed, window=rows
        )
        state, edited = State(), {}
        for place, value in values.items():
            if place.key in program.steps:
                state, edited[place] = visit(program, state, place.key, value)
        return edited, program.report(state)
