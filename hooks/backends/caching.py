"""Key/value caches: what is edited on its way in, and what their owner does to them between two calls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ..errors import PlanError
from . import seams

OPERATIONS = ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices", "reset")
"""Methods of a cache that change which tokens of which rows it holds."""
BATCHING = (
    "continuous batching (generate_batch, cache_implementation='paged') lays tokens of many texts in one row and keys "
    "and values in pages, so nobody knows which text and which position a token is of: call generate() with the "
    "prompts as one batch, padded on the left"
)

_MOVES = "keeps keys and values on the host and moves them to a CUDA device, and the model runs on"


def is_cache(value: Any) -> bool:
    """Whether a value is a key/value cache of transformers."""
    return hasattr(value, "update") and hasattr(value, "get_seq_length")


def cache_of(output: Any) -> Any:
    """The cache among what a model returns, by name or somewhere in a tuple; None where there is none."""
    if isinstance(output, tuple):
        return next((value for value in output if is_cache(value)), None)
    found = getattr(output, "past_key_values", None)
    return found if is_cache(found) else None


def filled(cache: Any) -> int:
    """How many columns a cache holds; 0 of none. Waits for the device where the cache counts there."""
    return 0 if cache is None else int(cache.get_seq_length())


def require_plain(cache: Any, attentions: Iterable[Any], device: torch.device, encodes: bool = False) -> None:
    """Refuse caches that hold something else than one key and one value for each token, as attention sees them.

    Args:
        cache: the cache.
        attentions: of the model; `device`: on which it runs.
        encodes: whether it decodes what it encodes, and so has another cache, of keys of that.

    Raises:
        PlanError: such a cache.
    """
    if not is_cache(cache):
        raise PlanError(
            f"a {type(cache).__name__} is no key/value cache that a plan can follow: use a Cache of transformers"
        )
    if encodes and hasattr(cache, "self_attention_cache"):
        cache = cache.self_attention_cache
    if getattr(cache, "offloading", False) and device.type != "cuda":
        raise PlanError(f"a {type(cache).__name__} with offloading=True {_MOVES} {device}: make it without")
    if hasattr(cache, "cross_attention_cache"):
        raise PlanError("an EncoderDecoderCache holds two caches, and plans know models with one stack of layers")
    if any(getattr(cache, "is_linear", ())):
        raise PlanError("layers with a state in place of keys and values (linear attention) cannot be followed")
    if any(hasattr(attention, "kv_lora_rank") for attention in attentions):
        raise PlanError(
            "latent attention caches what keys and values are made of, so their edits would not persist: decode with "
            "use_cache=False"
        )


def require_makeable(kind: str | None, options: Mapping[str, Any] | None, module: nn.Module) -> None:
    """Refuse caches that `generate` is told to make and cannot make here, or that no plan can follow.

    Args:
        kind: its ``cache_implementation``; `options`: its ``cache_config``.
        module: the model.

    Raises:
        PlanError: such a cache.
    """
    if kind == "paged":
        raise PlanError(BATCHING)
    device = next((value.device for value in module.parameters()), torch.device("cpu"))
    if kind is not None and "offloaded" in kind and device.type != "cuda":
        same = "'dynamic'" if kind == "offloaded" else "'static'"
        raise PlanError(f"cache_implementation={kind!r} {_MOVES} {device}: {same} holds the same where the model is")
    if kind == "quantized":
        from transformers import QuantizedCache

        given: dict[str, Any] = {"backend": "quanto", "config": module.config} | dict(options or {})
        try:
            if getattr(module.config, "is_encoder_decoder", False):
                raise ValueError("a model that decodes what it encodes has no such cache")
            QuantizedCache(**given)
        except (ImportError, ValueError, TypeError) as error:
            raise PlanError(
                f"cache_implementation='quantized' with backend {given['backend']!r} cannot be made here "
                f"({error}): cache_config={{'backend': 'fp8'}} needs no package, where all layers attend to all "
                "that came before; leave it out for keys and values as they are"
            ) from error


def windows(cache: Any, queries: int, layers: int) -> dict[int, tuple[int, int]]:
    """For each layer, the column that the first key of its attention is and their number, in a call of some queries."""
    if cache is None:
        return {}
    cache = getattr(cache, "self_attention_cache", cache)
    sizes = [cache.get_mask_sizes(queries, layer) for layer in range(layers)]
    return {layer: (int(start), int(width)) for layer, (width, start) in enumerate(sizes)}


class Entering:
    """A cache as one attention layer sees it: what is written into it is edited first, and so persists.

    The cache itself is the caller's, and stays what it is.
    """

    def __init__(self, cache: Any, edit: Callable[[Tensor], Tensor]) -> None:
        self._cache, self._edit = cache, edit

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys [B, K, T, D], edited, and values; returns all that attention is to see."""
        return self._cache.update(self._edit(key_states), value_states, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def __len__(self) -> int:
        return len(self._cache)


def rows_after(name: str, argument: Any, rows: int) -> Tensor | None:
    """The rows of a cache after an operation, each by the row that it goes on from; None where it keeps them."""
    if name == "batch_repeat_interleave":
        return torch.arange(rows).repeat_interleave(int(argument))
    if name in ("reorder_cache", "batch_select_indices"):
        return torch.arange(rows)[torch.as_tensor(argument).to("cpu")]
    return None


def follow(cache: Any, note: Callable[[str, Any], None], copied: Callable[[Any], None]) -> Callable[[], None]:
    """Learn of all that is done to a cache between calls; returns what ends it.

    Args:
        note: called with the name of an operation and its argument.
        copied: called with a copy that is made of it, which nobody follows.
    """
    # No function here holds the cache, which is to go with the last who has it.
    where = ref(cache)
    quantised = any(hasattr(layer, "_quantized_keys") for layer in getattr(cache, "layers", ()))

    def noting(name: str) -> Callable[..., Any]:
        def function(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if name == "crop" and quantised:
                raise PlanError(
                    "a quantised cache keeps what it is to forget: tokens that were proposed and rejected (an "
                    "assistant, prompt lookup) need another one"
                )
            result = own(*args, **kwargs)
            note(name, next(iter((*args, *kwargs.values())), None))
            return result

        return function

    def copying(own: Callable[..., Any], memo: dict[int, Any]) -> Any:
        held = where()
        twin = _plain_copy(held, memo, own)
        copied(twin)
        return twin

    removals = [seams.place(cache, name, noting(name)) for name in OPERATIONS if hasattr(cache, name)]
    removals.append(seams.place(cache, "__deepcopy__", copying))

    def end() -> None:
        for remove in reversed(removals):
            remove()

    return end


def followed(cache: Any) -> Any:
    """The cache whose methods we answer for in the place of this one's: another, of which it is a copy that shares all.

    It is the cache itself where it is followed, or where it came out of a file with what was on it; None of any other.
    """
    seam = next((one for one in map(vars(cache).get, OPERATIONS) if isinstance(one, seams.Seam)), None)
    return None if seam is None else seam.owner()


def apart(cache: Any) -> Any:
    """A copy of a cache, which nobody follows."""
    found = vars(cache).get("__deepcopy__")
    return _plain_copy(cache, {}, found.own if isinstance(found, seams.Seam) else partial(copy.deepcopy, cache))


def _plain_copy(cache: Any, memo: dict[int, Any], copied: Callable[[dict[int, Any]], Any]) -> Any:
    """The copy that a function makes of a cache, without what of ours came with it."""
    # What an offloaded cache moves by, no copy can be made of.
    parts = [cache, *(value for value in vars(cache).values() if is_cache(value))]
    streams = [value for part in parts for value in vars(part).values() if isinstance(value, torch.Stream)]
    memo.update({id(stream): stream for stream in streams})
    twin = copied(memo)
    for name in (*OPERATIONS, "__deepcopy__"):
        if isinstance(vars(twin).get(name), seams.Seam):
            del vars(twin)[name]
    return twin
