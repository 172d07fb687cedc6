"""Model repair: ablate the edges that are found spurious, and measure what that fixes and what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from hooks import Inputs, Model, Plan, World
from hooks.errors import InputsError
from hooks.html import table
from interp.evaluation import evaluate
from interp.metrics import Metric
from interp.paths.graph import Graph
from interp.paths.nodes import Edge
from interp.paths.rewire import rewire
from interp.paths.sources import pair_of
from interp.sweeps import check_model


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
    model: Model,
    edges: Iterable[str | Edge],
    measured: Mapping[str, tuple[Inputs, Metric]],
    *,
    graph: Graph | None = None,
    values: str = "mean",
    reference: Inputs | None = None,
    pooled: bool = False,
    budget: int | None = None,
) -> Repair:
    """Ablate edges and measure a metric on several sets of prompts, before and after.

    Args:
        model: a wrapped model.
        edges: the edges that are ablated, all at once: each carries a constant instead of its writer's output.
        measured: by name, prompts and what is measured on them: what is to be fixed, and what is not to be lost.
        graph: default ``Graph.of(model)``.
        values: "mean" (over `reference`) or "zero".
        reference, pooled, budget: as in `edge_sweep`.

    Returns:
        The metrics before and after. `repair_plan` gives the plan, to hold on the model.
    """
    check_model(model, "noising")
    graph = Graph.of(model) if graph is None else graph
    chosen = graph.select(edges=edges)
    if not measured:
        raise InputsError("name what is measured: {'spurious': (inputs, metric), 'clean': (inputs, metric)}")
    before, after, rows = {}, {}, {}
    for name, (inputs, metric) in measured.items():
        plan = repair_plan(
            model, chosen, inputs, graph=graph, values=values, reference=reference, pooled=pooled, budget=budget
        )
        before[name] = float(np.mean(evaluate(model, inputs, metric).double().cpu().numpy()))
        after[name] = float(np.mean(evaluate(model, World(inputs, plan), metric).double().cpu().numpy()))
        rows[name] = len(inputs)
    return Repair(tuple(edge.name for edge in chosen), values, before, after, rows)


@torch.no_grad()
def repair_plan(
    model: Model,
    edges: Iterable[str | Edge],
    inputs: Inputs,
    *,
    graph: Graph | None = None,
    values: str = "mean",
    reference: Inputs | None = None,
    pooled: bool = False,
    budget: int | None = None,
) -> Plan:
    """The plan that ablates edges on given inputs. Arguments as in `repair`.

    Raises:
        InputsError: values that are not constants.
    """
    if values not in ("mean", "zero"):
        raise InputsError(f"a repair puts in constants: values is 'mean' or 'zero', not {values!r}")
    graph = Graph.of(model) if graph is None else graph
    pair = pair_of(model, inputs, None, "noising", values, reference, pooled, 0, budget)
    return rewire(graph, graph.mask(graph.select(edges=edges)), pair.source, model)
