"""The worlds that plans read: which there are, and their values."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..budget import rows_per_pass
from ..plan.plan import Origin, Plan, World
from ..plan.sites import Site
from ..plan.tape import Tape
from ..program import Edits, source_id
from .forward import hooked_pass

if TYPE_CHECKING:
    from ..model import Model


def all_reads(worlds: Sequence[World]) -> dict[Any, tuple[World, list[Site]]]:
    """The worlds that are read by the plans of others, each with the whole sites that are read there, by
    `editing.source_id`.
    """
    found: dict[Any, tuple[World, list[Site]]] = {}
    for world in worlds:
        for item in world.plan:
            for read in item.reads:
                source = read.source
                if source is Origin.UNEDITED:
                    source = World(world.inputs)
                elif isinstance(source, Plan):
                    source = World(world.inputs, source)
                if not isinstance(source, World):
                    continue
                _, sites = found.setdefault(source_id(read.source, world), (source, []))
                place = (item.site if read.site is None else read.site).whole
                if place not in sites:
                    sites.append(place)
    return found


def read_tapes(
    model: Model,
    worlds: Sequence[World],
    seed: int,
    expose: frozenset[int],
    limit: float | None = None,
    only: Container[Any] | None = None,
    graph: bool = False,
) -> dict[Any, Tape]:
    """Run the worlds that plans read, and those that their plans read, each once, by `editing.source_id`.

    Args:
        model: the wrapped model.
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
