"""Results as xarray datasets and back; xarray is imported on use."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from hooks import ResultError
from interp.axes import Axis
from interp.effects import Effects

if TYPE_CHECKING:
    import xarray as xr  # pyright: ignore[reportMissingImports]

T = TypeVar("T")

_ARRAYS = ("effect", "base", "source", "status", "noise_floor")
_KEPT = ("axes", "metrics", "several", "rows", "config")


def to_dataset(result: Effects) -> xr.Dataset:
    """A dataset of a result's arrays.

    Coordinates are the axes' values (their labels where a value is a group), labels beside them as "pos_label", and
    "metric" and "row". Whatever else the result holds is in one attribute, as JSON.
    """
    import xarray as xr  # pyright: ignore[reportMissingImports]

    metric = ("metric",) if result.several else ()
    cells = tuple(axis.name for axis in result.axes)
    dims = {
        "effect": (*metric, *cells, "row"),
        "base": (*metric, "row"),
        "source": (*metric, "row"),
        "status": cells,
        "noise_floor": metric,
    }
    data = {n: (dims[n], getattr(result, n)) for n in _ARRAYS if getattr(result, n) is not None}
    coords: dict[str, Any] = {"row": ("row", list(result.rows))}
    if result.several:
        coords["metric"] = ("metric", list(result.metrics))
    for axis in result.axes:
        coords[axis.name] = (axis.name, _coordinate(axis))
        coords[f"{axis.name}_label"] = (axis.name, list(axis.labels))
    kept = {
        "axes": [{"name": axis.name, "values": axis.values, "labels": axis.labels} for axis in result.axes],
        "metrics": result.metrics,
        "several": result.several,
        "rows": result.rows,
        "config": result.config,
    }
    return xr.Dataset(data, coords, {"interp_result": json.dumps(kept)})


def of_dataset(dataset: Any, make: Callable[..., T]) -> T:
    """The result of a dataset that `to_dataset` made, or of a part of it; see `Result.from_xarray`."""
    try:
        kept = json.loads(dataset.attrs["interp_result"])
        made = [Axis(a["name"], tuple(a["values"]), tuple(a["labels"])) for a in kept["axes"]]
        known = {axis.name: dict(zip(_coordinate(axis), axis.values, strict=True)) for axis in made}
        several = "metric" in dataset["effect"].dims
        axes = []
        for name in [axis.name for axis in made if axis.name in dataset["effect"].dims]:
            values = tuple(known[name][value] for value in dataset[name].values.tolist())
            axes.append(Axis(name, values, tuple(map(str, dataset[f"{name}_label"].values.tolist()))))
        order = (*(("metric",) if several else ()), *(axis.name for axis in axes), "row")
        arrays = {
            n: dataset[n].transpose(*(d for d in order if d in dataset[n].dims)).values for n in _ARRAYS if n in dataset
        }
        metrics = tuple(np.atleast_1d(dataset["metric"].values).tolist()) if kept["several"] else kept["metrics"]
        rows = tuple(map(str, dataset["row"].values.tolist()))
        config = kept["config"]
        if rows != tuple(kept["rows"]):
            config = {k: v for k, v in config.items() if k != "tokens"}
        return make(
            **{"source": None, **arrays, "axes": tuple(axes), "metrics": metrics, "several": several},
            rows=rows,
            config=config,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ResultError(f"no dataset that Result.to_xarray made: {type(error).__name__}: {error}") from error


def _coordinate(axis: Axis) -> list:
    """The values of an axis as coordinates: texts where one is a group, which xarray would take for an axis more."""
    return [str(v) for v in axis.values] if any(isinstance(v, tuple) for v in axis.values) else list(axis.values)
