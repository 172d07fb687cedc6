"""Getting a model by name: one that ships with the package, a folder, or a name on the Hugging Face hub."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path

import torch

from hooks import Model, wrap
from hooks.errors import ModelError, nearest

SHIPPED = Path(__file__).parent / "models" / "weights"


def shipped() -> tuple[str, ...]:
    """Names of the models that come with the package."""
    return tuple(sorted(p.parent.name for p in SHIPPED.glob("*/model.safetensors")))


def load(name: str | PathLike[str], *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Model:
    """Load a model and its tokenizer, in evaluation mode.

    Args:
        name: a model that ships with the package, a local folder, or a name on the Hugging Face hub.
        device: where to put it.
        dtype: what to convert it to; default what it was saved in.

    Raises:
        ModelError: the name is none of these; the message says what there is.
    """
    text = str(name)
    if text in shipped():
        model = _load_small(SHIPPED / text)
    elif (Path(name) / "config.json").exists():
        folder = Path(name)
        own = json.loads((folder / "config.json").read_text()).get("model_type") == "interp"
        model = _load_small(folder) if own else _load_hub(text, local=True)
    elif Path(name).exists():
        raise ModelError(f"{text} has no config.json: it is not a saved model")
    else:
        model = _load_hub(text, local=False)
    module = model.module.to(device=device, dtype=dtype).eval()
    return wrap(module, model.tokenizer)


def _load_small(folder: Path) -> Model:
    from safetensors.torch import load_file

    from interp.models import Transformer, TransformerConfig, WordTokenizer

    data = json.loads((folder / "config.json").read_text())
    data.pop("model_type", None)
    module = Transformer(TransformerConfig.from_dict(data))
    module.load_state_dict(load_file(folder / "model.safetensors"))
    words = folder / "tokenizer.json"
    return wrap(module, WordTokenizer.load(words) if words.exists() else None)


def _load_hub(name: str, local: bool) -> Model:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        module = AutoModelForCausalLM.from_pretrained(name, local_files_only=local)
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
    except OSError as error:
        have = ", ".join(shipped()) or "none yet"
        raise ModelError(
            f"{name!r} is not a model that ships with the package ({have}{nearest(name, shipped())}), not a folder "
            f"with a saved model, and could not be had from the hub: {str(error).splitlines()[0]}"
        ) from error
    return wrap(module, tokenizer)
