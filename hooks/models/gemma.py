"""Gemma 2: a Llama with norms also after its sublayers, windows in every other layer, and scores and logits capped.

Gemma 1 has neither those norms nor caps; Gemma 3 norms queries and keys, and its windowed layers have angles of their
own.
"""

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


def describe(model: Any) -> Architecture:
    """Find the parts of a Gemma with a language-model head.

    Raises:
        ModelError: the model attends to later tokens too, or scales its embeddings outside the embedding module.
    """
    arch = llama.describe(model)
    if not hasattr(arch.embed, "embed_scale"):
        raise ModelError(
            "this version of transformers scales Gemma's embeddings outside their module, where no site is; upgrade it"
        )
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is None or not hasattr(model, "lm_head"):  # a classifier's logits have none
        return arch
    return replace(arch, cap=partial(softcap, cap=cap), lift_cap=partial(lift_cap, model))


@contextmanager
def lift_cap(model: Any) -> Iterator[None]:
    """Switch the cap off, which is a line of the model's forward that its config decides; the body keeps its config.

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
