"""Worlds on their way through the network together, as the tokens at which they differ from their base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...models.architecture import Block, rotate
from ...models.attention import exposed_attention
from ...plan.sites import execution_order
from ...program import Edits, Guard, Key
from ..session import head_results_change
from .attention import allowed_keys, packed_attention, reach, seen_by
from .readout import read_out
from .tokens import Packed, tiled

if TYPE_CHECKING:
    from .shared import SharedRun

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

    run_: SharedRun
    worlds: Sequence[Edits]
    is_base: bool = False

    def __post_init__(self) -> None:
        run = self.run_
        self.arch, self.rows, self.tile = run.arch, len(run.inputs), TILE.get(run.device.type, 1 << 30)
        self.kept: list[dict[int, Tensor]] = [{} for _ in self.worlds]
        self.real = run.inputs.mask.repeat(len(self.worlds), 1)
        self.needed = [self.real if self.is_base else n.repeat(len(self.worlds), 1) for n in run.needed]
        self.positions = run.inputs.positions.flatten().to(run.device)
        self.touched = [set(w.by_key) | w.needs_here for w in self.worlds]
        self.captured: dict[Key, list[int]] = {}
        for index, site in enumerate(run.reads):
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
            x = x.to(pos.dirty, self.base(("embed", -1, None)))
            x = Packed(x.dirty, x.values + pos.values, self.rows)
        x = self.visit(("resid_pre", 0, None), x, first)
        depth = len(self.arch.blocks)
        used = {key[1] for keys in [*self.touched, self.captured] for key in keys}
        stop = self.run_.base_stop if self.is_base else self.run_.stop
        for layer in range(min(depth, stop + 1)):
            # No world has left the base yet, and none does in this layer.
            if len(x.values) or layer in used:
                x = self.block(layer, x)
        self.mark_pruned()
        return self.collect(read_out(self, x) if stop == depth else [])

    def entering(self, layer: int) -> Tensor:
        """Tokens whose residual before a layer can matter."""
        return self.needed[layer - 1] if layer else seen_by(self.needed[0], self.arch.causal) & self.real

    def base(self, key: Key) -> Tensor | None:
        """The base's value [b, T, ...] of a site; None while the base itself is computed."""
        return None if self.is_base else self.run_.base[key]

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
        if self.is_base and (always or key in self.run_.recorded):
            self.run_.base[key] = x.world(0, None, 0, len(x.values))
        if key in self.captured:
            offsets = x.offsets()
            for w in range(len(self.worlds)):
                whole = x.world(w, self.base(key), offsets[w], offsets[w + 1])
                self.keep(key, w, whole)

    def keep(self, key: Key, world: int, whole: Tensor) -> None:
        """Keep the parts that are read of one world's value of a site."""
        for index in self.captured.get(key, ()):
            site = self.run_.reads[index]
            part = self.run_.region(site).get(whole) if site.restricted else whole
            self.kept[world][index] = part.clone()

    def edit(self, key: Key, x: Packed, needed: Tensor, edited: Sequence[int]) -> Packed:
        """Apply the plans of some worlds at a site, and find out which tokens they changed."""
        offsets, base = x.offsets(), self.base(key)
        results, masks = [], []
        for w in edited:
            old = x.world(w, base, offsets[w], offsets[w + 1])
            new = self.worlds[w].visit(key, old)
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
            edits = self.worlds[w]
            entries = [edits.audit[index] for key in keys for index in edits.by_key.get(key, ())]
            for entry in entries:
                if entry.intervention.op.always:
                    region = edits.region(entry.intervention.site, entry.intervention.only)
                    change = change.scatter(1, region.cols, True)
            change = change & self.real[here]
            if bool(change.any()) and not bool((change & needed[here]).any()):
                for entry in entries:
                    entry.pruned = True
            updates[w] = (x.dirty[here] | change, new)
        return x.with_worlds(updates)

    def mark_pruned(self) -> None:
        """Interventions above the last thing that is read can reach nothing."""
        depth = len(self.arch.blocks)
        for edits in self.worlds:
            for key, indices in edits.by_key.items():
                for index in indices:
                    if not edits.audit[index].calls and execution_order(key, depth)[0] > self.run_.stop:
                        edits.audit[index].pruned = True

    def block(self, layer: int, x: Packed) -> Packed:
        """One block, from the residual before it to the residual after it."""
        block, needed = self.arch.blocks[layer], self.needed[layer]
        entering = self.entering(layer)
        before: Key = ("resid_pre", 0, None) if layer == 0 else ("resid_post", layer - 1, None)
        z = self.attention(layer, block, self.visit(("attn_in", layer, None), x, entering), needed)
        attn = self.flat_map(lambda v: block.out(v.flatten(1)), z)
        self.count(layer, "out", attn)
        attn = self.results(layer, block, z, attn, needed)
        if block.post1 is not None:
            attn = self.flat_map(block.post1, attn)
        added: dict[Key, Packed] = {("attn_out", layer, None): self.visit(("attn_out", layer, None), attn, needed)}
        if block.mlp is not None:
            if not block.parallel:
                before, x = ("resid_mid", layer, None), self.add(x, before, added)
                x, added = self.visit(before, x, needed), {}
            out = self.mlp(layer, block, self.visit(("mlp_in", layer, None), x, needed), needed)
            added["mlp_out", layer, None] = out
        x = self.add(x, before, added)
        return self.visit(("resid_post", layer, None), x, needed)

    def add(self, x: Packed, key: Key, added: dict[Key, Packed]) -> Packed:
        """The residual x, which is the base's site `key`, with what sublayers add to it.

        Each of them has changed at least the needed tokens that x has.
        """
        dirty = torch.stack([stream.dirty for stream in added.values()]).any(0)
        values = x.to(dirty, self.base(key)).values
        for name, stream in added.items():
            whole = stream if torch.equal(stream.dirty, dirty) else stream.to(dirty, self.base(name))
            values = values + whole.values
        return Packed(dirty, values, self.rows)

    def flat_map(self, function: Callable[[Tensor], Tensor], x: Packed) -> Packed:
        """Apply a function of each token by itself, some tokens at a time."""
        return Packed(x.dirty, tiled(function, x.values, self.tile), self.rows)

    def mlp(self, layer: int, block: Block, x: Packed, needed: Tensor) -> Packed:
        """From the residual that the MLP reads to what it adds."""
        mlp, norm = block.mlp, block.norm2
        assert mlp is not None
        assert norm is not None
        pre_key, post_key = ("mlp_pre", layer, None), ("mlp_post", layer, None)

        def post(hidden: Tensor, read: Tensor) -> Tensor:
            return mlp.act(hidden) if mlp.up is None else mlp.act(hidden) * mlp.up(read)

        def down(hidden: Tensor) -> Tensor:
            return mlp.down(hidden) if block.post2 is None else block.post2(mlp.down(hidden))

        if self.involved(pre_key) or self.involved(post_key):
            hidden = self.visit(pre_key, self.flat_map(lambda v: mlp.pre(norm(v)), x), needed)
            x = x.to(hidden.dirty, self.base(("mlp_in", layer, None)))
            hidden = Packed(hidden.dirty, post(hidden.values, norm(x.values)), self.rows)
            hidden = self.visit(post_key, hidden, needed)
            out = self.flat_map(down, hidden)
        else:

            def whole(v: Tensor) -> Tensor:
                read = norm(v)
                return down(post(mlp.pre(read), read))

            out = self.flat_map(whole, x)
        self.count(layer, "mlp", out)
        return self.visit(("mlp_out", layer, None), out, needed)

    def count(self, layer: int, part: str, x: Packed) -> None:
        """Count the work of a part of a block."""
        if self.run_.meter is not None:
            self.run_.meter.block(layer, part, len(x.values))

    def involved(self, key: Key) -> bool:
        """Whether a site has to be computed by itself."""
        return key in self.captured or key in self.run_.recorded or any(key in keys for keys in self.touched)

    def attention(self, layer: int, block: Block, x: Packed, needed: Tensor) -> Packed:
        """From the residual that attention reads to z."""
        keyed, asking = x, x.to(x.dirty & needed, None)
        normed = self.flat_map(block.norm1, keyed)
        same_tokens = asking.dirty is keyed.dirty or torch.equal(asking.dirty, keyed.dirty)
        entering = self.entering(layer)
        parts = []
        for name, need in (("q", needed), ("k", entering), ("v", entering)):
            source = normed if name != "q" or same_tokens else normed.to(asking.dirty, None)
            part = self.flat_map(getattr(block, name), source)
            self.count(layer, name, part)
            parts.append(self.split_inputs(name, layer, block, keyed, part, need))
        q = self.visit(("q", layer, None), parts[0], needed)
        k = self.visit(("k", layer, None), parts[1], entering)
        v = self.visit(("v", layer, None), parts[2], entering)
        q, k = self.turn(q, block.q_norm), self.turn(k, block.k_norm)
        q = self.visit(("rot_q", layer, None), q, needed)
        k = self.visit(("rot_k", layer, None), k, entering)
        out = (reach(k.dirty | v.dirty, block.window, self.arch.causal) | q.dirty) & self.real & needed
        looks = {(name, layer, None) for name in INSIDE}
        inside = [w for w, keys in enumerate(self.touched) if keys & looks]
        if looks & set(self.captured):
            inside = list(range(len(self.worlds)))
        z = self.attend(layer, block, q, k, v, out, inside)
        return self.visit(("z", layer, None), z, needed)

    def split_inputs(self, name: str, layer: int, block: Block, x: Packed, part: Packed, needed: Tensor) -> Packed:
        """Edits of what single heads read, before the norm: those heads are projected again."""
        key = (f"{name}_input", layer, None)
        edited = [w for w, keys in enumerate(self.touched) if key in keys]
        if not edited and key not in self.captured:
            return part
        projection, offsets = getattr(block, name), x.offsets()
        part_offsets, results = part.offsets(), {}
        for w in range(len(self.worlds)) if key in self.captured else edited:
            whole = x.world(w, self.base(("attn_in", layer, None)), offsets[w], offsets[w + 1])
            copies = whole.unsqueeze(2).expand(-1, -1, projection.heads, -1)
            new = self.worlds[w].visit(key, copies)
            self.keep(key, w, new)
            if new is copies:
                continue
            old = part.world(w, self.base((name, layer, None)), part_offsets[w], part_offsets[w + 1])
            change = (new != copies).flatten(2).any(2)
            projected = projection.per_head(block.norm1(new))
            results[w] = (torch.where(change[:, :, None, None], projected, old), change.cpu())
        return self.adopt([key], part, needed, results) if results else part

    def turn(self, x: Packed, norm: nn.Module | None) -> Packed:
        """Queries or keys as attention uses them: after their norm and the rotary embedding."""
        values = x.values if norm is None else norm(x.values)
        if self.arch.rotary is not None:
            values = rotate(values, *self.arch.rotary(self.positions[x.home()], values.dtype))
        return Packed(x.dirty, values, self.rows)

    def results(self, layer: int, block: Block, z: Packed, attn: Packed, needed: Tensor) -> Packed:
        """Edits of single heads' contributions to the residual stream."""
        key = ("result", layer, None)
        edited = [w for w, keys in enumerate(self.touched) if key in keys]
        if not edited and key not in self.captured:
            return attn
        z_offsets, results = z.offsets(), {}
        for w in range(len(self.worlds)) if key in self.captured else edited:
            whole = z.world(w, self.base(("z", layer, None)), z_offsets[w], z_offsets[w + 1])

            def edit(result: Tensor, w: int = w) -> Tensor:
                new = self.worlds[w].visit(key, result)
                self.keep(key, w, new)
                return new

            delta = head_results_change(block, whole, edit)
            if w in edited:
                results[w] = (block.out(whole.flatten(2)) + delta, (delta != 0).any(2).cpu())
        return self.adopt([key], attn, needed, results) if results else attn

    def attend(
        self, layer: int, block: Block, q: Packed, k: Packed, v: Packed, out: Tensor, inside: Sequence[int]
    ) -> Packed:
        """Attention at the tokens `out`: packed in groups of members, or whole for the worlds that look inside."""
        plain = out
        for w in inside:
            plain = plain.clone() if plain is out else plain
            plain[w * self.rows : (w + 1) * self.rows] = False
        bases = (self.base(("rot_q", layer, None)), self.base(("rot_k", layer, None)), self.base(("v", layer, None)))
        exposed, causal = layer in self.run_.exposed, self.arch.causal
        z = packed_attention(block, self.run_.inputs, plain, (q, k, v), bases, exposed, causal)
        return self.attend_inside(layer, block, (q, k, v), bases, z, out, inside) if inside else z

    def attend_inside(
        self, layer: int, block: Block, qkv: tuple, bases: tuple, z: Packed, out: Tensor, inside: Sequence[int]
    ) -> Packed:
        """Attention of the worlds that edit or keep scores or patterns, over all their positions."""
        inputs = self.run_.inputs
        every = torch.arange(inputs.width).expand(self.rows, -1)
        allowed = allowed_keys(inputs, torch.arange(self.rows), every, block.window, self.arch.causal)
        allowed = allowed.to(self.run_.device)
        streams = [(stream, stream.offsets(), base) for stream, base in zip(qkv, bases, strict=True)]
        z_base, results = self.base(("z", layer, None)), {}
        for w in inside:
            q, k, v = (stream.world(w, base, o[w], o[w + 1]).transpose(1, 2) for stream, o, base in streams)

            def look(name: str, x: Tensor, guard: Guard | None, w: int = w) -> Tensor:
                x = self.worlds[w].visit((name, layer, None), x, guard)
                self.keep((name, layer, None), w, x)
                return x

            mixed = exposed_attention(q, k, v, allowed, block.scaling, look, cap=block.softcap)
            change = out[w * self.rows : (w + 1) * self.rows]
            if z_base is not None:
                change = change | (mixed != z_base).flatten(2).any(2).cpu()
            results[w] = (mixed, change)
        return self.adopt([(name, layer, None) for name in INSIDE], z, self.needed[layer], results)

    def collect(self, logits: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """The reads of each world, in the order in which they were asked for."""
        out = []
        for w in range(len(self.worlds)):
            given = iter([values[w] for values in logits])
            out.append([next(given) if r.name == "logits" else self.kept[w][i] for i, r in enumerate(self.run_.reads)])
        return out
