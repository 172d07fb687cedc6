"""What a newcomer sees of the package: its names, its version, its errors, and help that points to what is there."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hooks.errors
import interp as ip

ELSEWHERE = {"EvictedCache", "Trainer.log", "dynamic"}
"""Names of transformers and torch, and of a class that is made on use."""
ROOT = Path(__file__).resolve().parents[2]


def documented(thing: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Any, str]]:
    """Everything that one comes to from the package by attributes, with its docstring."""
    if id(thing) in seen or isinstance(thing, (str, int, float, tuple, list, dict)):
        return
    seen.add(id(thing))
    yield name, thing, inspect.getdoc(thing) or ""
    below = []
    if inspect.isclass(thing):
        below = [(key, getattr(value, "__func__", getattr(value, "fget", value))) for key, value in vars(thing).items()]
    elif inspect.ismodule(thing) and thing.__name__.startswith("interp"):
        below = [(key, getattr(thing, key)) for key in getattr(thing, "__all__", [])]
    for key, value in list(below):
        if not key.startswith("_") and (callable(value) or inspect.ismodule(value)):
            yield from documented(value, f"{name}.{key}", seen)


def reachable(dotted: str, owner: str) -> bool:
    """Whether a name is an attribute of the package, of what documents it, or of a module by its path."""
    parts = dotted.split(".")
    scopes: list[Any] = [ip, ip.adapters, ip.attention, ip.kv, ip.paths, ip.training]
    thing: Any = ip
    for part in owner.split(".")[1:]:
        thing = getattr(thing, part)
        scopes.append(thing)
    where = getattr(thing, "__module__", "")
    scopes += [importlib.import_module(where)] if where.startswith("interp.") else []
    if parts[0] == "ip":
        parts = parts[1:]
    for length in range(len(parts), 0, -1):
        if parts[0] in ("interp",):
            try:
                scopes.append(importlib.import_module(".".join(parts[:length])))
            except ImportError:
                continue
            parts = parts[length:]
            break
    for scope in scopes:
        found = scope
        try:
            for part in parts:
                fields = getattr(found, "__dataclass_fields__", {})
                found = fields[part] if part in fields else getattr(found, part)
        except AttributeError:
            continue
        return True
    return False


def test_help_points_to_names_that_one_can_reach():
    missing, looked = [], 0
    for name, _, text in documented(ip, "ip", set()):
        named = re.findall(r"(?<!`)`((?:hooks|interp|ip)\.[\w.]+|[A-Z]\w*(?:\.\w+)*)`(?!`)", text)
        named += re.findall(r"[Ss]ee `([\w.]+)`", text)
        for pointed in named:
            looked += 1
            if pointed not in ELSEWHERE and not reachable(pointed, name):
                missing.append((name, pointed))
    assert looked > 60 and missing == []


def test_every_error_that_users_meet_is_a_name_of_the_package():
    errors = [e for e in vars(hooks.errors).values() if inspect.isclass(e) and issubclass(e, ip.InterpError)]
    assert len(errors) > 10 and all(getattr(ip, e.__name__) is e for e in errors)


def test_the_version_is_the_one_that_is_shipped():
    assert re.fullmatch(r"\d+\.\d+\.\d+", ip.__version__)
    assert 'path = "interp/version.py"' in (ROOT / "pyproject.toml").read_text()


def test_what_dir_shows_is_what_the_package_offers():
    shown = [name for name in dir(ip) if not name.startswith("__")]
    assert set(shown) == set(ip.__all__) - {"__version__"}
    assert "__version__" in dir(ip) and "streaming" not in shown and {"paths", "plots", "training"} <= set(shown)
    assert all(hasattr(ip, name) for name in dir(ip))
