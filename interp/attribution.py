"""Attribution patching: a sweep's effects to first order, every cell from one backward pass (Nanda 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hooks import Edits, Inputs, MetricError, Model, Origin, Plan, PlanError, Site, World, execution_order, record
from interp.evaluation import check_metrics
from interp.grids import Factory, Grid
from interp.metrics import Metric, call
from interp.provenance import describe_run
from interp.results import Result
from interp.sides import check_model, require_grid, source_of, stated
from interp.sweeps import assemble, references, require_finite, source_metrics


def attribution(
    model: Model,
    clean: Inputs,
    corrupt: Inputs | None,
    grid: Grid,
    *,
    metric: Metric,
    intervention: Factory | None = None,
    direction: str | None = None,
    budget: int | None = None,
    seed: int = 0,
) -> Result:
    """Estimate the effect of every cell of a grid to first order: <gradient of the metric, f(x) - x> at the edited
    sites.

    Two forward passes and one backward for all cells together. Exact where the metric is linear in the activation from
    the site on; far off where a softmax or a norm saturates, so check what matters with `sweep`, which takes the same
    arguments.

    Args:
        model, clean, corrupt, grid, intervention, direction, budget, seed: as in `sweep`.
        metric: one differentiable metric.

    Returns:
        A `Result` like a sweep's, whose effects are estimates.

    Raises:
        MetricError: the metric has no gradient (rank, accuracy), or it or an estimate is nan; see `sweep`.
        PlanError: an intervention has no first-order estimate of its own: it writes -inf, mixes rows, or reads what
            another one may change; or a plan that is held on the model mixes rows.
    """
    require_grid(grid)
    direction = check_model(model, stated(model, direction, clean, corrupt, grid, intervention))
    check_metrics([metric])
    base_inputs, source, factory, on = source_of(
        model, clean, corrupt, direction, intervention, grid, seed, budget=budget
    )
    model.check_inputs(base_inputs)
    axes, cells = on.cells(model, base_inputs)
    plans = [cell.plan(factory) for cell in cells]
    bound = metric.bind(model, base_inputs)
    reference = references(model, [metric], [bound], source, base_inputs, seed)[0]
    everything = World(base_inputs, sum((plan for plan in plans), Plan()))
    model.check(everything.plan)
    _require_estimable(everything.plan)
    sites = _distinct(everything.plan, model.n_layers)
    held, _ = model.held_on(base_inputs)
    require_rows_apart(held)
    worlds = [World(base_inputs, plan) for plan in plans]
    edits = Edits(model, worlds, alongside=[World(base_inputs, held)], reads=bound.reads, seed=seed, budget=budget)
    rows = len(base_inputs)
    values = np.full((1, len(cells) + 2, rows), np.nan)
    status = np.zeros((len(cells) + 2, rows), np.int8)
    captures = [*sites, *bound.reads]
    for outcome in record(
        model, [World(base_inputs)], captures, grad=True, seed=seed, budget=budget, alongside=[everything]
    ):
        window, kept = outcome.rows, outcome.values
        with model.suspended(), torch.enable_grad():
            read = [*kept[len(sites) :], *(r[window] for r in reference)]
            measured = call(bound, metric.name, window, read, " of the unedited run")
            gradients = _gradients(measured, kept[: len(sites)], metric.name)
        base = measured.detach().to("cpu", torch.float64).numpy()
        require_finite(base[None], [metric.name], window)
        values[0, :2, window] = base
        at = {place.key: i for i, place in enumerate(sites)}
        for c, plan in enumerate(plans):
            mine = {site: kept[at[site.key]].detach() for site in _distinct(plan, model.n_layers)}
            with torch.no_grad():
                edited, audit = edits.at(c, window, mine)
            total = torch.zeros(len(base), dtype=torch.float64)
            for site, new in edited.items():
                gradient = gradients[at[site.key]]
                change = torch.where(gradient == 0, 0, new - mine[site])
                total += (gradient * change).flatten(1).sum(1).to("cpu", torch.float64)
            values[0, c + 2, window] = base + total.numpy()
            status[c + 2, window] = 0 if any(entry.change for entry in audit) else 1
    measured_source = None if source is None else source_metrics(model, [metric], source, [reference], budget, seed)
    result = assemble(values, status, axes, cells, [metric], False, measured_source, base_inputs, model)
    told = {"inputs": base_inputs, "source": source, "plans": plans}
    result.config.update(describe_run(model, grid, intervention, corrupt, direction, seed, **told))
    result.config["executor"] = "first order (attribution patching)"
    return result


def require_rows_apart(held: Plan) -> None:
    """Raise PlanError where a plan that is held mixes rows, so that a sum's gradient is not of each row its own."""
    mixing = next((item for item in held if "row" in item.op.mixes), None)
    if mixing is not None:
        raise PlanError(
            f"{mixing}, which is held on the model, mixes rows, so a gradient does not tell their effects apart: "
            "measure them, with sweep() or edge_sweep()"
        )


def _require_estimable(plan: Plan) -> None:
    for item in plan:
        why = ""
        if item.op.writes_inf:
            why = "a change to -inf"
        elif "row" in item.op.mixes:
            why = "a function that mixes rows"
        elif any(read.source is Origin.HERE for read in item.reads):
            why = "a read of this world's own values"
        if why:
            raise PlanError(f"{item}: {why} has no first-order estimate; use sweep()")


def _distinct(plan: Plan, n_layers: int) -> list[Site]:
    """The whole sites that a plan edits, in execution order."""
    found = {item.site.key: item.site.whole for item in plan}
    return [found[key] for key in sorted(found, key=lambda k: execution_order(k, n_layers))]


def _gradients(measured: Tensor, values: Sequence[Tensor], name: str) -> list[Tensor]:
    """The gradient of the sum over rows at each value; rows do not mix, so this is each row's own."""
    if not measured.requires_grad:
        raise MetricError(
            f"metric {name!r} has no gradient at these sites, so there is no first-order estimate; use sweep()"
        )
    found = torch.autograd.grad(measured.sum(), values, allow_unused=True)
    return [torch.zeros_like(v) if g is None else g for g, v in zip(found, values, strict=True)]
