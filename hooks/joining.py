"""At which layer worlds that are decoded side by side part: before it they are one, and are computed once.

The call stays the caller's own up to that block, where every row is put in place of those of all worlds. So the blocks
before it cost what they cost without worlds, and their part of the cache has the caller's rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .backends import caching, frames, seams
from .models.hook import Hook
from .models.network import Network
from .plan.plan import Plan

CALLED = frozenset(
    {
        *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache"),
        *("cache_position", "logits_to_keep", "return_dict", "pixel_values", "image_sizes", "image_grid_thw"),
        *("mm_token_type_ids", "token_type_ids", "mm_encoder_outputs", "pixel_attention_mask"),
    }
)
"""What a model may be called with: nothing else would be of rows, or comes back by layer."""
BLOCK = frozenset(
    {
        *("hidden_states", "attention_mask", "position_ids", "past_key_values", "layer_past", "use_cache"),
        *("cache_position", "position_embeddings", "output_attentions", "encoder_hidden_states"),
        *("encoder_attention_mask",),
    }
)
"""What a block may take, of which `widened` knows the rows."""
RECORDED = ("output_hidden_states", "output_attentions", "output_router_logits")
BY_ROWS = frozenset({"pos_embed", "router", "expert_out"})
"""Sites that a pass is shown by the rows of all worlds wherever they are."""


def parting(plans: Iterable[Plan], blocks: int) -> int:
    """The first block in which worlds may differ, of those that follow some plans: 0 where they do from the start."""
    first = blocks - 1
    for plan in plans:
        for item in plan:
            places = [item.site] + [read.site for read in item.own_reads if read.site is not None]
            for number, place in enumerate(places):
                name, layer, stack = place.key
                if number and stack is None and name not in BY_ROWS:
                    continue  # it is read, and is one value for all
                if stack is not None or (layer < 0 and name not in ("ln_final", "logits")):
                    return 0
                first = first if layer < 0 else min(first, layer)
    return first


def may_join(network: Network, call: Mapping[str, Any], cache: Any) -> bool:
    """Whether the blocks of a model are known to do with rows what `widened` takes them to, in this call."""
    arch = network.architecture
    if torch.is_grad_enabled() or network.tool is not None or arch.readout is not None:
        return False
    if any(value is not None and value is not False and name not in CALLED for name, value in call.items()):
        return False
    config = getattr(network.module, "config", None)
    for part in (config, None if config is None else config.get_text_config()):
        if part is None or any(getattr(part, name, False) for name in RECORDED):
            return False
        if getattr(part, "_attn_implementation", None) not in ("sdpa", "eager"):
            return False
    if not _plain_cache(cache):
        return False
    return all(_understood(block.module, block.attention.module, layer) for layer, block in enumerate(arch.blocks))


def _plain_cache(cache: Any) -> bool:
    from transformers import DynamicCache, StaticCache

    if cache is None:
        return True
    # Rows are moved layer by layer, past methods of the cache itself that are the user's own.
    own = [vars(cache).get(name) for name in caching.OPERATIONS]
    return type(cache) in (DynamicCache, StaticCache) and all(one is None or isinstance(one, seams.Seam) for one in own)


@cache
def _taken(block: type) -> tuple[str, ...]:
    """What a class of blocks takes, in order."""
    return tuple(inspect.signature(block.forward).parameters)[1:]


def _understood(block: nn.Module, attention: nn.Module, layer: int) -> bool:
    if type(block) not in _KNOWN:
        forward = type(block).forward
        taken = [
            p.name for p in list(inspect.signature(forward).parameters.values())[1:] if p.kind is not p.VAR_KEYWORD
        ]
        _KNOWN[type(block)] = forward.__module__.startswith("transformers.models.") and set(taken) <= BLOCK
    return _KNOWN[type(block)] and getattr(attention, "layer_idx", layer) == layer


_KNOWN: dict[type, bool] = {}
"""Whether a class of blocks takes what is understood, found out once."""


@contextmanager
def joining(call: frames.Call, network: Network, layer: int, rows: int, worlds: int) -> Iterator[None]:
    """Within it, a call that is under way is of one world before a block, and of all from there on.

    Args:
        call: of a pass of all worlds.
        layer: the block.
        rows: of the call.
        worlds: how many.
    """
    call.run.joined = layer
    wide: dict[int, tuple[Any, Any]] = {}

    def shared(value: Any, name: str) -> Any:
        # Every block is given the same masks and positions, which are made wider once.
        if id(value) not in wide:
            wide[id(value)] = value, widened(name, value, rows, worlds)
        return wide[id(value)][1]

    def hook(first: bool) -> Callable[..., Any]:
        def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if frames.innermost() is not call:
                return None
            given = dict(zip(_taken(type(block)), args, strict=False)) | kwargs
            stream = given.pop("hidden_states")
            rest = {name: shared(value, name) for name, value in given.items()}
            return (), {"hidden_states": widened("", stream, rows, worlds) if first else stream, **rest}

        return enter

    handles = []
    try:
        for number, block in enumerate(network.architecture.blocks[layer:]):
            placed = block.module.register_forward_pre_hook(Hook(hook(not number)), prepend=True, with_kwargs=True)
            handles.append(placed)
        yield
    finally:
        for handle in handles:
            handle.remove()


def widened(name: str, value: Any, rows: int, worlds: int) -> Any:
    """An argument of a block for the rows of several worlds, one world after another.

    Args:
        name: of the argument.
        value: as it is for the rows of one; what has no rows stays as it is.
        rows: how many these are.
    """
    if isinstance(value, tuple):
        return tuple(widened(name, one, rows, worlds) for one in value)
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    axis = 1 if name == "position_ids" and value.ndim == 3 else 0
    if value.shape[axis] != rows:  # one for all rows
        return value
    return value.repeat(*(worlds if number == axis else 1 for number in range(value.ndim)))
