"""One forward pass of the user's own model, with the interventions of one or several worlds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..plan.plan import World
from ..plan.sites import Site
from ..program import Edits
from .checkpointing import uncheckpointed
from .session import Session, install

if TYPE_CHECKING:
    from ..model import Model


def hooked_pass(
    model: Model,
    edits: Sequence[Edits],
    captures: Sequence[Sequence[Site]],
    expose: frozenset[int],
    graph: bool = False,
) -> tuple[Session, Tensor]:
    """Run worlds of equally many rows and columns along the batch of one forward pass, under hooks that then are gone.

    Args:
        model: the wrapped model.
        edits: the worlds.
        captures: for each world, the sites to keep.
        expose: layers whose attention is computed with its inside exposed; see `exposed_layers`.
        graph: keep what is captured attached to the autograd graph.

    Returns:
        The session, whose `kept` holds what was captured, and the logits of the whole batch.
    """
    session = Session(edits, captures, graph)
    with ExitStack() as stack:
        if graph and session.touched():
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


def exposed_layers(worlds: Sequence[World], reads: Sequence[Site]) -> frozenset[int]:
    """Layers whose attention shows its inside for some world, and so for all, because they are to share a kernel."""
    sites = [*reads]
    for world in worlds:
        for item in world.plan:
            sites += [item.site, *(read.site for read in item.reads if read.site is not None)]
    return frozenset(s.layer for s in sites if s.name in ("scores", "pattern") and s.layer is not None)
