"""Sites of worlds that are written down together: edits, what is read of them, and which tokens they may change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...plan.plan import Read, World
from ...plan.region import Region, taken
from ...plan.sites import DIM, HEAD, Key
from ...plan.tape import Tape
from .base import COPIES, Base
from .cells import INSIDE, Stack
from .effects import Effects
from .stacking import Stacker
from .tokens import Moves, Packed, Tokens, take
from .trace import Trace, Value

STREAM = ("resid_pre", "resid_mid", "resid_post")
"""The residual stream itself: a token whose stream is the base's again is one that the world shares with it again."""


class Visits:
    """What worlds on one base do and read at the sites that they come to.

    Args:
        base: what they are run against, or what is run itself.
        worlds: the worlds, whose inputs may differ from the base's.
        tapes: of the worlds that plans read, by `source_id`.
        differs: of those that were run against the same base, where they may differ from it: bool [b, T] by tape and
            site.
        seed: of random interventions.
        is_base: whether the one world is the base itself.
    """

    def __init__(
        self,
        base: Base,
        worlds: Sequence[World],
        tapes: Mapping[Any, Tape],
        differs: Mapping[tuple[int, Key], Tensor],
        seed: int,
        is_base: bool = False,
    ) -> None:
        self.base, self.worlds, self.differs, self.is_base = base, worlds, differs, is_base
        self.arch, self.rows = base.arch, len(base.layout)
        self.trace = Trace()
        self.moves = Moves(self.trace)
        self.stacker = Stacker(
            trace=self.trace, worlds=worlds, sizes=base.sizes, tapes=tapes, seed=seed, layout=base.whole_layout,
            window=base.window, here=self.read_here,
        )  # fmt: skip
        self.effects = Effects(self.trace, len(worlds), self.rows)
        count = len(worlds)
        self.real = base.layout.queries.real.repeat(count, 1)
        self.needed = [self.real if is_base else n.repeat(count, 1) for n in base.needed]
        self.everyone = torch.arange(count * self.rows)
        self.touched = self.stacker.touched
        self.captured: dict[Key, list[int]] = {}
        for index, site in enumerate(() if is_base else base.reads):
            if site.name != "logits":
                self.captured.setdefault(site.key, []).append(index)
        self.read: dict[int, Value] = {}
        self.recorded: dict[Key, Value] = {}
        self.dirty: dict[Key, Tensor] = {}
        self.held: dict[Key, Packed] = {}
        self.seen: dict[tuple[int, Key], Value] = {}
        self._constants: dict[Key, Value] = {}
        self._within: dict[tuple[int, int], tuple[Tokens, Tensor, Tokens]] = {}

    def plain(self, key: Key) -> Callable[[], Value] | None:
        """The base's value [b * T, ...] of a site; None while the base itself is computed, or where nobody needs it."""
        return (
            None if self.is_base or (key[0] in COPIES and not self.base.keeps(key)) else partial(self.base_value, key)
        )

    def base_value(self, key: Key) -> Value:
        """The base's value of a site, to be read when the trace runs."""
        if key not in self._constants:
            self._constants[key] = self.trace.do(partial(self.base.values.__getitem__, key))
        return self._constants[key]

    def visit(self, key: Key, x: Packed, needed: Tensor) -> Packed:
        """Edit a site in the worlds whose plans name it, drop what cannot matter, and keep what is asked for."""
        for stacks in self.stacker.turns(key):
            x = self.edit(key, x, needed, stacks)
        known = (id(x.tokens), id(needed))
        if known not in self._within:
            self._within[known] = x.tokens, needed, x.tokens & needed
        x = self.moves.to(x, self._within[known][2], None)
        self.note(key, x)
        return x

    def note(self, key: Key, x: Packed) -> None:
        """Keep the base's value where worlds will need it, and the worlds' values where they are read."""
        if self.is_base and self.base.keeps(key):
            self.recorded[key] = self.trace.keep(self.whole(x))
        if key in self.stacker.own:
            self.held[key] = x
        if key in self.captured:
            self.dirty[key] = x.tokens.mask
            for index in self.captured[key]:
                self.capture(index, key, x)

    def capture(self, index: int, key: Key, x: Packed) -> None:
        """Keep the part of a site that is read, in every world."""
        region = self.base.region(self.base.reads[index])
        part = self.part(x, self.everyone, region.cols.repeat(len(self.worlds), 1), self.plain(key))
        self.read[index] = self.trace.keep(self.narrowed(part, region, len(self.worlds)))

    def part(self, x: Packed, members: Tensor, cols: Tensor, base: Callable[[], Value] | None) -> Value:
        return self.moves.dense(x, members, cols, base)

    def narrowed(self, part: Value, region: Region, worlds: int) -> Value:
        """The heads and entries of a region, of its tokens in some worlds."""
        steps = [(axis, index) for axis, index in region.steps if region.site.axes[axis] in (HEAD, DIM)]
        if not steps:
            return part
        index = [i if i.ndim == 1 else i.repeat(worlds, 1) for _, i in steps]
        return self.trace.do(partial(narrow, tuple(axis for axis, _ in steps)), part, at=index)

    def whole(self, x: Packed) -> Value:
        """The base's activation [b * T, ...], zero at padding."""
        if len(x.tokens) == x.tokens.mask.numel():
            return x.value
        return self.trace.do(partial(_scattered, x.tokens.mask.numel()), x.value, at=[x.tokens.flat])

    def read_here(self, stack: Stack, read: Read, _: Region) -> Value:
        """What worlds have computed of a site, as they have edited it, at the region of a read."""
        assert read.site is not None
        key = read.site.key
        regions = [
            self.stacker.resolver(self.worlds[cell.world].inputs).region(cell.item.reads[n].site, cell.item.only)[1]  # type: ignore[arg-type]
            for cell in stack.cells
            for n in [next(i for i, r in enumerate(stack.item.reads) if r is read)]
        ]
        if read.site.name in INSIDE:
            steps = tuple(axis for axis, _ in regions[0].steps)
            whole = self.seen[stack.cells[0].world, key]
            return self.trace.do(partial(narrow, steps), whole, at=[index for _, index in regions[0].steps])
        part = self.part(self.held[key], stack.members, torch.cat([r.cols for r in regions]), self.plain(key))
        return self.narrowed(part, regions[0], len(stack))

    def edit(self, key: Key, x: Packed, needed: Tensor, stacks: Sequence[Stack]) -> Packed:
        """Apply a turn of interventions at a site, and find out which tokens they may change."""
        mask = x.tokens.mask
        found = []
        for stack in stacks:
            part = self.part(x, stack.members, stack.cols, self.plain(key))
            new, change = self.stacker.apply(stack, part, (HEAD, DIM))
            mask, changed = self.changed(stack, mask, x.tokens.mask)
            self.effects.note(stack, change, changed, needed)
            found.append((stack, new))
        tokens = x.tokens.become(mask)
        x = self.moves.to(x, tokens, self.plain(key))
        return self.written(x, [(stack.members, stack.cols, stack.tokens_valid, new) for stack, new in found])

    def changed(self, stack: Stack, mask: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens held after an edit, given those before it; and those [m, n] that it may change."""
        op, site = stack.item.op, stack.site
        region = torch.zeros(len(stack.members), mask.shape[1], dtype=torch.bool)
        counts = stack.tokens_valid
        region.scatter_(1, stack.cols, True if counts is None else counts)
        region &= self.real[stack.members]
        others = self.different(stack)
        mask = mask.clone() if mask is before else mask
        if others is None:
            changed = region
            mask[stack.members] |= region
        else:
            mine = before[stack.members]
            changed = region & (others | mine)
            weight = stack.item.weight
            whole = site.dim is None and not isinstance(weight, Tensor) and weight == 1
            if op.replaces and whole and site.name in STREAM:
                mask[stack.members] = torch.where(region, others, mask[stack.members])
            else:
                mask[stack.members] |= changed
        return mask, changed

    def edited_tokens(self, key: Key) -> Tensor:
        """Tokens [members, T] that some intervention at a site names."""
        mask = torch.zeros_like(self.real)
        for stacks in self.stacker.turns(key):
            for stack in stacks:
                mine = torch.zeros(len(stack.members), mask.shape[1], dtype=torch.bool)
                counts = stack.tokens_valid
                mask[stack.members] |= mine.scatter_(1, stack.cols, True if counts is None else counts)
        return mask & self.real

    def different(self, stack: Stack) -> Tensor | None:
        """Where what is read may differ from the base at the same place, bool [m, T]; None where it may everywhere."""
        op = stack.item.op
        if self.is_base or not op.still or len(stack.item.reads) != 1:
            return None
        read = stack.item.reads[0]
        if not read.aligned or isinstance(read.source, Tensor) or read.site is not None:
            return None
        tape = self.stacker.resolver(self.worlds[stack.cells[0].world].inputs).tape(read, stack.item)
        known = self.differs.get((id(tape), stack.site.key))
        return None if known is None else known.repeat(len(stack), 1)

    def written(self, x: Packed, parts: Sequence[tuple[Tensor, Tensor, Tensor | None, Value]]) -> Packed:
        """An activation with the tokens [m, n] of some members replaced, where they count and are held."""
        at, values = [], []
        for members, cols, counts, value in parts:
            flat = (members[:, None] * x.tokens.width + cols).flatten()
            held = x.tokens.mask.flatten()[flat]
            if counts is not None:
                held = held & counts.flatten()
            where = held.nonzero().squeeze(1)
            if not len(where):
                continue
            values.append(value)
            at += [x.tokens.place[flat[where]], where]
        if not values:
            return x
        return Packed(x.tokens, self.trace.do(_write, x.value, *values, at=at))


def narrow(axes: tuple[int, ...], x: Tensor, *index: Tensor) -> Tensor:
    """What indices along some axes select."""
    return taken(x, tuple(zip(axes, index, strict=True)))


def _scattered(size: int, x: Tensor, at: Tensor) -> Tensor:
    return x.new_zeros((size, *x.shape[1:])).index_copy_(0, at, x)


def _write(x: Tensor, *args: Tensor) -> Tensor:
    count = len(args) // 3
    out = x.clone()
    for number, part in enumerate(args[:count]):
        target, source = args[count + 2 * number : count + 2 * number + 2]
        flat = part.flatten(0, 1)
        out.index_copy_(0, target, flat if len(source) == len(flat) else take(flat, source))
    return out
