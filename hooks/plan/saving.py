"""Plans as files: JSON for what they say, safetensors for their tensors. Nothing in either is ever run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from ..digest import digest_of
from ..errors import InterpError, PlanError
from ..files import pair, read_record, read_tensors, sha256, write_all
from .encoding import Record, decode, encode
from .sites import Site

FORMAT = "interp-plan"
VERSION = 1


def save_plan(plan: Any, path: str | os.PathLike[str]) -> None:
    """Write a plan to ``path.json`` and, where it holds tensors, ``path.safetensors``.

    Both files are written beside their names and then renamed, so that an interrupted save leaves the old ones.

    Raises:
        PlanError: the plan holds a function of the user's.
    """
    data, tensors = encode(plan)
    packed = save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}) if tensors else b""
    checksum = sha256(packed) if tensors else ""
    record = {"format": FORMAT, "version": VERSION, "tensors_sha256": checksum, "plan": data}
    words, arrays = pair(path)
    words.parent.mkdir(parents=True, exist_ok=True)
    # Tensors of an earlier plan go with it; a file of that name that is something else stays.
    stale = not tensors and _holds_tensors_of_a_plan(words, arrays)
    # The checksum ties the two files together, should the second fail to be renamed.
    files = {arrays: packed} if tensors else {}
    write_all({**files, words: (json.dumps(record, indent=1) + "\n").encode()})
    if stale:
        arrays.unlink(missing_ok=True)


def _holds_tensors_of_a_plan(words: Path, arrays: Path) -> bool:
    """Whether there are tensors, and a saved plan beside them that they belong to."""
    try:
        data = read_record(words, "plan", ("format", FORMAT), VERSION, ("tensors_sha256", "plan"), PlanError)
        read_tensors(arrays, data["tensors_sha256"], words, PlanError)
    except (OSError, PlanError):
        return False
    return True


def load_plan(path: str | os.PathLike[str], records: Mapping[str, Record], operations: Mapping[str, type]) -> Any:
    """Read what `save_plan` wrote.

    Args:
        path: as it was given to `save_plan`.
        records: the classes that may stand there, by the name of their type.
        operations: the operations, by name.

    Raises:
        PlanError: there is none, or the file holds anything else.
    """
    words, arrays = pair(path)
    if not words.exists():
        raise PlanError(f"there is no saved plan at {words}")
    data = read_record(words, "plan", ("format", FORMAT), VERSION, ("tensors_sha256", "plan"), PlanError)
    try:
        tensors: dict[str, Tensor] = {}
        if data["tensors_sha256"]:
            if not arrays.exists():
                raise PlanError(f"{words} needs its tensors, and {arrays} is missing")
            tensors = load(read_tensors(arrays, data["tensors_sha256"], words, PlanError))
        return decode(data["plan"], tensors, records, operations)
    except InterpError:
        raise
    except Exception as error:  # whatever a file that nobody wrote can bring about
        raise PlanError(f"{words} is damaged: {type(error).__name__}: {error}") from None


def fingerprint(value: Any) -> str:
    """A digest of a plan, world, inputs or intervention that two have in common exactly when they are equal.

    Functions of the user's enter by name and byte code, which tells most changes but not all.
    """
    data, tensors = encode(value, functions=True)
    names = {name: digest_of(tensor) for name, tensor in tensors.items()}

    def canonical(data: Any) -> Any:
        # A tensor by its content, so that two of the same content need not be one object; a site by what it names.
        if isinstance(data, dict):
            if data.get("type") == "tensor":
                return names[data["name"]]
            if data.get("type") == "site":
                place = Site(data["name"], data["layer"], data["stack"])
                data = data | dict(zip(("name", "layer", "stack"), place.key, strict=True))
            if data.get("type") in ("inputs", "seen"):
                data = {key: item for key, item in data.items() if key != "tokens"}
            return {key: canonical(item) for key, item in data.items()}
        return [canonical(item) for item in data] if isinstance(data, list) else data

    return digest_of(json.dumps(canonical(data), sort_keys=True))
