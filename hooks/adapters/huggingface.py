"""What Hugging Face models have in common: how one attention module is made to call another function."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .architecture import AttentionFunction

_NAME = "interp_exposed"


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
