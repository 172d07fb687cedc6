"""Writing a JSON file and its tensors so that nobody ever finds them half written."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


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
