"""The copy-on-write executor: worlds on one input are computed together, and only where they differ from the base.

A world joins at the layer and at the positions where its plan first changes a value. From then on it carries the tokens
that differ (`Packed`); every step of a block that works token by token runs on one long row of them, and attention
alone fills in the rest of a world's keys and values from the base. Tokens that nothing read depends on are dropped, so
the last layer is computed only at the positions that are read.

The base is the same program, run for one world in which every token differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ...audit import Audit
from ...budget import bytes_per_token, keeps_rows_together
from ...plan.inputs import Inputs
from ...plan.plan import World
from ...plan.sites import Site
from ...plan.tape import Tape
from ...program import Program
from ...resolving import resolve, source_id
from ..job import Job, Outcome
from ..sources import all_reads, read_tapes
from .base import Base, record_keys
from .chunk import Chunk
from .tokens import Packed


def run_base(base: Base) -> list[Tensor]:
    """Compute the base, keep what worlds will need of it, and return its reads."""
    real, network = base.inputs.mask, base.network
    program = resolve(World(base.whole), network.sizes, {}, device=network.device, window=base.window)
    x = Packed(real, base.embedded(base.inputs, real), len(base.inputs))
    return Chunk(base, [program], is_base=True).run(x)[0]


def run_against(
    base: Base, worlds: Sequence[World], programs: Sequence[Program]
) -> tuple[list[list[Tensor]], list[Audit]]:
    """Run worlds against a base, whose inputs may differ from theirs.

    Returns:
        Of each world its reads, and what its interventions did.
    """
    chunk = Chunk(base, programs)
    dirty, pieces = [], []
    for world in worlds:
        own = base.inputs if world.inputs is base.whole else world.inputs.rows(base.window)
        differs = own.differs(base.inputs) & base.inputs.mask
        dirty.append(differs)
        if bool(differs.any()):
            pieces.append(base.embedded(own, differs))
    # Where no world has tokens of its own, one token's embedding says of what shape and dtype they would be.
    values = torch.cat(pieces) if pieces else base.values["embed", -1, None][0, :0]
    found = chunk.run(Packed(torch.cat(dirty), values, len(base.inputs)))
    return found, chunk.audits()


def run_shared(job: Job) -> Iterator[list[Outcome]]:
    """Run worlds against bases that those with one `Inputs` object share, and yield them a chunk at a time."""
    groups: dict[int, list[int]] = {}
    for index, world in enumerate(job.worlds):
        groups.setdefault(id(world.inputs), []).append(index)
    return chain.from_iterable(_run_group(job, members) for members in groups.values())


def _run_group(job: Job, members: Sequence[int]) -> Iterator[list[Outcome]]:
    """Run the worlds of one base, by their numbers."""
    network, mine = job.network, [job.worlds[i] for i in members]
    inputs = mine[0].inputs
    # Reference sets are needed whole; other worlds that are read go through the network beside their readers.
    sources = all_reads(mine)
    apart = {source_id(r.source, w.inputs) for w in mine for i in w.plan for r in i.reads if not r.aligned}
    apart |= {key for key, (source, _) in sources.items() if not _shares_base(source, inputs)}
    fixed = read_tapes(network, mine, job.seed, job.expose, job.limit, only=apart)
    sources = {key: found for key, found in sources.items() if key not in apart}
    order = sorted(range(len(mine)), key=lambda i: _first_column(mine[i], inputs))
    own = [r for w in mine for i in w.plan for r in i.own_reads]
    keys = {item.site.key for world in mine for item in world.plan} | {r.key for r in job.reads}
    keys |= {r.site.key for r in own if r.site is not None}
    keys |= {site.key for _, sites in sources.values() for site in sites}
    per_row = bytes_per_token(network) * inputs.width
    limit = float("inf") if job.limit is None else job.limit
    step = max(1, _at_most(limit / 2 / (per_row * network.n_layers), len(inputs)))
    if keeps_rows_together(network, inputs):
        step = len(inputs)
    for window in job.windows(len(inputs), step):
        left = [i for i in order if not job.skip(members[i], window)]
        if not left:
            continue
        base = Base(
            network=network,
            whole=inputs,
            window=window,
            reads=job.reads,
            exposed=job.expose,
            recorded=record_keys(keys),
            # A value read from another position of the same world may be one that nothing else needs.
            trim=not own,
            meter=job.meter,
        )
        run_base(base)
        tapes = {**fixed, **_tapes_beside(base, sources)}
        together = max(1, _at_most(limit / (per_row * len(base.inputs)), len(left)))
        for at in range(0, len(left), together):
            chosen = left[at : at + together]
            programs = [
                resolve(mine[i], network.sizes, tapes, device=network.device, seed=job.seed, window=window)
                for i in chosen
            ]
            found, audits = run_against(base, [mine[i] for i in chosen], programs)
            yield [
                Outcome(members[i], window, tuple(values), audit)
                for i, audit, values in zip(chosen, audits, found, strict=True)
            ]


def _shares_base(source: World, inputs: Inputs) -> bool:
    """Whether a world that is read can be run against the base of `inputs`: the same layout, and no plan of its own."""
    return source.inputs.columns.laid_like(inputs.columns) and not len(source.plan)


def _tapes_beside(base: Base, sources: Mapping[Any, tuple[World, list[Site]]]) -> dict[Any, Tape]:
    """Run the worlds that are read as worlds of the same base: where their inputs agree with it, so do their values,
    bitwise.
    """
    tapes, network = {}, base.network
    for key, (source, sites) in sources.items():
        view = replace(base, reads=sites, trim=False)
        program = resolve(source, network.sizes, {}, device=network.device, window=base.window)
        found, _ = run_against(view, [source], [program])
        kept = tuple(zip(sites, found[0], strict=True))
        tapes[key] = Tape(source.inputs, kept, network.sizes, base.window)
    return tapes


def _first_column(world: World, inputs: Inputs) -> int:
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


def _at_most(number: float, most: int) -> int:
    return int(min(number, most))
