"""The way of worlds through the network together, as the tokens at which they may differ from their base.

Which tokens those are follows from the plans and from who sees whom, so the way is written down (`trace.py`) before
anything is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from ...models.blocks import Attention, Map, Mlp, Sublayer
from ...models.experts import Experts
from ...models.norms import rescaled, scale_of
from ...models.projections import head_results
from ...plan.sites import Key, execution_order
from .attention import Sharing, reach, seen_by
from .inside import Inside
from .readout import Readout
from .tokens import Packed, Tokens, take, tiled
from .trace import Value
from .visits import Visits

HIDDEN = ("mlp_pre", "mlp_pre_linear", "mlp_post")
"""Sites inside an MLP, which is taken apart where somebody looks there."""
TILE = {"cpu": 512}
"""Tokens that go through a block's linear layers at a time, by device type."""
TILE_ELSEWHERE = 1 << 15


class Route(Visits):
    """Worlds on one base, written down from the embeddings to what is read; see `Visits` for the arguments."""

    @property
    def tile(self) -> int:
        """Tokens that go through linear layers at a time."""
        return TILE.get(self.base.device.type, TILE_ELSEWHERE)

    @cached_property
    def first(self) -> Tensor:
        """Tokens whose embeddings can matter."""
        return seen_by(self.needed[0], self.base.causal) & self.real

    def write(self) -> None:
        """Write everything down."""
        x, first = self.embedded(), self.entering(0)
        x = self.visit(("embed", -1, None), x, first)
        if self.arch.pos_embed is not None:
            x = self.add_positions(x, first)
        x = self.visit(("resid_pre", 0, None), x, first)
        depth = len(self.arch.blocks)
        used = {key[1] for keys in (self.touched, self.captured) for key in keys}
        stop = self.base.last if self.is_base else self.base.stop
        for layer in range(min(depth, stop + 1)):
            # No world has left the base yet, and none does in this layer.
            if len(x.tokens) or layer in used:
                x = self.block(layer, x)
        self.prune_what_is_above()
        if stop == depth:
            x = self.normed(("ln_final", -1, None), self.arch.norm, self.arch.final, x, self.needed[-1])
            Readout(self, self.tile).read(x)

    # -- the stream

    def embedded(self) -> Packed:
        """The embeddings of the tokens that worlds do not share with the base."""
        base, masks, chosen = self.base, [], []
        none = torch.zeros_like(base.layout.queries.real)
        for world in self.worlds:
            if world.inputs is base.whole and not self.is_base:
                masks.append(none)
                continue
            own = base.inputs if world.inputs is base.whole else world.inputs.rows(base.window)
            mask = base.inputs.mask if self.is_base else own.differs(base.inputs) & base.inputs.mask
            masks.append(mask)
            if bool(mask.any()):
                chosen.append((own, mask))
        tokens = Tokens(torch.cat(masks), self.rows)
        if not chosen:
            width, like = self.arch.width, self.base.network
            return Packed(tokens, self.trace.do(lambda: torch.empty(0, width, dtype=like.dtype, device=like.device)))
        return Packed(tokens, self.trace.do(lambda: torch.cat([base.embedded(own, mask) for own, mask in chosen])))

    def add_positions(self, x: Packed, needed: Tensor) -> Packed:
        """The learned embeddings of positions, and the residual stream with them."""
        positions = self.base.layout.queries.index.flatten()
        module = self.arch.pos_embed if self.arch.at_positions is None else self.arch.at_positions
        assert module is not None
        pos = Packed(x.tokens, self.trace.do(module, at=[positions[x.tokens.home]]))
        pos = self.visit(("pos_embed", -1, None), pos, needed)
        x = self.moves.to(x, pos.tokens, self.plain(("embed", -1, None)))
        return Packed(x.tokens, self.trace.do(torch.add, x.value, pos.value))

    def entering(self, layer: int) -> Tensor:
        """Tokens whose residual before a layer can matter."""
        if layer:
            return self.needed[layer - 1]
        return self.first

    def prune_what_is_above(self) -> None:
        """Interventions above the last thing that is read can reach nothing."""
        depth = len(self.arch.blocks)
        for key, turns in self.stacker.asked.items():
            if execution_order(key, depth)[0] > self.base.stop and not self.is_base:
                self.effects.prune(cell for cells in turns for cell in cells)

    # -- blocks

    def block(self, layer: int, x: Packed) -> Packed:
        """One block, from the residual before it to the residual after it."""
        block, needed = self.arch.blocks[layer], self.needed[layer]
        before: Key = ("resid_pre", 0, None) if layer == 0 else ("resid_post", layer - 1, None)
        added: dict[Key, Packed] = {("attn_out", layer, None): self.attend(layer, block.of_attention, x)}
        if block.of_mlp is not None:
            if not block.parallel:
                before, x = ("resid_mid", layer, None), self.sum(block.of_attention, self.add(x, before, added))
                x, added = self.visit(before, x, needed), {}
            added["mlp_out", layer, None] = self.feed(layer, block.of_mlp, x)
        x = self.sum(block.sublayers[-1], self.add(x, before, added))
        return self.visit(("resid_post", layer, None), x, needed)

    def sum(self, sublayer: Sublayer, x: Packed) -> Packed:
        """The residual stream after what a sublayer adds to it."""
        return x if sublayer.post_add is None else self.flat_map(sublayer.post_add, x)

    def attend(self, layer: int, sublayer: Sublayer, x: Packed) -> Packed:
        """From the residual before a block to what attention adds."""
        attention, needed = sublayer.fn, self.needed[layer]
        assert isinstance(attention, Attention)
        read = self.visit(("attn_in", layer, None), x, self.entering(layer))
        z = self.mix(layer, sublayer, attention, read, needed)
        out = self.flat_map(lambda v: attention.out(v.flatten(1)), z)
        self.count(layer, "out", out)
        out = self.results(layer, attention, z, out, needed)
        if sublayer.post is not None or sublayer.scale != 1.0:
            out = self.flat_map(sublayer.added, out)
        return self.visit(("attn_out", layer, None), out, needed)

    def feed(self, layer: int, sublayer: Sublayer, x: Packed) -> Packed:
        """From the residual that the MLP reads to what it adds; it is taken apart only where a world looks inside."""
        mlp, norm, needed = sublayer.fn, sublayer.read, self.needed[layer]
        assert not isinstance(mlp, Attention)
        source: Key = ("mlp_in", layer, None)
        x = self.visit(source, x, needed)
        key: Key = ("ln2", layer, None)
        if self.involved(key) or self.involved(("ln2_scale", layer, None)):
            # From here on what is read is what the norm has returned, as it is.
            x = self.normed(key, sublayer.pre, norm, x, needed)
            source, norm = key, _as_it_is
        if isinstance(mlp, Experts):
            out = self.mixture(layer, sublayer, mlp, x, source, norm)
        elif any(self.involved((name, layer, None)) for name in HIDDEN):
            out = self.taken_apart(layer, sublayer, mlp, x, source, norm)
        else:
            out = self.flat_map(lambda v: sublayer.added(mlp(norm(v))), x)
        self.count(layer, "mlp", out)
        return self.visit(("mlp_out", layer, None), out, needed)

    def normed(self, key: Key, norm: nn.Module | None, apply: Map, x: Packed, needed: Tensor) -> Packed:
        """What a norm returns of its input, with what it divides by edited."""
        scale, out = (f"{key[0]}_scale", *key[1:]), self.flat_map(apply, x)
        if self.involved(scale):
            divides = scale_of(norm, self.arch.width)
            assert norm is not None and divides is not None
            old = Packed(x.tokens, self.trace.do(divides, x.value))
            new = self.visit(scale, old, needed)
            old, out = (self.moves.to(each, new.tokens, self.plain(at)) for each, at in ((old, scale), (out, key)))
            out = Packed(new.tokens, self.trace.do(partial(rescaled, norm), out.value, old.value, new.value))
        return self.visit(key, out, needed)

    def taken_apart(self, layer: int, sublayer: Sublayer, mlp: Mlp, x: Packed, source: Key, norm: Map) -> Packed:
        """From what an MLP reads, which is the base's site `source`, to what it adds, by its hidden values."""
        needed, pre, up = self.needed[layer], ("mlp_pre", layer, None), ("mlp_pre_linear", layer, None)
        hidden = self.visit(pre, self.flat_map(lambda v: mlp.pre(norm(v)), x), needed)
        x = self.moves.to(x, hidden.tokens, self.plain(source))
        if mlp.up is None:
            make = self.trace.do(mlp.act, hidden.value)
        else:
            made: Map = mlp.up
            linear = self.visit(up, self.flat_map(lambda v: made(norm(v)), x), needed)
            hidden = self.moves.to(hidden, linear.tokens, self.plain(pre))
            make = self.trace.do(lambda h, u: mlp.act(h) * u, hidden.value, linear.value)
        hidden = self.visit(("mlp_post", layer, None), Packed(hidden.tokens, make), needed)
        return self.flat_map(lambda v: sublayer.added(mlp.down(v)), hidden)

    def mixture(self, layer: int, sublayer: Sublayer, mlp: Experts, x: Packed, key: Key, norm: Map) -> Packed:
        """From what experts read to what they add; taken apart only where a world looks inside."""
        router, each = ("router", layer, None), ("expert_out", layer, None)
        needed, source = self.needed[layer], self.plain(key)
        if not self.involved(router) and not self.involved(each):
            return self.flat_map(lambda v: sublayer.added(mlp(norm(v))), x)
        logits = self.visit(router, self.flat_map(lambda v: mlp.logits(norm(v)), x), needed)
        x = self.moves.to(x, logits.tokens, source)
        parts = self.trace.do(lambda v, said: mlp.parts(norm(v), *mlp.route(said)), x.value, logits.value)
        added = self.visit(each, Packed(x.tokens, parts), needed)
        x = self.moves.to(x, added.tokens, source)
        joined = self.trace.do(lambda p, v: sublayer.added(mlp.joined(p, norm(v))), added.value, x.value)
        return Packed(added.tokens, joined)

    def add(self, x: Packed, key: Key, added: dict[Key, Packed]) -> Packed:
        """The residual x, which is the base's site `key`, with what sublayers add to it.

        Each of them has changed at least the needed tokens that x has.
        """
        streams = list(added.values())
        tokens = streams[0].tokens
        for stream in streams[1:]:
            tokens = tokens | stream.tokens.mask
        x = self.moves.to(x, tokens, self.plain(key))
        value = x.value
        for name, stream in added.items():
            value = self.trace.do(torch.add, value, self.moves.to(stream, tokens, self.plain(name)).value)
        return Packed(x.tokens, value)

    def flat_map(self, function: Callable[[Tensor], Tensor], x: Packed) -> Packed:
        """Apply a function of each token by itself, some tokens at a time."""
        return Packed(x.tokens, self.trace.do(lambda v: tiled(function, v, self.tile), x.value))

    def count(self, layer: int, part: str, x: Packed) -> None:
        """Count the work of a part of a block."""
        if self.base.meter is not None:
            self.base.meter.block(layer, part, len(x.tokens))

    def involved(self, key: Key) -> bool:
        """Whether a site has to be computed by itself."""
        return key in self.captured or key in self.base.recorded or key in self.touched

    # -- attention

    def mix(self, layer: int, sublayer: Sublayer, attention: Attention, x: Packed, needed: Tensor) -> Packed:
        """From the residual that attention reads to z."""
        norm = sublayer.read
        entering = self.entering(layer)
        if any(self.involved((name, layer, None)) for name in ("ln1", "ln1_scale")):
            normed = self.normed(("ln1", layer, None), sublayer.pre, norm, x, entering)
        else:
            normed = self.flat_map(norm, x)
        asking = normed.tokens & needed
        parts = []
        for name, need in (("q", needed), ("k", entering), ("v", entering)):
            source = self.moves.to(normed, asking, None) if name == "q" else normed
            part = self.flat_map(getattr(attention, name), source)
            self.count(layer, name, part)
            parts.append(self.split_inputs(name, layer, norm, attention, x, part, need))
        q = self.visit(("q", layer, None), parts[0], needed)
        k = self.visit(("k", layer, None), parts[1], entering)
        v = self.visit(("v", layer, None), parts[2], entering)
        q, k = self.turn(q, attention.q_norm, attention), self.turn(k, attention.k_norm, attention)
        q = self.visit(("rot_q", layer, None), q, needed)
        k = self.visit(("rot_k", layer, None), k, entering)
        inside = Inside(self, layer)
        changed = reach(k.tokens.mask | v.tokens.mask, attention.window, attention.causal) | q.tokens.mask
        out = q.tokens.become((changed | inside.forbidden()) & self.real & needed)
        sharing = Sharing(
            self.trace, self.moves, self.base.layout, attention, layer in self.base.exposed, self.base.device.type
        )
        base_q, base_k, base_v = (self.plain((name, layer, None)) for name in ("rot_q", "rot_k", "v"))
        bases = (base_q, base_k, base_v)
        z = sharing.mix(out, (q, k, v), bases, inside.bans)
        z = inside.look((q, k, v), bases, z, changed, needed)
        return self.visit(("z", layer, None), z, needed)

    def split_inputs(
        self,
        name: str,
        layer: int,
        norm: Map,
        attention: Attention,
        x: Packed,
        part: Packed,
        needed: Tensor,
    ) -> Packed:
        """Edits of what single heads read, before the norm: at the tokens that are edited heads are projected again."""
        key = (f"{name}_input", layer, None)
        if not self.involved_in_worlds(key):
            return part
        projection = getattr(attention, name)
        copies = self.copies(x, key, ("attn_in", layer, None), lambda v: _copied(v, projection.heads))
        edited = self.visit(key, copies, needed)
        held = edited.tokens.mask & self.edited_tokens(key)
        again = self.moves.to(edited, edited.tokens.become(held), None)
        projected = self.trace.do(lambda v: projection.per_head(norm(v)), again.value)
        return self.replaced(part, Packed(again.tokens, projected), self.plain((name, layer, None)))

    def results(self, layer: int, attention: Attention, z: Packed, attn: Packed, needed: Tensor) -> Packed:
        """Edits of single heads' contributions to the residual stream."""
        key = ("result", layer, None)
        if not self.involved_in_worlds(key):
            return attn
        copies = self.copies(z, key, ("z", layer, None), lambda v: head_results(attention.out, v))
        edited = self.visit(key, copies, needed)
        held = edited.tokens.become(edited.tokens.mask & self.edited_tokens(key))
        new, old = self.moves.to(edited, held, None), self.moves.to(copies, held, None)
        there = attn.tokens | held.mask
        if there is not attn.tokens:
            z = self.moves.to(z, there, self.plain(("z", layer, None)))
            attn = self.flat_map(lambda v: attention.out(v.flatten(1)), z)
        delta = self.trace.do(lambda a, b: (a - b).sum(1), new.value, old.value)
        at = there.place[held.flat]
        return Packed(there, self.trace.do(lambda a, d, i: a.index_add(0, i, d), attn.value, delta, at=[at]))

    def involved_in_worlds(self, key: Key) -> bool:
        return key in self.captured or key in self.touched or (self.is_base and key in self.base.recorded)

    def copies(self, x: Packed, key: Key, source: Key, make: Callable[[Tensor], Tensor]) -> Packed:
        """What single heads read or add, at the tokens of which somebody wants to know."""
        wanted = x.tokens.mask | self.edited_tokens(key)
        if key not in self.captured and key not in self.stacker.own and not self.is_base:
            wanted = self.edited_tokens(key)
        x = self.moves.to(x, x.tokens.become(wanted), self.plain(source))
        return Packed(x.tokens, self.trace.do(make, x.value))

    def replaced(self, x: Packed, new: Packed, base: Callable[[], Value] | None) -> Packed:
        """An activation with some of its tokens replaced."""
        tokens = x.tokens | new.tokens.mask
        x = self.moves.to(x, tokens, base)
        at = tokens.place[new.tokens.flat]
        return Packed(tokens, self.trace.do(lambda a, b, i: a.index_copy(0, i, b), x.value, new.value, at=[at]))

    def turn(self, x: Packed, norm: Map | None, attention: Attention) -> Packed:
        """Queries or keys as attention uses them: after their norm and the rotary embedding."""
        value = x.value if norm is None else self.trace.do(norm, x.value)
        rotary, base = attention.rotary, self.base
        if rotary is None:
            return Packed(x.tokens, value)

        def turned(v: Tensor, home: Tensor) -> Tensor:
            cos, sin = base.angles(rotary, v.dtype)
            return rotary.turn(v, take(cos, home), take(sin, home))

        return Packed(x.tokens, self.trace.do(turned, value, at=[x.tokens.home]))


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _copied(x: Tensor, heads: int) -> Tensor:
    return x.unsqueeze(1).expand(-1, heads, -1)
