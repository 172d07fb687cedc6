"""Plans of scaled parts, and models that have the scales in their weights: one network, with and without a plan."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch

import interp as ip
from hooks import Model
from hooks.models.projections import linear_weight

Scales = Mapping[tuple[str, int, int | None], float]
"""By site, layer and head (None for what has no heads) what it is multiplied by: q, k, v, z or mlp_out."""

WRITTEN: Scales = {("z", 0, 1): 0.5, ("mlp_out", 0, None): -0.5, ("z", 1, 0): 2.0}
"""What writers add, which every way of measuring has to see."""
COMPUTED: Scales = {**WRITTEN, ("q", 1, 0): 2.5, ("k", 1, 1): 0.5, ("v", 1, 1): -0.5, ("v", 0, 0): 1.5}
"""What heads compute of their inputs too."""


def held(scales: Scales) -> ip.Plan:
    """The plan that scales."""
    parts = [ip.scale(ip.site(name, layer, head=head), by) for (name, layer, head), by in scales.items()]
    return ip.Plan(tuple(parts))


def baked(model: Model, scales: Scales) -> Model:
    """A copy of a model with the scales in its weights."""
    model = ip.wrap(copy.deepcopy(model.module))
    with torch.no_grad():
        for (name, layer, head), by in scales.items():
            block = model.architecture.blocks[layer]
            if name == "z":
                weight, _ = linear_weight(block.attention.out)
                weight.unflatten(1, (block.attention.q.heads, -1))[:, head] *= by
                continue
            if name == "mlp_out":
                assert block.mlp is not None
                weight, bias = linear_weight(block.mlp.down)
            else:
                weight, bias = (None if p is None else p[head] for p in getattr(block.attention, name).parameters())
            for part in (weight, bias):
                if part is not None:
                    part *= by
    return model
