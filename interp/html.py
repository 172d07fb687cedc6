"""A result as a notebook shows it: one piece of SVG, without scripts or anything loaded from elsewhere."""

from __future__ import annotations

import html
from typing import Any

import numpy as np

from hooks import table
from interp.axes import Axis
from interp.doing import done, meaning
from interp.effects import Effects
from interp.selection import select, top
from interp.typesetting import visible

_RED, _BLUE = (178, 24, 43), (33, 102, 172)
MOST_CELLS = 20_000
"""Past this many cells a picture is lighter than hoverable squares."""
MOST_BARS, SHOWN_BARS = 80, 30
"""How long an axis may be that is drawn whole, and how much of a longer one is drawn."""
WIDEST = 900
"""Pixels that the squares of a row take at most."""


def heatmap(result: Effects, cell: int = 18) -> str:
    """A result with one to three axes as an SVG heatmap whose squares tell their effect on hover, with a colour scale.

    Three axes are a panel for each site, or for each value of the first axis. One long axis (thousands of edges, say)
    is its largest effects as bars.

    Args:
        result: a result with one metric.
        cell: side of a square, in pixels.
    """
    if len(result.axes) == 1 and len(result.axes[0]) > MOST_BARS:
        return _bars(result)
    dim, titles = _panels(result)
    mean, (low, high), counts = result.mean(), result.ci(), result.counts()
    limit = float(np.nanmax(np.abs(mean), initial=0.0)) or 1.0
    pieces: list[str] = []
    width = height = across = down = 0
    for number, title in enumerate(titles):
        part = tuple(a if dim is None else a.take(number, dim) for a in (mean, low, high, counts))
        axes = result.axes if dim is None else result.axes[:dim] + result.axes[dim + 1 :]
        before = "" if dim is None else f"{result.axes[dim].name} {result.axes[dim].values[number]}, "
        drawn, wide, tall = _panel(part, axes, limit, cell, before, result)
        if across and across + wide > WIDEST:
            across, down = 0, height
        if title:
            drawn, tall = _text(64, 12, title, "start") + f"<g transform='translate(0,14)'>{drawn}</g>", tall + 14
        pieces.append(f"<g transform='translate({across},{down})'>{drawn}</g>" if across or down else drawn)
        across += wide
        width, height = max(width, across), max(height, down + tall)
    pieces.append(f"<g transform='translate(0,{height})'>{_scale(limit)}</g>")
    return (
        f"<div style='font-family:sans-serif;font-size:12px'>{html.escape(_said(result))}</div>"
        f"<svg width='{max(width, 310)}' height='{height + 30}' style='background:white'>{''.join(pieces)}</svg>"
    )


def _panels(result: Effects) -> tuple[int | None, list[str]]:
    """Which axis panels are for, and their titles; one without a title for fewer than three axes."""
    if len(result.axes) < 3:
        return None, [""]
    names = [axis.name for axis in result.axes]
    dim = names.index("site") if "site" in names else 0
    before = "" if names[dim] == "site" else f"{names[dim]} "
    return dim, [before + visible(label) for label in result.axes[dim].labels]


def _panel(
    numbers: tuple[np.ndarray, ...], axes: tuple[Axis, ...], limit: float, cell: int, before: str, result: Effects
) -> tuple[str, int, int]:
    """One heatmap of means, bounds and counts [*axes], and its width and height in pixels."""
    y, x = axes if len(axes) == 2 else (None, axes[0])
    values, low, high, counts = (a.reshape(1 if y is None else len(y), len(x)) for a in numbers)
    cell = max(2, min(cell, WIDEST // len(x)))
    longest = max((len(visible(label)[:14]) for label in x.labels), default=0)
    rows = len(values)
    left, top, room = 64, 8, 14 + 6 * longest
    width, height = left + cell * len(x) + 8, top + cell * rows + room + 16
    parts = []
    for i in range(rows):
        # Layers are drawn upwards, as in the figures.
        at = top + cell * ((rows - 1 - i) if y is not None and y.name == "layer" else i)
        for j in range(len(x)):
            value = values[i, j]
            name = before + ", ".join(f"{a.name} {a.values[k]}" for a, k in ((y, i), (x, j)) if a is not None)
            label = "" if x.labels[j] == str(x.values[j]) else f" {visible(x.labels[j])!r}"
            interval = "" if np.isnan(low[i, j]) else f" [{low[i, j]:+.3g}, {high[i, j]:+.3g}]"
            few = f", {counts[i, j]} of {len(result.rows)} rows" if 0 < counts[i, j] < len(result.rows) else ""
            told = html.escape(f"{name}{label}: {value:+.4g}{interval}{few}")
            parts.append(
                f"<rect x='{left + cell * j}' y='{at}' width='{cell}' height='{cell}' fill='{_colour(value / limit)}'>"
                f"<title>{told}</title></rect>"
            )
        if y is not None and (rows * cell < 40 or i % max(1, round(11 / cell)) == 0):
            parts.append(_text(left - 4, at + cell * 0.7, visible(y.labels[i])[:9], "end"))
    for j, label in enumerate(x.labels):
        if j % max(1, round(11 / cell)) == 0:
            across, down = left + cell * (j + 0.65), top + cell * rows + 6
            parts.append(_text(across, down, visible(label)[:14], "end", f" transform='rotate(-90 {across} {down})'"))
    if y is not None:
        middle = top + cell * rows / 2
        parts.append(_text(10, middle, _name(y), "middle", f" transform='rotate(-90 10 {middle})'"))
    parts.append(_text(left + cell * len(x) / 2, height - 4, _name(x), "middle"))
    return "".join(parts), width, height


def _bars(result: Effects) -> str:
    """The largest effects along one axis that is too long to be drawn, as bars that tell theirs on hover."""
    (axis,) = result.axes
    cells, left, wide, line = top(result, SHOWN_BARS, None), 170, 300, 15
    limit = max((abs(cell["effect"]) for cell in cells), default=0.0) or 1.0
    parts = []
    for i, one in enumerate(cells):
        name = _shown(axis, one)
        size, middle = abs(one["effect"]) / limit * wide / 2, left + wide / 2
        told = html.escape(
            f"{axis.name} {name}: {one['effect']:+.4g}{f' [{_interval(one)}]' if _interval(one) else ''}"
        )
        start = middle if one["effect"] > 0 else middle - size
        parts.append(
            f"<rect x='{start:.1f}' y='{line * i + 3}' width='{size:.1f}' height='{line - 4}' "
            f"fill='{_colour(0.9 if one['effect'] > 0 else -0.9)}'><title>{told}</title></rect>"
        )
        parts.append(_text(left - 6, line * i + 12, visible(name)[:28], "end"))
        parts.append(_text(left + wide + 6, line * i + 12, f"{one['effect']:+.3g}", "start"))
    rest = len(axis) - len(cells)
    small = float(
        np.nanmax(np.abs(np.delete(result.mean(), [axis.values.index(c[axis.name]) for c in cells])), initial=0)
    )
    said = f"{_said(result)}; the {len(cells)} largest of {len(axis):,}, the other {rest:,} at most {small:.3g} in size"
    return (
        f"<div style='font-family:sans-serif;font-size:12px'>{html.escape(said)}</div>"
        f"<svg width='{left + wide + 60}' height='{line * len(cells) + 6}' style='background:white'>"
        f"{''.join(parts)}</svg>"
    )


def _said(result: Effects) -> str:
    """What the numbers are, and over how many rows."""
    have = result.counts()
    few = f"{int(have[have > 0].min(initial=len(result.rows)))} to " if (have < len(result.rows)).any() else ""
    rows = f"{few}{len(result.rows)} row{'s' * (len(result.rows) != 1)}"
    told = done(result)
    return f"{told}{': ' * bool(told)}{meaning(result)} on {result.metrics[0]}, mean of {rows}"


def _scale(limit: float) -> str:
    """The scale of the colours, from -limit over 0 to limit."""
    steps, left, wide = 41, 64, 5
    parts = [
        f"<path d='M{left + wide * i} 2h{wide}v10h-{wide}z' fill='{_colour(2 * i / (steps - 1) - 1)}'/>"
        for i in range(steps)
    ]
    for share, text in ((0.0, f"{-limit:.3g}"), (0.5, "0"), (1.0, f"+{limit:.3g}")):
        parts.append(_text(left + wide * steps * share, 23, text, "middle"))
    return "".join(parts)


def _name(axis: Axis) -> str:
    return {"pos": "position", "key_pos": "key position"}.get(axis.name, axis.name)


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
    long = len(result.axes) == 1 and len(result.axes[0]) > MOST_BARS
    if len(result.axes) in (1, 2, 3) and (result.status.size <= MOST_CELLS or long):
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
