"""The copy-on-write executor: worlds on one input are computed together, and only where they differ from the base.

A world joins at the layer and at the positions where its plan first changes a value. From then on it carries the tokens
that may differ; every step of a block that works token by token runs on one long row of them, and attention alone looks
at the rest of a world's keys and values, which are the base's. Tokens that nothing read depends on are dropped, so the
last layer is computed only at the positions that are read.

The base is the same program, run for one world in which every token differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from torch import Tensor

from ...audit import Audit
from ...budget import held_per_token, keeps_rows_together
from ...plan.inputs import Inputs
from ...plan.operations.attention import Knockout
from ...plan.plan import Origin, Plan, World
from ...plan.sites import Key, Site, execution_order
from ...plan.tape import Tape
from ...resolving import source_id, touched
from ..job import Job, Outcomes, Record
from ..sources import all_reads, read_tapes
from .base import COPIES, Base, first_spread, record_keys
from .cells import INSIDE
from .route import Route

ENOUGH = {"cpu": 512}
"""Tokens in a chunk from which on the products of a block get hardly faster, by device type."""
ENOUGH_ELSEWHERE = 1 << 18
AHEAD = 16
"""Chunks of worlds that are written down before their base is run, at most."""


@dataclass(frozen=True, eq=False)
class Found:
    """What came of some worlds.

    Attributes:
        values: for each read its value in every world, [W, b, ...].
        records: what the interventions of each world did.
        dirty: of the sites that were read whole, the tokens that may differ from the base, bool [W * b, T].
    """

    values: tuple[Tensor, ...]
    records: tuple[Record, ...]
    dirty: Mapping[Key, Tensor]


def run_base(base: Base) -> list[Tensor]:
    """Compute the base, keep what worlds will need of it, and return its reads of the logits."""
    route = Route(base, [World(base.whole)], {}, {}, 0, is_base=True)
    route.write()
    found = route.trace.run(base.device)
    base.values.update({key: found[value] for key, value in route.recorded.items()})
    base.logits.update({index: found[value] for index, value in route.read.items()})
    return [base.logits[index] for index in sorted(base.logits)]


def run_against(
    base: Base,
    worlds: Sequence[World],
    tapes: Mapping[Any, Tape] | None = None,
    differs: Mapping[tuple[int, Key], Tensor] | None = None,
    seed: int = 0,
) -> Found:
    """Run worlds against a base, whose inputs may differ from theirs.

    Args:
        base: what they share, which has been run.
        worlds: the worlds.
        tapes: of the worlds that their plans read, by `source_id`.
        differs: where those may differ from the base, by tape and site.
        seed: of random interventions.
    """
    return run_written(written(base, worlds, tapes or {}, differs or {}, seed))


def written(
    base: Base,
    worlds: Sequence[World],
    tapes: Mapping[Any, Tape],
    differs: Mapping[tuple[int, Key], Tensor],
    seed: int,
) -> Route:
    """The way of worlds against a base, which need not have been run; see `run_against`."""
    route = Route(base, worlds, tapes, differs, seed)
    route.write()
    return route


def run_written(route: Route) -> Found:
    """Run worlds whose way is written down."""
    base, worlds = route.base, route.worlds
    found = route.trace.run(base.device)
    values = (found[route.read[index]] for index in range(len(base.reads)))
    changes = route.effects.read(found)
    records = tuple(
        _record(world.plan, route.effects.cells[w], changes[w], route.effects.pruned[w])
        for w, world in enumerate(worlds)
    )
    return Found(tuple(v.unflatten(0, (len(worlds), -1)) for v in values), records, route.dirty)


def _record(plan: Plan, cells: Mapping[int, Any], changes: Mapping[int, float], pruned: set[int]) -> Record:
    def note(audit: Audit) -> None:
        for number, cell in cells.items():
            if number in changes:
                audit[number].record(*touched(cell.region), changes[number])
            audit[number].pruned = number in pruned

    return Record(plan, changes, frozenset(pruned), note)


def run_shared(job: Job) -> Iterator[Outcomes]:
    """Run worlds against bases that those with one `Inputs` object share, and yield them a chunk at a time."""
    groups: dict[int, list[int]] = {}
    for index, world in enumerate(job.worlds):
        groups.setdefault(id(world.inputs), []).append(index)
    return chain.from_iterable(_run_group(job, members) for members in groups.values())


def _run_group(job: Job, members: Sequence[int]) -> Iterator[Outcomes]:
    """Run the worlds of one base, by their numbers."""
    network, mine = job.network, [job.worlds[i] for i in members]
    inputs = mine[0].inputs
    # Reference sets are needed whole; other worlds that are read go through the network beside their readers.
    sources = all_reads(mine)
    reads = [(w, r) for w in mine for i in w.plan.interventions for r in i.reads]
    apart = {source_id(r.source, w.inputs) for w, r in reads if not r.aligned}
    apart |= {key for key, (source, _) in sources.items() if not _shares_base(source, inputs)}
    fixed = read_tapes(network, mine, job.seed, job.expose, job.limit, only=apart)
    sources = {key: found for key, found in sources.items() if key not in apart}
    firsts = [_first_column(world, inputs) for world in mine]
    layers = [_first_layer(world, network.n_layers) for world in mine]
    order = sorted(range(len(mine)), key=lambda i: (layers[i], firsts[i]))
    own = {r.site.key for _, r in reads if r.source is Origin.HERE and r.site is not None}
    shown = {r.key for r in job.reads} | own | {site.key for _, sites in sources.values() for site in sites}
    keys = {item.site.key for world in mine for item in world.plan.interventions} | shown
    spread = first_spread([*mine, *(source for source, _ in sources.values())], inputs, network.n_layers)
    exposed = job.expose & _looked_into(job)
    per_token = held_per_token(network)
    limit = float("inf") if job.limit is None else job.limit
    step = max(1, _at_most(limit / 2 / (inputs.width * per_token * network.n_layers), len(inputs)))
    if keeps_rows_together(network, inputs):
        step = len(inputs)
    for window in job.windows(len(inputs), step):
        left = [i for i in order if job.skip is None or not job.skip(members[i], window)]
        if not left:
            continue
        base = Base(
            network=network,
            whole=inputs,
            window=window,
            reads=job.reads,
            exposed=exposed,
            recorded=frozenset(key for key in record_keys(keys) if key[0] not in COPIES or key in shown),
            spread=spread,
            # A value read from another position of the same world may be one that nothing else needs.
            trim=not own,
            meter=job.meter,
        )
        chunks = _chunks(base, left, firsts, limit / 2, per_token)
        ahead = [] if sources else list(islice(chunks, AHEAD + 1))
        if ahead and len(ahead) <= AHEAD:
            # All that worlds read of the base is known before it is run, and no more of it is kept.
            routes = [written(base, [mine[i] for i in chosen], fixed, {}, job.seed) for chosen in ahead]
            base.wanted = frozenset().union(*(route.reads_of_base for route in routes))
            run_base(base)
            for chosen in ahead:
                found = run_written(routes.pop(0))
                yield Outcomes(tuple(members[i] for i in chosen), window, found.values, found.records)
            continue
        run_base(base)
        beside, differs = _tapes_beside(base, sources)
        tapes = {**fixed, **beside}
        for chosen in chain(ahead, chunks):
            found = run_against(base, [mine[i] for i in chosen], tapes, differs, job.seed)
            yield Outcomes(tuple(members[i] for i in chosen), window, found.values, found.records)


def _looked_into(job: Job) -> set[int | None]:
    """Layers of which some world sees scores or patterns: edges that are only forbidden are a kernel's mask."""
    sites = [*job.reads]
    for world in job.worlds:
        for item in world.plan.interventions:
            sites += [read.site for read in item.reads if read.site is not None]
            if not isinstance(item.op, Knockout):
                sites.append(item.site)
    return {site.layer for site in sites if site.name in INSIDE}


def _chunks(
    base: Base, left: Sequence[int], firsts: Sequence[int], limit: float, per_token: int
) -> Iterator[list[int]]:
    """Worlds, as many at a time as their tokens and what is read of them allow."""
    rows, width = base.layout.queries.real.shape
    enough = ENOUGH.get(base.device.type, ENOUGH_ELSEWHERE)
    itemsize = base.network.dtype.itemsize
    read = 0
    for site in base.reads:
        size = 1
        for count in base.region(site).shape.values():
            size *= count
        read += size * itemsize
    chunk: list[int] = []
    tokens = 0
    for i in left:
        more = rows * max(1, width - firsts[i])
        held = (tokens + more) * per_token + (len(chunk) + 1) * read
        if chunk and (tokens + more > enough or held > limit):
            yield chunk
            chunk, tokens = [], 0
        chunk.append(i)
        tokens += more
    yield chunk


def _shares_base(source: World, inputs: Inputs) -> bool:
    """Whether a world that is read can be run against the base of `inputs`: the same layout, and no plan of its own."""
    return source.inputs.columns.laid_like(inputs.columns) and not len(source.plan)


def _tapes_beside(
    base: Base, sources: Mapping[Any, tuple[World, list[Site]]]
) -> tuple[dict[Any, Tape], dict[tuple[int, Key], Tensor]]:
    """Run the worlds that are read as worlds of the same base: where their inputs agree with it, so do their values,
    bitwise.

    Returns:
        Their tapes, and where they may differ from the base, by tape and site.
    """
    tapes, differs, network = {}, {}, base.network
    for key, (source, sites) in sources.items():
        found = run_against(replace(base, reads=sites, trim=False), [source])
        kept = tuple((site, values[0]) for site, values in zip(sites, found.values, strict=True))
        tapes[key] = Tape(source.inputs, kept, network.sizes, base.window)
        differs |= {(id(tapes[key]), at): mask for at, mask in found.dirty.items()}
    return tapes, differs


def _first_layer(world: World, depth: int) -> int:
    """The layer at which a world forks from its base: those that fork at one layer fill the layers above together."""
    return min((execution_order(item.site.key, depth)[0] for item in world.plan.interventions), default=depth)


def _first_column(world: World, inputs: Inputs) -> int:
    """About where a world forks from its base: worlds that fork at one place pack well together."""
    first = inputs.width
    for item in world.plan.interventions:
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


def _at_most(number: float, most: int) -> int:
    return int(min(number, most))
