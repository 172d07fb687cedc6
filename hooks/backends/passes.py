"""One forward pass of the user's own model, with the interventions of one or several worlds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..models.network import Network
from ..plan.inputs import Inputs
from ..plan.pictures import joined
from ..plan.sites import VISION, Site
from ..program import Program
from .checkpointing import uncheckpointed
from .native import Pass, Placement


def run_pass(
    network: Network,
    programs: Sequence[Program],
    inputs: Sequence[Inputs],
    captures: Sequence[Sequence[Site]],
    expose: frozenset[int],
    graph: bool = False,
) -> tuple[Any, Tensor]:
    """Run worlds of equally many rows and columns along the batch of one forward pass, under hooks that then are gone.

    Args:
        network: the model.
        programs: the worlds; `inputs` are those of each, on the rows that are run.
        captures: for each world, the sites to keep.
        expose: layers whose attention is computed with its inside exposed; see `exposed_layers`.
        graph: keep what is captured attached to the autograd graph.

    Returns:
        The pass, which holds what was captured, and the logits of the whole batch.
    """
    if hasattr(network.tool, "run_pass"):
        return network.tool.run_pass(network, programs, inputs, captures, expose, graph)
    keys = {place.key for sites in captures for place in sites}.union(*(program.touched for program in programs))
    placement = Placement(network, keys, expose)
    run = Pass(placement, programs, captures, graph)
    with placement.gate.lock, ExitStack() as stack:
        if graph and keys:
            stack.enter_context(uncheckpointed(network.module))
        stack.callback(placement.remove)
        placement.place()
        placement.swap(stack)
        stack.enter_context(placement.gate.expecting(network.module, run))
        pixels = [i.pixels for i in inputs if i.pixels is not None]
        pictures = [i.pictures for i in inputs if i.pictures is not None]
        logits = network.forward(
            torch.cat([i.ids for i in inputs]),
            torch.cat([i.mask for i in inputs]),
            torch.cat([i.positions for i in inputs]),
            torch.cat(pixels) if pixels else None,
            joined(pictures) if pictures else None,
            _joined_sources([i.source for i in inputs if i.source is not None]),
        )
        if not pictures and any(key[2] == VISION for key in keys):
            run.visit_nothing(VISION)
    return run, logits


def _joined_sources(sources: Sequence[Inputs]) -> Inputs | None:
    """The texts that several worlds encode, one after another along the rows."""
    if not sources:
        return None
    return Inputs.of(torch.cat([one.ids for one in sources]), torch.cat([one.mask for one in sources]))
