"""Running worlds: three executors that give the same values.

``sequential`` runs one world at a time through the user's own model, under forward hooks: the oracle. ``batched``
stacks worlds along the rows of one such run. ``shared`` computes each value once however many worlds have it
(`hooks.shared`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .audit import FIRED, INERT, PRUNED, Audit
from .checkpointing import uncheckpointed
from .editing import Edits, source_id, world_reads
from .errors import ModelError, PlanError, nearest
from .inputs import Inputs
from .meter import Meter
from .plan import Origin, World
from .session import INSIDE, Session, install
from .shared import SharedRun, record_keys
from .sites import Site, site
from .tape import Tape

if TYPE_CHECKING:
    from .model import Model

Skip = Callable[[int, slice], bool]
EXECUTORS = ("auto", "sequential", "batched", "shared")
CPU_BUDGET = 1 << 30
"""Bytes of activations that a chunk of worlds may take on a CPU, unless the caller says otherwise."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What was read of one world, for some of its rows.

    Attributes:
        index: which world.
        rows: the rows, of those of its inputs.
        values: one tensor for each read, [b, ...].
        audit: what its interventions did on these rows.
    """

    index: int
    rows: slice
    values: tuple[Tensor, ...]
    audit: Audit

    @property
    def status(self) -> str:
        """``pruned`` if every intervention was, ``inert`` if none changed anything, else ``fired``."""
        found = {entry.status for entry in self.audit}
        if found and found <= {PRUNED}:
            return PRUNED
        return FIRED if FIRED in found else INERT


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
    reads: Sequence[Site],
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
    for world in worlds:
        if not isinstance(world, World):
            raise PlanError(f"run_worlds runs Worlds (inputs under a plan), not {type(world).__name__}")
        model.check_inputs(world.inputs)
        model.check(world.plan)
    reads = [site(read) for read in reads]
    for read in reads:
        model.require(read)
    limit = budget if budget is not None else default_budget(model.device)
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0 or limit == float("inf"):
        raise ModelError(f"a memory budget is a positive number of bytes, not {limit!r}")
    held = [model.held_on(world.inputs) for world in worlds] if model.holds else []
    if held:
        worlds = [World(world.inputs, plan + world.plan) for (plan, _), world in zip(held, worlds, strict=True)]
    with model.suspended():
        choice = choose(model, worlds, executor)
    expose = exposed_layers(worlds, reads)
    run = _run_shared if choice.executor == "shared" else _run_hooked
    options = {} if choice.executor == "shared" else {"batch": choice.executor == "batched"}
    outcomes = run(model, worlds, reads, limit, seed, expose, skip or (lambda index, rows: False), meter, **options)
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


def exposed_layers(worlds: Sequence[World], reads: Sequence[Site]) -> frozenset[int]:
    """Layers whose attention shows its inside for some world, and so for all, because they are to share a kernel."""
    sites = [*reads]
    for world in worlds:
        for item in world.plan:
            sites += [item.site, *(read.site for read in item.reads if read.site is not None)]
    return frozenset(s.layer for s in sites if s.name in ("scores", "pattern") and s.layer is not None)


def default_budget(device: torch.device) -> int:
    """A quarter of a GPU's free memory, or `CPU_BUDGET`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 4
    return CPU_BUDGET


def hooked_pass(
    model: Model,
    edits: Sequence[Edits],
    captures: Sequence[Sequence[Site]],
    expose: frozenset[int],
    graph: bool = False,
) -> tuple[Session, Tensor]:
    """One forward pass of the user's model, with worlds of equally many rows and columns along its batch."""
    session = Session(edits, captures, graph)
    with ExitStack() as stack:
        if graph and session.keys():
            stack.enter_context(uncheckpointed(model.module))
        install(session, model.architecture, stack, expose)
        inputs = [e.world.inputs.rows(e.window) for e in edits if e.window is not None]
        pixels = [i.pixels for i in inputs if i.pixels is not None]
        logits = model.forward(
            torch.cat([i.ids for i in inputs]),
            torch.cat([i.mask for i in inputs]),
            torch.cat([i.positions for i in inputs]),
            torch.cat(pixels) if pixels else None,
        )
    return session, logits


def read_tapes(
    model: Model,
    worlds: Sequence[World],
    seed: int,
    expose: frozenset[int],
    limit: int | None = None,
    only: Container[Any] | None = None,
    graph: bool = False,
) -> dict[Any, Tape]:
    """Run the worlds that plans read, and those that their plans read, each once.

    Args:
        only: the ids of the worlds that are wanted (see `editing.source_id`); None for all.
        graph: keep the values attached to the autograd graph.
    """
    wanted = {key: found for key, found in all_reads(worlds).items() if only is None or key in only}
    tapes = {}
    for key, (source, sites) in wanted.items():
        for place in sites:
            model.require(place)
        deeper = read_tapes(model, [source], seed, expose, limit, graph=graph)
        pieces: list[list[Tensor]] = []
        mixing = any(item.op.mixes for item in source.plan)
        step = rows_per_pass(model, source.inputs, None if mixing else limit)
        for start in range(0, len(source.inputs), step):
            window = slice(start, min(start + step, len(source.inputs)))
            edits = Edits(source, model.sizes, deeper, seed, window)
            session, _ = hooked_pass(model, [edits], [sites], expose, graph)
            edits.audit.require_fired()
            pieces.append([session.kept[0][i] for i in range(len(sites))])
        values = tuple((site, torch.cat([p[i] for p in pieces])) for i, site in enumerate(sites))
        tapes[key] = Tape(source.inputs, values, model.sizes)
    return tapes


def all_reads(worlds: Sequence[World]) -> dict[Any, tuple[World, list[Site]]]:
    """The worlds that are read by the plans of others, with every site that is read there, by `editing.source_id`."""
    wanted: dict[Any, tuple[World, list[Site]]] = {}
    for world in worlds:
        for key, (source, sites) in world_reads(world.plan, world).items():
            _, known = wanted.setdefault(key, (source, []))
            known += [site for site in sites if site not in known]
    return wanted


def rows_per_pass(model: Model, inputs: Inputs, limit: int | None) -> int:
    """How many rows of inputs one forward pass may take within a budget of bytes; all without one."""
    if limit is None:
        return len(inputs)
    return max(1, min(len(inputs), int(limit // (model.bytes_per_token() * inputs.width))))


def _run_hooked(
    model: Model,
    worlds: Sequence[World],
    reads: Sequence[Site],
    limit: int,
    seed: int,
    expose: frozenset[int],
    skip: Skip,
    meter: Meter | None,
    batch: bool,
) -> Iterator[list[Outcome]]:
    tapes = read_tapes(model, worlds, seed, expose, limit)
    inside = frozenset(
        item.site.layer for w in worlds for item in w.plan if item.site.name in INSIDE and item.site.layer is not None
    )
    expose = expose | inside
    groups: dict[Any, list[int]] = {}
    for index, world in enumerate(worlds):
        groups.setdefault((world.inputs.ids.shape if batch else index), []).append(index)
    for members in groups.values():
        first = worlds[members[0]].inputs
        fit = rows_per_pass(model, first, limit)
        if any(i.op.mixes for index in members for i in worlds[index].plan):
            fit = max(fit, len(first))
        step = min(fit, len(first))
        together = max(1, fit // step) if batch else 1
        for start in range(0, len(first), step):
            window = slice(start, min(start + step, len(first)))
            left = [index for index in members if not skip(index, window)]
            for at in range(0, len(left), together):
                chosen = left[at : at + together]
                edits = [Edits(worlds[i], model.sizes, tapes, seed, window) for i in chosen]
                session, _ = hooked_pass(model, edits, [reads] * len(chosen), expose)
                if meter is not None:
                    meter.whole(len(chosen) * len(first.ids[window]), first.width)
                for entry in edits:
                    entry.audit.require_fired()
                yield [
                    Outcome(index, window, tuple(kept[i] for i in range(len(reads))), entry.audit)
                    for index, kept, entry in zip(chosen, session.kept, edits, strict=True)
                ]


def _run_shared(
    model: Model,
    worlds: Sequence[World],
    reads: Sequence[Site],
    limit: int,
    seed: int,
    expose: frozenset[int],
    skip: Skip,
    meter: Meter | None,
) -> Iterator[list[Outcome]]:
    groups: dict[int, list[int]] = {}
    for index, world in enumerate(worlds):
        groups.setdefault(id(world.inputs), []).append(index)
    for members in groups.values():
        inputs = worlds[members[0]].inputs
        mine = [worlds[i] for i in members]
        # Reference sets are needed whole; other worlds that are read go through the network beside their readers.
        sources = all_reads(mine)
        apart = {source_id(r.source, w) for w in mine for i in w.plan for r in i.reads if not r.aligned}
        apart |= {key for key, (source, _) in sources.items() if not _shares_base(source, inputs)}
        fixed = read_tapes(model, mine, seed, expose, limit, only=apart)
        sources = {key: found for key, found in sources.items() if key not in apart}
        order = sorted(range(len(mine)), key=lambda i: _first_column(mine[i], model, inputs))
        own = [r for w in mine for i in w.plan for r in i.reads if r.source is Origin.HERE]
        keys = {item.site.key for world in mine for item in world.plan} | {r.key for r in reads}
        keys |= {r.site.key for r in own if r.site is not None}
        keys |= {site.key for _, sites in sources.values() for site in sites}
        step = max(1, min(len(inputs), int(limit // 2 // (model.bytes_per_token() * inputs.width * model.n_layers))))
        for start in range(0, len(inputs), step):
            window = slice(start, min(start + step, len(inputs)))
            left = [i for i in order if not skip(members[i], window)]
            if not left:
                continue
            run = SharedRun(
                arch=model.architecture,
                whole=inputs,
                window=window,
                reads=reads,
                sizes=model.sizes,
                device=model.device,
                exposed=expose,
                recorded=record_keys(keys),
                # A value read from another position of the same world may be one that nothing else needs.
                trim=not own,
                meter=meter,
            )
            run.run_base(Edits(World(inputs), model.sizes, {}, seed, window))
            tapes = {**fixed, **_shared_tapes(model, run, sources, seed, window)}
            per_world = model.bytes_per_token() * inputs.width * (window.stop - window.start)
            together = max(1, int(limit // per_world))
            for at in range(0, len(left), together):
                chosen = left[at : at + together]
                edits = [Edits(mine[i], model.sizes, tapes, seed, window) for i in chosen]
                yield [
                    Outcome(members[i], window, tuple(values), entry.audit)
                    for i, entry, values in zip(chosen, edits, run.run_worlds(edits), strict=True)
                ]


def _shares_base(source: World, inputs: Inputs) -> bool:
    """Whether a world that is read can be run against the base of `inputs`: the same layout, and no plan of its own."""
    same_layout = source.inputs.mask.shape == inputs.mask.shape and bool((source.inputs.mask == inputs.mask).all())
    return same_layout and not len(source.plan)


def _shared_tapes(
    model: Model, run: SharedRun, sources: Mapping[Any, tuple[World, list[Site]]], seed: int, window: slice
) -> dict[Any, Tape]:
    """Run the worlds that are read as worlds of the same base: where their inputs agree with it, so do their values,
    bitwise.
    """
    tapes = {}
    for key, (source, sites) in sources.items():
        view = SharedRun(
            run.arch,
            run.whole,
            run.window,
            sites,
            run.sizes,
            run.device,
            run.exposed,
            run.recorded,
            trim=False,
            base=run.base,
            meter=run.meter,
        )
        values = view.run_worlds([Edits(source, model.sizes, {}, seed, window)])[0]
        kept = tuple(zip(sites, values, strict=True))
        tapes[key] = Tape(source.inputs, kept, model.sizes, window)
    return tapes


def _first_column(world: World, model: Model, inputs: Inputs) -> int:
    """About where a world forks from its base: worlds that fork at one place pack well together."""
    first = inputs.width
    for item in world.plan:
        pos = item.site.pos
        if isinstance(pos, int) and pos >= 0:
            first = min(first, pos)
        elif isinstance(pos, int):
            first = min(first, inputs.width + pos)
        elif isinstance(pos, tuple) and min(pos) >= 0:
            first = min(first, min(pos))
        else:
            return 0
    return first
