"""Plans as files: JSON for what they say, safetensors for their tensors. Nothing in either is ever run.

Every value is written as data that names its own type; loading knows the types below and refuses anything else. A plan
with a function of the user's cannot be saved, because loading it would mean running code from a file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from .errors import PlanError, nearest
from .files import pair, write_all
from .inputs import Inputs
from .interventions import OPS, Custom
from .plan import Intervention, Op, Origin, Plan, Read, World
from .sites import Site, Span
from .tape import Tape

FORMAT = "interp-plan"
VERSION = 1


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write a plan to ``path.json`` and, where it holds tensors, ``path.safetensors``.

    Both files are written beside their names and then renamed, so that an interrupted save leaves the old ones.

    Raises:
        PlanError: the plan holds a function of the user's.
    """
    data, tensors = encode(plan)
    text = json.dumps({"format": FORMAT, "version": VERSION, "tensors": len(tensors), "plan": data}, indent=1) + "\n"
    words, arrays = pair(path)
    words.parent.mkdir(parents=True, exist_ok=True)
    files = {words: text.encode()}
    if tensors:
        files = {arrays: save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}), **files}
    write_all(files)
    if not tensors:
        arrays.unlink(missing_ok=True)


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan that `save_plan` wrote.

    Raises:
        PlanError: there is none, or the file holds anything but a plan.
    """
    words, arrays = pair(path)
    if not words.exists():
        raise PlanError(f"there is no saved plan at {words}")
    try:
        data = json.loads(words.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{words} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise PlanError(f"{words} is not a saved plan")
    if data.get("version") != VERSION:
        raise PlanError(f"{words} has version {data.get('version')!r}; this version reads {VERSION}")
    tensors: dict[str, Tensor] = {}
    if data.get("tensors"):
        if not arrays.exists():
            raise PlanError(f"{words} needs its tensors, and {arrays} is missing")
        tensors = load_file(arrays)
    try:
        plan = decode(data.get("plan"), tensors)
    except (KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"{words} is damaged: {error!r}") from error
    if not isinstance(plan, Plan):
        raise PlanError(f"{words} holds a {type(plan).__name__}, not a plan")
    return plan


def fingerprint(value: Any) -> str:
    """A digest of a plan, world, inputs or intervention that two have in common exactly when they are equal.

    Functions of the user's enter by name and byte code, which tells most changes but not all.
    """
    data, tensors = encode(value, functions=True)
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def encode(value: Any, functions: bool = False) -> tuple[Any, dict[str, Tensor]]:
    """Write a value as JSON data and a table of tensors."""
    tensors: dict[str, Tensor] = {}
    known: dict[int, str] = {}

    def put(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in known:
                known[id(value)] = f"t{len(tensors)}"
                tensors[known[id(value)]] = value.detach()
            return {"type": "tensor", "name": known[id(value)]}
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            return {"type": "float", "value": value.hex()}
        if isinstance(value, tuple):
            return {"type": "tuple", "items": [put(v) for v in value]}
        if isinstance(value, frozenset):
            return {"type": "tuple", "items": sorted(put(v) for v in value)}
        if isinstance(value, Op):
            if isinstance(value, Custom):
                if not functions:
                    raise PlanError(f"a plan with a function of yours ({value}) cannot be saved: loading runs no code")
                return {"type": "function", "name": str(value), "code": _code_digest(value.fn)}
            return {"type": "op", "name": value.name} | {"fields": {k: put(v) for k, v in value.parameters().items()}}
        if isinstance(value, Origin):
            return {"type": "origin", "name": value.name}
        for name, (kind, _, fields) in _RECORDS.items():
            if isinstance(value, kind):
                return {"type": name} | {field: put(getattr(value, field)) for field in fields}
        raise PlanError(f"a {type(value).__name__} cannot be saved")

    return put(value), tensors


def decode(data: Any, tensors: dict[str, Tensor]) -> Any:
    """Read what `encode` wrote, refusing everything else."""
    if data is None or isinstance(data, (bool, int, str)):
        return data
    if not isinstance(data, dict) or "type" not in data:
        raise PlanError(f"a saved plan cannot hold {data!r}")
    kind = data["type"]
    if kind == "tensor":
        if data["name"] not in tensors:
            raise PlanError(f"tensor {data['name']!r} is missing")
        return tensors[data["name"]]
    if kind == "float":
        return float.fromhex(data["value"])
    if kind == "tuple":
        return tuple(decode(v, tensors) for v in data["items"])
    if kind == "origin":
        return Origin[data["name"]]
    if kind == "op":
        if data["name"] not in OPS:
            raise PlanError(f"unknown intervention {data['name']!r}{nearest(data['name'], OPS)}")
        return OPS[data["name"]](**{k: decode(v, tensors) for k, v in data["fields"].items()})
    if kind in _RECORDS:
        _, build, fields = _RECORDS[kind]
        if set(data) != {"type", *fields}:
            raise PlanError(f"a saved {kind} has fields {sorted(fields)}, this one {sorted(set(data) - {'type'})}")
        values = {name: decode(data[name], tensors) for name in fields}
        return build(**values)
    raise PlanError(f"a saved plan cannot hold a {kind!r}{nearest(kind, _RECORDS)}")


_RECORDS: dict[str, tuple[type, Callable[..., Any], tuple[str, ...]]] = {
    "plan": (Plan, Plan, ("interventions",)),
    "intervention": (Intervention, Intervention, ("site", "op", "reads", "weight", "only")),
    "read": (Read, Read, ("source", "site", "aligned")),
    "site": (Site, Site, ("name", "layer", "stack", "head", "pos", "key_pos", "dim")),
    "span": (Span, Span, ("start", "stop")),
    "world": (World, World, ("inputs", "plan")),
    "inputs": (Inputs, Inputs.of, ("ids", "mask", "row_ids", "tokens")),
    "tape": (
        Tape,
        lambda inputs, values, size_table: Tape(inputs, values, {key: dict(sizes) for key, sizes in size_table}),
        ("inputs", "values", "size_table"),
    ),
}
"""What may stand in a file: the type, what makes one of its fields, and the fields."""


def _code_digest(fn: Callable[..., Any]) -> str:
    code = getattr(fn, "__code__", None)
    if code is None:
        return type(fn).__qualname__
    closed = [repr(cell.cell_contents) for cell in getattr(fn, "__closure__", None) or ()]
    return hashlib.sha256(repr((code.co_code, code.co_consts, code.co_names, closed)).encode()).hexdigest()
