"""Results as files: JSON for what they say, safetensors for their arrays, and a checksum that ties the two together."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors.numpy

from hooks import ResultError, pair, read_record, read_tensors, sha256, write_all
from interp.axes import Axis
from interp.effects import Effects

T = TypeVar("T")

SCHEMA, VERSION = "interp.result", 1
_ARRAYS = ("effect", "base", "source", "status", "noise_floor")
_DATA = ("axes", "metrics", "several", "rows", "config")


def save_result(result: Effects, path: str | os.PathLike[str]) -> Path:
    """Write `path`.json (everything but the arrays) and `path`.safetensors (the arrays).

    Both are written under temporary names and then renamed, so a file is never half written, and the JSON holds the
    checksum of the arrays, so a pair that does not belong together is refused. Missing folders are made.

    Args:
        result: what to save.
        path: a `.json` or `.safetensors` suffix is stripped.

    Returns:
        The path of the JSON file.

    Raises:
        ResultError: an axis or the config holds something that is not JSON data; nothing is written.
    """
    arrays = {name: getattr(result, name) for name in _ARRAYS if getattr(result, name) is not None}
    tensors = safetensors.numpy.save({name: np.asarray(array, order="C") for name, array in arrays.items()})
    record = {
        "schema": SCHEMA,
        "version": VERSION,
        "axes": [{"name": axis.name, "values": axis.values, "labels": axis.labels} for axis in result.axes],
        "metrics": result.metrics,
        "several": bool(result.several),
        "rows": result.rows,
        "config": result.config,
        "arrays_sha256": sha256(tensors),
    }
    for name in _DATA:
        _check_json(record[name], name)
    text = json.dumps(record, indent=1)
    json_path, arrays_path = pair(path)
    json_path.parent.mkdir(parents=True, exist_ok=True)
    write_all({arrays_path: tensors, json_path: text.encode()})
    return json_path


def load_result(path: str | os.PathLike[str], make: Callable[..., T]) -> T:
    """What is made of the fields of a result that `save_result` wrote; see `Result.load`."""
    json_path, arrays_path = pair(path)
    record = read_record(json_path, "result", ("schema", SCHEMA), VERSION, ("arrays_sha256", *_DATA), ResultError)
    tensors = read_tensors(arrays_path, record["arrays_sha256"], json_path, ResultError)
    try:
        arrays = safetensors.numpy.load(tensors)
        axes = tuple(Axis(a["name"], tuple(a["values"]), tuple(a["labels"])) for a in record["axes"])
        data = {name: record[name] for name in _DATA} | {"axes": axes}
        return make(**{"source": None, **arrays, **data})
    except (ResultError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ResultError(f"{json_path} is not a saved result: {error}") from None


def _check_json(value: Any, where: str) -> None:
    """Raise unless the value comes back from JSON as it is, tuples as lists; numpy numbers and int keys do not."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ResultError(f"{where} is not JSON data: its key {key!r} is a {type(key).__name__}, not a str")
            _check_json(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _check_json(item, f"{where}[{i}]")
    elif not isinstance(value, (str, int, float, type(None))):
        raise ResultError(f"{where} is not JSON data: {value!r} is a {type(value).__name__}")
    elif isinstance(value, float) and not np.isfinite(value):
        raise ResultError(f"{where} is not JSON data: {value}")
