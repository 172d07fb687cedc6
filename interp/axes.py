"""The axes of a grid of effects, and how one or several of their values are found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hooks import ResultError, nearest

COLUMNS = ("metric", "row", "effect", "base", "source", "status", "low", "high")
"""What the columns of a result's table are called, which no axis can be."""


@dataclass(frozen=True)
class Axis:
    """One axis of a grid.

    Attributes:
        name: "layer", "pos", "head", "key_pos", "site", "cell".
        values: numbers, strings, or tuples of ints (a group edited together).
        labels: what a figure or table prints (tokens, say); by default the values as text.
    """

    name: str
    values: tuple
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        values = tuple(plain(value) for value in self.values)
        labels = tuple(self.labels) or tuple(str(value) for value in values)
        if not isinstance(self.name, str) or self.name in COLUMNS:
            raise ResultError(f"an axis cannot be called {self.name!r}: that names a column of the result's table")
        if len(labels) != len(values) or not all(isinstance(label, str) for label in labels):
            raise ResultError(f"axis {self.name!r} has {len(values)} values and needs as many labels, got {labels}")
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "labels", labels)

    def __len__(self) -> int:
        return len(self.values)

    def text(self, i: int) -> str:
        """The name of the axis with one of its values, and its label where that says more."""
        value, label = str(self.values[i]), self.labels[i]
        return f"{self.name}={value}" if label == value else f"{self.name}={value} {label!r}"


def plain(value: Any) -> Any:
    """Return Python's own numbers for numpy's, and tuples for lists."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    return tuple(plain(item) for item in value) if isinstance(value, (list, tuple)) else value


def find(what: str, values: tuple, wanted: Any, labels: tuple[str, ...] = ()) -> int | list[int]:
    """Return the index of one value, or the indices of several: a list, range or array, or a tuple that is no value.

    A text that is no value may be the label of one.
    """
    several = isinstance(wanted, (list, range)) or (isinstance(wanted, np.ndarray) and wanted.ndim > 0)
    wanted = plain(tuple(wanted) if several else wanted)
    if several or (isinstance(wanted, tuple) and wanted not in values):
        if not wanted:
            raise ResultError(f"an empty selection from {what}")
        return [_find_one(what, values, one, labels) for one in wanted]
    return _find_one(what, values, wanted, labels)


def _find_one(what: str, values: tuple, wanted: Any, labels: tuple[str, ...]) -> int:
    # True == 1 in Python: a mask must not pass for the values 0 and 1.
    found = [
        i for i, value in enumerate(values) if value == wanted and isinstance(wanted, bool) is isinstance(value, bool)
    ]
    if not found and isinstance(wanted, str):
        found = [i for i, label in enumerate(labels) if label == wanted and label != str(values[i])]
        if len(found) > 1:
            places = some([values[i] for i in found])
            raise ResultError(f"{what} has the label {wanted!r} {len(found)} times, at {places}: name one of these")
        values = (*values, *labels) if not found else values
    if not found:
        raise ResultError(f"{what} has no {wanted!r}{nearest(wanted, values)}; it has {some(values)}")
    if len(found) > 1:
        raise ResultError(f"{what} has {wanted!r} {len(found)} times, so it does not say which")
    return found[0]


def some(values: Sequence) -> str:
    """Return the values as text, in short when there are many."""
    if len(values) <= 12:
        return ", ".join(map(repr, values))
    return f"{', '.join(map(repr, values[:6]))}, ..., {values[-1]!r}"
