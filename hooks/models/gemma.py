"""Gemma 2: a Llama with norms also after its sublayers, windows in every other layer, and scores and logits capped."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

from ..errors import ModelError
from ..models import llama
from .architecture import Architecture
from .attention import softcap
from .blocks import Block, Sublayer


def describe(model: Any) -> Architecture:
    """Find the parts of a Gemma 2 with a language-model head.

    Raises:
        ModelError: the model attends to later tokens too, or scales its embeddings outside the embedding module.
    """
    arch, config = llama.describe(model), model.config
    if config.use_bidirectional_attention:
        raise ModelError("this Gemma attends to later tokens too (use_bidirectional_attention); a decoder is causal")
    if not hasattr(arch.embed, "embed_scale"):
        raise ModelError(
            "this version of transformers scales Gemma's embeddings outside their module, where no site is; upgrade it"
        )
    blocks = tuple(
        Block(
            layer,
            (
                Sublayer(
                    layer.input_layernorm,
                    replace(block.attention, softcap=layer.self_attn.attn_logit_softcapping),
                    post=layer.post_attention_layernorm,
                ),
                Sublayer(
                    layer.pre_feedforward_layernorm, llama.gated(layer.mlp), post=layer.post_feedforward_layernorm
                ),
            ),
        )
        for block, layer in zip(arch.blocks, model.model.layers, strict=True)
    )
    cap = config.final_logit_softcapping
    if cap is None:
        return replace(arch, blocks=blocks)
    return replace(arch, blocks=blocks, cap=partial(softcap, cap=cap), lift_cap=partial(_lift_cap, model))


@contextmanager
def _lift_cap(model: Any) -> Iterator[None]:
    """The cap is a line of the model's forward that its config switches off; the body keeps the config that it has.

    What the config holds stays the same, so that it is saved as it is, and other threads read the cap as before.
    """
    original = model.config
    changed = copy.copy(original)
    changed.__class__ = _uncapped(type(original), threading.get_ident())
    model.config = changed
    try:
        yield
    finally:
        model.config = original


@lru_cache(maxsize=64)  # making a class of configs takes longer than a small model's forward pass
def _uncapped(kind: type, thread: int) -> type:
    """A class of configs that say nothing of a cap to one thread."""

    def cap(config: Any) -> float | None:
        return None if threading.get_ident() == thread else vars(config)["final_logit_softcapping"]

    return type(kind.__name__, (kind,), {"final_logit_softcapping": property(cap)})
