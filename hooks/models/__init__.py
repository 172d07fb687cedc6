"""Where each family of models keeps its parts.

An adapter is a function from a module to an `Architecture`. It is found by the `model_type` of a Hugging Face config,
or by the qualified name of the module's class; `register` adds one.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

from ..errors import ModelError, nearest
from .architecture import Architecture

_HERE = __name__
_ADAPTERS: dict[str, str | Callable[[Any], Architecture]] = {
    "gemma2": f"{_HERE}.gemma",
    "gemma3": f"{_HERE}.gemma3_vl",
    "gpt2": f"{_HERE}.gpt2",
    "gpt_neox": f"{_HERE}.neox",
    "llama": f"{_HERE}.llama",
    "idefics3": f"{_HERE}.idefics",
    "llava": f"{_HERE}.llava",
    "llava_next": f"{_HERE}.llava_next",
    "llava_onevision": f"{_HERE}.llava_next",
    "mistral": f"{_HERE}.llama",
    "qwen2": f"{_HERE}.llama",
    "qwen2_5_vl": f"{_HERE}.qwen_vl",
    "qwen2_vl": f"{_HERE}.qwen_vl",
    "qwen3": f"{_HERE}.llama",
    "smolvlm": f"{_HERE}.idefics",
    "vit": f"{_HERE}.vit",
    "interp.models.transformer.Transformer": f"{_HERE}.small",
}


def register(name: str, adapter: Callable[[Any], Architecture]) -> None:
    """Add the adapter of a family.

    Args:
        name: a Hugging Face `model_type`, or the qualified name of a class (``"package.module.Class"``).
        adapter: a function from such a module to its `Architecture`.
    """
    _ADAPTERS[name] = adapter


def adapter_of(name: str) -> Callable[[Any], Architecture] | None:
    """The adapter of a family, or None where there is none."""
    adapter = _ADAPTERS.get(name)
    return import_module(adapter).describe if isinstance(adapter, str) else adapter


def describe(module: nn.Module) -> Architecture:
    """Find the parts of a model.

    Raises:
        ModelError: no adapter knows this model.
    """
    names = [f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__]
    model_type = getattr(getattr(module, "config", None), "model_type", None)
    for name in [*([model_type] if isinstance(model_type, str) else []), *names]:
        adapter = adapter_of(name)
        if adapter is not None:
            return adapter(module)
    given = model_type or names[0]
    raise ModelError(
        f"no adapter knows {given!r}{nearest(given, _ADAPTERS)}; there are {', '.join(_ADAPTERS)}. "
        "Add one with hooks.models.register(name, function), or pass adapter= to wrap()."
    )
