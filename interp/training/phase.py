"""The step at which a loss suddenly drops, found afterwards or as it happens."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from hooks import MetricError


def phase_change(
    losses: Sequence[float],
    threshold: float,
    *,
    plateau: tuple[int, int] | None = None,
    smooth: int = 1,
    steps: Sequence[int] | None = None,
) -> int | None:
    """The first step at which the mean of the last `smooth` losses is below a threshold; None where there is none.

    Args:
        losses: one for each observation.
        threshold: in the loss's unit; or, with a plateau, a share of its height.
        plateau: ``(start, stop)``: the steps whose mean loss is the plateau's height. The drop is looked for from
            `stop` on.
        smooth: observations that the mean is over; there is no mean before there are so many.
        steps: the step of each observation, ascending; by default 0, 1, 2, ...

    Raises:
        MetricError: arguments out of range, or no observation in the plateau and some after it.
    """
    _check(threshold, plateau, smooth)
    at = range(len(losses)) if steps is None else list(steps)
    if len(at) != len(losses):
        raise MetricError(f"{len(at)} steps for {len(losses)} losses")
    if any(a >= b for a, b in pairwise(at)):
        raise MetricError("steps: each comes after the one before")
    limit, first = threshold, 0
    if plateau is not None:
        flat = [x for s, x in zip(at, losses, strict=True) if plateau[0] <= s < plateau[1]]
        first = plateau[1]
        if not len(at) or at[-1] < first:
            return None
        limit = threshold * _height(flat, plateau)
    for i in range(smooth - 1, len(losses)):
        if at[i] >= first and math.fsum(losses[i + 1 - smooth : i + 1]) / smooth < limit:
            return at[i]
    return None


class Drop:
    """`phase_change` one loss at a time."""

    def __init__(self, threshold: float, plateau: tuple[int, int] | None = None, smooth: int = 1) -> None:
        _check(threshold, plateau, smooth)
        self.threshold, self.plateau, self.smooth = threshold, plateau, smooth
        self.recent: deque[float] = deque(maxlen=smooth)
        self.flat: list[float] = []
        self.step: int | None = None

    def see(self, step: int, loss: float) -> bool:
        """Take in the loss of a step; whether this is the step of the drop.

        Raises:
            MetricError: the plateau is over and no loss of it was seen.
        """
        self.recent.append(loss)
        limit = self.threshold
        if self.plateau is not None:
            if self.plateau[0] <= step < self.plateau[1]:
                self.flat.append(loss)
            if step < self.plateau[1]:
                return False
            limit = self.threshold * _height(self.flat, self.plateau)
        full = len(self.recent) == self.smooth
        if self.step is None and full and math.fsum(self.recent) / self.smooth < limit:
            self.step = step
            return True
        return False

    def state_dict(self) -> dict[str, Any]:
        """What has been seen, as plain data."""
        of = [self.threshold, self.plateau and list(self.plateau), self.smooth]
        return {"of": of, "recent": list(self.recent), "flat": list(self.flat), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            MetricError: it is of another threshold, plateau or smoothing.
        """
        own = self.state_dict()["of"]
        if state["of"] != own:
            raise MetricError(f"what was seen is of (threshold, plateau, smooth) {state['of']}, and this is of {own}")
        self.recent = deque(state["recent"], maxlen=self.smooth)
        self.flat, self.step = list(state["flat"]), state["step"]


@dataclass(frozen=True)
class PhaseTimes:
    """When runs changed.

    Attributes:
        median: median step over runs, in steps; inf where at least half of the runs never changed.
        low, high: ends of its bootstrap interval over runs; inf where they lie beyond what was run.
        changed, censored: how many runs changed, and how many had not when they ended, after `horizon` steps.
        horizon: steps that were run.
    """

    median: float
    low: float
    high: float
    changed: int
    censored: int
    horizon: int

    def __str__(self) -> str:
        def text(x: float) -> str:
            return f"more than {self.horizon}" if math.isinf(x) else f"{x:.0f}"

        never = f"; {self.censored} of {self.changed + self.censored} runs never changed" if self.censored else ""
        return f"step {text(self.median)} ({text(self.low)} to {text(self.high)}{never})"


def phase_times(
    times: Sequence[int | float | None], horizon: int, *, level: float = 0.95, n_boot: int = 2000, seed: int = 0
) -> PhaseTimes:
    """The median step of the phase change over runs (seeds), with a percentile bootstrap interval.

    A run that never changed is censored: all that is known is that its step is later than the horizon. It counts as
    later than every other, which leaves a median well defined where a mean would not be.

    Args:
        times: one for each run; None (or nan) where it never changed.
        horizon: steps that every run was given.
        level: coverage of the interval.
        n_boot: number of bootstrap draws.
        seed: of the draws.

    Raises:
        MetricError: no run, a time before 0 or after the horizon, or arguments out of range.
    """
    found = np.array([np.inf if t is None or math.isnan(t) else float(t) for t in times])
    outside = found[np.isfinite(found) & ((found < 0) | (found > horizon))]
    if not len(found) or len(outside) or not 0 < level < 1 or n_boot < 1:
        raise MetricError(
            f"expected at least one time, all from 0 to the horizon of {horizon} steps, a level between 0 and 1, and "
            f"draws; got {list(times)}, level={level}, n_boot={n_boot}"
        )
    draws = np.random.default_rng(seed).integers(0, len(found), (n_boot, len(found)))
    medians = np.sort(_median(found[draws]))
    tail = (1 - level) / 2
    low, high = medians[math.floor(tail * (n_boot - 1))], medians[math.ceil((1 - tail) * (n_boot - 1))]
    changed = int(np.isfinite(found).sum())
    return PhaseTimes(
        float(_median(found[None])[0]), float(low), float(high), changed, len(found) - changed, int(horizon)
    )


def _median(values: np.ndarray) -> np.ndarray:
    """Median over the last axis; inf where one of the middle two is."""
    ordered, n = np.sort(values, axis=-1), values.shape[-1]
    return (ordered[..., (n - 1) // 2] + ordered[..., n // 2]) / 2


def _check(threshold: float, plateau: tuple[int, int] | None, smooth: int) -> None:
    if not isinstance(threshold, (int, float)) or not math.isfinite(threshold):
        raise MetricError(f"a threshold is a finite number, got {threshold!r}")
    if not _whole(smooth) or smooth < 1:
        raise MetricError(f"a loss is smoothed over at least 1 observation, got smooth={smooth!r}")
    if plateau is None:
        return
    pair = isinstance(plateau, (tuple, list)) and len(plateau) == 2 and all(map(_whole, plateau))
    if not pair or not 0 <= plateau[0] < plateau[1]:
        raise MetricError(f"a plateau is (start, stop), two steps with start before stop, got {plateau!r}")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _height(flat: Sequence[float], plateau: tuple[int, int]) -> float:
    if not flat:
        raise MetricError(f"no loss was observed in the plateau, steps {plateau[0]} to {plateau[1]}: it has no height")
    return math.fsum(flat) / len(flat)
