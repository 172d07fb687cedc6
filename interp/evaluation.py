"""Metrics measured on worlds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hooks import Inputs, MetricError, Model, ModelError, Site, World, listed, run_worlds
from interp.metrics import Bound, Metric, call


def evaluate(model: Model, inputs: Inputs | World, measured: Metric, *, executor: str = "auto") -> Tensor:
    """The value of a metric on inputs, or on a world (inputs under a plan): one number a row, [B].

    A value may be infinite (a log-probability of 0, say); it is not nan.

    Raises:
        ModelError: the model is in training mode.
        MetricError: it is no metric, needs a source world, or returns anything but one number a row.
    """
    require_eval(model)
    check_metrics([measured])
    world = inputs if isinstance(inputs, World) else World(inputs)
    bound = measured.bind(model, world.inputs)
    others: dict[int, list[Tensor]] = {}
    if measured.reference is not None:
        if not isinstance(measured.reference, World):
            raise MetricError(f"{measured.name} compares with a sweep's source; here, name a World: reference=")
        others = {0: read_reference(model, measured, measured.reference, bound, world.inputs, executor=executor)}
    values = read_world(model, world, bound.reads, executor)
    return call(bound, measured.name, slice(0, len(world.inputs)), [*values, *others.get(0, [])])


def require_eval(model: Model, what: str = "what is measured") -> None:
    """Check that a model can be measured.

    Raises:
        ModelError: it is not wrapped, or in training mode.
    """
    if not isinstance(model, Model):
        raise ModelError(f"{what} takes a wrapped model: ip.wrap(model), not {type(model).__name__}")
    if any(module.training for module in model.module.modules()):
        raise ModelError(
            "the model is in training mode, where dropout would be taken for an effect; call .eval() first"
        )


def check_metrics(metrics: Sequence[Any]) -> None:
    """Raise MetricError unless these are metrics, each of its own name."""
    if not metrics:
        raise MetricError("nothing is measured: name a metric")
    for m in metrics:
        if not isinstance(m, Metric):
            raise MetricError(f"{m!r} is not a metric; wrap a function of yours with ip.metric(fn, reads=...)")
    names = [m.name for m in metrics]
    if len(set(names)) != len(names):
        raise MetricError(f"metrics have different names, got {names}")


def read_world(
    model: Model, world: World, reads: Sequence[Site], executor: str = "auto", seed: int = 0
) -> list[Tensor]:
    """The values of sites in one world, all rows together."""
    pieces = [outcome.values for outcome in run_worlds(model, [world], reads, executor=executor, seed=seed)]
    return [torch.cat([piece[i] for piece in pieces]) for i in range(len(reads))]


def read_reference(
    model: Model,
    measured: Metric,
    reference: World,
    bound: Bound,
    inputs: Inputs,
    seed: int = 0,
    executor: str = "auto",
) -> list[Tensor]:
    """What a metric compares with, row by row.

    Raises:
        MetricError: the reference has other rows or positions, or is nan.
    """
    if len(reference.inputs) != len(inputs):
        raise MetricError(
            f"{measured.name} compares {len(inputs)} rows with a reference of {len(reference.inputs)}: a row is a pair"
        )
    unequal = bool((reference.inputs.lengths != inputs.lengths).any())
    if unequal and any(not listed(place.pos) for place in bound.reads):
        raise MetricError(
            f"{measured.name} compares position by position, and the reference has prompts of other lengths"
        )
    values = read_world(model, reference, measured.bind(model, reference.inputs).reads, executor, seed)
    for place, value in zip(bound.reads, values, strict=True):
        region = model.region(place, inputs)
        if [region.shape[axis] for axis in place.axes] != list(value.shape):
            raise MetricError(
                f"{measured.name}: the reference has {list(value.shape)} at {place}, the run "
                f"{list(region.shape.values())}"
            )
        _require_numbers(value, region.full_valid(), f"metric {measured.name!r}: the reference, {place},")
    return values


def _require_numbers(value: Tensor, counts: Tensor, what: str) -> None:
    missing = (value.isnan() & counts.to(value.device)).flatten(1).any(1)
    if bool(missing.any()):
        rows = missing.nonzero().flatten().tolist()
        raise MetricError(f"{what} is nan on rows {rows}: give it numbers, or leave them out")
