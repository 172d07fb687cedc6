"""Digests of values and functions: whether something is what it was, in this process or another."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import types
from typing import Any

import numpy as np
import torch
from torch import Tensor


def digest_of(value: Any) -> str:
    """A digest that two values have in common when they are equal: tensors by content, functions by content.

    A function enters with its byte code, its constants, its defaults, and what it closes over, but not with the
    functions that it calls by name. An object of another kind enters with its type and its attributes.
    """
    digest = hashlib.sha256()
    _feed(digest, value, {}, {})
    return digest.hexdigest()


def _feed(digest: Any, value: Any, above: dict[int, int], known: dict[int, tuple[Any, bytes]]) -> None:
    """Enter a value.

    Args:
        digest: what it enters.
        value: the value.
        above: the objects that it is a part of, by id, and how deep each is.
        known: the objects that were entered before, by id, with their digests; held here, so that an id stays theirs.
    """
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        digest.update(f"{type(value).__name__} {value!r};".encode())
        return
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().flatten()
        digest.update(f"tensor {value.dtype} {list(value.shape)};".encode())
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        return
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.ascontiguousarray(value)
        digest.update(f"array {array.dtype} {array.shape};".encode() + array.tobytes())
        return
    key = id(value)
    if key in above:
        digest.update(f"{len(above) - above[key]} above;".encode())
        return
    if key not in known:
        inner = hashlib.sha256(f"{type(value).__module__}.{type(value).__qualname__}(".encode())
        above[key] = len(above)
        for part in _parts(value):
            _feed(inner, part, above, known)
        del above[key]
        known[key] = (value, inner.digest())
    digest.update(known[key][1])


def _parts(value: Any) -> list[Any]:
    """What a value consists of."""
    if isinstance(value, (tuple, list)):
        return list(value)
    if isinstance(value, (set, frozenset)):
        return sorted(digest_of(v) for v in value)
    if isinstance(value, dict):
        return [part for key in value for part in (key, value[key])]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, types.FunctionType):
        # A list or dict is a place for notes, which change while the function stays what it is.
        held = [cell.cell_contents for cell in value.__closure__ or ()]
        cells = [type(v).__name__ if isinstance(v, (list, dict, set)) else v for v in held]
        return [value.__code__, value.__defaults__, value.__kwdefaults__, cells]
    if isinstance(value, types.CodeType):
        return [value.co_code, value.co_names, value.co_consts]
    if isinstance(value, (type, types.BuiltinFunctionType, types.ModuleType)):
        own = getattr(value, "__self__", None)  # of a method such as a dict's, what it is a method of
        bound = [] if own is None or isinstance(own, types.ModuleType) else [own]
        return [getattr(value, "__module__", ""), getattr(value, "__qualname__", value.__name__), *bound]
    if isinstance(value, torch.nn.Module):
        return [type(value).__qualname__, *(part for name, t in value.state_dict().items() for part in (name, t))]
    if dataclasses.is_dataclass(value):
        # Not all that it holds: what it has computed of its fields by now is not what it is.
        return [(field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value)]
    return [vars(value)] if hasattr(value, "__dict__") else []
