"""Wrapping a model of the user's: a module, a wrapped one, or one in another tool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .backends.tools import tool_of
from .discovery import discover
from .errors import ModelError
from .model import Model
from .models import adapter_of
from .models.architecture import Architecture
from .models.network import without_wrapper


def wrap(
    model: Any,
    tokenizer: Any = None,
    *,
    adapter: Callable[[nn.Module], Architecture] | None = None,
    remote: bool | str = False,
) -> Model:
    """Wrap a model of the user's, which stays as it is.

    Args:
        model: of transformers, a language model of one of the families that are known or of one whose structure is
            (see the README), a BERT, or a ViT with a classifier; the project's own small transformer; or any module
            with an adapter; or one of these in a ``TransformerBridge`` of TransformerLens or in a model of nnsight's.
        tokenizer: for prompts that are text, and for printing tokens; or the processor of a model that sees, which has
            one within.
        adapter: a function that says where the model keeps its parts, for a family that is not known. Of a model that
            is wrapped already, tokenizer and adapter replace what it has. Of a model of peft's, `module` is the one
            that its layers were put into.
        remote: of a model of nnsight's, where its traces run: as nnsight's `trace` takes it.

    Raises:
        ModelError: nobody knows the model's parts, two layers are one module, or the model was compiled.
    """
    if isinstance(model, Model):
        if tokenizer is None and adapter is None:
            return model
        known = (model.processor or model.tokenizer) if tokenizer is None else tokenizer
        again = Model(model.module, *_reading(known, model.adapter if adapter is None else adapter))
        again.tool = model.tool
        return again
    tool = tool_of(model, remote)
    if tool is not None:
        known = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
        wrapped = Model(tool.module, *_reading(known, adapter or tool.describe))
        wrapped.tool = tool
        return wrapped
    if not isinstance(model, nn.Module):
        raise ModelError(f"wrap() takes a torch module, not {type(model).__name__}")
    return Model(without_wrapper(model), *_reading(tokenizer, adapter or known_or_discovered))


def _reading(tokenizer: Any, adapter: Any) -> tuple[Any, Any, Any]:
    """A tokenizer, the adapter, and the processor that the tokenizer is a part of, if it was given in its place."""
    within = getattr(tokenizer, "tokenizer", None)
    return (tokenizer, adapter, None) if within is None else (within, adapter, tokenizer)


def known_or_discovered(module: nn.Module) -> Architecture:
    """The parts of a model, as its family's adapter says, or found out where nobody knows the family.

    Raises:
        ModelError: it cannot be described.
    """
    return (adapter_of(module) or discover)(module)
