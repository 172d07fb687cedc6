"""Whether a description that was found out is true: at every kind of site, read and edited, in both ways of running."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..certificate import ALLOWED, compare
from ..models.architecture import Architecture
from ..models.network import Network
from ..plan.inputs import Inputs
from ..plan.operations.values import Scale, Steer
from ..plan.plan import Intervention, Plan, World
from ..plan.sites import Site
from ..record import record
from .probe import TOKENS, ordinary


@torch.no_grad()
def differing(module: nn.Module, found: Architecture) -> str:
    """What a model does otherwise than its description says; empty where nothing."""
    network = Network(module, lambda _: found)
    draw = torch.Generator().manual_seed(1)
    usable = torch.tensor(ordinary(getattr(module, "config", None), found.token_ids))
    inputs = Inputs.of(usable[torch.randint(len(usable), (1, TOKENS), generator=draw)])
    reason = compare(network, inputs)
    if reason:
        return reason
    if not _same_beside_padding(network, inputs):
        return "padding to the left of a row changes what it computes of it"
    layers = _layers(found)
    whole = [Site(name, None if layer < 0 else layer) for name, layer, _ in network.sizes]
    values = {name: _read(network, [World(inputs)], whole, name) for name in ("sequential", "shared")}
    for place, one, two in zip(whole, values["sequential"][0], values["shared"][0], strict=True):
        if not _near(one, two, network.dtype):
            return f"{place} is not what stands there"
    some = [place for place in whole if place.layer is None or place.layer in layers]
    plans = [_edit(place, value) for place, value in zip(whole, values["sequential"][0], strict=True) if place in some]
    worlds = [World(inputs, Plan((item,))) for item in plans]
    edited = {name: _read(network, worlds, [Site("logits")], name) for name in ("batched", "shared")}
    for item, (one,), (two,) in zip(plans, edited["batched"], edited["shared"], strict=True):
        if not _near(one, two, network.dtype):
            return f"an edit of {item.site} does something else than it says"
    return ""


def _same_beside_padding(network: Network, inputs: Inputs) -> bool:
    """Whether the logits of a row are the same to the right of padding."""
    pad = lambda x, value: torch.nn.functional.pad(x, (2, 0), value=value)  # noqa: E731
    padded = Inputs.of(pad(inputs.ids, int(inputs.ids[0, 0])), pad(inputs.mask, False))
    alone, beside = (network.forward(x.ids, x.mask, x.positions) for x in (inputs, padded))
    return _near(beside[:, -alone.shape[1] :], alone, network.dtype)


def _layers(found: Architecture) -> set[int]:
    """The first layer, the last, and one of every kind."""
    kinds: dict[tuple[object, ...], int] = {}
    for layer, block in enumerate(found.blocks):
        attention = block.attention
        kinds.setdefault(
            (type(block.module), type(block.mlp), attention.window, attention.rotary is None, attention.opaque), layer
        )
    return {0, len(found.blocks) - 1, *kinds.values()}


def _read(network: Network, worlds: list[World], reads: list[Site], executor: str) -> list[tuple[Tensor, ...]]:
    found = sorted(record(network, worlds, reads, executor=executor), key=lambda one: one.index)
    return [tuple(one.values) for one in found]


def _edit(place: Site, value: Tensor) -> Intervention:
    where = place.at(pos=1)
    if place.name == "pattern":
        return Intervention(where, Scale(0.5))
    finite = value[value.isfinite()].double()
    size = float(finite.pow(2).mean().sqrt()) if finite.numel() else 1.0
    if place.name == "scores":
        return Intervention(where.at(key_pos=0), Steer(torch.tensor(max(size, 1.0)).to(value)))
    vector = torch.randn(value.shape[-1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return Intervention(where, Steer((vector * size).to(value)))


def _near(one: Tensor, two: Tensor, dtype: torch.dtype) -> bool:
    finite = torch.isfinite(two)
    if not torch.equal(torch.isfinite(one), finite):
        return False
    one, two = one[finite].double(), two[finite].double()
    most = float(two.abs().max()) if two.numel() else 0.0
    return not one.numel() or float((one - two).abs().max()) <= ALLOWED.get(dtype, 1e-1) * max(most, 1e-30)
