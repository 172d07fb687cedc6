"""Digests of values and functions: whether something is what it was, in this process or another."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import hashlib
import types
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .code import globals_read, installed, members, written_to


def digest_of(value: Any) -> str:
    """A digest that two values have in common when they are equal: tensors by content, functions by content.

    A function enters with its byte code, its constants, its defaults, what it closes over, and the globals that it
    reads by name; functions and classes of installed packages by name and byte code alone. What a function itself
    writes to (a list that it appends to, say) is its notes, and enters by type. An object of another kind enters with
    its type, its attributes, and the code of its class.
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
        if value.dtype.hasobject:
            return _feed(digest, ("array", np.shape(value), value.tolist()), above, known)
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
        return _function(value)
    if isinstance(value, types.CodeType):
        return [value.co_code, value.co_names, value.co_consts]
    if isinstance(value, (staticmethod, classmethod)):
        return [value.__func__]
    if isinstance(value, property):
        return [value.fget, value.fset]
    if isinstance(value, enum.Enum):
        return [value.name]
    if isinstance(value, (type, types.BuiltinFunctionType, types.ModuleType)):
        own = getattr(value, "__self__", None)  # of a method such as a dict's, what it is a method of
        bound = [] if own is None or isinstance(own, types.ModuleType) else [own]
        if isinstance(value, type) and not installed(value.__module__):
            bound += [value.__bases__, members(value)]
        return [getattr(value, "__module__", ""), getattr(value, "__qualname__", value.__name__), *bound]
    return [*_state(value), *([] if installed(type(value).__module__) else [type(value)])]


_NOTES = (list, dict, set, collections.deque, bytearray, bool, int, float, str, type(None))
"""What a function may keep notes in; tensors have methods of the same names, which leave them as they are."""


def _function(value: types.FunctionType) -> list[Any]:
    notes = written_to(value.__code__)

    def held(name: str, thing: Any, written: frozenset[str]) -> Any:
        return type(thing).__name__ if name in written and isinstance(thing, _NOTES) else thing

    cells = []
    for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=False):
        try:
            cells.append(held(name, cell.cell_contents, notes.closed_over))
        except ValueError:  # nothing is in it yet
            cells.append(())
    arguments = value.__code__.co_varnames[: value.__code__.co_argcount]
    given = value.__defaults__ or ()
    positional = zip(arguments[len(arguments) - len(given) :], given, strict=True)
    defaults = [held(name, thing, notes.arguments) for name, thing in positional]
    named = {name: held(name, thing, notes.arguments) for name, thing in (value.__kwdefaults__ or {}).items()}
    read = {} if installed(value.__module__) else globals_read(value)
    known = {name: held(name, thing, notes.globals) for name, thing in read.items()}
    return [value.__code__, defaults, named, cells, known]


def _state(value: Any) -> list[Any]:
    """What an object of another kind holds."""
    if isinstance(value, torch.nn.Module):
        return [type(value).__qualname__, *(part for name, t in value.state_dict().items() for part in (name, t)),
                *structure(value)]  # fmt: skip
    if callable(getattr(value, "get_vocab", None)):  # of a tokenizer, whose other parts change as it is used
        return [sorted(value.get_vocab().items())]
    wrapped = getattr(value, "module", None)
    if isinstance(wrapped, torch.nn.Module) and hasattr(value, "architecture"):
        return [wrapped]
    if dataclasses.is_dataclass(value):
        # Not all that it holds: what it has computed of its fields by now is not what it is.
        return [(field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value)]
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()) if hasattr(value, name)]
    if hasattr(value, "__dict__") or slots:
        own = {name: getattr(value, name) for name in slots if name not in ("__dict__", "__weakref__")}
        return [{**own, **getattr(value, "__dict__", {})}]
    try:
        reduced = value.__reduce_ex__(2)
    except Exception:  # nobody knows what it holds, as of a generator or a lock
        return []
    if isinstance(reduced, str):
        return [reduced]
    return [list(part) if hasattr(part, "__next__") else part for part in reduced]


_PASSING = ("training", "gradient_checkpointing", "name_or_path", "warnings_issued")
"""Plain attributes of modules that say nothing of what they compute in evaluation mode."""


def structure(module: torch.nn.Module) -> list[Any]:
    """What a module computes besides its weights: the kinds of its parts, their plain settings, and hooks on them."""
    parts: list[Any] = []
    for name, part in module.named_modules():
        plain = {
            key: thing
            for key, thing in vars(part).items()
            if isinstance(thing, (bool, int, float, str)) and not (key.startswith("_") or "cache" in key)
            and key not in _PASSING
        }  # fmt: skip
        listed = [*part._forward_pre_hooks.values(), *part._forward_hooks.values()]
        hooks = [hook for hook in listed if not getattr(hook, "passing", False)]
        parts += [name, type(part), plain, vars(part).get("forward"), hooks]
    return parts
