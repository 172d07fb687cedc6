"""The last tokens of a text, run again in many worlds against keys and values of the tokens before them.

Worlds that remove cached keys differ in what the tail's queries may attend to and in nothing else, so the prefix is run
once, by the model itself, and the tail's blocks on as many worlds as fit, from the layer on at which they differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .errors import InputsError
from .models.attention import attention_pattern, softcap
from .models.blocks import Attention, Block
from .models.network import Network
from .plan.inputs import Inputs
from .plan.plan import World
from .plan.sites import Site
from .record import choose, record


@dataclass(frozen=True, eq=False)
class Seen:
    """What one layer's attention makes of the tail, in one world.

    Attributes:
        resid: [n, M], the residual stream before the block.
        q: [n, H, D], the queries as they attend; k and v: [T, K, D], all keys and values that they may attend to.
        scores: [K, n, G, T], of the G query heads of each key/value head, -inf where a key may not be attended to.
        pattern: [K, n, G, T], their softmax, which sums to less than 1 where heads have sinks.
        z: [n, K, G, D], what it mixes.
    """

    resid: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor
    pattern: Tensor
    z: Tensor


class Tail:
    """The tokens from `start` on of one row of a decoder, against the keys and values before them.

    Args:
        network: the wrapped model.
        ids: int64 [T], the tokens of the row.
        start: the first token of the tail.
        wanted: the positions whose logits are read, in increasing order; tokens after the last are left out.

    Attributes:
        logits: [m, V] of the wanted positions, as the model itself gives them.

    Raises:
        InputsError: `start` or `wanted` do not lie within the text.
    """

    def __init__(self, network: Network, ids: Tensor, start: int, wanted: Sequence[int]) -> None:
        wanted = list(wanted)
        if not 0 < start < len(ids):
            raise InputsError(f"a tail begins after the first token and before the end, not at {start} of {len(ids)}")
        if not wanted or wanted != sorted(set(wanted)) or wanted[0] < start or wanted[-1] >= len(ids):
            raise InputsError(f"positions that are read are increasing, from {start} to {len(ids) - 1}, not {wanted}")
        self.network, self.start, self.wanted = network, start, wanted
        self.total, self.n = wanted[-1] + 1, wanted[-1] + 1 - start
        self.inputs = Inputs.of(ids)
        layers = range(network.n_layers)
        reads = [Site(name, layer) for layer in layers for name in ("k", "v")]
        reads += [Site("resid_pre", 0), Site("logits", pos=tuple(wanted))]
        (found,) = record(network, [World(self.inputs)], reads, executor="batched", together=True)
        *cached, stream, logits = (value[0] for value in found.values)
        self.embedded, self.logits = stream[start : self.total], logits
        positions = torch.arange(len(ids), device=network.device)[None]  # rotary angles may depend on the longest
        self._angles = [
            None if block.attention.rotary is None else block.attention.rotary(positions, stream.dtype)
            for block in self.blocks
        ]
        self.keys = [self._turned(layer, cached[2 * layer][:start], 0, start) for layer in layers]
        self.values = [cached[2 * layer + 1][:start] for layer in layers]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of the model."""
        return self.network.architecture.blocks

    def unfit(self) -> str:
        """Why the tail would not be the model's own as the model is now; empty where it is, to rounding."""
        choice = choose(self.network, [World(self.inputs)])
        if choice.executor != "shared":
            return choice.reason
        wide = torch.promote_types(self.logits.dtype, torch.float32)
        mine, theirs = self.run()[0].to(wide), self.logits.to(wide)
        limit = {torch.float64: 1e-8, torch.float32: 1e-3}.get(self.logits.dtype, 0.1)
        apart = float((mine - theirs).abs().max() / theirs.abs().max().clamp_min(1))
        return "" if apart <= limit else f"the model's own forward is {apart:.1e} away from its description"

    # -- whole worlds

    def run(self, bias: Tensor | None = None) -> Tensor:
        """Logits [W, m, V] of worlds.

        Args:
            bias: [W, L, K, T], added to the scores of the tail's queries: -inf where a key is removed, the logarithm of
                a gate elsewhere; or [W, L, K, n, T], of each query its own. None for the one world without.
        """
        count = 1 if bias is None else len(bias)
        x = self.embedded.expand(count, -1, -1)
        for layer in range(len(self.blocks)):
            x = self._block(layer, x, None if bias is None else bias[:, layer])
        return self._read(x)

    def seen(self, bias: Tensor | None = None) -> tuple[list[Seen], Tensor]:
        """What every layer's attention sees in one world, and its logits [m, V].

        Args:
            bias: [L, K, T] as in `run`.
        """
        x, layers = self.embedded[None], []
        for layer in range(len(self.blocks)):
            own = None if bias is None else bias[None, layer]
            pre = x
            q, k, v = self._project(layer, x)
            scores, pattern, z = self._attend(layer, q, k, v, own)
            keys, values = torch.cat([self.keys[layer], k[0]]), torch.cat([self.values[layer], v[0]])
            mine = z[0]  # what goes on is made of this tensor, so that a gradient at it is the whole one
            layers.append(Seen(pre[0], q[0], keys, values, scores[:, 0], pattern[:, 0], mine))
            x = self._after(layer, pre, mine[None].flatten(2, 3))
        return layers, self._read(x)[0]

    # -- worlds that differ in one unit of one layer

    def without_each(
        self, layer: int, seen: Seen, chunk: int, keys: Tensor | None = None, bias: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Remove every key of the prefix from one layer, for one key/value head at a time.

        Removing key i from a query that gives it weight a_i leaves z + a_i / (1 - a_i) (z - v_i), with sinks and
        without. Keys that no query of
        the tail attends to are left out: removing them changes nothing.

        Args:
            layer: which.
            seen: what it sees in the world from which keys are removed.
            chunk: worlds at a time.
            keys: bool [start], which are removed; None for all.
            bias: [L, K, T] as in `run`, of the world from which keys are removed.

        Yields:
            int64 [w] key/value heads, int64 [w] keys, and logits [w, m, V].
        """
        weight = seen.pattern[..., : self.start]
        attended = (weight != 0).flatten(1, 2).any(1)
        heads, where = (attended if keys is None else attended & keys.to(attended.device)).nonzero(as_tuple=True)
        if not len(heads):
            return
        for some_heads, some_keys in zip(heads.split(chunk), where.split(chunk), strict=True):
            z = self._removed(layer, seen, some_heads, some_keys)
            yield some_heads, some_keys, self.from_z(layer, seen.resid, z, bias)

    def _removed(self, layer: int, seen: Seen, heads: Tensor, keys: Tensor) -> Tensor:
        """z [w, n, H, D] of worlds in which one key is removed for one key/value head each."""
        rows = torch.arange(len(heads), device=heads.device)
        weight = seen.pattern[heads, :, :, keys][..., None]  # [w, n, G, 1]
        value = seen.v[keys, heads][:, None, None]  # [w, 1, 1, D]
        old = seen.z[:, heads].transpose(0, 1)  # [w, n, G, D]
        left = 1 - weight
        new = old + weight / left.clamp_min(1e-2) * (old - value)
        # Where nearly all attention was on the key, the formula divides a difference of nearly equal numbers.
        sharp = (left < 1e-2).flatten(1).any(1).nonzero().flatten()
        if len(sharp):
            scores = seen.scores[heads[sharp]]  # [s, n, G, T], a copy
            scores[torch.arange(len(sharp), device=keys.device), :, :, keys[sharp]] = -torch.inf
            sinks = self._sinks(layer)
            pattern = attention_pattern(scores, None if sinks is None else sinks[heads[sharp], 0]).to(seen.v.dtype)
            new[sharp] = torch.einsum("sngt,tsd->sngd", pattern, seen.v[:, heads[sharp]])
        z = seen.z.expand(len(heads), -1, -1, -1, -1).clone()
        z[rows, :, heads] = new
        return z.flatten(2, 3)

    def from_z(self, layer: int, resid: Tensor, z: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits [W, m, V] of worlds that have z [W, n, H, D] in a layer, before which the stream is `resid` [n, M].

        Above it they are under `bias` [L, K, T], as in `run`.
        """
        x = self._after(layer, resid.expand(len(z), -1, -1), z)
        for later in range(layer + 1, len(self.blocks)):
            x = self._block(later, x, None if bias is None else bias[None, later])
        return self._read(x)

    # -- blocks

    @cached_property
    def _read_at(self) -> list[int]:
        return [position - self.start for position in self.wanted]

    def _read(self, x: Tensor) -> Tensor:
        """Logits of the residual stream [W, m, M] after the last block, which has the wanted tokens alone."""
        arch = self.network.architecture
        return arch.logits(arch.norm(x.flatten(0, 1))).unflatten(0, x.shape[:2])

    def _block(self, layer: int, x: Tensor, bias: Tensor | None) -> Tensor:
        """The residual stream [W, n, M] after a block; after the last one at the wanted tokens alone."""
        q, k, v = self._project(layer, x)
        if bias is None and self._fusable(layer, q):
            return self._after(layer, x, self._mix(layer, q, k, v))
        _, _, z = self._attend(layer, q, k, v, bias)
        return self._after(layer, x, z.flatten(2, 3))

    def _project(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [W, n, H, D], keys and values [W, n, K, D], as they attend."""
        around = self.blocks[layer].of_attention
        normed = around.read(x)
        q, k, v = (getattr(self.blocks[layer].attention, name)(normed) for name in "qkv")
        attention = self.blocks[layer].attention
        q = self._turn(layer, q if attention.q_norm is None else attention.q_norm(q), self.start, self.total)
        return q, self._turned(layer, k, self.start, self.total), v

    def _turned(self, layer: int, k: Tensor, start: int, stop: int) -> Tensor:
        norm = self.blocks[layer].attention.k_norm
        return self._turn(layer, k if norm is None else norm(k), start, stop)

    def _turn(self, layer: int, x: Tensor, start: int, stop: int) -> Tensor:
        angles = self._angles[layer]
        if angles is None:
            return x
        rotary = self.blocks[layer].attention.rotary
        assert rotary is not None
        return rotary.turn(x, *(a[0, start:stop] for a in angles))

    def _attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores and pattern [K, W, n, G, T], and z [W, n, K, G, D], of queries over the prefix's keys and their
        own.
        """
        attention = self.blocks[layer].attention
        asked, own = self._own_scores(attention, q, k)
        shared = (asked.flatten(1, 3) @ self.keys[layer].permute(1, 2, 0)).unflatten(1, asked.shape[1:4])
        scores = torch.cat([shared, own], -1) * attention.scaling
        if attention.softcap is not None:
            scores = softcap(scores, attention.softcap)
        if bias is not None:
            own = bias.transpose(0, 1)  # of every query, or of each its own
            scores = scores + (own[:, :, None, None] if own.ndim == 3 else own[:, :, :, None])
        scores = scores.masked_fill(~self._allowed(attention, 0), -torch.inf)
        pattern = attention_pattern(scores, self._sinks(layer)).to(v.dtype)
        z = (pattern[..., : self.start].flatten(1, 3) @ self.values[layer].transpose(0, 1)).unflatten(
            1, asked.shape[1:4]
        )
        z = z + (pattern[..., self.start :].flatten(2, 3) @ v.permute(2, 0, 1, 3)).unflatten(2, asked.shape[2:4])
        return scores, pattern, z.permute(1, 2, 0, 3, 4)

    def _own_scores(self, attention: Attention, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [K, W, n, G, D] by key/value head, and their unscaled scores with the tail's keys, [K, W, n, G,
        n].
        """
        count = attention.k.heads
        asked = q.unflatten(2, (count, attention.q.heads // count)).permute(2, 0, 1, 3, 4)
        own = asked.flatten(2, 3) @ k.permute(2, 0, 3, 1)
        return asked, own.unflatten(2, asked.shape[2:4])

    def _fusable(self, layer: int, q: Tensor) -> bool:
        """Whether a kernel that gives its log-sum-exp computes the prefix's part: no cap, and all of it in sight."""
        attention = self.blocks[layer].attention
        seen_whole = attention.window is None or attention.window >= self.total
        return q.device.type == "cpu" and attention.softcap is None and seen_whole and not torch.is_grad_enabled()

    def _mix(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """z [W, n, H, D]: attention over the prefix, by one kernel for all worlds, and over the tail, merged."""
        attention = self.blocks[layer].attention
        asked, own = self._own_scores(attention, q, k)
        keys, values = (x[layer].transpose(0, 1)[None] for x in (self.keys, self.values))
        z, mass = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            asked.flatten(1, 3)[None], keys, values, 0.0, False, attn_mask=None, scale=attention.scaling
        )
        z, mass = z[0].unflatten(1, asked.shape[1:4]), mass[0].unflatten(1, asked.shape[1:4])[..., None]
        own = (own * attention.scaling).masked_fill(~self._allowed(attention, self.start), -torch.inf)
        own_mass = own.logsumexp(-1, keepdim=True)
        mine = (own - own_mass).exp().flatten(2, 3) @ v.permute(2, 0, 1, 3)
        share = torch.sigmoid(mass.to(own_mass.dtype) - own_mass).to(z.dtype)
        z = torch.lerp(mine.unflatten(2, asked.shape[2:4]).to(z.dtype), z, share)
        sinks = self._sinks(layer)
        if sinks is not None:
            z = z * torch.sigmoid(torch.logaddexp(mass.to(own_mass.dtype), own_mass) - sinks).to(z.dtype)
        return z.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def _sinks(self, layer: int) -> Tensor | None:
        """The sinks of a layer's heads as scores [K, W, n, G, T] have them, [K, 1, 1, G, 1]."""
        attention = self.blocks[layer].attention
        count = attention.k.heads
        return None if attention.sink is None else attention.sink.view(count, 1, 1, attention.q.heads // count, 1)

    def _allowed(self, attention: Attention, first: int) -> Tensor:
        """bool [n, 1, T - first]: the keys from `first` on that the tail's queries may attend to."""
        own = torch.arange(self.start, self.total, device=self.network.device)[:, None, None]
        keys = torch.arange(first, self.total, device=self.network.device)
        allowed = keys <= own
        return allowed if attention.window is None else allowed & (keys > own - attention.window)

    def _after(self, layer: int, x: Tensor, z: Tensor) -> Tensor:
        """The residual stream after a block, given that before it and z [W, n, H, D]."""
        block = self.blocks[layer]
        if layer == len(self.blocks) - 1:
            x, z = x[:, self._read_at], z[:, self._read_at]
        before = x
        for sublayer in block.sublayers:
            if isinstance(sublayer.fn, Attention):
                out = sublayer.fn.out(z.flatten(2))
            else:
                inside = sublayer.read(before if block.parallel else x)
                out = sublayer.fn(inside.flatten(0, 1)).unflatten(0, inside.shape[:2])
            x = sublayer.summed(x + sublayer.added(out))
        return x
