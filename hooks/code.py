"""What can be told of a function without calling it: the globals that it reads, and what it writes to."""

from __future__ import annotations

import dis
import sys
import sysconfig
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

OURS = ("hooks", "interp")
_MUTATING = {
    "add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem", "popleft", "remove",
    "setdefault", "update",
}  # fmt: skip
_LOADS = {
    "LOAD_FAST": "local",
    "LOAD_DEREF": "closed over",
    "LOAD_CLASSDEREF": "closed over",
    "LOAD_GLOBAL": "global",
    "LOAD_NAME": "global",
}
_STORES = {"STORE_DEREF": "closed over", "STORE_GLOBAL": "global"}
_IN_CLASSES = {
    "__dict__", "__weakref__", "__module__", "__qualname__", "__doc__", "__annotations__", "__abstractmethods__",
    "_abc_impl", "__slots__", "__dataclass_fields__", "__dataclass_params__", "__match_args__", "__parameters__",
    "__orig_bases__",
}  # fmt: skip
"""What a class has besides what its author wrote."""


def installed(module: str | None) -> bool:
    """Whether a module belongs to Python, to an installed package or to us, rather than to the user."""
    top = (module or "").partition(".")[0]
    if not top or top == "__main__":
        return False
    if top in OURS or top in sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(top), "__file__", None)
    return isinstance(file, str) and file.startswith(_folders())


_FOLDERS: list[tuple[str, ...]] = []  # a plain list, so that functions can be sent to where a model runs


def _folders() -> tuple[str, ...]:
    if not _FOLDERS:
        _FOLDERS.append(tuple({sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")}))
    return _FOLDERS[0]


def members(cls: type) -> dict[str, Any]:
    """What the author of a class wrote into it, by name."""
    return {name: vars(cls)[name] for name in sorted(vars(cls)) if name not in _IN_CLASSES}


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def globals_read(fn: types.FunctionType) -> dict[str, Any]:
    """The globals that a function, or one inside it, reads by name; of a module of the user's, what is read of it."""
    found: dict[str, Any] = {}
    for code in _codes(fn.__code__):
        listed = list(dis.get_instructions(code))
        for now, following in zip(listed, [*listed[1:], None], strict=True):
            name = now.argval
            if _LOADS.get(now.opname) != "global" or name not in fn.__globals__:
                continue
            value = fn.__globals__[name]
            of_users = isinstance(value, types.ModuleType) and not installed(value.__name__)
            if of_users and following is not None and following.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                name, value = f"{name}.{following.argval}", getattr(value, following.argval, None)
            found[name] = value
    return found


@dataclass(frozen=True)
class Writes:
    """The names to which a function, or one inside it, writes, or to whose value: by a method, an item, or anew.

    Attributes:
        arguments: its own arguments.
        closed_over: what it closes over.
        globals: globals.
    """

    arguments: frozenset[str]
    closed_over: frozenset[str]
    globals: frozenset[str]


def written_to(code: types.CodeType) -> Writes:
    """What a function writes to, as far as its byte code tells."""
    own = set(_written(code))
    every = own.union(*(_written(one) for one in _codes(code)))
    names = {kind: frozenset(name for k, name in every if k == kind) for kind in _LOADS.values()}
    mine = frozenset(name for kind, name in own if kind != "global")
    return Writes(mine & set(code.co_varnames), names["closed over"], names["global"])


def _written(code: types.CodeType) -> Iterator[tuple[str, str]]:
    # What lies on the interpreter's stack: a name and its kind, or None for anything else.
    stack: list[tuple[str, str] | None] = []
    for step in dis.get_instructions(code):
        op, effect = step.opname, dis.stack_effect(step.opcode, step.arg, jump=False)
        top = stack[-1] if stack else None
        if op in _STORES:
            yield _STORES[op], step.argval
        if op in ("LOAD_ATTR", "LOAD_METHOD") and step.argval in _MUTATING and top is not None:
            yield top
        if op in ("STORE_SUBSCR", "DELETE_SUBSCR") and len(stack) > 1 and (container := stack[-2]) is not None:
            yield container
        if op == "COPY" and step.arg:
            stack.append(stack[-step.arg] if len(stack) >= step.arg else None)
        elif op == "SWAP" and step.arg and len(stack) >= step.arg:
            stack[-1], stack[-step.arg] = stack[-step.arg], stack[-1]
        elif op in _LOADS:
            # A global is pushed above a null where it is about to be called.
            stack += [*[None] * (effect - 1), (_LOADS[op], step.argval)]
        else:
            pure = op.startswith(("LOAD_CONST", "PUSH_", "STORE_", "POP_", "DELETE_"))
            if effect < 0:
                del stack[effect:]
            if stack and not pure:
                stack[-1] = None  # a result has taken the place of what it was made of
            stack += [None] * max(0, effect)
