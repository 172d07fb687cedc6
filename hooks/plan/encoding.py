"""Values of plans as data and back: each class says what it consists of, and reading knows the given classes alone.

Data is what JSON can hold, with tensors by name beside it. Reading refuses whatever is not of a known type, with
exactly its fields, each of the type that its class allows; nothing that stands in a file is ever run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ..digest import digest_of
from ..errors import PlanError, nearest

Put = Callable[[Any], Any]
"""From a value to data; what a class writes its parts with."""


@runtime_checkable
class Encodable(Protocol):
    """A value that can be written as data."""

    def encoded(self, put: Put) -> dict[str, Any]:
        """The value as data that names its own type."""
        ...


@dataclass(frozen=True)
class Record:
    """How values of one class stand in a file.

    Attributes:
        name: what the data names as its type.
        fields: the types that each field may have, by name.
        build: from the fields, in their order, to the value.
    """

    name: str
    fields: Mapping[str, tuple[type, ...]]
    build: Callable[..., Any]

    def encoded(self, value: Any, put: Put) -> dict[str, Any]:
        """The fields of a value as data."""
        return {"type": self.name} | {field: put(getattr(value, field)) for field in self.fields}


def encode(value: Any, functions: bool = False) -> tuple[Any, dict[str, Tensor]]:
    """Write a value as data and a table of tensors.

    Args:
        value: what is written.
        functions: write functions of the user's too, by name and digest, for a fingerprint; else they are refused.

    Raises:
        PlanError: it holds something that cannot be saved.
    """
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
        if isinstance(value, Encodable):
            data = value.encoded(put)
            if data["type"] == "function" and not functions:
                raise PlanError(f"a plan with a function of yours ({value}) cannot be saved: loading runs no code")
            return data
        raise PlanError(f"a {type(value).__name__} cannot be saved")

    return put(value), tensors


_PLAIN = {"tensor": ("name",), "float": ("value",), "tuple": ("items",), "op": ("name", "fields")}


def decode(
    data: Any, tensors: Mapping[str, Tensor], records: Mapping[str, Record], operations: Mapping[str, type]
) -> Any:
    """Read what `encode` wrote, refusing everything else.

    Args:
        data: what stands in the file.
        tensors: its tensors by name.
        records: the classes that may stand there, by the name of their type.
        operations: the operations, by name.

    Raises:
        PlanError: it holds something else.
    """

    def read(data: Any) -> Any:
        if data is None or isinstance(data, (bool, int, str)):
            return data
        if not isinstance(data, dict) or "type" not in data:
            raise PlanError(f"a saved plan cannot hold {data!r}")
        kind = data["type"]
        if kind in _PLAIN and set(data) != {"type", *_PLAIN[kind]}:
            raise PlanError(
                f"a saved {kind} has fields {sorted(_PLAIN[kind])}, this one {sorted(set(data) - {'type'})}"
            )
        if kind == "tensor":
            if data["name"] not in tensors:
                raise PlanError(f"tensor {data['name']!r} is missing")
            return tensors[data["name"]]
        if kind == "float":
            return float.fromhex(data["value"])
        if kind == "tuple":
            return tuple(read(v) for v in data["items"])
        if kind == "op":
            return operation(data["name"], {name: read(v) for name, v in data["fields"].items()})
        if kind in records:
            return record(records[kind], data)
        raise PlanError(f"a saved plan cannot hold a {kind!r}{nearest(kind, records)}")

    def operation(name: str, fields: dict[str, Any]) -> Any:
        if name not in operations:
            raise PlanError(f"unknown intervention {name!r}{nearest(name, operations)}")
        for field, value in fields.items():
            if not isinstance(value, (int, float, Tensor)):
                raise PlanError(f"parameter {field!r} of a saved {name} is a {type(value).__name__}")
        return operations[name](**fields)

    def record(kind: Record, data: dict[str, Any]) -> Any:
        if set(data) != {"type", *kind.fields}:
            raise PlanError(
                f"a saved {kind.name} has fields {sorted(kind.fields)}, this one {sorted(set(data) - {'type'})}"
            )
        values = {name: read(data[name]) for name in kind.fields}
        for name, value in values.items():
            types = kind.fields[name]
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                raise PlanError(f"the {name} of a saved {kind.name} is a {type(value).__name__}")
        return kind.build(**values)

    return read(data)
