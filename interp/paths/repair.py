"""Model repair: ablate the edges that are found spurious, and measure what that fixes and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from hooks import Inputs, InputsError, Model, Plan, World, budget_of, nearest, table
from interp.evaluation import evaluate
from interp.metrics import Metric
from interp.paths.fronts import require_agreement
from interp.paths.graph import Graph, graph_of
from interp.paths.nodes import Edge
from interp.paths.pair import Pair
from interp.paths.rewire import check_heads, rewire
from interp.paths.sources import Means, Source, check_reference
from interp.paths.streams import additive, check_additive
from interp.sides import check_model

CONSTANTS = ("mean", "zero")


@dataclass(frozen=True)
class Repair:
    """What ablating some edges did.

    Attributes:
        edges: what was ablated.
        values: with what: "zero" or "mean".
        before, after: the mean metric on each set of prompts.
        rows: how many rows each set has.
    """

    edges: tuple[str, ...]
    values: str
    before: dict[str, float]
    after: dict[str, float]
    rows: dict[str, int]

    def __str__(self) -> str:
        width = max(map(len, self.before))
        lines = [f"{len(self.edges)} edges ablated ({self.values}):"]
        for name, before in self.before.items():
            after = self.after[name]
            lines.append(
                f"  {name.ljust(width)}  {before:.4g} -> {after:.4g}  ({after - before:+.4g}; {self.rows[name]} rows)"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [
            (name, self.rows[name], f"{b:.4g}", f"{self.after[name]:.4g}", f"{self.after[name] - b:+.4g}")
            for name, b in self.before.items()
        ]
        caption = f"{len(self.edges)} edges ablated ({self.values})"
        return table(("prompts", "rows", "before", "after", "change"), rows, caption=caption)


@torch.no_grad()
def repair(
    model: Model | Pair,
    edges: Iterable[str | Edge] | str | Edge,
    measured: Mapping[str, tuple[Inputs, Metric]],
    *,
    graph: Graph | None = None,
    values: str | None = None,
    reference: Inputs | None = None,
    pooled: bool | None = None,
    executor: str | None = None,
    budget: int | None = None,
) -> Repair:
    """Ablate edges and measure a metric on several sets of prompts, before and after.

    Args:
        model: a wrapped model; or a pair, whose model, values, reference, executor and budget are used, and whose means
            are kept.
        edges: the edges that are ablated, all at once: each carries a constant instead of its writer's output.
        measured: by name, prompts and what is measured on them: what is to be fixed, and what is not to be lost.
        graph: default ``Graph.of(model)``.
        values: "mean" (over `reference`), the default, or "zero".
        reference, pooled, executor, budget: as in `Pair`.

    Returns:
        The metrics before and after. `repair_plan` gives what is held on the model, for any forward pass of yours.

    Raises:
        PathError, InputsError: as `repair_plan`, or nothing that is measured.
        ModelError: the model is in training mode.
    """
    constants = Constants.of(model, values, reference, pooled, executor, budget)
    model, executor = constants.model, constants.executor
    graph = graph_of(model, graph)
    chosen = graph.select(edges=edges)
    _check_measured(measured)
    check_model(model, "noising")
    repaired = _plan_of(constants, graph, chosen)
    before, after, rows = {}, {}, {}
    for name, (inputs, metric) in measured.items():
        # One prompt is enough to see how the model is built; a plan that is held may be of all of them.
        check_additive(model, inputs if model.holds else inputs.rows(slice(0, 1)), executor=executor)
        worlds = (inputs, World(inputs, repaired(inputs)))
        before[name], after[name] = (
            float(evaluate(model, world, metric, executor=executor).double().mean()) for world in worlds
        )
        rows[name] = len(inputs)
    return Repair(tuple(edge.name for edge in chosen), constants.values, before, after, rows)


def _check_measured(measured: Mapping[str, tuple[Inputs, Metric]]) -> None:
    like = "{'spurious': (inputs, metric), 'clean': (inputs, metric)}"
    if not isinstance(measured, Mapping) or not measured:
        raise InputsError(f"name what is measured: {like}")
    for name, given in measured.items():
        inputs, metric = given if isinstance(given, (tuple, list)) and len(given) == 2 else (None, None)
        if not isinstance(inputs, Inputs) or not isinstance(metric, Metric):
            raise InputsError(f"what is measured as {name!r} is prompts and a metric, {like}, not {given!r}")


@torch.no_grad()
def repair_plan(
    model: Model | Pair,
    edges: Iterable[str | Edge] | str | Edge,
    *,
    graph: Graph | None = None,
    values: str | None = None,
    reference: Inputs | None = None,
    pooled: bool | None = None,
    executor: str | None = None,
    budget: int | None = None,
) -> Callable[[Inputs], Plan]:
    """The plan that ablates edges on whatever the model is run on: ``with model.apply(repair_plan(...)):``.

    The means are computed here, once. Arguments as in `repair`.

    Returns:
        a function from inputs to the plan on them, which `Model.apply` takes.

    Raises:
        PathError: an edge that the model lacks, a model that the graph does not describe, or a pair and other arguments
            that contradict it.
        InputsError: values that are not constants, or no reference for a mean; of the function, prompts longer than
            the reference's, where the means are not pooled.
        ModelError: the model is in training mode while the means are computed, or the budget is no number of bytes.
    """
    constants = Constants.of(model, values, reference, pooled, executor, budget)
    graph = graph_of(constants.model, graph)
    return _plan_of(constants, graph, graph.select(edges=edges))


@dataclass(frozen=True, eq=False)
class Constants:
    """What edges carry instead of what their writers add, in a repair.

    Attributes:
        model: the wrapped model.
        values: "mean" or "zero".
        means: gives the means; None of zeros.
        executor: see `run_worlds`.
    """

    model: Model
    values: str
    means: Callable[[], Means] | None
    executor: str

    @classmethod
    def of(
        cls,
        model: Model | Pair,
        values: str | None,
        reference: Inputs | None,
        pooled: bool | None,
        executor: str | None,
        budget: int | None,
    ) -> Constants:
        """The constants of a pair, or of a model and what is given."""
        if isinstance(model, Pair):
            given = {"values": values, "reference": reference, "pooled": pooled, "executor": executor, "budget": budget}
            require_agreement(model, {name: value for name, value in given.items() if value is not None})
            _check_values(model.values)
            pair = model.current()
            means = None if pair.reference is None else lambda: pair.means
            return cls(pair.model, pair.values, means, pair.executor)
        values, pooled, executor = values or "mean", bool(pooled), executor or "auto"
        _check_values(values)
        check_reference(values, reference, pooled)
        graph_of(model, None)
        budget_of(model, budget)
        if reference is None:
            return cls(model, values, None, executor)
        check_model(model, "noising")
        return cls(model, values, lambda: Means.over(additive(model, reference, budget, 0, executor), pooled), executor)


def _check_values(values: str) -> None:
    if values not in CONSTANTS:
        hint = nearest(str(values), CONSTANTS)
        raise InputsError(f"a repair puts in constants: values is 'mean' or 'zero', not {values!r}{hint}")


def _plan_of(constants: Constants, graph: Graph, chosen: tuple[Edge, ...]) -> Callable[[Inputs], Plan]:
    mask, means = graph.mask(chosen), None
    check_heads(graph, "repairs")
    if constants.means is not None:
        means = constants.means().only({edge.writer for edge in chosen})

    return _Repaired(constants.model, graph, mask, constants.values, means)


@dataclass(frozen=True, eq=False)
class _Repaired:
    """From inputs to the plan that ablates the edges of a mask on them."""

    model: Model
    graph: Graph
    mask: np.ndarray
    values: str
    means: Means | None

    def __call__(self, inputs: Inputs) -> Plan:
        if not isinstance(inputs, Inputs):
            raise InputsError(f"a repair is of inputs, from model.inputs(...), not {type(inputs).__name__}")
        return rewire(self.graph, self.mask, Source(self.values, inputs, means=self.means), self.model)
