"""A result as a notebook shows it: one piece of SVG, without scripts or anything loaded from elsewhere."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from interp.results import Result

_RED, _BLUE = (178, 24, 43), (33, 102, 172)
MOST_CELLS = 20_000
"""Past this many cells a picture is lighter than hoverable squares."""


def heatmap(result: Result, cell: int = 18) -> str:
    """A result with one or two axes as an SVG heatmap whose squares tell their effect on hover.

    Args:
        result: a result with one metric.
        cell: side of a square, in pixels.
    """
    from interp.plots import visible

    y, x = result.axes if len(result.axes) == 2 else (None, result.axes[0])
    values = result.mean().reshape(1 if y is None else len(y), len(x))
    low, high = (bound.reshape(values.shape) for bound in result.ci())
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
            told = html.escape(f"{name}{label}: {value:+.4g}{interval}")
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
