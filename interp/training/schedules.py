"""When something happens in training, and how strongly: functions of the number of optimizer steps taken so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from numbers import Real
from typing import Any

from hooks import PlanError

When = None | range | tuple[int, int | None] | Sequence[tuple[int, int | None]] | Callable[[int], bool]
"""Steps: None for all; a range; ``(start, stop)`` up to but not including `stop` (None: open), or several of these; or
a function of the step."""

Every = int | Sequence[int] | Callable[[int], bool]
"""Steps: every n-th from 0 on; those listed; or a function of the step."""

Level = float | Sequence[tuple[int, float]] | Callable[[int], float]
"""A number from 0 to 1; knots ``(step, value)``, between which it goes straight and outside of which it stays; or a
function of the step."""


def during(when: When) -> Callable[[int], bool]:
    """Make a function of the step from any form of `When`.

    Raises:
        PlanError: it is none of them.
    """
    if when is None:
        return lambda step: True
    if isinstance(when, range):
        return lambda step: step in when
    if callable(when):
        return lambda step: bool(when(step))
    spans: list[Any] = [when] if _is_span(when) else list(when) if isinstance(when, (list, tuple)) else []
    if not spans or not all(_is_span(span) for span in spans):
        raise PlanError(
            f"unknown schedule {when!r}: expected None, a range, (start, stop), several of these, or a function of the "
            "step"
        )
    return lambda step: any(start <= step and (stop is None or step < stop) for start, stop in spans)


def due(every: Every) -> Callable[[int], bool]:
    """Make a function of the step from any form of `Every`.

    Raises:
        PlanError: it is none of them.
    """
    if isinstance(every, int) and not isinstance(every, bool) and every > 0:
        return lambda step: step % every == 0
    if callable(every):
        return lambda step: bool(every(step))
    if isinstance(every, (list, tuple, range, set, frozenset)) and len(every) and all(_is_step(s) for s in every):
        steps = frozenset(every)
        return lambda step: step in steps
    raise PlanError(f"unknown schedule {every!r}: expected every n-th step (n > 0), a list of steps, or a function")


def level(value: Level) -> Callable[[int], float]:
    """Make a function of the step from any form of `Level`.

    Raises:
        PlanError: it is none of them, the knots are not in order, or a value is not from 0 to 1; what a function gives
            is looked at when it is asked.
    """
    if _is_strength(value):
        return lambda step: float(value)  # type: ignore[arg-type]
    if callable(value):
        return lambda step: _given(value(step), step)
    knots: list[Any] = list(value) if isinstance(value, (list, tuple)) else []
    good = knots and all(
        isinstance(k, (list, tuple)) and len(k) == 2 and _is_step(k[0]) and _is_strength(k[1]) for k in knots
    )
    if not good or any(a[0] >= b[0] for a, b in pairwise(knots)):
        raise PlanError(
            f"unknown strength {value!r}: expected a number from 0 to 1, knots (step, number) in order, or a function"
        )

    def between(step: int) -> float:
        if step <= knots[0][0]:
            return float(knots[0][1])
        for (a, x), (b, y) in pairwise(knots):
            if step < b:
                return x + (y - x) * (step - a) / (b - a)
        return float(knots[-1][1])

    return between


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_strength(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) <= 1


def _given(value: Any, step: int) -> float:
    if not _is_strength(value):
        raise PlanError(f"a strength is a number from 0 to 1; the schedule gives {value!r} at step {step}")
    return float(value)


def _is_span(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not _is_step(value[0]):
        return False
    return value[1] is None or (_is_step(value[1]) and value[1] > value[0])
