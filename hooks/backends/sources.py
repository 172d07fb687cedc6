"""The worlds that plans read: which there are, and their values."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..budget import rows_per_pass
from ..models.checks import check_site
from ..models.network import Network
from ..plan.plan import Origin, Plan, World
from ..plan.sites import Key, Site
from ..plan.tape import Tape
from ..resolving import resolve, source_id
from .passes import run_pass


def all_reads(worlds: Sequence[World]) -> dict[Any, tuple[World, list[Site]]]:
    """The worlds that are read by the plans of others, each with the whole sites that are read there, by
    `resolving.source_id`.
    """
    found: dict[Any, tuple[World, dict[Key, Site]]] = {}
    known: set[Any] = set()
    for world in worlds:
        for item in world.plan.interventions:
            for read in item.reads:
                source, site = read.source, item.site if read.site is None else read.site
                this = (id(source), id(world.inputs), site.key)
                if this in known:
                    continue
                known.add(this)
                if source is Origin.UNEDITED:
                    source = World(world.inputs)
                elif isinstance(source, Plan):
                    source = World(world.inputs, source)
                if not isinstance(source, World):
                    continue
                _, sites = found.setdefault(source_id(read.source, world.inputs), (source, {}))
                if site.key not in sites:
                    sites[site.key] = site.whole
    return {key: (source, list(sites.values())) for key, (source, sites) in found.items()}


def read_tapes(
    network: Network,
    worlds: Sequence[World],
    seed: int,
    expose: frozenset[int],
    limit: float | None = None,
    only: Container[Any] | None = None,
    graph: bool = False,
) -> dict[Any, Tape]:
    """Run the worlds that plans read, and those that their plans read, each once, by `resolving.source_id`.

    Args:
        network: the model.
        worlds: the worlds whose plans read.
        seed: seed of random interventions.
        expose: layers whose attention is computed with its inside exposed.
        limit: bytes that the activations of a pass may take; None for as many as all rows take.
        only: the ids of the worlds that are wanted; None for all.
        graph: keep the values attached to the autograd graph.

    Raises:
        UnfiredError: an intervention of a world that is read never fired.
    """
    wanted = {key: found for key, found in all_reads(worlds).items() if only is None or key in only}
    tapes = {}
    for key, (source, sites) in wanted.items():
        for place in sites:
            check_site(network, place)
        deeper = read_tapes(network, [source], seed, expose, limit, graph=graph)
        pieces: list[tuple[Tensor, ...]] = []
        mixing = any(item.op.mixes for item in source.plan)
        step = rows_per_pass(network, source.inputs, None if mixing else limit)
        for start in range(0, len(source.inputs), step):
            window = slice(start, min(start + step, len(source.inputs)))
            program = resolve(source, network.sizes, deeper, device=network.device, seed=seed, window=window)
            run, _ = run_pass(network, [program], [source.inputs.rows(window)], [sites], expose, graph)
            program.report(run.states[0]).require_fired()
            pieces.append(run.values(0))
        values = tuple((site, torch.cat([p[i] for p in pieces])) for i, site in enumerate(sites))
        tapes[key] = Tape(source.inputs, values, network.sizes)
    return tapes


def read_as_constants(world: World) -> set[Any]:
    """The worlds that are read by functions through which no gradient flows, and by no other."""
    constant: dict[Any, bool] = {}
    for item in world.plan:
        for key in all_reads([replace(world, plan=Plan((item,)))]):
            constant[key] = constant.get(key, True) and item.op.reads_constants
    return {key for key, every in constant.items() if every}
