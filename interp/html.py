"""A result as a notebook shows it: one piece of SVG, without scripts or anything loaded from elsewhere."""

from __future__ import annotations

import html
from typing import Any

import numpy as np

from hooks import table
from interp.axes import Axis
from interp.effects import Effects
from interp.selection import select, top
from interp.typesetting import visible

_RED, _BLUE = (178, 24, 43), (33, 102, 172)
MOST_CELLS = 20_000
"""Past this many cells a picture is lighter than hoverable squares."""


def heatmap(result: Effects, cell: int = 18) -> str:
    """A result with one or two axes as an SVG heatmap whose squares tell their effect on hover.

    Args:
        result: a result with one metric.
        cell: side of a square, in pixels.
    """
    y, x = result.axes if len(result.axes) == 2 else (None, result.axes[0])
    values = result.mean().reshape(1 if y is None else len(y), len(x))
    low, high = (bound.reshape(values.shape) for bound in result.ci())
    counts = result.counts().reshape(values.shape)
    limit = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    left, top = 64, 8
    rows = len(values)
    width, height = left + cell * len(x) + 8, top + cell * rows + 90
    parts = []
    for i in range(rows):
        # Layers are drawn upwards, as in the figures.
        at = top + cell * ((rows - 1 - i) if y is not None and y.name == "layer" else i)
        for j in range(len(x)):
            value = values[i, j]
            name = ", ".join(f"{a.name} {a.values[k]}" for a, k in ((y, i), (x, j)) if a is not None)
            label = "" if x.labels[j] == str(x.values[j]) else f" {visible(x.labels[j])!r}"
            interval = "" if np.isnan(low[i, j]) else f" [{low[i, j]:+.3g}, {high[i, j]:+.3g}]"
            few = f", {counts[i, j]} of {len(result.rows)} rows" if 0 < counts[i, j] < len(result.rows) else ""
            told = html.escape(f"{name}{label}: {value:+.4g}{interval}{few}")
            colour = _colour(value / limit)
            parts.append(
                f"<rect x='{left + cell * j}' y='{at}' width='{cell}' height='{cell}' fill='{colour}'>"
                f"<title>{told}</title></rect>"
            )
        if y is not None:
            parts.append(_text(left - 4, at + cell * 0.7, visible(y.labels[i]), "end"))
    for j, label in enumerate(x.labels):
        if j % max(1, round(11 / cell)) == 0:
            across, down = left + cell * (j + 0.65), top + cell * rows + 6
            parts.append(_text(across, down, visible(label)[:14], "end", f" transform='rotate(-90 {across} {down})'"))
    if y is not None:
        parts.append(_text(4, top + cell * rows / 2, y.name, "start"))
    title = f"effect on {result.metrics[0]}, mean of {len(result.rows)} row(s); darkest is {limit:.3g}"
    return (
        f"<div style='font-family:sans-serif;font-size:12px'>{html.escape(title)}</div>"
        f"<svg width='{width}' height='{height}' style='background:white'>{''.join(parts)}</svg>"
    )


def _colour(share: float) -> str:
    if np.isnan(share):
        return "#d1d1d1"
    end = _RED if share > 0 else _BLUE
    mixed = (round(255 + (c - 255) * min(1.0, abs(share))) for c in end)
    return "#" + "".join(f"{c:02x}" for c in mixed)


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' font-size='10' font-family='sans-serif' text-anchor='{anchor}'{more}>"
        f"{html.escape(text)}</text>"
    )


def summary(result: Effects) -> str:
    """Return a summary, the five largest effects, and a heatmap that tells every effect on hover, for notebooks."""
    best = top(result, 5, None)
    of = f" on {best[0]['metric']}" if best and result.several else ""
    head = [*(axis.name for axis in result.axes), f"mean effect{of}", "95% interval", "rows"]
    lines = [
        [*(_shown(axis, cell) for axis in result.axes), f"{cell['effect']:+.4g}", _interval(cell), _rows(result, cell)]
        for cell in best
    ]
    told = {key: result.config[key] for key in ("model", "direction", "executor", "selected") if key in result.config}
    about = "; ".join(f"{key} {visible(str(value))[:80]}" for key, value in told.items())
    drawn = ""
    if len(result.axes) in (1, 2) and result.status.size <= MOST_CELLS:
        drawn = heatmap(select(result, {"metric": result.metrics[0]}) if result.several else result)
    small = f"<div><small>{html.escape(about)}</small></div>" if about else ""
    return table(head, lines, caption=repr(result)) + small + drawn


def _shown(axis: Axis, cell: dict[str, Any]) -> str:
    """Return the cell's value on the axis, with its label where that says more."""
    value = cell[axis.name]
    label = axis.labels[axis.values.index(value)]
    return str(value) if label == str(value) else f"{value} {visible(label)}"


def _rows(result: Effects, cell: dict[str, Any]) -> int:
    """Return how many rows have the cell."""
    one = select(result, {"metric": cell.get("metric", result.metrics[0])})
    return int(select(one, {axis.name: cell[axis.name] for axis in result.axes}).counts())


def _interval(cell: dict[str, Any]) -> str:
    return "" if np.isnan(cell["low"]) else f"{cell['low']:+.4g} to {cell['high']:+.4g}"
