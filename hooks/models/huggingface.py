"""What Hugging Face models have in common: their head, and how an attention module is made to call another function."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .architecture import AttentionFunction
from .projections import linear_outputs

_NAME = "interp_exposed"
_PACKED = "interp_exposed_flash"
"""Towers of packed sequences call a function of this name once, with the ends of them, and others once for each."""
_ENDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_FUNCTIONS: WeakKeyDictionary[nn.Module, AttentionFunction] = WeakKeyDictionary()
"""The function that each attention module calls at the moment: not on the config, which users save and copy."""


def unembedding(model: Any) -> Any:
    """The module from the final norm to logits: a language model's, or a classifier's of tokens or sequences.

    Raises:
        ModelError: the model has no such head.
    """
    # Older releases of transformers call that of GPT-NeoX embed_out.
    found = (getattr(model, name, None) for name in ("lm_head", "embed_out", "score"))
    head = next((each for each in found if isinstance(each, nn.Module)), None)
    if head is None:
        raise ModelError(
            f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM (or with a head "
            "that classifies tokens or sequences)"
        )
    return head


def inner(model: Any, name: str) -> Any:
    """The layers of a model: what it keeps under a name, or itself where it is no more than they."""
    return getattr(model, name, model)


def headless(model: Any, instead: str, ids: int | None = None) -> dict[str, Any]:
    """What an `Architecture` says of the head of a model that has none, and what is to be done for one."""
    why = f"a {type(model).__name__} has no head, so it returns the states of its last layer and no logits; {instead}"
    return {"unembed": nn.Identity(), "vocabulary": 0, "ids": ids, "missing": {"logits": why}}


def headed(model: Any) -> dict[str, Any]:
    """What an `Architecture` says of a model's head: itself, how many logits it returns, and of which tokens.

    Raises:
        ModelError: it has a head of another kind.
    """
    ids = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if getattr(model, "base_model", None) is model and not hasattr(model, "lm_head"):
        return headless(model, "load it with AutoModelForCausalLM", ids)
    head = unembedding(model)
    return {"unembed": head, "vocabulary": linear_outputs(head), "ids": ids,
            "pooled": "SequenceClassification" in type(model).__name__}  # fmt: skip


def own_attention(module: Any, implementation: str) -> AttentionFunction:
    """The attention function that a module calls by itself, given the name of its implementation."""
    from transformers import AttentionInterface

    # An eager function is not registered: each family has one beside its classes, whoever derives from them.
    homes: list[Any] = [sys.modules.get(kind.__module__) for kind in type(module).__mro__]
    eager = next((home.eager_attention_forward for home in homes if hasattr(home, "eager_attention_forward")), None)
    if eager is None and implementation == "eager":
        raise ModelError(f"nobody knows the eager attention function of {type(module).__name__}: use sdpa attention")
    return AttentionInterface().get_interface(implementation, eager)  # type: ignore[arg-type]


def _dispatch(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    function = _FUNCTIONS.get(module)
    if function is None:  # another thread's swap ended between this thread's look at the config and its call
        function = partial(_by_sequence, own_attention(module, module.config._attn_implementation))
    return function(module, *args, **kwargs)


def _by_sequence(
    own: AttentionFunction, module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any = None, **given: Any
) -> tuple[Tensor, Tensor | None]:
    """Call an attention function once for each sequence of those that are packed, unless it knows of that."""
    ends = given.get("cu_seq_lens_q")
    if ends is None or "flash" in getattr(own, "__name__", ""):
        return own(module, q, k, v, attention_mask, **given)
    rest = {name: value for name, value in given.items() if name not in _ENDS}
    parts = [torch.split(x, ends.diff().tolist(), dim=2) for x in (q, k, v)]
    return torch.cat([own(module, *one, attention_mask, **rest)[0] for one in zip(*parts, strict=True)], 1), None


def swap_packed_attention(attention: Any, function: AttentionFunction) -> AbstractContextManager[None]:
    """The same for a tower of packed sequences: the function is given all of them, and the ends of each."""
    return swap_attention(attention, function, _PACKED)


@contextmanager
def swap_attention(attention: Any, function: AttentionFunction, name: str = _NAME) -> Iterator[None]:
    """Make one attention module call `function`, through the attention interface of transformers.

    All layers share one config object, so this one gets a shallow copy that names our function; the mask is still built
    for the model's own kernel, from the config that the model keeps.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(name, _dispatch)
    original, before = attention.config, _FUNCTIONS.get(attention)
    changed = copy.copy(original)
    changed._attn_implementation_internal = name
    own = own_attention(attention, original._attn_implementation)
    own = own if name == _NAME else partial(_by_sequence, own)
    _FUNCTIONS[attention] = partial(function, own=own)
    attention.config = changed
    try:
        yield
    finally:
        attention.config = original
        if before is None:
            del _FUNCTIONS[attention]
        else:
            _FUNCTIONS[attention] = before
