"""The attention seam: what a model's attention does with a cache whose heads keep different keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from hooks import Model, ModelError
from interp.kv.cache import Evicted, Kept
from interp.kv.policies import Policy
from interp.kv.view import View, pattern_of

MASKED = 1 << 22
"""Entries of a mask that are made at a time, where heads see different keys."""


class Attending:
    """One cache in force on its model: it says what calls feed, answers attention, and lets keys go.

    Attributes:
        cache: the cache.
        policy: what scores keys; None where none is scored.
        prefilling: whether keys are scored and evicted after each call; keeping: whether they are scored alone.
        stabilizers: how many of the last tokens are kept in any case, of this call.
        due: the layers that the call has not reached yet, which get its keys once each.
        real: bool [B, T], the tokens of the call that are no padding; index: int64 [B, T], their numbers;
        positions: int64 [B, T], what the model is told of them.
    """

    def __init__(self, cache: Evicted, policy: Policy | None) -> None:
        self.cache, self.policy = cache, policy
        self.model: Model = cache.model
        self.prefilling, self.keeping, self.stabilizers = False, False, 0
        self.due: set[int] = set()
        self.real = self.index = self.positions = torch.zeros(0)
        self.hidden: dict[int, tuple[Tensor, dict[str, Any]]] = {}

    # -- the call

    def called(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the model runs: what is fed, and at which positions."""
        cache: Any = self.cache
        if kwargs.get("past_key_values") is not cache:
            raise ModelError(
                "the model is called without the cache that is attended to: pass past_key_values=cache, by "
                "keyword, or leave "
                "ip.kv.attending()"
            )
        fed = args[0] if args else kwargs.get("input_ids")
        fed = kwargs.get("inputs_embeds") if fed is None else fed
        if fed is None:
            raise ModelError("the model is called without input_ids or inputs_embeds")
        rows, count = fed.shape[:2]
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            if mask.shape[1] not in (count, cache.seen + count):
                raise ModelError(
                    f"an attention mask of {mask.shape[1]} columns for {cache.seen} cached tokens and {count} "
                    f"that are fed"
                )
            real = mask[:, -count:].bool()
        elif mask is None:
            real = torch.ones(rows, count, dtype=torch.bool)
        else:
            raise ModelError("with an evicted cache, an attention mask is two-dimensional: which tokens are real")
        if len({layer.seen for layer in cache.layers}) > 1:
            raise ModelError(
                "a call ended halfway, and some layers of the cache hold its tokens and others do not: prefill it anew"
            )
        self.real, self.due = real.to(self.model.device), set(range(len(cache.layers)))
        first = cache.layers[0]
        if first.is_initialized and len(first.tokens) != rows:
            raise ModelError(f"the cache has {len(first.tokens)} rows, and {rows} are fed")
        before = first.tokens[:, None] if first.is_initialized else 0
        self.index = (before + self.real.cumsum(1) - 1).clamp_min(0)
        self.positions = self.index
        if cache.eviction.positions == "slot":
            width = max(layer.width for layer in cache.layers)
            self.positions = (width + torch.arange(count, device=self.model.device)).expand(rows, -1)
        return args, {**kwargs, "position_ids": self.positions}

    def entering(self, layer: int) -> Callable[..., None]:
        """Before a layer's attention runs: what it reads, for policies that ask."""

        def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.policy is not None and self.policy.needs_hidden:
                read = args[0] if args else kwargs["hidden_states"]
                self.hidden[layer] = (read, kwargs)

        return note

    # -- keys and values

    def enter(self, layer: Kept, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add what is fed to a layer, and return what is attended to.

        Raises:
            ModelError: nothing was fed to this cache's own model, or the layer has its keys already.
        """
        if layer.layer not in self.due:
            raise ModelError(
                f"layer {layer.layer} adds to a cache that is attended to by {self.model!r}, which was not called: it "
                "was made for that model, and another one is called with it"
            )
        self.due.remove(layer.layer)
        if self.cache.eviction.positions == "slot":
            layer.append(self.turned(layer.layer, keys, self.positions, back=True), values, self.index, self.real)
            return self.at_slots(layer), layer.values  # type: ignore[return-value]
        layer.append(keys, values, self.index, self.real)
        return layer.keys, layer.values  # type: ignore[return-value]

    def at_slots(self, layer: Kept) -> Tensor:
        """A layer's keys at their slots: together, the last of them right before what is fed next."""
        count = self.positions.shape[1]
        stop = int(self.positions[0, -1]) + 1 if count else layer.width
        slots = torch.arange(stop - layer.width, stop, device=layer.keys.device)  # type: ignore[union-attr]
        return self.turned(layer.layer, layer.keys, slots.expand(len(layer.index), -1))  # type: ignore[arg-type]

    def turned(self, layer: int, x: Tensor, positions: Tensor, back: bool = False) -> Tensor:
        """Keys or queries [B, h, N, D] turned to positions [B, N], or back from there."""
        rotary = self.model.architecture.blocks[layer].attention.rotary
        if rotary is None:
            return x
        wide = torch.promote_types(x.dtype, torch.float32)
        cos, sin = rotary(positions, wide)
        if back:
            size = cos.square() + sin.square()  # angles may be scaled, and are rounded
            cos, sin = cos / size, -sin / size
        return rotary.turn(x.transpose(1, 2).to(wide), cos, sin).transpose(1, 2).to(x.dtype)

    # -- attention

    def attend(self, layer: int) -> Callable[..., tuple[Tensor, None]]:
        """A layer's attention function, over whatever each head keeps."""
        attention = self.model.architecture.blocks[layer].attention

        def function(
            module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, own: Any, **given: Any
        ) -> tuple[Tensor, None]:
            cache: Any = self.cache
            kept: Kept = cache.layers[layer]
            if given.get("position_bias") is not None:
                raise ModelError(f"attention of layer {layer} has a bias of its own, which a cache here does not know")
            sinks = attention.sink if given.get("s_aux") is None else given["s_aux"]
            scaling = given.get("scaling")
            scaling = attention.scaling if scaling is None else scaling
            view = View(self, layer, module, q, k, v, scaling, attention.softcap, attention.window, sinks)
            z = self.mixed(view)
            if self.policy is not None:
                self.after(kept, view)
            return z.transpose(1, 2), None

        return function

    def allowed(self, kept: Kept, window: int | None, queries: slice) -> Tensor:
        """bool [B, 1 or K, t, N]: the kept keys that some of the fed queries may attend to."""
        count, width = self.real.shape[1], kept.width
        columns = torch.arange(width, device=self.real.device)
        own = torch.arange(width - count, width, device=self.real.device)[queries, None]
        seen = (columns <= own)[None, None]
        if not kept.plain:
            # A query of padding sees itself, so that no row is empty.
            seen = seen & (kept.valid[:, :, None] | (columns == own))
        if window is not None:
            near = kept.index[:, :, None] > self.index[:, None, queries, None] - window
            seen = seen & (near | (columns == own))
        return seen

    def mixed(self, view: View) -> Tensor:
        """What a layer's queries make of its keys and values, [B, H, T, D]."""
        kept: Kept = self.cache.layers[view.layer]  # type: ignore[attr-defined]
        q, k, v, scaling, groups = view.queries, view.keys, view.values, view.scaling, view.groups
        count, width, fused = q.shape[2], k.shape[2], view.cap is None and view.sinks is None
        plain = kept.plain and view.window is None and fused
        if plain and (count == 1 or count == width):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, scale=scaling, is_causal=count > 1, enable_gqa=groups > 1
            )
        heads = 1 if plain else q.shape[1]
        step = max(1, MASKED // (len(q) * heads * width))
        if groups > 1:
            k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        pieces = []
        for start in range(0, count, step):
            some = slice(start, start + step)
            allowed = self.allowed(kept, view.window, some)
            if allowed.shape[1] > 1:
                allowed = allowed.repeat_interleave(groups, 1)
            if fused:
                pieces.append(
                    torch.nn.functional.scaled_dot_product_attention(
                        q[:, :, some], k, v, attn_mask=allowed, scale=scaling
                    )
                )
            else:
                scores = q[:, :, some] @ k.transpose(2, 3) * scaling
                pieces.append(pattern_of(scores, allowed, view.cap, view.sinks).to(q.dtype) @ v)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)

    # -- scores

    def after(self, kept: Kept, view: View) -> None:
        """Score what a layer holds now, and let go of what does not fit."""
        eviction, budgets = self.cache.eviction, self.cache.budgets
        decoding = eviction.decoding and not self.prefilling
        if not (self.prefilling or decoding):
            return
        assert self.policy is not None
        kept.scores = self.policy.checked(view)
        if budgets is None or self.keeping:
            return
        mine = budgets[kept.layer].to(kept.scores.device)
        most = kept.valid.sum(-1)
        if self.prefilling or bool((most >= mine + eviction.every).any()):
            kept.evict(mine, eviction, self.stabilizers if self.prefilling else eviction.stabilizers)


@contextmanager
def attending(cache: Any, policy: Policy | None = None) -> Iterator[Attending]:
    """Within it, a model attends to an evicted cache: calls of your own, and `generate(..., past_key_values=cache)`.

    Args:
        cache: from `prefill`.
        policy: what scores keys where they are evicted while decoding; by default the one that prefill used.

    Raises:
        ModelError: it is no such cache, is attended to already, or a plan is held on its model.
    """
    if not isinstance(cache, Evicted):
        raise ModelError(f"ip.kv.attending() takes the cache that ip.kv.prefill() returned, not {type(cache).__name__}")
    if cache.attending is not None:
        raise ModelError("this cache is attended to already: leave the outer ip.kv.attending() first")
    model = cache.model
    if hasattr(model.tool, "place_hooks"):
        raise ModelError(
            f"{model.tool.name} computes attention itself, where nobody can evict a key: wrap the model of transformers"
        )
    if model.holds:
        raise ModelError("a plan is held on the model: leave apply() first, it does not know which keys are kept")
    state = Attending(cache, policy or getattr(cache, "policy", None))
    architecture = model.architecture
    with ExitStack() as stack:
        stack.callback(setattr, cache, "attending", None)
        cache.attending = state
        handle = model.module.register_forward_pre_hook(state.called, with_kwargs=True, prepend=True)
        stack.callback(handle.remove)
        for layer, block in enumerate(architecture.blocks):
            module = block.attention.module
            stack.enter_context(architecture.swap_attention(module, state.attend(layer)))
            stack.callback(module.register_forward_pre_hook(state.entering(layer), with_kwargs=True).remove)
        yield state
