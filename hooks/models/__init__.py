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
    "bert": f"{_HERE}.bert",
    "bloom": f"{_HERE}.bloom",
    "clip": f"{_HERE}.towers",
    "clip_text_model": f"{_HERE}.towers",
    "clip_vision_model": f"{_HERE}.towers",
    "falcon": f"{_HERE}.falcon",
    "gemma": f"{_HERE}.gemma",
    "gemma2": f"{_HERE}.gemma",
    "gemma3": f"{_HERE}.gemma3_vl",
    "gemma3_text": f"{_HERE}.gemma",
    "gpt2": f"{_HERE}.gpt2",
    "gpt_neox": f"{_HERE}.neox",
    "gpt_oss": f"{_HERE}.gpt_oss",
    "gptj": f"{_HERE}.gptj",
    "granite": f"{_HERE}.llama",
    "granitemoe": f"{_HERE}.llama",
    "llama": f"{_HERE}.llama",
    "idefics3": f"{_HERE}.idefics",
    "llava": f"{_HERE}.llava",
    "llava_next": f"{_HERE}.llava_next",
    "llava_onevision": f"{_HERE}.llava_next",
    "mistral": f"{_HERE}.llama",
    "mixtral": f"{_HERE}.llama",
    "olmo2": f"{_HERE}.llama",
    "olmo3": f"{_HERE}.llama",
    "olmoe": f"{_HERE}.llama",
    "opt": f"{_HERE}.opt",
    "phi3": f"{_HERE}.llama",
    "qwen2": f"{_HERE}.llama",
    "qwen2_5_vl": f"{_HERE}.qwen_vl",
    "qwen2_moe": f"{_HERE}.llama",
    "qwen2_vl": f"{_HERE}.qwen_vl",
    "qwen3": f"{_HERE}.llama",
    "qwen3_moe": f"{_HERE}.llama",
    "siglip": f"{_HERE}.towers",
    "siglip_text_model": f"{_HERE}.towers",
    "siglip_vision_model": f"{_HERE}.towers",
    "smolvlm": f"{_HERE}.idefics",
    "mt5": f"{_HERE}.t5",
    "t5": f"{_HERE}.t5",
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


def adapter_named(name: str) -> Callable[[Any], Architecture] | None:
    """The adapter of a family, by its name, or None where there is none."""
    adapter = _ADAPTERS.get(name)
    return import_module(adapter).describe if isinstance(adapter, str) else adapter


def adapter_of(module: nn.Module) -> Callable[[Any], Architecture] | None:
    """The adapter of a model's family, or None where there is none."""
    names = [f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__]
    model_type = getattr(getattr(module, "config", None), "model_type", None)
    for name in [*([model_type] if isinstance(model_type, str) else []), *names]:
        adapter = adapter_named(name)
        if adapter is not None:
            return adapter
    return None


def describe(module: nn.Module) -> Architecture:
    """Find the parts of a model of a family that is known.

    Raises:
        ModelError: no adapter knows this model.
    """
    adapter = adapter_of(module)
    if adapter is not None:
        return adapter(module)
    raise ModelError(
        f"no adapter knows {unknown(module)}. Add one with hooks.models.register(name, function), or pass adapter= to "
        "wrap()."
    )


def unknown(module: nn.Module) -> str:
    """What a model calls itself that no adapter knows, and which families there are."""
    given = getattr(getattr(module, "config", None), "model_type", None) or (
        f"{type(module).__module__}.{type(module).__qualname__}"
    )
    return f"{given!r}{nearest(given, _ADAPTERS)}; there are {', '.join(_ADAPTERS)}"
