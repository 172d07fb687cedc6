"""What training writes down: a JSON-lines file that a resumed run continues, and plain data to put there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hooks import ResultError, write_all


class JsonLines:
    """A file with one JSON object a line, each with the `step` it was written at."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lines = 0

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Append a line, at once."""
        line = json.dumps({"step": step, **record}, allow_nan=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.lines += 1

    def start(self, step: int = 0, lines: int | None = None) -> None:
        """Continue at a step: what was written later is dropped, and a last line that is half written.

        At step 0, and where it is not said how many lines there were, the file begins anew.

        Args:
            step: lines of later steps are dropped.
            lines: how many were written when the run was saved; later ones are dropped, whatever their step.

        Raises:
            ResultError: a line that is not a record of training; the file stays as it is.
        """
        if not self.path.exists():
            return
        anew = step == 0 and lines is None
        kept = [] if anew else [record for record in self.read() if record["step"] <= step][:lines]
        self.lines = len(kept)
        write_all({self.path: "".join(json.dumps(record) + "\n" for record in kept).encode()})

    def read(self) -> Iterator[dict[str, Any]]:
        """The records in order, without a last line that is only half written.

        Raises:
            ResultError: a line that is not a record of training.
        """
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        *lines, _ = text.split("\n")
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ResultError(f"{self.path}:{number} is not a record with a step: {line[:60]!r}")
            yield record


def plain(value: Any) -> Any:
    """JSON data of what a measure gave: numbers, tensors, arrays, and lists and mappings of those.

    Raises:
        ResultError: anything else.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return plain(value.detach().to("cpu").tolist())
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    effect = ": of a sweep give the effect, or its mean" if hasattr(value, "effect") else ""
    raise ResultError(
        f"a measure gives numbers, tensors, or lists and mappings of those, not {type(value).__name__}{effect}"
    )


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by name, as loggers take them: lists and mappings go by ``name/index``."""
    found: dict[str, float] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                add(f"{name}/{key}", item)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                add(f"{name}/{index}", item)
        elif isinstance(value, (int, float)):
            found[name] = value

    for name, value in record.items():
        add(name, value)
    return found
