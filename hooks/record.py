"""Running worlds: three executors that give the same values.

``sequential`` runs one world at a time through the user's own model, under forward hooks: the oracle. ``batched``
stacks worlds along the rows of one such run (`hooks.hooked`). ``shared`` computes each value once however many worlds
have it (`hooks.shared`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from .backends.forward import exposed_layers
from .backends.hooked import run_hooked
from .backends.job import Job, Outcome, Skip
from .backends.packed.shared import run_shared
from .backends.sources import all_reads
from .budget import budget_of
from .errors import ModelError, PlanError, nearest
from .meter import Meter
from .plan.plan import World
from .plan.sites import Site, sites_of

if TYPE_CHECKING:
    from .model import Model

EXECUTORS = ("auto", "sequential", "batched", "shared")


@dataclass(frozen=True)
class Choice:
    """The executor that is used, and why it is not the one that was asked for (or the fastest)."""

    executor: str
    reason: str = ""


def choose(model: Model, worlds: Sequence[World], executor: str = "auto") -> Choice:
    """Decide how worlds are run.

    Raises:
        ModelError: the executor's name is unknown.
    """
    if executor not in EXECUTORS:
        raise ModelError(
            f"unknown executor {executor!r}{nearest(executor, EXECUTORS)}; there are {', '.join(EXECUTORS)}"
        )
    if executor in ("sequential", "batched"):
        return Choice(executor)
    reason = model.unshareable()
    everything = [*worlds, *(source for source, _ in all_reads(worlds).values())]
    mixing = next((item for w in everything for item in w.plan if item.op.mixes), None)
    if not reason and mixing is not None:
        reason = f"{mixing} mixes {' and '.join(sorted(mixing.op.mixes))}"
    return Choice("shared") if not reason else Choice("batched", f"batched instead of shared: {reason}")


def run_worlds(
    model: Model,
    worlds: Sequence[World],
    reads: Sequence[Site | str] | Site | str,
    *,
    executor: str = "auto",
    budget: int | None = None,
    seed: int = 0,
    skip: Skip | None = None,
    meter: Meter | None = None,
) -> Iterator[Outcome]:
    """Run worlds and yield what is read of each, as chunks of worlds and rows are done (without gradients).

    Args:
        model: the wrapped model.
        worlds: the worlds; those with one `Inputs` object share its base.
        reads: the sites wanted of every world.
        executor: one of `EXECUTORS`.
        budget: bytes that the activations of a chunk may take; what is read does not depend on it beyond rounding.
        seed: seed of random interventions.
        skip: says of a world (by index) and a range of rows that they need not be run.
        meter: counts the work of the worlds (not of those that they read).

    Raises:
        PlanError, SiteError, ShapeError: a plan that does not fit the model or the inputs.
    """
    if isinstance(worlds, World):
        raise PlanError("run_worlds runs several Worlds: put the one in a list")
    for world in worlds:
        if not isinstance(world, World):
            raise PlanError(f"run_worlds runs Worlds (inputs under a plan), not {type(world).__name__}")
        model.check_inputs(world.inputs)
        model.check(world.plan)
    wanted = sites_of(reads)
    for read in wanted:
        model.require(read)
    limit = budget_of(model, budget)
    held = [model.held_on(world.inputs) for world in worlds] if model.holds else []
    if held:
        worlds = [World(world.inputs, plan + world.plan) for (plan, _), world in zip(held, worlds, strict=True)]
    with model.suspended():
        choice = choose(model, worlds, executor)
    expose = exposed_layers(worlds, wanted)
    job = Job(model, worlds, wanted, limit, seed, expose, skip or (lambda index, rows: False), meter)
    outcomes = run_shared(job) if choice.executor == "shared" else run_hooked(job, choice.executor == "batched")
    while True:
        # The caller's code runs between two chunks, on a model as the caller knows it.
        with model.suspended(), torch.no_grad():
            chunk = next(outcomes, None)
        if chunk is None:
            return
        for outcome in chunk:
            if held:
                plan, record = held[outcome.index]
                outcome = replace(outcome, audit=outcome.audit.split(len(plan), record))
            yield outcome
