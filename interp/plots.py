"""Pictures of results: a heatmap for two axes, bars for one, a panel for each site for three.

matplotlib is imported on use, pyplot never: a figure made here belongs to whoever holds it, and nothing global changes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from hooks import ResultError, nearest
from interp.axes import Axis
from interp.effects import Effects
from interp.selection import select
from interp.typesetting import (
    LONGEST,
    SMALLEST,
    entitle,
    printed,
    room_of,
    say,
    set_ticks,
    shortened,
    tick_x,
    tick_y,
    typeset,
    visible,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Red-white-blue keeps its two ends apart in every common form of colour blindness.
_COLOURS = "RdBu_r"
_TITLES = {"pos": "position", "key_pos": "key position"}


def heatmap(result: Effects, ax: Any = None, metric: str | None = None, value: str | None = None) -> Axes | list[Axes]:
    """Draw the mean effects of a result with one, two or three axes.

    Two axes make a heatmap: layers upwards, positions or heads to the right; zero is white, more is red, less is blue,
    a cell that no row has is grey. One axis makes bars with 95 % bootstrap intervals. Three make a heatmap for each
    site (or each value of the first axis, where none is called "site"), on one colour scale.

    Args:
        result: what to draw.
        ax: matplotlib axes to draw into, for three axes a list with one a panel; by default a figure of their own.
        metric: which, where there are several; the first by default.
        value: "normalized" or "effect"; by default normalized where the result can be.

    Returns:
        The matplotlib axes; for three axes the list of them.

    Raises:
        ResultError: no such metric or value, nothing to normalize by, not one to three axes, or not one `ax` a panel.
    """
    one = select(result, {"metric": result.metrics[0] if metric is None else metric})
    if not 1 <= len(one.axes) <= 3:
        names = ", ".join(axis.name for axis in one.axes) or "none"
        raise ResultError(
            f"a plot shows one to three axes, this result has {len(one.axes)} ({names}): see sel() and top()"
        )
    values, normalized = _values(one, value)
    given = None if ax is None else list(ax) if isinstance(ax, (list, tuple, np.ndarray)) else [ax]
    if len(one.axes) == 1:
        return _bars(one, values, normalized, given)
    if len(one.axes) == 2:
        return _maps(one, values[None], normalized, one.axes, [""], given)[0]
    names = [axis.name for axis in one.axes]
    dim = names.index("site") if "site" in names else 0
    panel, rest = one.axes[dim], one.axes[:dim] + one.axes[dim + 1 :]
    before = "" if panel.name == "site" else f"{_title(panel)} "
    titles = [before + label for label in panel.labels]
    return _maps(one, np.moveaxis(values, dim, 0), normalized, rest, titles, given)


def ranked(result: Effects, k: int = 12, ax: Any = None, value: str | None = None) -> Axes:
    """Draw the k cells of the largest effect as bars, largest first, with 95 % bootstrap intervals.

    Args:
        result: a result with one metric.
        k: how many.
        ax: matplotlib axes to draw into; by default a figure of their own.
        value: "normalized" or "effect"; by default normalized where the result can be.

    Returns:
        The matplotlib axes.

    Raises:
        ResultError: the result has several metrics.
    """
    from interp.axes import Axis

    if result.several:
        raise ResultError(
            f"cells are ranked by one metric, and there are {', '.join(result.metrics)}: see sel(metric=)"
        )
    means = np.abs(np.nan_to_num(result.mean()))
    order = np.argsort(-means, axis=None)[:k]
    index = np.unravel_index(order, means.shape)
    names = tuple(
        ".".join(str(axis.values[i]) for axis, i in zip(result.axes, cell, strict=True))
        for cell in zip(*index, strict=True)
    )
    title = ".".join(axis.name for axis in result.axes)
    flat = replace(
        result,
        effect=result.effect[index],
        axes=(Axis(title, names),),
        several=False,
        status=result.status[index],
    )
    drawn = heatmap(flat, ax=ax, value=value)
    assert not isinstance(drawn, list)
    return drawn


def attention(pattern: Any, tokens: Sequence[str], ax: Any = None, title: str = "") -> Axes:
    """Draw an attention pattern: queries down, keys to the right, dark is much.

    Args:
        pattern: [T, S], weights from 0 to 1, a tensor or an array.
        tokens: text of the T = S tokens.
        ax: matplotlib axes to draw into; by default a figure of their own.
        title: what stands above.

    Returns:
        The matplotlib axes.
    """
    weights = np.asarray(pattern, dtype=float)
    if weights.ndim != 2 or weights.shape != (len(tokens), len(tokens)):
        raise ResultError(f"a pattern of {len(tokens)} tokens has shape {[len(tokens)] * 2}, got {list(weights.shape)}")
    if ax is None:
        size = 1.6 + 0.2 * len(tokens)
        ax = _figure(size, size).subplots()
    # Causal attention leaves the future empty; what does look there is drawn.
    future = np.triu(np.ones(weights.shape, bool), 1)
    hidden = future & (not weights[future].any())
    ax.imshow(np.where(hidden, np.nan, weights), cmap="Blues", vmin=0.0, vmax=1.0, interpolation="nearest")
    labels = [printed(visible(token), LONGEST) for token in tokens]
    size = min(9.0, max(SMALLEST, 150.0 / len(tokens)))
    set_ticks(ax.xaxis, labels, 1, True, size, 90)
    set_ticks(ax.yaxis, labels, 1, True, size, 0)
    ax.set_xlabel("key", fontsize=9)
    ax.set_ylabel("query", fontsize=9)
    entitle(ax, title)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return ax


def _values(result: Effects, value: str | None) -> tuple[np.ndarray, bool]:
    """Return what to draw [*axes], and whether it is normalized."""
    options = ("normalized", "effect")
    if value not in (None, *options):
        raise ResultError(f"value is 'normalized' or 'effect', got {value!r}{nearest(value, options)}")
    if value != "effect":
        try:
            return result.normalized(), True
        except ResultError:
            if value == "normalized":
                raise
    return result.mean(), False


def _maps(
    result: Effects,
    grids: np.ndarray,
    normalized: bool,
    axes: Sequence[Axis],
    titles: Sequence[str],
    given: list[Axes] | None,
) -> list[Axes]:
    """Draw one heatmap a panel; `grids` is [panel, *axes]."""
    y, x = axes
    if _rank(x) < _rank(y):
        y, x, grids = x, y, grids.swapaxes(1, 2)
    across = min(len(titles), 3)
    if given is None:
        down = math.ceil(len(titles) / across)
        width = min(_inches(x, 0.22, 1.8, 6.0), 6.0 / across) * across + 1.4 + room_of(y)
        height = (_inches(y, 0.19, 2.0, 5.5) + 0.3 * (titles != [""])) * down + 0.5 + room_of(x)
        figure = _figure(width, height)
        every = figure.subplots(down, across, squeeze=False).ravel().tolist()
        for ax in every[len(titles) :]:
            ax.remove()
        panels = every[: len(titles)]
        left, bottom = panels[::across], panels[-across:]
    else:
        figure = None
        panels = left = bottom = _as_many(given, len(titles))

    finite = np.abs(grids[np.isfinite(grids)])
    limit = float(finite.max(initial=0.0)) or 1.0
    look = {"cmap": _COLOURS, "vmin": -limit, "vmax": limit, "aspect": "auto", "interpolation": "nearest"}
    for ax, grid, title in zip(panels, grids, titles, strict=True):
        ax.set_facecolor("0.82")  # nan is transparent and shows it
        image = ax.imshow(np.clip(grid, -limit, limit), origin="lower" if y.name == "layer" else "upper", **look)
        entitle(ax, title or _selected(result))
    bar = panels[0].figure.colorbar(image, ax=panels if len(panels) > 1 else panels[0], pad=0.02, aspect=25)
    absent = " (grey: in no row)" if np.isnan(grids).any() else ""
    for ax in bottom:
        ax.set_xlabel(printed(_title(x)) + absent, usetex=False)
    for ax in left:
        ax.set_ylabel(printed(_title(y)), usetex=False)
    if figure is not None and titles != [""] and _selected(result):
        figure.suptitle(printed(_selected(result), 60), usetex=False)

    def set_type() -> None:
        for ax in panels:
            tick_x(ax, x, shown=ax in bottom)
            tick_y(ax, y, shown=ax in left)
        say(bar.ax, _meaning(result, normalized))

    typeset(panels[0], set_type)
    return panels


def _bars(result: Effects, values: np.ndarray, normalized: bool, given: list[Axes] | None) -> Axes:
    from matplotlib import colormaps

    (axis,) = result.axes
    figure = None if given else _figure(_inches(axis, 0.24, 2.4, 6.4) + 0.9, 2.3 + room_of(axis))
    (ax,) = _as_many(given, 1) if figure is None else [figure.subplots()]
    low, high = result.ci(normalized=normalized)
    at = np.arange(len(axis))
    blue, red = colormaps[_COLOURS]([0.12, 0.88])
    finite = np.where(np.isfinite(values), values, np.nan)  # an infinite bar has no end to draw
    ax.bar(at, finite, width=0.72, color=[red if v > 0 else blue for v in values])
    ax.vlines(at, low, high, color="black", linewidth=1.0)
    ax.axhline(0.0, color="black", linewidth=0.6)
    ax.set_xlim(-0.6, len(axis) - 0.4)
    ax.set_xlabel(printed(_title(axis)), usetex=False)
    entitle(ax, _selected(result))
    meaning = [*_meaning(result, normalized), *(["95% intervals"] if np.isfinite(low).any() else [])]

    def set_type() -> None:
        tick_x(ax, axis, shown=True)
        say(ax, meaning)

    typeset(ax, set_type)
    return ax


def _title(axis: Axis) -> str:
    return _TITLES.get(axis.name, axis.name)


def _meaning(result: Effects, normalized: bool) -> list[str]:
    """Return what the numbers are, in pieces."""
    over = f"mean of {len(result.rows)} row{'s' * (len(result.rows) != 1)}"
    what, scale = ("normalized effect", "0 = base, 1 = source") if normalized else ("effect", "edited − base")
    return [f"{what} on {shortened(visible(result.metrics[0]), 40)}", scale, over]


def _selected(result: Effects) -> str:
    """Return what `sel` picked."""
    picked = result.config.get("selected")
    return ", ".join(f"{name} {value}" for name, value in picked.items()) if isinstance(picked, dict) else ""


def _rank(axis: Axis) -> int:
    """Return how far from the vertical an axis belongs."""
    return {"layer": 0, "head": 2, "pos": 3, "key_pos": 4}.get(axis.name, 1)


def _inches(axis: Axis, cell: float, least: float, most: float) -> float:
    return min(max(cell * len(axis), least), most)


def _as_many(given: list[Axes] | None, panels: int) -> list[Axes]:
    if given is None or len(given) != panels:
        raise ResultError(
            f"this plot has {panels} panel{'s' * (panels != 1)} and needs as many axes, got {len(given or [])}"
        )
    return given


def _figure(width: float, height: float) -> Figure:
    """Return a figure of its own, in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    # A notebook shows figures without being told only after pyplot has been imported; this one shows always.
    figure._repr_png_ = partial(_png, figure)  # pyright: ignore[reportAttributeAccessIssue]
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
