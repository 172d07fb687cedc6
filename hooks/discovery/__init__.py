"""Models of families that nobody has described: found out by running them, and believed only where that is confirmed.

A description is put together from one forward pass on a few tokens: each part of it (a layout of heads, a norm, a
rotary embedding, a factor, a sum) is a hypothesis that is tried on the values. It is then held to the model as those
of known families are, and at every kind of site besides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..backends.gate import gate_of
from ..certificate import noise_for_zeros
from ..errors import ModelError
from ..models.architecture import Architecture
from .confirming import differing
from .outside import outside
from .probe import in_eval_mode, probe


def discover(module: nn.Module) -> Architecture:
    """Describe a causal or bidirectional transformer of a family that is not known.

    Raises:
        ModelError: its structure is not understood, or what is understood of it is not what it computes.
    """
    name = type(module).__name__
    try:
        return _discovered(module)
    except Exception as error:  # a structure may be other than anything that was thought of
        told = str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"
        raise ModelError(
            f"nobody has described a {name}, and its structure is not one that is understood: {told}. Say where it "
            "keeps its parts: wrap(model, adapter=function), as the README shows"
        ) from error


@torch.no_grad()
def _discovered(module: nn.Module) -> Architecture:
    if any(p.device.type == "meta" for p in module.parameters()):
        raise ModelError("its weights are not there (they are on the meta device), so it cannot be run")
    gate = gate_of(module)
    with gate.lock, gate.suspended(), in_eval_mode(module):
        with noise_for_zeros(module):
            found = outside(module, probe(module, vocabulary_of(module)))
        reason = differing(module, found)
    if reason:
        raise ModelError(f"as far as it is understood, it computes something else: {reason}")
    return found


def vocabulary_of(module: Any) -> int:
    """How many token ids a model takes.

    Raises:
        ModelError: it has no embedding of tokens.
    """
    try:
        embedding = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = next((part for part in module.modules() if isinstance(part, nn.Embedding)), None)
    size = getattr(embedding, "num_embeddings", None)
    if not isinstance(size, int):
        raise ModelError("it has no embedding of tokens")
    return size
