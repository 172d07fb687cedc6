"""What Hugging Face models have in common: their head, their rotary embedding, how an attention module is swapped."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .architecture import AttentionFunction

_NAME = "interp_exposed"


def unembedding(model: Any) -> nn.Module:
    """The module from the final norm to logits.

    Raises:
        ModelError: the model has no language-model head.
    """
    # Older releases of transformers call that of GPT-NeoX embed_out.
    head = getattr(model, "lm_head", getattr(model, "embed_out", None))
    if not isinstance(head, nn.Module):
        raise ModelError(f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM")
    return head


def rotary(module: nn.Module) -> Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]:
    """What `Architecture.rotary` asks for, from the module that computes all layers' angles."""

    def angles(positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        like = torch.empty((), dtype=dtype, device=positions.device)
        cos, sin = module(like, positions.reshape(1, -1))
        shape = (*positions.shape, cos.shape[-1])
        return cos.reshape(shape), sin.reshape(shape)

    return angles


def _dispatch(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any):
    return module.config.interp_attention(module, query, key, value, mask, **kwargs)


@contextmanager
def swap_attention(attention: Any, function: AttentionFunction) -> Iterator[None]:
    """Make one attention module call `function`, through the attention interface of transformers.

    All layers share one config object, so this one gets a shallow copy that names our function; the mask is still built
    for the model's own kernel, from the config that the model keeps.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _dispatch)
    original = attention.config
    changed = copy.copy(original)
    changed._attn_implementation_internal = _NAME
    changed.interp_attention = function
    attention.config = changed
    try:
        yield
    finally:
        attention.config = original
