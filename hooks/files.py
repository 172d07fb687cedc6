"""A JSON file and its tensors: written so that nobody ever finds them half written, read only where they are whole."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .errors import InterpError


def pair(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The JSON file and the tensors' file that a path means, with either suffix or none; a name may hold dots."""
    path = Path(path)
    name = path.stem if path.suffix in (".json", ".safetensors") else path.name
    return path.with_name(f"{name}.json"), path.with_name(f"{name}.safetensors")


def write_all(files: dict[Path, bytes]) -> None:
    """Write every file under a temporary name, then rename them in order; on failure leave no temporary file behind."""
    written = {path: path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp") for path in files}
    try:
        for path, data in files.items():
            with open(written[path], "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in written.items():
            os.replace(temporary, path)
    finally:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)


def read_record(
    path: Path, kind: str, marker: tuple[str, str], version: int, fields: Collection[str], error: type[InterpError]
) -> dict[str, Any]:
    """Read a JSON file that says what it is.

    Args:
        path: the file.
        kind: what it is, for messages.
        marker: the name and value of the field by which it is known.
        version: the one that is understood, in the field "version".
        fields: what it holds besides these two, no more and no less.
        error: what is raised where it is anything else.
    """
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} is not JSON: {problem}") from None
    if not isinstance(data, dict) or data.get(marker[0]) != marker[1]:
        raise error(f"{path} is not a saved {kind}: it lacks {marker[0]} = {marker[1]!r}")
    if data.get("version") != version:
        raise error(f"{path} has version {data.get('version')!r}; this release reads {version}")
    wanted = {marker[0], "version", *fields}
    if set(data) != wanted:
        raise error(f"{path} differs from a saved {kind} in the fields {sorted(wanted ^ set(data))}")
    return data


def read_tensors(path: Path, checksum: str, words: Path, error: type[InterpError]) -> bytes:
    """Read the tensors' file that belongs to a JSON file, which holds its checksum."""
    packed = path.read_bytes()
    if sha256(packed) != checksum:
        raise error(f"{path} does not belong to {words}: its checksum differs; save again")
    return packed


def sha256(packed: bytes) -> str:
    """The checksum that ties two files together."""
    return hashlib.sha256(packed).hexdigest()
