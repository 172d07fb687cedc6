"""Scores and patterns of one layer: forbidden edges as masks, and whatever else is done to them where it is done.

Attention that is only forbidden never becomes scores that somebody sees: the kernels are given a mask. What edits
scores or patterns is given those of the heads and queries that it edits, unless a world reads them whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ...models.attention import attention_pattern, attention_scores
from ...plan.operations.attention import Knockout
from ...plan.region import taken
from ...plan.sites import HEAD, KEY, POS, Key, same
from .attention import SCRATCH, SCRATCH_ELSEWHERE, Base, reach
from .bans import Bans, stacked_bans
from .cells import Cell, Stack
from .kernels import allowed_keys
from .tokens import Packed, take
from .trace import Value
from .visits import Visits, narrow

Streams = tuple[Packed, Packed, Packed]
Bases = tuple[Base | None, Base | None, Base | None]


class Inside:
    """What worlds do to the scores and patterns of a layer.

    Args:
        visits: of the worlds.
        layer: the layer.
    """

    def __init__(self, visits: Visits, layer: int) -> None:
        self.visits, self.layer = visits, layer
        self.attention = visits.arch.blocks[layer].attention
        self.keys: tuple[Key, Key] = (("scores", layer, None), ("pattern", layer, None))
        self.shown = any(key in visits.captured for key in self.keys)
        self.bans: Bans | None = None

    @cached_property
    def cells(self) -> dict[int, tuple[list[Cell], list[Cell]]]:
        """The interventions of each world that has some, at the scores and at the pattern."""
        found: dict[int, tuple[list[Cell], list[Cell]]] = {}
        for at, key in enumerate(self.keys):
            for cells in self.visits.stacker.asked.get(key, []):
                for cell in cells:
                    found.setdefault(cell.world, ([], []))[at].append(cell)
        return found

    @cached_property
    def looking(self) -> list[int]:
        """The worlds that have to see scores or patterns."""
        if self.shown:
            return list(range(len(self.visits.worlds)))
        own = any(key in self.visits.stacker.own for key in self.keys)
        reading = [w for w, world in enumerate(self.visits.worlds) if own and self._reads(world)]
        editing = [
            w
            for w, (scores, pattern) in self.cells.items()
            if pattern or not all(isinstance(cell.item.op, Knockout) for cell in scores)
        ]
        return sorted({*reading, *editing})

    def _reads(self, world: Any) -> bool:
        return any(
            read.site is not None and read.site.key in self.keys for item in world.plan for read in item.own_reads
        )

    def forbidden(self) -> Tensor:
        """Tokens [members, T] whose queries are forbidden something; the masks are made here."""
        visits, mask = self.visits, torch.zeros_like(self.visits.real)
        looking, found = set(self.looking), []
        earlier: dict[int, list[tuple[Tensor, Tensor, Tensor | None]]] = {}
        turns = visits.stacker.asked.get(self.keys[0], [])
        several = len(turns) > 1
        for cells in turns:
            for stack in visits.stacker.stacks([cell for cell in cells if cell.world not in looking]):
                queries, keys, heads = self._product(stack)
                real = visits.real[stack.members]
                hits = queries & real & reach(keys & real, self.attention.window, self.attention.causal)
                fired = hits.reshape(len(stack), -1).any(1).tolist()
                for i, cell in enumerate(stack.cells if several else ()):
                    rows = slice(i * visits.rows, (i + 1) * visits.rows)
                    mine = (queries[rows], keys[rows], None if heads is None else heads[rows])
                    before = earlier.setdefault(cell.world, [])
                    fired[i] = self._adds(mine, before) if before else fired[i]
                    before.append(mine)
                changes = [torch.inf if one else 0.0 for one in fired]
                visits.effects.note_known(stack, changes, hits, visits.needed[self.layer])
                mask[stack.members] |= hits
                found.append((stack.members, queries, keys, heads))
        self.bans = stacked_bans(len(visits.real), found)
        return mask

    def _product(self, stack: Stack) -> tuple[Tensor, Tensor, Tensor | None]:
        """The queries and keys bool [m, T] and the heads bool [m, H] (None: all) between which edges are forbidden."""
        width = self.visits.real.shape[1]
        valid = stack.valid
        masks = []
        for cols, axis in ((stack.cols, -1), (stack.key_cols, -2)):
            counts: Any = True
            if valid is not None:
                counts = valid.any(axis)[:, 0].expand(-1, cols.shape[1])
            masks.append(torch.zeros(len(stack.members), width, dtype=torch.bool).scatter_(1, cols, counts))
        heads = next((index for axis, index in stack.steps([HEAD])), None)
        if heads is None:
            return masks[0], masks[1], None
        index = heads.expand(len(stack.members), -1)
        chosen = torch.zeros(len(stack.members), self.attention.q.heads, dtype=torch.bool)
        return masks[0], masks[1], chosen.scatter_(1, index, True)

    def _adds(self, mine: tuple, before: list) -> bool:
        """Whether one of several prohibitions of a world forbids an edge that those before it do not."""
        queries, keys, heads = mine
        real, attention = self.visits.base.layout.queries.real, self.attention
        every = torch.arange(real.shape[1]).expand(len(real), -1)
        edges = allowed_keys(every, real, attention) & queries[..., None] & keys[:, None]
        for head in [None] if heads is None else heads[0].nonzero().flatten().tolist():
            left = edges
            for asking, asked, theirs in before:
                if (
                    theirs is None
                    or (head is not None and bool(theirs[0, head]))
                    or (head is None and bool(theirs.all()))
                ):
                    left = left & ~(asking[..., None] & asked[:, None])
            if bool(left.any()):
                return True
        return False

    # -- worlds that look

    def look(self, qkv: Streams, bases: Bases, z: Packed, changed: Tensor, needed: Tensor) -> Packed:
        """Attention of the worlds that edit or read scores or patterns, where they do.

        Args:
            qkv: queries, keys and values, as worlds have changed them; `bases`: the base's.
            z: what attention gives without those edits.
            changed: bool [members, T], the tokens whose attention differs from the base's without those edits.
            needed: those that can matter.
        """
        if not self.looking:
            return z
        visits, results = self.visits, []
        mask = z.tokens.mask.clone()
        captured: dict[int, list[tuple[Tensor, Value]]] = {}
        for group in self._groups(qkv):
            new, changes = self._group(group, qkv, bases, changed, captured, needed)
            results.append(new)
            mask[new[0]] |= changes & needed[new[0]] & visits.real[new[0]]
        for index, parts in captured.items():
            order = torch.cat([members for members, _ in parts])
            back = torch.empty(len(order), dtype=torch.int64)
            back[order] = torch.arange(len(order))
            value = visits.trace.do(_gather_back, *(value for _, value in parts), at=[back])
            visits.read[index] = visits.trace.keep(value)
        for key in self.keys:
            visits.dirty[key] = changed & visits.real
        plain = None if visits.is_base else visits.plain(("z", self.layer, None))
        z = visits.moves.to(z, z.tokens.become(mask), plain)
        parts = []
        for members, cols, heads, value in results:
            if value is None:
                continue
            if heads is not None:
                whole = visits.part(z, members, cols, plain)
                value = visits.trace.do(_put_heads, whole, value, at=[heads])
            parts.append((members, cols, None, value))
        return visits.written(z, parts)

    def _groups(self, qkv: Streams) -> list[tuple[list[int], bool]]:
        """Worlds that are looked into together, and whether the whole of their scores and patterns is wanted."""
        visits, alike = self.visits, {}
        for w in self.looking:
            scores, pattern = self.cells.get(w, ([], []))
            every = [*scores, *pattern]
            reads = self._reads(visits.worlds[w])
            whole = self.shown or reads or not every or any(not _same_queries(every[0], cell) for cell in every[1:])
            own = bool(qkv[1].tokens.mask[w * visits.rows : (w + 1) * visits.rows].any()) or bool(
                qkv[2].tokens.mask[w * visits.rows : (w + 1) * visits.rows].any()
            )
            likeness = tuple(tuple(visits.stacker.likeness(cell) for cell in cells) for cells in (scores, pattern))
            alike.setdefault((whole, own, likeness, w if reads else None), []).append(w)
        found = []
        attention, width = self.attention, visits.real.shape[1]
        scratch = SCRATCH.get(visits.base.device.type, SCRATCH_ELSEWHERE)
        for (whole, own, _, _), worlds in alike.items():
            cell = None if whole else next(c for cells in self.cells[worlds[0]] for c in cells)
            heads = attention.q.heads if cell is None else cell.region.shape[HEAD]
            queries = width if cell is None else cell.region.shape[POS]
            numbers = 4 * heads * queries * width + 2 * width * attention.k.width * (
                attention.k.heads if own else heads
            )
            fit = max(1, int(scratch // (4 * numbers * visits.rows)))
            found += [(worlds[at : at + fit], whole) for at in range(0, len(worlds), fit)]
        return found

    def _group(
        self,
        group: tuple[list[int], bool],
        qkv: Streams,
        bases: Bases,
        changed: Tensor,
        captured: dict[int, list[tuple[Tensor, Value]]],
        needed: Tensor,
    ) -> tuple[tuple[Tensor, Tensor, Tensor | None, Value | None], Tensor]:
        """Look into some worlds.

        Returns:
            Their members, the columns [m, n] and heads of which z is given, and that (None where they edit nothing);
            and the tokens [m, T] at which it may differ from the base's.
        """
        visits, attention = self.visits, self.attention
        worlds, whole = group
        turns = [[[self.cells[w][at][i] for w in worlds] for i in range(len(self.cells.get(worlds[0], ([], []))[at]))]
                 for at in (0, 1)]  # fmt: skip
        stacks = [[Stack(tuple(cells), visits.rows) for cells in each] for each in turns]
        members = (torch.tensor(worlds)[:, None] * visits.rows + torch.arange(visits.rows)).flatten()
        first = None if whole else next(stack for each in stacks for stack in each)
        width = visits.real.shape[1]
        cols = torch.arange(width).expand(len(members), -1) if first is None else first.cols
        heads = None if first is None else next((index for _, index in first.steps([HEAD])), None)
        rows = members % visits.rows
        q = visits.part(qkv[0], members, cols, bases[0])
        k, v = (self._filled(x, members, rows, heads, base) for x, base in zip(qkv[1:], bases[1:], strict=True))
        at = [rows, cols, visits.base.layout.keys.real]
        allowed = visits.trace.do(partial(_allowed, attention, visits.base.layout.offset), at=at)
        given = [] if heads is None else [heads]
        scores = visits.trace.do(partial(_scores, attention, heads is not None), q, k, allowed, at=given)
        scores = self._visit(0, scores, allowed, stacks[0], worlds, members, captured, whole, needed)
        pattern = visits.trace.do(partial(_pattern, attention), scores, q, at=given)
        pattern = self._visit(1, pattern, allowed, stacks[1], worlds, members, captured, whole, needed)
        tokens = changed[members].clone()
        if not stacks[0] and not stacks[1]:
            return (members, cols, heads, None), tokens
        counts = None
        for stack in (s for each in stacks for s in each):
            tokens |= self._edited(stack)
            counts = stack.tokens_valid if counts is None else counts
        z = visits.trace.do(lambda p, values: (p @ values).transpose(1, 2), pattern, v)
        return (members, cols, heads, z), tokens

    def _visit(
        self, at: int, x: Value, allowed: Value, stacks: Sequence[Stack], worlds: Sequence[int], members: Tensor,
        captured: dict[int, list[tuple[Tensor, Value]]], whole: bool, needed: Tensor,
    ) -> Value:  # fmt: skip
        visits, key = self.visits, self.keys[at]
        for stack in stacks:
            x, change = visits.stacker.apply(stack, x, (HEAD, POS, KEY) if whole else (KEY,), guard=allowed)
            visits.effects.note(stack, change, self._edited(stack), needed)
        if key in visits.stacker.own and len(worlds) == 1:
            self.visits.seen[worlds[0], key] = x
        for index in visits.captured.get(key, []):
            region = visits.base.region(visits.base.reads[index])
            captured.setdefault(index, []).append((members, visits.trace.do(
                partial(narrow, tuple(axis for axis, _ in region.steps)), x,
                at=[i if i.ndim == 1 else i.repeat(len(worlds), 1) for _, i in region.steps])))  # fmt: skip
        return x

    def _edited(self, stack: Stack) -> Tensor:
        """Tokens [m, T] whose pattern a stack may change."""
        mask = torch.zeros(len(stack.members), self.visits.real.shape[1], dtype=torch.bool)
        counts = stack.tokens_valid
        mask.scatter_(1, stack.cols, True if counts is None else counts)
        others = self.visits.different(stack)
        return mask & self.visits.real[stack.members] if others is None else mask & others

    def _filled(self, x: Packed, members: Tensor, rows: Tensor, heads: Tensor | None, base: Base | None) -> Value:
        """Keys or values [m, H, T, D] of some members, or of the heads that are looked into."""
        visits, attention = self.visits, self.attention
        share = attention.q.heads // attention.k.heads
        chosen = torch.arange(attention.q.heads) if heads is None else heads
        chosen = (chosen // share).expand(len(members), -1)
        if base is not None and not bool(x.tokens.mask[members].any()):
            at = rows[:, None] * attention.k.heads + chosen
            shape = (visits.rows, visits.real.shape[1])
            return visits.trace.do(partial(_base_heads, shape), base(), at=[at])
        width = visits.real.shape[1]
        full = visits.part(x, members, torch.arange(width).expand(len(members), -1), base)
        return visits.trace.do(_heads_of, full, at=[chosen])


def _same_queries(one: Cell, other: Cell) -> bool:
    """Whether two interventions of a world mean the same heads and queries."""
    a, b = one.item, other.item
    if a.only is not None or b.only is not None or isinstance(a.site.pos, Tensor) or isinstance(b.site.pos, Tensor):
        return a.only is b.only and a.site.pos is b.site.pos and same(a.site.head, b.site.head)
    return same(a.site.head, b.site.head) and same(a.site.pos, b.site.pos)


def _allowed(attention: Any, offset: int, rows: Tensor, cols: Tensor, real: Tensor) -> Tensor:
    allowed = allowed_keys(cols, real.index_select(0, rows), attention, offset)
    return allowed.expand(-1, cols.shape[1], -1)[:, None]


def _scores(attention: Any, some: bool, q: Tensor, k: Tensor, allowed: Tensor, *heads: Tensor) -> Tensor:
    if some:
        q = taken(q, ((2, heads[0]),))
    return attention_scores(q.transpose(1, 2), k, allowed, attention.scaling, cap=attention.softcap)


def _pattern(attention: Any, scores: Tensor, like: Tensor, *heads: Tensor) -> Tensor:
    sinks = attention.sink
    if sinks is not None and heads:
        sinks = sinks[heads[0]]
    return attention_pattern(scores, sinks).to(like.dtype)


def _base_heads(shape: tuple[int, int], base: Tensor, at: Tensor) -> Tensor:
    each = base.unflatten(0, shape).transpose(1, 2).flatten(0, 1)
    return take(each, at.flatten()).unflatten(0, tuple(at.shape))


def _heads_of(x: Tensor, heads: Tensor) -> Tensor:
    return taken(x, ((2, heads),)).transpose(1, 2)


def _put_heads(whole: Tensor, part: Tensor, heads: Tensor) -> Tensor:
    if heads.ndim == 1:
        return whole.index_copy(2, heads, part)
    index = heads[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[3])
    return whole.scatter(2, index, part)


def _gather_back(*args: Tensor) -> Tensor:
    *parts, back = args
    return torch.cat(parts).index_select(0, back)
