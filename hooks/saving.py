"""Plans as files: JSON for what they say, safetensors for their tensors. Nothing in either is ever run.

Every value is written as data that names its own type; loading knows the types below and refuses anything else. A plan
with a function of the user's cannot be saved, because loading it would mean running code from a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from .digest import digest_of
from .errors import InterpError, PlanError, nearest
from .files import pair, read_record, read_tensors, sha256, write_all
from .inputs import Inputs
from .ops import OPS, Custom
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


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan that `save_plan` wrote.

    Raises:
        PlanError: there is none, or the file holds anything but a plan.
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
        plan = decode(data["plan"], tensors)
        if not isinstance(plan, Plan):
            raise PlanError(f"{words} holds a {type(plan).__name__}, not a plan")
        if not all(isinstance(read, Read) for item in plan for read in item.reads):
            raise PlanError(f"{words} reads something that is not a read")
    except InterpError:
        raise
    except Exception as error:  # whatever a file that nobody wrote can bring about
        raise PlanError(f"{words} is damaged: {type(error).__name__}: {error}") from None
    return plan


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
            if data.get("type") == "inputs":
                data = {key: item for key, item in data.items() if key != "tokens"}
            return {key: canonical(item) for key, item in data.items()}
        return [canonical(item) for item in data] if isinstance(data, list) else data

    return digest_of(json.dumps(canonical(data), sort_keys=True))


def encode(value: Any, functions: bool = False) -> tuple[Any, dict[str, Tensor]]:
    """Write a value as JSON data and a table of tensors."""
    tensors: dict[str, Tensor] = {}
    known: dict[str, str] = {}

    def put(value: Any) -> Any:
        if isinstance(value, Tensor):
            # By content: a plan that was loaded holds copies of what it held once.
            content = digest_of(value)
            if content not in known:
                known[content] = f"t{len(tensors)}"
                tensors[known[content]] = value.detach()
            return {"type": "tensor", "name": known[content]}
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            return {"type": "float", "value": value.hex()}
        if isinstance(value, (tuple, list)):
            return {"type": "tuple", "items": [put(v) for v in value]}
        if isinstance(value, frozenset):
            return {"type": "tuple", "items": sorted(put(v) for v in value)}
        if isinstance(value, Op):
            if isinstance(value, Custom):
                if not functions:
                    raise PlanError(f"a plan with a function of yours ({value}) cannot be saved: loading runs no code")
                return {"type": "function", "name": str(value), "code": digest_of(value.fn)}
            return {"type": "op", "name": value.name} | {"fields": {k: put(v) for k, v in value.parameters().items()}}
        if isinstance(value, Origin):
            return {"type": "origin", "name": value.name}
        for name, (kind, _, fields) in _RECORDS.items():
            if isinstance(value, kind) and (name != "images" or value.pixels is not None):
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
    if kind in _PLAIN and set(data) != {"type", *_PLAIN[kind]}:
        raise PlanError(f"a saved {kind} has fields {sorted(_PLAIN[kind])}, this one {sorted(set(data) - {'type'})}")
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
        fields = {name: decode(v, tensors) for name, v in data["fields"].items()}
        for name, value in fields.items():
            if not isinstance(value, (int, float, Tensor)):
                raise PlanError(f"parameter {name!r} of a saved {data['name']} is a {type(value).__name__}")
        return OPS[data["name"]](**fields)
    if kind in _RECORDS:
        _, build, fields = _RECORDS[kind]
        if set(data) != {"type", *fields}:
            raise PlanError(f"a saved {kind} has fields {sorted(fields)}, this one {sorted(set(data) - {'type'})}")
        values = {name: decode(data[name], tensors) for name in fields}
        for name, value in values.items():
            if not isinstance(value, _TYPES[kind, name]) or (isinstance(value, bool) and name != "aligned"):
                raise PlanError(f"the {name} of a saved {kind} is a {type(value).__name__}")
        return build(**values)
    raise PlanError(f"a saved plan cannot hold a {kind!r}{nearest(kind, _RECORDS)}")


_PLAIN = {"tensor": ("name",), "float": ("value",), "tuple": ("items",), "origin": ("name",), "op": ("name", "fields")}
_NONE = type(None)
_INDEX = (int, tuple, Span, Tensor, _NONE)
_TYPES: dict[tuple[str, str], tuple[type, ...]] = {
    ("plan", "interventions"): (tuple,),
    ("intervention", "site"): (Site,),
    ("intervention", "op"): (Op,),
    ("intervention", "reads"): (tuple,),
    ("intervention", "weight"): (int, float, Tensor),
    ("intervention", "only"): (Tensor, _NONE),
    ("read", "source"): (World, Plan, Tape, Tensor, Origin),
    ("read", "site"): (Site, _NONE),
    ("read", "aligned"): (bool,),
    ("site", "name"): (str,),
    ("site", "layer"): (int, _NONE),
    ("site", "stack"): (str, _NONE),
    **{("site", axis): _INDEX for axis in ("head", "pos", "key_pos", "dim")},
    ("span", "start"): (int, _NONE),
    ("span", "stop"): (int, _NONE),
    ("world", "inputs"): (Inputs,),
    ("world", "plan"): (Plan,),
    **{("inputs", name): (Tensor,) for name in ("ids", "mask", "row_ids")},
    ("inputs", "tokens"): (tuple, _NONE),
    ("images", "pixels"): (Tensor,),
    ("images", "patch"): (tuple,),
    ("images", "row_ids"): (Tensor,),
    ("tape", "inputs"): (Inputs,),
    ("tape", "values"): (tuple,),
    ("tape", "size_table"): (tuple,),
}
_RECORDS: dict[str, tuple[type, Callable[..., Any], tuple[str, ...]]] = {
    "plan": (Plan, Plan, ("interventions",)),
    "intervention": (Intervention, Intervention, ("site", "op", "reads", "weight", "only")),
    "read": (Read, Read, ("source", "site", "aligned")),
    "site": (Site, Site, ("name", "layer", "stack", "head", "pos", "key_pos", "dim")),
    "span": (Span, Span, ("start", "stop")),
    "world": (World, World, ("inputs", "plan")),
    "images": (Inputs, Inputs.of_images, ("pixels", "patch", "row_ids")),
    "inputs": (Inputs, Inputs.of, ("ids", "mask", "row_ids", "tokens")),
    "tape": (
        Tape,
        lambda inputs, values, size_table: Tape(inputs, values, {key: dict(sizes) for key, sizes in size_table}),
        ("inputs", "values", "size_table"),
    ),
}
"""What may stand in a file: the type, what makes one of its fields, and the fields. Images are inputs with pixels, and
come before those without.
"""
