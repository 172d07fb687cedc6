"""Attention of long texts from which edges are left out: a few queries at a time, without a pattern of all of them.

On a CPU the kernel is SDPA under a mask made for each tile of queries; on a GPU it is flex attention, which is told by
a function which edges there are. Memory grows with the tokens, not with their square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..models.attention import exposed_attention
from ..plan.operations.attention import Knockout
from ..plan.region import Region
from ..program import State

LONG = 1 << 26
"""How many scores a layer may have before they are computed a few queries at a time."""
TILE = 1 << 24
"""How many scores there are at a time."""


@dataclass(frozen=True, eq=False)
class Ban:
    """Edges that one intervention forbids: products of queries bool [B, T], keys [B, S] and heads [H], on some rows."""

    world: int
    number: int
    rows: slice
    queries: Tensor
    keys: Tensor
    heads: Tensor

    @classmethod
    def of(cls, world: int, number: int, rows: slice, region: Region, q: Tensor, keys: int) -> Ban:
        """That of a region of scores."""
        heads, width = q.shape[1], q.shape[2]
        count, given = rows.stop - rows.start, dict(region.steps)
        valid = None if region.valid is None else region.valid.to(q.device)
        asking = None if valid is None else valid.amax(dim=(1, 3))
        asked = None if valid is None else valid.amax(dim=(1, 2))
        every = torch.ones(heads, dtype=torch.bool, device=q.device)
        if 1 in given:
            every = torch.zeros_like(every).index_fill(0, given[1].to(q.device), True)
        return cls(
            world,
            number,
            rows,
            _flags(given.get(2), asking, count, width, q.device),
            _flags(given.get(3), asked, count, keys, q.device),
            every,
        )


def _flags(index: Tensor | None, valid: Tensor | None, rows: int, width: int, device: torch.device) -> Tensor:
    """bool [B, width], True at columns that an index [n] or [B, n] names where it is valid."""
    if index is None:
        return torch.ones(rows, width, dtype=torch.bool, device=device) if valid is None else valid.expand(rows, width)
    index = index.to(device)
    index = index.expand(rows, -1) if index.ndim == 1 else index
    marks = torch.ones_like(index, dtype=torch.int8) if valid is None else valid.expand(index.shape).to(torch.int8)
    # A column past the last stands for a token of another call.
    found = torch.zeros(rows, width + 1, dtype=torch.int8, device=device).scatter_reduce(1, index, marks, "amax")
    return found[:, :width].bool()


@dataclass(frozen=True, eq=False)
class Edges:
    """Which edges there are before anything is forbidden.

    Attributes:
        mask: bool or float 4-D, 2-D [B, S], or None.
        causal, window, first: as of `read_mask`.
        shape: B, H, T and S.
    """

    mask: Tensor | None
    causal: bool
    window: int | None
    first: int
    shape: tuple[int, int, int, int]

    def at(self, queries: slice, keys: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """bool, broadcastable to [B, H, n, keys], and what is added to the scores."""
        mask = self.mask
        if mask is not None and mask.ndim == 4:
            part = mask[:, :, queries, :keys]
            if part.dtype == torch.bool:
                return part, None
            allowed = part > torch.finfo(part.dtype).min / 2
            return allowed, torch.where(allowed, part, 0)
        allowed = torch.ones(1, 1, queries.stop - queries.start, keys, dtype=torch.bool, device=device)
        if self.causal:
            own = torch.arange(self.first + queries.start, self.first + queries.stop, device=device)[:, None]
            key = torch.arange(keys, device=device)
            allowed = (key <= own) if self.window is None else (key <= own) & (key > own - self.window)
            allowed = allowed[None, None]
        return (allowed if mask is None else allowed & mask[:, None, None, :keys].bool()), None

    def reach(self, queries: slice) -> int:
        """How many keys some queries may see at most."""
        known = self.causal and (self.mask is None or self.mask.ndim == 2)
        return min(self.shape[3], self.first + queries.stop) if known else self.shape[3]


def attend_in_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edges: Edges,
    bans: Sequence[Ban],
    scaling: float,
    cap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, dict[tuple[int, int], Tensor]]:
    """z [B, T, H, D] without the edges that are forbidden, and whether each ban forbade any that there was.

    A query that may attend to nothing gives zeros.
    """
    if q.device.type == "cuda" and sinks is None and (edges.mask is None or edges.mask.dtype == torch.bool):
        return _flex(q, k, v, edges, bans, scaling, cap), {(b.world, b.number): _met(edges, b, q) for b in bans}
    rows, heads, width, _ = q.shape
    step = max(1, TILE // (rows * heads * k.shape[2]))
    parts, met = [], {(ban.world, ban.number): torch.zeros((), dtype=torch.bool, device=q.device) for ban in bans}
    for start in range(0, width, step):
        chosen = slice(start, min(start + step, width))
        keys = edges.reach(chosen)
        allowed, bias = edges.at(chosen, keys, q.device)
        if bans:
            there, allowed = allowed, allowed.expand(rows, heads, -1, -1).clone()
            there = there.expand(rows, heads, -1, -1)
            for ban in bans:
                forbidden = ban.queries[:, None, chosen, None] & ban.keys[:, None, None, :keys]
                forbidden = forbidden & ban.heads[None, :, None, None]
                met[ban.world, ban.number] = met[ban.world, ban.number] | (forbidden & there[ban.rows]).any()
                allowed[ban.rows] &= ~forbidden
        parts.append(_tile(q[:, :, chosen], k[:, :, :keys], v[:, :, :keys], allowed, bias, scaling, cap, sinks))
    return torch.cat(parts, 1), met


def _tile(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    bias: Tensor | None,
    scaling: float,
    cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    if cap is not None or sinks is not None or bias is not None:
        return exposed_attention(q, k, v, allowed, scaling, lambda _name, x, _guard: x, bias, cap=cap, sinks=sinks)[0]
    dead = ~allowed.any(-1, keepdim=True)
    z = scaled_dot_product_attention(
        q, k, v, attn_mask=allowed | dead, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    return torch.where(dead, 0, z).transpose(1, 2)


def _met(edges: Edges, ban: Ban, q: Tensor) -> Tensor:
    """Whether a ban forbids an edge that there is: bool [], in time that grows with the tokens."""
    keys, queries, device = ban.keys, ban.queries, q.device
    mask = None if edges.mask is None else edges.mask[ban.rows] if len(edges.mask) > 1 else edges.mask
    if mask is not None and mask.ndim == 4:
        found = torch.zeros((), dtype=torch.bool, device=device)
        for start in range(0, queries.shape[1], 128):
            part = slice(start, start + 128)
            found = found | (mask[:, :, part] & queries[:, None, part, None] & keys[:, None, None]).any()
        return found & ban.heads.any()
    if mask is not None:
        keys = keys & mask.bool()
    before = torch.nn.functional.pad(keys.long().cumsum(1), (1, 0))
    own = torch.arange(queries.shape[1], device=device) + edges.first
    last = (own + 1).clamp_max(keys.shape[1]) if edges.causal else torch.full_like(own, keys.shape[1])
    start = torch.zeros_like(own) if edges.window is None else (own + 1 - edges.window).clamp(0, keys.shape[1])
    return ((before[:, last] > before[:, start]) & queries).any() & ban.heads.any()


@cache
def _compiled() -> tuple[Any, Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)


def _flex(
    q: Tensor, k: Tensor, v: Tensor, edges: Edges, bans: Sequence[Ban], scaling: float, cap: float | None
) -> Tensor:
    rows, heads, width, keys = edges.shape
    # One flag for each row: a ban is of the rows of one world.
    asking = torch.zeros(len(bans), rows, width, dtype=torch.bool, device=q.device)
    asked = torch.zeros(len(bans), rows, keys, dtype=torch.bool, device=q.device)
    by_head = torch.zeros(len(bans), heads, dtype=torch.bool, device=q.device)
    for number, ban in enumerate(bans):
        asking[number, ban.rows], asked[number, ban.rows], by_head[number] = ban.queries, ban.keys, ban.heads
    mask, causal, window, first = edges.mask, edges.causal, edges.window, edges.first

    def there(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = key >= 0
        if mask is not None and mask.ndim == 4:
            allowed = mask[b % mask.shape[0], h % mask.shape[1], query, key]
        elif mask is not None:
            allowed = mask[b, key].bool()
        if causal and (mask is None or mask.ndim == 2):
            allowed = allowed & (key <= query + first)
            if window is not None:
                allowed = allowed & (key > query + first - window)
        for number in range(len(bans)):
            allowed = allowed & ~(asking[number, b, query] & asked[number, b, key] & by_head[number, h])
        return allowed

    def capped(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score if cap is None else cap * torch.tanh(score / cap)

    attention, blocks = _compiled()
    block = blocks(there, rows, heads, width, keys, device=q.device)
    z = attention(q, k, v, score_mod=capped, block_mask=block, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
    return z.transpose(1, 2)


def in_tiles(
    run: Any,
    layer: int,
    qkv: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    causal: bool,
    window: int | None,
    scaling: float,
    cap: float | None,
    sinks: Tensor | None,
) -> Tensor | None:
    """z [B, T, H, D] of a layer, without the edges that the plans of a pass forbid there.

    Returns:
        None where the text is short, or where more is looked at than edges that are forbidden.
    """
    q, k, v = qkv
    if q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= LONG:
        return None
    bans = _bans(run, layer, q, k.shape[2])
    if bans is None:
        return None
    first = run.keys(layer)[0]
    edges = Edges(mask, causal, window, first, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
    z, met = attend_in_tiles(q, k, v, edges, bans, scaling, cap, sinks)
    for (w, number), some in met.items():
        changes = {**run.states[w].changes, number: torch.where(some, torch.inf, 0.0)}
        run.states[w] = State(run.states[w].here, changes)
    return z


def _bans(run: Any, layer: int, q: Tensor, keys: int) -> list[Ban] | None:
    scores, pattern = ("scores", layer, None), ("pattern", layer, None)
    found, height = [], q.shape[0] // len(run.programs)
    for w, program in enumerate(run.programs):
        steps = program.steps.get(scores, ())
        looked_at = (
            pattern in program.touched or scores in program.held_back or {scores, pattern} & set(run.captured_keys)
        )
        if looked_at or not all(isinstance(step.item.op, Knockout) for step in steps):
            return None
        if steps and run.tracking:
            run.require_known(scores)
        rows = slice(w * height, (w + 1) * height)
        found += [Ban.of(w, step.number, rows, step.region, q, keys) for step in steps]
    return found
