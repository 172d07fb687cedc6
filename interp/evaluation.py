"""Metrics measured on worlds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hooks import Inputs, Model, Site, World, run_worlds
from hooks.errors import MetricError
from hooks.region import listed, resolve
from interp.metrics import Bound, Metric, call


def evaluate(model: Model, inputs: Inputs | World, measured: Metric, *, executor: str = "auto") -> Tensor:
    """The value of a metric on inputs, or on a world (inputs under a plan): one number a row, [B].

    Raises:
        MetricError: it is no metric, needs a source world, or returns anything but one number a row.
    """
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
        MetricError: the reference has other rows or positions.
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
        shape = resolve(place, inputs, model.sizes[place.key]).shape
        if [shape[axis] for axis in place.axes] != list(value.shape):
            raise MetricError(
                f"{measured.name}: the reference has {list(value.shape)} at {place}, the run {list(shape.values())}"
            )
    return values
