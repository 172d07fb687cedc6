"""Worlds on their way through the network together, as the tokens at which they differ from their base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...audit import Audit
from ...models.attention import exposed_attention
from ...models.blocks import Attention, Mlp, Sublayer
from ...models.positions import rotate
from ...plan.sites import Key, execution_order
from ...program import Guard, Program, State, visit
from ..placing import head_results_change
from .attention import allowed_keys, packed_attention, reach, seen_by
from .base import Base
from .readout import read_out
from .tokens import Packed, tiled

TILE = {"cpu": 512}
"""Tokens that go through a block's linear layers at a time, by device type; elsewhere all at once."""

INSIDE = ("scores", "pattern")
"""Sites for which a world's attention is computed whole, with its inside exposed."""
ALWAYS = frozenset({"embed", "resid_pre", "rot_q", "rot_k", "v", "resid_mid", "resid_post", "ln_final"})
"""Sites whose base value every run needs: what worlds read where they have not changed it."""
BESIDE = frozenset({"attn_out", "mlp_out"})
"""The same in a parallel block, where attention may have changed tokens that the MLP has not, and the reverse."""


@dataclass(eq=False)
class Chunk:
    """Worlds that go through the network together."""

    base: Base
    programs: Sequence[Program]
    is_base: bool = False

    def __post_init__(self) -> None:
        base, worlds = self.base, len(self.programs)
        layout = base.layout
        self.arch, self.rows, self.tile = base.arch, len(layout), TILE.get(base.device.type, 1 << 30)
        self.states = [State() for _ in self.programs]
        self.pruned: list[set[int]] = [set() for _ in self.programs]
        self.kept: list[dict[int, Tensor]] = [{} for _ in self.programs]
        self.real = layout.queries.real.repeat(worlds, 1)
        self.needed = [self.real if self.is_base else n.repeat(worlds, 1) for n in base.needed]
        self.positions = layout.queries.index.flatten().to(base.device)
        self.touched = [program.touched for program in self.programs]
        self.captured: dict[Key, list[int]] = {}
        for index, site in enumerate(base.reads):
            if site.name != "logits":
                self.captured.setdefault(site.key, []).append(index)

    def run(self, x: Packed) -> list[list[Tensor]]:
        """Run the network from the embeddings of the changed tokens, and return the reads of each world."""
        first = self.entering(0)
        x = self.visit(("embed", -1, None), x, first)
        if self.arch.pos_embed is not None:
            at = Packed(x.dirty, x.values, self.rows)
            pos = Packed(x.dirty, self.arch.pos_embed(self.positions[at.home()]), self.rows)
            pos = self.visit(("pos_embed", -1, None), pos, first)
            x = x.to(pos.dirty, self.plain(("embed", -1, None)))
            x = Packed(x.dirty, x.values + pos.values, self.rows)
        x = self.visit(("resid_pre", 0, None), x, first)
        depth = len(self.arch.blocks)
        used = {key[1] for keys in [*self.touched, self.captured] for key in keys}
        stop = self.base.last if self.is_base else self.base.stop
        for layer in range(min(depth, stop + 1)):
            # No world has left the base yet, and none does in this layer.
            if len(x.values) or layer in used:
                x = self.block(layer, x)
        self.prune_what_is_above()
        return self.collect(self.read_out(x) if stop == depth else [])

    def read_out(self, x: Packed) -> list[list[Tensor]]:
        """The final norm, and the reads of the logits."""
        x = self.flat_map(self.arch.norm, x)
        final: Key = ("ln_final", -1, None)
        x = self.visit(final, x, self.needed[-1])
        edited, offsets = {}, x.offsets()
        for w, keys in enumerate(self.touched):
            if ("logits", -1, None) in keys:
                whole = x.world(w, self.plain(final), offsets[w], offsets[w + 1])
                if self.arch.readout is not None:
                    whole = whole[:, self.arch.readout, None]
                edited[w] = self.apply(w, ("logits", -1, None), self.arch.logits(whole))
        return read_out(self.base, x, edited, self.is_base, self.tile)

    def apply(self, world: int, key: Key, x: Tensor, guard: Guard | None = None) -> Tensor:
        """What one world's program makes of its whole value of a site."""
        self.states[world], x = visit(self.programs[world], self.states[world], key, x, guard)
        return x

    def audits(self) -> list[Audit]:
        """What each world's interventions did."""
        audits = [program.report(state) for program, state in zip(self.programs, self.states, strict=True)]
        for audit, numbers in zip(audits, self.pruned, strict=True):
            for number in numbers:
                audit[number].pruned = True
        return audits

    def entering(self, layer: int) -> Tensor:
        """Tokens whose residual before a layer can matter."""
        return self.needed[layer - 1] if layer else seen_by(self.needed[0], self.base.causal) & self.real

    def plain(self, key: Key) -> Tensor | None:
        """The base's value [b, T, ...] of a site; None while the base itself is computed."""
        return None if self.is_base else self.base.values[key]

    def visit(self, key: Key, x: Packed, needed: Tensor) -> Packed:
        """Edit a site in the worlds whose plans name it, drop what cannot matter, and keep what is asked for."""
        edited = [w for w, keys in enumerate(self.touched) if key in keys]
        if edited:
            x = self.edit(key, x, needed, edited)
        if not bool((needed | ~x.dirty).all()):
            x = x.to(x.dirty & needed, None)
        self.record(key, x)
        return x

    def record(self, key: Key, x: Packed) -> None:
        """Keep the base's value where worlds will need it, and the worlds' values where they are read."""
        always = key[0] in ALWAYS or (key[0] in BESIDE and self.arch.blocks[key[1]].parallel)
        if self.is_base and (always or key in self.base.recorded):
            self.base.values[key] = x.world(0, None, 0, len(x.values))
        if key in self.captured:
            offsets = x.offsets()
            for w in range(len(self.programs)):
                whole = x.world(w, self.plain(key), offsets[w], offsets[w + 1])
                self.keep(key, w, whole)

    def keep(self, key: Key, world: int, whole: Tensor) -> None:
        """Keep the parts that are read of one world's value of a site."""
        for index in self.captured.get(key, ()):
            site = self.base.reads[index]
            part = self.base.region(site).get(whole) if site.restricted else whole
            self.kept[world][index] = part.clone()

    def edit(self, key: Key, x: Packed, needed: Tensor, edited: Sequence[int]) -> Packed:
        """Apply the plans of some worlds at a site, and find out which tokens they changed."""
        offsets, base = x.offsets(), self.plain(key)
        results, masks = [], []
        for w in edited:
            old = x.world(w, base, offsets[w], offsets[w + 1])
            self.states[w], new = visit(self.programs[w], self.states[w], key, old)
            results.append(new)
            masks.append((new != old).flatten(2).any(2))
        changes = torch.stack(masks).cpu()
        return self.adopt([key], x, needed, dict(zip(edited, zip(results, changes, strict=True), strict=True)))

    def adopt(
        self, keys: Sequence[Key], x: Packed, needed: Tensor, results: dict[int, tuple[Tensor, Tensor]]
    ) -> Packed:
        """Take over worlds' new values [b, T, ...], given the tokens bool [b, T] that the edits at `keys` changed."""
        updates = {}
        for w, (new, change) in results.items():
            here = slice(w * self.rows, (w + 1) * self.rows)
            steps = [step for key in keys for step in self.programs[w].steps.get(key, ())]
            for step in steps:
                if step.item.op.always:
                    change = change.scatter(1, step.region.cols, True)
            change = change & self.real[here]
            if bool(change.any()) and not bool((change & needed[here]).any()):
                self.pruned[w] |= {step.number for step in steps}
            updates[w] = (x.dirty[here] | change, new)
        return x.with_worlds(updates)

    def prune_what_is_above(self) -> None:
        """Interventions above the last thing that is read can reach nothing."""
        depth = len(self.arch.blocks)
        for w, program in enumerate(self.programs):
            for key, steps in program.steps.items():
                if execution_order(key, depth)[0] > self.base.stop:
                    self.pruned[w] |= {step.number for step in steps} - set(self.states[w].changes)

    def block(self, layer: int, x: Packed) -> Packed:
        """One block, from the residual before it to the residual after it."""
        block, needed = self.arch.blocks[layer], self.needed[layer]
        before: Key = ("resid_pre", 0, None) if layer == 0 else ("resid_post", layer - 1, None)
        added: dict[Key, Packed] = {("attn_out", layer, None): self.attend(layer, block.of_attention, x)}
        if block.of_mlp is not None:
            if not block.parallel:
                before, x = ("resid_mid", layer, None), self.add(x, before, added)
                x, added = self.visit(before, x, needed), {}
            added["mlp_out", layer, None] = self.feed(layer, block.of_mlp, x)
        x = self.add(x, before, added)
        return self.visit(("resid_post", layer, None), x, needed)

    def attend(self, layer: int, sublayer: Sublayer, x: Packed) -> Packed:
        """From the residual before a block to what attention adds."""
        attention, needed = sublayer.fn, self.needed[layer]
        assert isinstance(attention, Attention)
        read = self.visit(("attn_in", layer, None), x, self.entering(layer))
        z = self.mix(layer, sublayer.pre, attention, read, needed)
        out = self.flat_map(lambda v: attention.out(v.flatten(1)), z)
        self.count(layer, "out", out)
        out = self.results(layer, attention, z, out, needed)
        if sublayer.post is not None:
            out = self.flat_map(sublayer.post, out)
        return self.visit(("attn_out", layer, None), out, needed)

    def feed(self, layer: int, sublayer: Sublayer, x: Packed) -> Packed:
        """From the residual that the MLP reads to what it adds; it is taken apart only where a world looks inside."""
        mlp, norm, needed = sublayer.fn, sublayer.pre, self.needed[layer]
        assert isinstance(mlp, Mlp)
        x = self.visit(("mlp_in", layer, None), x, needed)
        pre_key, post_key = ("mlp_pre", layer, None), ("mlp_post", layer, None)
        if self.involved(pre_key) or self.involved(post_key):
            hidden = self.visit(pre_key, self.flat_map(lambda v: mlp.pre(norm(v)), x), needed)
            x = x.to(hidden.dirty, self.plain(("mlp_in", layer, None)))
            hidden = Packed(hidden.dirty, mlp.hidden(hidden.values, norm(x.values)), self.rows)
            hidden = self.visit(post_key, hidden, needed)
            out = self.flat_map(lambda v: sublayer.added(mlp.down(v)), hidden)
        else:
            out = self.flat_map(lambda v: sublayer.added(mlp(norm(v))), x)
        self.count(layer, "mlp", out)
        return self.visit(("mlp_out", layer, None), out, needed)

    def add(self, x: Packed, key: Key, added: dict[Key, Packed]) -> Packed:
        """The residual x, which is the base's site `key`, with what sublayers add to it.

        Each of them has changed at least the needed tokens that x has.
        """
        dirty = torch.stack([stream.dirty for stream in added.values()]).any(0)
        values = x.to(dirty, self.plain(key)).values
        for name, stream in added.items():
            whole = stream if torch.equal(stream.dirty, dirty) else stream.to(dirty, self.plain(name))
            values = values + whole.values
        return Packed(dirty, values, self.rows)

    def flat_map(self, function: Callable[[Tensor], Tensor], x: Packed) -> Packed:
        """Apply a function of each token by itself, some tokens at a time."""
        return Packed(x.dirty, tiled(function, x.values, self.tile), self.rows)

    def count(self, layer: int, part: str, x: Packed) -> None:
        """Count the work of a part of a block."""
        if self.base.meter is not None:
            self.base.meter.block(layer, part, len(x.values))

    def involved(self, key: Key) -> bool:
        """Whether a site has to be computed by itself."""
        return key in self.captured or key in self.base.recorded or any(key in keys for keys in self.touched)

    def mix(self, layer: int, norm: nn.Module, attention: Attention, x: Packed, needed: Tensor) -> Packed:
        """From the residual that attention reads to z."""
        keyed, asking = x, x.to(x.dirty & needed, None)
        normed = self.flat_map(norm, keyed)
        same_tokens = asking.dirty is keyed.dirty or torch.equal(asking.dirty, keyed.dirty)
        entering = self.entering(layer)
        parts = []
        for name, need in (("q", needed), ("k", entering), ("v", entering)):
            source = normed if name != "q" or same_tokens else normed.to(asking.dirty, None)
            part = self.flat_map(getattr(attention, name), source)
            self.count(layer, name, part)
            parts.append(self.split_inputs(name, layer, norm, attention, keyed, part, need))
        q = self.visit(("q", layer, None), parts[0], needed)
        k = self.visit(("k", layer, None), parts[1], entering)
        v = self.visit(("v", layer, None), parts[2], entering)
        q, k = self.turn(q, attention.q_norm, attention), self.turn(k, attention.k_norm, attention)
        q = self.visit(("rot_q", layer, None), q, needed)
        k = self.visit(("rot_k", layer, None), k, entering)
        out = (reach(k.dirty | v.dirty, attention.window, attention.causal) | q.dirty) & self.real & needed
        looks = {(name, layer, None) for name in INSIDE}
        inside = [w for w, keys in enumerate(self.touched) if keys & looks]
        if looks & set(self.captured):
            inside = list(range(len(self.programs)))
        z = self.looked_into(layer, attention, (q, k, v), out, inside)
        return self.visit(("z", layer, None), z, needed)

    def split_inputs(
        self,
        name: str,
        layer: int,
        norm: nn.Module,
        attention: Attention,
        x: Packed,
        part: Packed,
        needed: Tensor,
    ) -> Packed:
        """Edits of what single heads read, before the norm: those heads are projected again."""
        key = (f"{name}_input", layer, None)
        edited = [w for w, keys in enumerate(self.touched) if key in keys]
        if not edited and key not in self.captured:
            return part
        projection, offsets = getattr(attention, name), x.offsets()
        part_offsets, results = part.offsets(), {}
        for w in range(len(self.programs)) if key in self.captured else edited:
            whole = x.world(w, self.plain(("attn_in", layer, None)), offsets[w], offsets[w + 1])
            copies = whole.unsqueeze(2).expand(-1, -1, projection.heads, -1)
            new = self.apply(w, key, copies)
            self.keep(key, w, new)
            if new is copies:
                continue
            old = part.world(w, self.plain((name, layer, None)), part_offsets[w], part_offsets[w + 1])
            change = (new != copies).flatten(2).any(2)
            projected = projection.per_head(norm(new))
            results[w] = (torch.where(change[:, :, None, None], projected, old), change.cpu())
        return self.adopt([key], part, needed, results) if results else part

    def turn(self, x: Packed, norm: nn.Module | None, attention: Attention) -> Packed:
        """Queries or keys as attention uses them: after their norm and the rotary embedding."""
        values = x.values if norm is None else norm(x.values)
        if attention.rotary is not None:
            home = x.home()
            cos, sin = self.base.angles(attention.rotary, values.dtype)
            values = rotate(values, cos[home], sin[home])
        return Packed(x.dirty, values, self.rows)

    def results(self, layer: int, attention: Attention, z: Packed, attn: Packed, needed: Tensor) -> Packed:
        """Edits of single heads' contributions to the residual stream."""
        key = ("result", layer, None)
        edited = [w for w, keys in enumerate(self.touched) if key in keys]
        if not edited and key not in self.captured:
            return attn
        z_offsets, results = z.offsets(), {}
        for w in range(len(self.programs)) if key in self.captured else edited:
            whole = z.world(w, self.plain(("z", layer, None)), z_offsets[w], z_offsets[w + 1])

            def edit(result: Tensor, w: int = w) -> Tensor:
                new = self.apply(w, key, result)
                self.keep(key, w, new)
                return new

            delta = head_results_change(attention, whole, edit)
            if w in edited:
                results[w] = (attention.out(whole.flatten(2)) + delta, (delta != 0).any(2).cpu())
        return self.adopt([key], attn, needed, results) if results else attn

    def looked_into(
        self, layer: int, attention: Attention, qkv: tuple[Packed, Packed, Packed], out: Tensor, inside: Sequence[int]
    ) -> Packed:
        """Attention at the tokens `out`: packed in groups of members, or whole for the worlds that look inside."""
        plain = out
        for w in inside:
            plain = plain.clone() if plain is out else plain
            plain[w * self.rows : (w + 1) * self.rows] = False
        bases = (self.plain(("rot_q", layer, None)), self.plain(("rot_k", layer, None)), self.plain(("v", layer, None)))
        z = packed_attention(attention, self.base.layout, plain, qkv, bases, layer in self.base.exposed)
        return self.look(layer, attention, qkv, bases, z, out, inside) if inside else z

    def look(
        self,
        layer: int,
        attention: Attention,
        qkv: tuple[Packed, Packed, Packed],
        bases: tuple[Tensor | None, ...],
        z: Packed,
        out: Tensor,
        inside: Sequence[int],
    ) -> Packed:
        """Attention of the worlds that edit or keep scores or patterns, over all their positions."""
        layout = self.base.layout
        every = torch.arange(layout.queries.width).expand(self.rows, -1)
        allowed = allowed_keys(layout, torch.arange(self.rows), every, attention).to(self.base.device)
        streams = [(stream, stream.offsets(), base) for stream, base in zip(qkv, bases, strict=True)]
        z_base, results = self.plain(("z", layer, None)), {}
        for w in inside:
            q, k, v = (stream.world(w, base, o[w], o[w + 1]).transpose(1, 2) for stream, o, base in streams)

            def show(name: str, x: Tensor, guard: Guard | None, w: int = w) -> Tensor:
                x = self.apply(w, (name, layer, None), x, guard)
                self.keep((name, layer, None), w, x)
                return x

            mixed, _ = exposed_attention(q, k, v, allowed, attention.scaling, show, cap=attention.softcap)
            change = out[w * self.rows : (w + 1) * self.rows]
            if z_base is not None:
                change = change | (mixed != z_base).flatten(2).any(2).cpu()
            results[w] = (mixed, change)
        return self.adopt([(name, layer, None) for name in INSIDE], z, self.needed[layer], results)

    def collect(self, logits: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """The reads of each world, in the order in which they were asked for."""
        out = []
        for w in range(len(self.programs)):
            given = iter([values[w] for values in logits])
            out.append([next(given) if r.name == "logits" else self.kept[w][i] for i, r in enumerate(self.base.reads)])
        return out
