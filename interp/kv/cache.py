"""A `transformers` cache that keeps some keys and values of each layer and head, and knows which tokens they are of."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hooks import Model, ModelError
from interp.kv.eviction import Eviction, choose_kept

TENSORS = ("keys", "values", "index", "valid", "scores")


class Kept:
    """What one layer keeps, [B, K, N] keys in the order of the text; heads that keep fewer have keys that are not
    valid.

    Attributes:
        keys, values: [B, K, N, D]; keys as they attend, or before rotation where positions are slots.
        index: int64 [B, K, N], the number of each key's token in its row, which never moves.
        valid: bool [B, K, N].
        scores: [B, K, N], what a policy gave them; zeros where none did.
        tokens: int64 [B], real tokens of each row so far, kept or not.
        seen: columns of the text so far, padding included.
        fresh: how many of the last columns came since keys were evicted last.
    """

    def setup(self, owner: Any, layer: int) -> None:
        """Begin empty."""
        self.owner, self.layer = owner, layer
        self.forget()

    def forget(self) -> None:
        """Be empty again."""
        self.keys = self.values = None
        self.index = self.valid = self.scores = self.tokens = torch.zeros(0)
        self.seen = self.fresh = 0
        self.is_initialized = False

    @property
    def width(self) -> int:
        """How many keys N there are for each head, at most."""
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def plain(self) -> bool:
        """Whether all heads and rows keep as many keys, all of them valid."""
        return self.keys is None or bool(self.valid.all())

    def append(self, keys: Tensor, values: Tensor, index: Tensor, real: Tensor) -> None:
        """Add the keys and values [B, K, T, D] of tokens, of which int64 [B, T] are the numbers and bool [B, T]
        real.
        """
        rows, heads, count, _ = keys.shape
        shape = (rows, heads, count)
        new = {
            "keys": keys,
            "values": values,
            "index": index[:, None].expand(shape),
            "valid": real[:, None].expand(shape),
            "scores": torch.zeros(shape, device=keys.device),
        }
        empty = self.keys is None
        for name, value in new.items():
            setattr(self, name, value.clone() if empty else torch.cat([getattr(self, name), value], 2))
        self.tokens = real.sum(1) if empty else self.tokens + real.sum(1)
        self.seen, self.fresh, self.is_initialized = self.seen + count, self.fresh + count, True
        self.dtype, self.device = keys.dtype, keys.device

    def keep(self, at: Tensor, valid: Tensor) -> None:
        """Go on with some keys, int64 [B, K, n], of which bool [B, K, n] are valid."""
        for name in TENSORS:
            old = getattr(self, name)
            where = at if old.ndim == 3 else at[..., None].expand(-1, -1, -1, old.shape[-1])
            setattr(self, name, old.gather(2, where))
        self.valid, self.fresh = self.valid & valid, 0

    def evict(self, budgets: Tensor, eviction: Eviction, stabilizers: int) -> None:
        """Let go of what does not fit budgets int64 [K]."""
        if not bool((self.valid.sum(-1) > budgets.to(self.valid.device)).any()):
            return
        recent = self.index >= (self.tokens - stabilizers)[:, None, None]
        forced = self.valid & (recent | (self.index < eviction.sinks))
        self.keep(*choose_kept(self.scores, self.valid, forced, budgets, eviction.across))

    # -- what transformers asks of a layer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values, and return those that are attended to."""
        return self.owner.enter(self, key_states, value_states)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is to be made ready."""

    def get_seq_length(self) -> int:
        """Columns of the text so far, kept or not: `generate` feeds what comes after them."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys there will be, and the column of the text that the first would be if they were the last
        ones.
        """
        return self.width + int(query_length), self.seen - self.width

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Be empty again."""
        self.forget()

    def _of_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.keys is not None:
            for name in (*TENSORS, "tokens"):
                setattr(self, name, change(getattr(self, name)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with other rows, as beams do."""
        self._of_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._of_rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with some rows."""
        self._of_rows(lambda x: x[indices.to(x.device) if isinstance(indices, Tensor) else indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, -n of n of them, none of which may have been before the last eviction.

        Raises:
            ModelError: some were: what was evicted then would have to come back; or the number is positive, which once
                meant how many are left.
        """
        if tokens_to_remove > 0:
            raise ModelError(f"crop(-n) takes n tokens back, and {tokens_to_remove} is positive")
        count = -int(tokens_to_remove)
        if count > self.fresh:
            raise ModelError(
                f"{count} tokens are to be taken back from a cache that evicted keys {self.fresh} tokens ago, "
                f"and what was "
                "evicted then is gone: generate without an assistant, or without eviction while decoding"
            )
        if count and self.keys is not None:
            self.tokens = self.tokens - self.valid[:, 0, -count:].sum(1)
            left = self.width - count
            for name in TENSORS:
                setattr(self, name, getattr(self, name)[:, :, :left])
            self.seen, self.fresh = self.seen - count, self.fresh - count


class Evicted:
    """A cache of `Kept` layers; `EvictedCache` is this and a `transformers.Cache`.

    Attributes:
        model: whose keys and values these are.
        eviction, budgets: what is kept.
        attending: what is done with a call's keys where the attention seam is in place; None outside.
        offset: by how much positions that are fed are less than the tokens' numbers, where positions are slots.
    """

    def setup(self, model: Model, eviction: Eviction) -> None:
        """Begin empty."""
        self.model, self.eviction, self.budgets = model, eviction, eviction.budgets(model)
        self.attending: Any = None
        for layer, kept in enumerate(self.layers):  # type: ignore[attr-defined]
            kept.setup(self, layer)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A cache of the same model with keys and values of its own, to ask several questions of one context.

        Raises:
            ModelError: it is attended to.
        """
        if self.attending is not None:
            raise ModelError("this cache is attended to: leave ip.kv.attending() before it is copied")
        made = memo[id(self)] = object.__new__(type(self))
        memo |= {id(one): one for one in (self.model, getattr(self, "policy", None))}
        for name, value in vars(self).items():
            setattr(made, name, deepcopy(value, memo))
        return made

    def enter(self, layer: Kept, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values to a layer, and return those that are attended to.

        Raises:
            ModelError: the model's own attention would attend to the wrong keys.
        """
        attention = self.model.architecture.blocks[layer.layer].attention
        expected = (attention.k.heads, attention.k.width)
        if (keys.shape[1], keys.shape[3]) != expected:
            raise ModelError(
                f"this cache was made for {self.model!r}, whose layer {layer.layer} has {expected[0]} "
                f"key/value heads of width "
                f"{expected[1]}; it was given keys of {keys.shape[1]} heads of width {keys.shape[3]}: another model's"
            )
        if self.attending is not None:
            return self.attending.enter(layer, keys, values)
        why = self.unlike_plain if layer.layer == 0 else ""
        if why:
            raise ModelError(
                f"this cache is attended to through ip.kv only ({why}): call the model within ip.kv.attending(cache)"
            )
        index = torch.arange(keys.shape[2], device=keys.device).expand(len(keys), -1)
        index = index + layer.tokens[:, None] if layer.is_initialized else index
        layer.append(keys, values, index, torch.ones_like(index, dtype=torch.bool))
        return layer.keys, layer.values  # type: ignore[return-value]

    @property
    def unlike_plain(self) -> str:
        """Why the model's own attention would attend to the wrong keys; empty where it would not."""
        layers: list[Kept] = self.layers  # type: ignore[attr-defined]
        if not all(layer.plain for layer in layers):
            return "heads or rows keep different keys"
        if len({layer.width for layer in layers}) > 1:
            return "its layers keep different numbers of keys"
        if any(block.attention.window is not None for block in self.model.architecture.blocks):
            return "its layers have windows"
        if self.eviction.positions == "slot":
            return "positions are slots"
        return "keys are evicted while decoding" if self.eviction.decoding else ""

    @property
    def seen(self) -> int:
        """Columns of the text so far, kept or not."""
        return self.layers[0].seen  # type: ignore[attr-defined]

    @property
    def bytes(self) -> int:
        """What the keys and values take."""
        kept = [x for layer in self.layers for x in (layer.keys, layer.values) if x is not None]  # type: ignore[attr-defined]
        return sum(x.numel() * x.element_size() for x in kept)

    def kept(self, row: int = 0) -> Tensor:
        """bool [L, K, S]: which tokens of a row each layer and head keeps, of as many as there are columns."""
        found = torch.zeros(len(self.layers), self.layers[0].index.shape[1], self.seen, dtype=torch.bool)  # type: ignore[attr-defined]
        for layer, one in enumerate(self.layers):  # type: ignore[attr-defined]
            head, at = one.valid[row].cpu().nonzero(as_tuple=True)
            found[layer, head, one.index[row].cpu()[head, at]] = True
        return found

    def __repr__(self) -> str:
        widths = sorted({layer.width for layer in self.layers})  # type: ignore[attr-defined]
        size = f"{widths[0]}" if len(widths) == 1 else f"{widths[0]} to {widths[-1]}"
        return f"EvictedCache({size} of {self.seen} tokens, {self.bytes / 1e6:.3g} MB)"


@lru_cache(maxsize=1)
def _classes() -> tuple[type, type]:
    from transformers.cache_utils import Cache, CacheLayerMixin

    class KeptLayer(Kept, CacheLayerMixin):
        is_sliding = False
        is_croppable = True

    class EvictedCache(Evicted, Cache):
        pass

    return KeptLayer, EvictedCache


def new_cache(model: Model, eviction: Eviction) -> Any:
    """An empty `EvictedCache`, which is a `transformers.Cache`, for a model."""
    layer, cache = _classes()
    made = cache(layers=[layer() for _ in model.architecture.blocks])
    made.setup(model, eviction)
    return made
