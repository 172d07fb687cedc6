"""The end of the copy-on-write executor: from the last residual to the logits that are read, and to no others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...models.architecture import Architecture, linear_weight
from ...plan.region import Region
from ...plan.sites import Site
from .tokens import Packed, tiled

if TYPE_CHECKING:
    from .chunk import Chunk


def read_out(chunk: Chunk, x: Packed) -> list[list[Tensor]]:
    """The final norm and, of the unembedding, the tokens and columns that are read.

    Args:
        chunk: the worlds.
        x: their residual after the last block.

    Returns:
        For each read of the logits, its value in each world.
    """
    x = chunk.flat_map(chunk.arch.norm, x)
    x = chunk.visit(("ln_final", -1, None), x, chunk.needed[-1])
    edited = _edited(chunk, x)
    reads = [(index, site) for index, site in enumerate(chunk.run_.reads) if site.name == "logits"]
    return [_logits(chunk, x, site, index, edited) for index, site in reads]


def _logits(chunk: Chunk, x: Packed, site: Site, index: int, edited: dict[int, Tensor]) -> list[Tensor]:
    """One read of the logits, of every world; those that edit the logits bring theirs."""
    run, rows = chunk.run_, chunk.rows
    region = run.region(site)
    cols = run.unembedded(region)
    n, width = cols.shape[1], x.dirty.shape[1]
    if index not in run.base_logits:
        at = (cols + torch.arange(rows)[:, None] * width).flatten().to(run.device)
        final = run.base["ln_final", -1, None].flatten(0, 1).index_select(0, at)
        home = torch.arange(rows).repeat_interleave(n)
        run.base_logits[index] = _columns(chunk.arch, final, home, region, chunk.tile).unflatten(0, (rows, n))
    base = run.base_logits[index]
    if chunk.is_base:
        return [base]
    slot = torch.full_like(run.inputs.ids, -1).scatter_(1, cols, torch.arange(n).expand_as(cols))
    flat = x.flat()
    place = slot.flatten()[flat % slot.numel()]
    chosen = (place >= 0).nonzero().squeeze(1)
    members = flat[chosen] // width
    final = x.values.index_select(0, chosen.to(run.device))
    values = _columns(chunk.arch, final, members % rows, region, chunk.tile)
    if run.meter is not None:
        run.meter.unembedding(*values.shape)
    dense = base.expand(len(chunk.worlds), *base.shape).clone()
    dense.view(-1, base.shape[-1]).index_copy_(0, (members * n + place[chosen]).to(run.device), values)
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


def _edited(chunk: Chunk, x: Packed) -> dict[int, Tensor]:
    """All logits [b, T, V] of the worlds that edit them; right at the positions that are read."""
    key, offsets, full = ("logits", -1, None), x.offsets(), {}
    for w, keys in enumerate(chunk.touched):
        if key in keys:
            final = x.world(w, chunk.base(("ln_final", -1, None)), offsets[w], offsets[w + 1])
            if chunk.arch.readout is not None:
                final = final[:, chunk.arch.readout, None]
            full[w] = chunk.worlds[w].visit(key, chunk.arch.logits(final))
    return full
