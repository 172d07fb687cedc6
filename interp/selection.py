"""Parts of a result: some values of its axes, or its largest cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from hooks import ResultError, nearest
from interp import stats
from interp.axes import Axis, find, some
from interp.effects import Effects

E = TypeVar("E", bound=Effects)


def select(result: E, wanted: Mapping[str, Any]) -> E:
    """Restrict a result to some values of some axes; see `Result.sel`.

    Raises:
        ResultError: no such axis, or no such value on it.
    """
    names = ["metric", *(axis.name for axis in result.axes)]
    for name in wanted:
        if name not in names:
            raise ResultError(f"no axis {name!r}{nearest(name, names)}; there are {some(names)}")
    for name, value in wanted.items():
        result = _of_metric(result, value) if name == "metric" else _of_axis(result, name, value)
    return result


def top(result: Effects, k: int, metric: str | None) -> list[dict[str, Any]]:
    """The cells with the largest |mean effect|, largest first; see `Result.top`."""
    one = select(result, {"metric": result.metrics[0] if metric is None else metric})
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 0:
        raise ResultError(f"top() lists a number of cells, 0 or more, not {k!r}")
    mean, have = one.mean().ravel(), one.counts().ravel()
    order = ranking(one)[:k]
    low, high = stats.bootstrap_ci(one.effect.reshape(mean.size, len(one.rows))[order])
    shape = tuple(len(axis) for axis in one.axes)
    found = []
    for rank, cell in enumerate(order):
        at = np.unravel_index(cell, shape)
        where = {axis.name: axis.values[i] for axis, i in zip(one.axes, at, strict=True)}
        for axis, i in zip(one.axes, at, strict=True):
            if axis.labels[i] != str(axis.values[i]):
                where[f"{axis.name}_label"] = axis.labels[i]
        numbers = {"effect": float(mean[cell]), "low": float(low[rank]), "high": float(high[rank])}
        told = {**where, **numbers, "rows": int(have[cell])}
        found.append({**({"metric": one.metrics[0]} if result.several else {}), **told})
    return found


def ranking(one: Effects) -> np.ndarray:
    """The cells of a result with one metric, flat, by |mean effect|, those that no row has left out.

    Cells that fewer than half of the rows have come after all others: a mean over few rows is large more easily.
    """
    mean, have = one.mean().ravel(), one.counts().ravel()
    order = np.lexsort((-np.abs(mean), 2 * have < len(one.rows)))  # the last key counts first; nan comes last
    return order[~np.isnan(mean[order])]


def _of_metric(result: E, wanted: Any) -> E:
    at = find("metric", result.metrics, wanted)
    if not result.several:
        return result
    return replace(
        result,
        effect=result.effect[at],
        base=result.base[at],
        source=None if result.source is None else result.source[at],
        noise_floor=result.noise_floor[at],
        metrics=tuple(np.array(result.metrics, dtype=object)[np.atleast_1d(at)]),
        several=isinstance(at, list),
    )


def _of_axis(result: E, name: str, wanted: Any) -> E:
    dim = [axis.name for axis in result.axes].index(name)
    axis = result.axes[dim]
    at = find(f"axis {name!r}", axis.values, wanted, axis.labels)
    if isinstance(at, list):
        kept = (Axis(name, tuple(axis.values[i] for i in at), tuple(axis.labels[i] for i in at)),)
        config = result.config
    else:
        kept = ()
        before = result.config.get("selected")
        noted = {**(before if isinstance(before, dict) else {}), name: axis.values[at]}
        config = {**result.config, "selected": noted}
    return replace(
        result,
        effect=result.effect.take(at, axis=dim + result.several),
        status=result.status.take(at, axis=dim),
        axes=result.axes[:dim] + kept + result.axes[dim + 1 :],
        config=config,
    )
