"""The end of the copy-on-write executor: of the unembedding, the tokens and columns that are read, and no others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...models.architecture import Architecture
from ...models.projections import linear_weight
from ...plan.region import Region
from .base import Base
from .tokens import Packed, tiled


def read_out(base: Base, x: Packed, edited: Mapping[int, Tensor], is_base: bool, tile: int) -> list[list[Tensor]]:
    """Every read of the logits, in every world.

    Args:
        base: what is read, and of which rows.
        x: what the final norm gives, in the worlds.
        edited: all logits [b, T, V] of the worlds that edit them, by number; right at the positions that are read.
        is_base: whether this is the base itself.
        tile: tokens that are unembedded at a time.

    Returns:
        For each read, its value in each world.
    """
    reads = [(index, base.region(site)) for index, site in enumerate(base.reads) if site.name == "logits"]
    return [_read(base, x, region, index, edited, is_base, tile) for index, region in reads]


def _read(
    base: Base, x: Packed, region: Region, index: int, edited: Mapping[int, Tensor], is_base: bool, tile: int
) -> list[Tensor]:
    cols = base.unembedded(region)
    rows, n, width = x.rows, cols.shape[1], x.dirty.shape[1]
    if index not in base.logits:
        at = (cols + torch.arange(rows)[:, None] * width).flatten().to(base.device)
        final = base.values["ln_final", -1, None].flatten(0, 1).index_select(0, at)
        home = torch.arange(rows).repeat_interleave(n)
        base.logits[index] = _columns(base.arch, final, home, region, tile).unflatten(0, (rows, n))
    plain = base.logits[index]
    if is_base:
        return [plain]
    slot = torch.full(base.layout.queries.real.shape, -1).scatter_(1, cols, torch.arange(n).expand_as(cols))
    flat = x.flat()
    place = slot.flatten()[flat % slot.numel()]
    chosen = (place >= 0).nonzero().squeeze(1)
    members = flat[chosen] // width
    final = x.values.index_select(0, chosen.to(base.device))
    values = _columns(base.arch, final, members % rows, region, tile)
    if base.meter is not None:
        base.meter.unembedding(*values.shape)
    dense = plain.expand(x.worlds, *plain.shape).clone()
    dense.view(-1, plain.shape[-1]).index_copy_(0, (members * n + place[chosen]).to(base.device), values)
    outputs = list(dense.unbind(0))
    for w, full in edited.items():
        outputs[w] = region.get(full)
    return outputs


def _columns(arch: Architecture, final: Tensor, rows: Tensor, region: Region, tile: int) -> Tensor:
    """Logits [N, C] of the final norm's output [N, M] that belongs to base rows `rows`, in the columns of a region."""
    if region.site.dim is None:
        return tiled(arch.logits, final, tile)
    index = next(i for axis, i in region.steps if axis == 2).to(final.device)
    weight, bias = linear_weight(arch.unembed)
    if index.ndim == 1:
        bias = None if bias is None else bias[index]
        return arch.capped(torch.nn.functional.linear(final, weight[index], bias))
    index = index[rows.to(final.device)]
    out = torch.einsum("nm,ncm->nc", final, weight[index])
    return arch.capped(out if bias is None else out + bias[index])
