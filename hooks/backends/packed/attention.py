"""Attention for worlds that share a base: the one step that has to know which world a token belongs to."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ...layout import Layout
from ...models.attention import exposed_attention
from ...models.blocks import Attention
from .tokens import Packed


def allowed_keys(layout: Layout, rows: Tensor, cols: Tensor, attention: Attention) -> Tensor:
    """Which keys queries may attend to.

    Args:
        layout: of the base's rows.
        rows: int64 [g], the base row of each group of queries.
        cols: int64 [g, n], the columns of the queries.
        attention: the layer, for its window and whether it is causal.

    Returns:
        bool [g, 1, n, T] on the CPU (n is 1 where all queries see the same).
    """
    real = layout.keys.real[rows]
    if not attention.causal:
        return real[:, None, None, :]
    keys, own = torch.arange(layout.keys.width), cols[..., None] + layout.offset
    allowed = (keys <= own) & real[:, None, :]
    if attention.window is not None:
        allowed &= keys > own - attention.window
    return allowed[:, None]


def reach(changed: Tensor, window: int | None, causal: bool) -> Tensor:
    """Tokens [members, T] whose attention sees a token with a changed key or value, given which those are."""
    if not causal:
        return changed.any(1, keepdim=True).expand_as(changed)
    seen = changed.long().cumsum(1)
    if window is not None:
        seen = seen - torch.nn.functional.pad(seen, (window, 0))[:, : seen.shape[1]]
    return seen > 0


def seen_by(asking: Tensor, causal: bool) -> Tensor:
    """Tokens [members, T] whose keys or values the attention of some token may see, given which tokens are meant."""
    if not causal:
        return asking.any(1, keepdim=True).expand_as(asking)
    return asking.flip(1).long().cumsum(1).flip(1) > 0


def packed_attention(
    attention: Attention,
    layout: Layout,
    out: Tensor,
    qkv: tuple[Packed, Packed, Packed],
    bases: tuple[Tensor | None, Tensor | None, Tensor | None],
    exposed: bool,
) -> Packed:
    """Attention at given tokens, each against its own world's keys and values.

    Args:
        attention: the layer, for its heads, scaling, cap and window.
        layout: of the base's rows.
        out: bool [members, T], the tokens at which z is wanted.
        qkv: the changed queries, keys and values.
        bases: the base's, [b, T, heads, D]; None while the base itself is computed, when every token is changed.
        exposed: use the kernel that the worlds which look inside attention use.

    Returns:
        z at `out`, values [N, H, D].
    """
    active = out.any(1)
    q = qkv[0].to(out, bases[0])
    k, v = (stream.to(stream.dirty & active[:, None], None) for stream in qkv[1:])
    counts, device = out.sum(1), q.values.device
    ends = [counts.cumsum(0), k.dirty.sum(1).cumsum(0), v.dirty.sum(1).cumsum(0)]
    z = torch.empty_like(q.values)
    for group in _groups(active.nonzero().squeeze(1), counts):
        # Members in between have no tokens here, so a group's tokens lie together in every stream.
        first, last = int(group[0]), int(group[-1])
        asked, *spans = (slice(int(end[first - 1]) if first else 0, int(end[last])) for end in ends)
        rows = group % q.rows
        keys, values = (
            _filled(stream, group, rows, stream.values[span], base)
            for stream, span, base in zip((k, v), spans, bases[1:], strict=True)
        )
        most = int(counts[group].max())
        cols = torch.argsort((~out[group]).byte(), dim=1, stable=True)[:, :most]
        allowed = allowed_keys(layout, rows, cols, attention).to(device)
        real = torch.arange(most) < counts[group][:, None]
        slots = None if bool(real.all()) else real.flatten().nonzero().squeeze(1).to(device)
        queries = q.values[asked]
        if slots is not None:
            queries = queries.new_zeros((real.numel(), *queries.shape[1:])).index_copy_(0, slots, queries)
        queries = queries.unflatten(0, (len(group), most)).transpose(1, 2)
        # No fused kernel of torch's caps its scores.
        if exposed or attention.softcap is not None:
            mixed, _ = exposed_attention(
                queries, keys, values, allowed, attention.scaling, _unseen, cap=attention.softcap
            )
        else:
            mixed = torch.nn.functional.scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=allowed,
                scale=attention.scaling,
                enable_gqa=attention.k.heads < attention.q.heads,
            ).transpose(1, 2)
        mixed = mixed.flatten(0, 1)
        z[asked] = mixed if slots is None else mixed.index_select(0, slots)
    return Packed(out, z, q.rows)


def _unseen(_name: str, x: Tensor, _guard: object) -> Tensor:
    return x


def _filled(stream: Packed, group: Tensor, rows: Tensor, changed: Tensor, base: Tensor | None) -> Tensor:
    """All keys or values [g, heads, T, D] of a group of members: the base's, where they have none of their own."""
    mine = stream.dirty[group]
    if base is None:
        whole = changed.new_zeros((*mine.shape, *changed.shape[1:]))
    else:
        whole = base.index_select(0, rows.to(base.device))
    whole.flatten(0, 1).index_copy_(0, mine.flatten().nonzero().squeeze(1).to(changed.device), changed)
    return whole.transpose(1, 2)


def _groups(members: Tensor, counts: Tensor, most: int = 4096) -> Iterable[Tensor]:
    """Runs of at most `most` members with about as many queries each, so that little of a group is filler."""
    if not len(members):
        return
    sizes = counts[members].tolist()
    start, low, high = 0, sizes[0], sizes[0]
    for i, size in enumerate(sizes):
        low, high = min(low, size), max(high, size)
        if high > 1.25 * low + 1 or i - start >= most:
            yield members[start:i]
            start, low, high = i, size, size
    yield members[start:]
