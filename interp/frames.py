"""A result as a table, one line a metric x cell x row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hooks import KEY, POS
from interp.axes import Axis
from interp.effects import Effects

if TYPE_CHECKING:
    import pandas as pd


def frame(result: Effects, status: Sequence[str]) -> pd.DataFrame:
    """Return a table with one line a metric x cell x row, for pandas, seaborn, statsmodels.

    Columns: metric, one an axis (its values), row, effect, base, source (nan for ablations), status ("fired", ...), and
    the labels of axes that have some: for positions, the token that the row has there ("" where it has none).
    """
    import pandas as pd

    shape = (len(result.metrics), *(len(axis) for axis in result.axes), len(result.rows))
    every = np.indices(shape, sparse=True)

    def spread(values: Sequence | np.ndarray, where: Sequence[np.ndarray]) -> np.ndarray:
        """Return a value for each line; `where` holds one index array for each dimension of the values."""
        if not isinstance(values, np.ndarray):
            values = pd.Series(list(values)).to_numpy()  # keeps tuples whole and numbers numbers
        return np.broadcast_to(values[tuple(where)], shape).ravel()

    nowhere = np.full(result.base.shape, np.nan)
    per_row = {"base": result.base, "source": nowhere if result.source is None else result.source}
    columns = {"metric": spread(result.metrics, every[:1])}
    columns |= {axis.name: spread(axis.values, [at]) for axis, at in zip(result.axes, every[1:-1], strict=True)}
    columns |= {"row": spread(result.rows, every[-1:]), "effect": result.effect.ravel()}
    columns |= {name: spread(np.atleast_2d(x), [every[0], every[-1]]) for name, x in per_row.items()}
    columns["status"] = np.array(status, dtype=object)[spread(result.status, every[1:-1])]
    for number, axis in enumerate(result.axes, 1):
        if axis.labels != tuple(map(str, axis.values)):
            each, at = labels_by_row(result, axis), (every[number], every[-1])
            columns[f"{axis.name}_label"] = spread(axis.labels, at[:1]) if each is None else spread(each, at)
    return pd.DataFrame(columns)


def labels_by_row(result: Effects, axis: Axis) -> np.ndarray | None:
    """The token that each row has at the positions of an axis, [value, row]; None where the axis says it for all."""
    tokens = result.config.get("tokens")
    if axis.name not in (POS, KEY) or not isinstance(tokens, list) or len(tokens) != len(result.rows):
        return None
    if not all(isinstance(value, int) for value in axis.values):
        return None
    each = [[row[v] if -len(row) <= v < len(row) else "" for row in tokens] for v in axis.values]
    return np.array(each, dtype=object)
