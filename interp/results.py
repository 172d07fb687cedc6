"""What a sweep found: effects by cell and row, with their files and views."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from interp import html as views
from interp import plots, selection
from interp.datasets import of_dataset, to_dataset
from interp.effects import STATUS, Effects
from interp.frames import frame
from interp.joining import concat, difference
from interp.result_files import load_result, save_result

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr  # pyright: ignore[reportMissingImports]
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["STATUS", "Result"]


@dataclass(frozen=True, eq=False)
class Result(Effects):
    """The effects of a grid of interventions, with their files, tables and pictures; see `interp.effects.Effects`.

    Raises:
        ResultError: the arrays' shapes do not agree with the axes, metrics and rows.

    Example:
        >>> from interp import Axis
        >>> result = Result(
        ...     effect=[[1.0, 3.0], [0.0, 0.5]],
        ...     axes=(Axis("layer", (4, 5)),),
        ...     metrics=("logit_diff",),
        ...     several=False,
        ...     base=[-1.0, -2.0],
        ...     source=[1.0, 2.0],
        ...     status=[0, 0],
        ...     noise_floor=1e-6,
        ...     rows=("Mary and John", "Tom and Anna"),
        ...     config={"direction": "denoising"},
        ... )
        >>> result
        Result(layer 2, 2 rows, logit_diff: 2 fired; largest effect +2 at layer=4)
        >>> result.normalized()
        array([0.66666667, 0.08333333])
        >>> result.sel(layer=5).mean()
        array(0.25)
    """

    def top(self, k: int = 10, metric: str | None = None) -> list[dict[str, Any]]:
        """Return the cells with the largest |mean effect|, largest first; cells that fewer than half of the rows have
        come after all others.

        Args:
            k: how many, at most.
            metric: which, where there are several; the first by default.

        Returns:
            One {axis name: value, ..., "effect", "low", "high", "rows"} a cell, with its 95 % interval and how many
            rows have it, with "metric" where there are several, and with "pos_label" (the token, say) where an axis has
            labels; cells that no row has are left out.

        Raises:
            ResultError: `k` is no number of cells.
        """
        return selection.top(self, k, metric)

    def sel(self, **wanted: Any) -> Result:
        """Return the result restricted to some values of some axes.

        One value drops its axis, as in xarray, and is noted under config["selected"]; a list, range or array keeps it.

        Args:
            wanted: `metric=` a name, and axes by name: `layer=3`, `pos=[0, 1]`, `head=(0, 1)` for the group (0, 1),
                `pos="name end"` for a named entry, or for a label that one entry has.

        Raises:
            ResultError: no such axis, or no such value on it.
        """
        return selection.select(self, wanted)

    def to_frame(self) -> pd.DataFrame:
        """Return a table with one line a metric x cell x row, for pandas, seaborn, statsmodels.

        Columns: metric, one an axis (its values), row, effect, base, source (nan for ablations), status ("fired", ...),
        and where an axis has labels "pos_label" and the like: for positions, the token that the row has there.
        """
        return frame(self, STATUS)

    def to_xarray(self) -> xr.Dataset:
        """Return the result as an `xarray.Dataset` with its arrays as variables, for xarray's selection and algebra."""
        return to_dataset(self)

    @classmethod
    def from_xarray(cls, dataset: xr.Dataset) -> Result:
        """Return the result that `to_xarray` made a dataset of, or what has been selected from it.

        Raises:
            ResultError: the dataset lacks a variable, an axis or an attribute of a result.
        """
        return of_dataset(dataset, cls)

    def minus(self, other: Result, name: str | None = None) -> Result:
        """Return this result less another one of the same cells, row by row: what an intervention does to one metric
        beyond what it does to the other, or to an answer beyond a foil that stands in a text of its own.

        Args:
            other: of as many rows, of which each belongs to the same row here.
            name: what the metric of the difference is called.

        Raises:
            ResultError: other axes, rows, ways of intervening, or values that are infinite in both.
        """
        return difference(self, other, name)

    @classmethod
    def concat(cls, results: Sequence[Result], along: str = "row") -> Result:
        """Return one result of several: batches of rows of one grid, or shards of one grid on the same rows.

        Args:
            results: at least one.
            along: "row", or the name of the axis whose values the results share out.

        Raises:
            ResultError: they are not of one sweep: other metrics, axes, direction, or model; rows that are not the
                same; or values that two of them have.
        """
        return concat(results, along)

    def plot(
        self, ax: Any = None, metric: str | None = None, value: str | None = None, **look: Any
    ) -> Axes | list[Axes]:
        """Draw the result, with a `title`, `cmap` and `labels` of yours; see `interp.plots.heatmap`. In a notebook,
        `figure()` is what shows.
        """
        return plots.heatmap(self, ax=ax, metric=metric, value=value, **look)

    def figure(self, metric: str | None = None, value: str | None = None, **look: Any) -> Figure:
        """Return a figure of the result, as `plot` draws it: a notebook shows it, and it has `savefig`."""
        axes = self.plot(metric=metric, value=value, **look)
        return cast("Figure", (axes[0] if isinstance(axes, list) else axes).figure)

    def __repr__(self) -> str:
        grid = " × ".join(f"{axis.name} {len(axis)}" for axis in self.axes) or "one cell"
        counts = Counter(self.status.ravel().tolist())
        happened = ", ".join(f"{n} {STATUS[code]}" for code, n in sorted(counts.items())) or "no cells"
        text = f"{grid}, {len(self.rows)} rows, {', '.join(self.metrics)}: {happened}"
        one = self.sel(metric=self.metrics[0])
        order = selection.ranking(one)
        if len(order):
            mean = one.mean()
            best = np.unravel_index(order[0], mean.shape)
            where = ", ".join(axis.text(i) for axis, i in zip(self.axes, best, strict=True))
            of = f" on {self.metrics[0]}" if self.several else ""
            text += f"; largest effect{of} {mean[best]:+.3g}{' at ' * bool(where)}{where}"
            have = int(one.counts()[best])
            text += f" ({have} of {len(self.rows)} rows have it)" * (have < len(self.rows))
        return f"Result({text})"

    def _repr_html_(self) -> str:
        """Return a summary, the five largest effects, and a heatmap that tells every effect on hover, for notebooks."""
        return views.summary(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `path`.json and `path`.safetensors, and return the path of the first; see `interp.result_files`."""
        return save_result(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Result:
        """Return what `save(path)` wrote.

        Raises:
            FileNotFoundError: either file is missing.
            ResultError: the files are not a saved result, are of a newer version, or do not belong together.
        """
        return load_result(path, cls)
