"""Combinations to parametrise a test with where the whole product would try one thing many times."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def pairs(first: Iterable[Any], second: Iterable[Any], third: Iterable[Any]) -> list[tuple[Any, Any, Any]]:
    """Every two values of different axes meet: all of the first two, and the third in turn, as in a Latin square.

    Args:
        first: values of the first axis, as many as there are in the third or more.
        second: values of the second, as many as there are in the third or more.
        third: values of the third.
    """
    second, third = list(second), list(third)
    return [(a, b, third[(i + j) % len(third)]) for i, a in enumerate(first) for j, b in enumerate(second)]


def in_turn(first: Iterable[Any], *others: Iterable[Any], start: int = 0) -> list[tuple[Any, ...]]:
    """Each value of the first axis once, with values of the others that take turns.

    Args:
        start: the turn to begin with, so that two tests that are alike try other combinations.
    """
    listed = [list(other) for other in others]
    return [(a, *(other[(i + start) % len(other)] for other in listed)) for i, a in enumerate(first)]
