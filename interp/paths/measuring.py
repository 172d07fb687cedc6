"""A metric measured on many worlds of one batch of prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hooks import Inputs, Model, World, run_worlds
from hooks.errors import MetricError
from hooks.meter import Meter
from interp.metrics import Bound, Metric, call
from interp.results import STATUS
from interp.sweeps import check_metrics, references


@dataclass(frozen=True, eq=False)
class Measure:
    """A metric, bound to the prompts of the run that is edited.

    Attributes:
        model, metric, bound, inputs: what is measured, and on what.
        others: what the metric compares with, on all rows.
        budget: bytes that the activations of a chunk may take.
        executor: see `hooks.run_worlds`.
        seed: of random interventions.
        meter: counts the work.
    """

    model: Model
    metric: Metric
    bound: Bound
    inputs: Inputs
    others: list[torch.Tensor]
    budget: int | None = None
    executor: str = "auto"
    seed: int = 0
    meter: Meter | None = None

    @classmethod
    def of(cls, model: Model, metric: Metric, inputs: Inputs, source: World | None, **options: Any) -> Measure:
        """Bind a metric.

        Raises:
            MetricError: it is not one metric, or it compares with a source that there is not.
        """
        if not isinstance(metric, Metric):
            raise MetricError(f"{metric!r} is not a metric; wrap a function of yours with ip.metric(fn, reads=...)")
        check_metrics([metric])
        bound = metric.bind(model, inputs)
        return cls(model, metric, bound, inputs, references(model, [metric], [bound], source, inputs)[0], **options)

    def each(
        self, worlds: Sequence[World], skip: Callable[[int, slice], bool] | None = None
    ) -> Iterator[tuple[int, slice, np.ndarray, int]]:
        """Yield of each world, for some of its rows: its number, the rows, the metric float64 [b], and its status."""
        for outcome in run_worlds(
            self.model,
            worlds,
            self.bound.reads,
            executor=self.executor,
            budget=self.budget,
            seed=self.seed,
            skip=skip,
            meter=self.meter,
        ):
            values = [*outcome.values, *(other[outcome.rows] for other in self.others)]
            measured = call(self.bound, self.metric.name, outcome.rows, values)
            yield outcome.index, outcome.rows, _numbers(measured), STATUS.index(outcome.status)

    def all(self, worlds: Sequence[World]) -> np.ndarray:
        """The metric of each world, float64 [worlds, rows]."""
        out = np.full((len(worlds), len(self.inputs)), np.nan)
        for index, rows, values, _ in self.each(worlds):
            out[index, rows] = values
        return out


def _numbers(values: torch.Tensor) -> np.ndarray:
    return values.detach().to("cpu", torch.float64).numpy()
