"""Pictures of results: a heatmap for two axes, bars for one, a panel for each site for three.

matplotlib is imported on use, pyplot never: a figure made here belongs to whoever holds it, and nothing global changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hooks import ResultError, nearest
from interp.attention_plot import attention
from interp.axes import Axis
from interp.canvas import figure_of
from interp.doing import done, edits, meaning
from interp.effects import Effects
from interp.selection import select
from interp.typesetting import (
    entitle,
    printed,
    room_of,
    say,
    shortened,
    tick_x,
    tick_y,
    typeset,
    visible,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["attention", "heatmap", "ranked"]

# Red-white-blue keeps its two ends apart in every common form of colour blindness.
_COLOURS = "RdBu_r"
MOST_BARS, SHOWN_BARS = 80, 30
"""How long an axis may be that is drawn whole, and how much of a longer one is drawn."""
_TITLES = {"pos": "position", "key_pos": "key position"}


@dataclass(frozen=True)
class Look:
    """What a user says of a picture; None and nothing where that is left to us.

    Attributes:
        title: what stands above.
        cmap: the colours, a name or a colour map of matplotlib's.
        labels: what axes are called, by name; and "value", what the numbers are.
    """

    title: str | None = None
    cmap: Any = None
    labels: Mapping[str, str] = field(default_factory=dict)


def heatmap(
    result: Effects,
    ax: Any = None,
    metric: str | None = None,
    value: str | None = None,
    *,
    title: str | None = None,
    cmap: Any = None,
    labels: Mapping[str, str] | None = None,
) -> Axes | list[Axes]:
    """Draw the mean effects of a result with one, two or three axes.

    Two axes make a heatmap: layers upwards, positions or heads to the right; zero is white, more is red, less is blue,
    a cell that no row has is grey. One axis makes bars with 95 % bootstrap intervals. Three make a heatmap for each
    site (or each value of the first axis, where none is called "site"), on one colour scale. One axis of very many
    values (edges, say) is drawn as its largest effects.

    Args:
        result: what to draw.
        ax: matplotlib axes to draw into, for three axes a list with one a panel; by default a figure of their own.
        metric: which, where there are several; the first by default.
        value: "normalized" or "effect"; by default normalized where the result can be.
        title: what stands above; by default what was done, and what was selected.
        cmap: a colour map of matplotlib's, or its name, whose middle is 0.
        labels: what axes are called, by their names, as ``{"pos": "word"}``; under "value", what the numbers are.

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
    look = _look(one, title, cmap, labels)
    if len(one.axes) == 1 and len(one.axes[0]) > MOST_BARS:
        told = [_selected(one), f"the {SHOWN_BARS} largest of {len(one.axes[0]):,}"]
        many = "; ".join(filter(None, told)) if title is None else title
        return ranked(one, SHOWN_BARS, ax, value, title=many, cmap=cmap, labels=labels)
    given = None if ax is None else list(ax) if isinstance(ax, (list, tuple, np.ndarray)) else [ax]
    if len(one.axes) == 1:
        return _bars(one, values, normalized, given, look)
    if len(one.axes) == 2:
        return _maps(one, values[None], normalized, one.axes, [""], given, look)[0]
    names = [axis.name for axis in one.axes]
    dim = names.index("site") if "site" in names else 0
    panel, rest = one.axes[dim], one.axes[:dim] + one.axes[dim + 1 :]
    before = "" if panel.name == "site" else f"{_title(panel, look)} "
    titles = [before + label for label in panel.labels]
    return _maps(one, np.moveaxis(values, dim, 0), normalized, rest, titles, given, look)


def _look(result: Effects, title: str | None, cmap: Any, labels: Mapping[str, str] | None) -> Look:
    """Check what a user says of a picture.

    Raises:
        ResultError: a label of an axis that there is not, or a colour map that matplotlib does not know.
    """
    from matplotlib import colormaps

    known = [*(axis.name for axis in result.axes), "value"]
    for name in labels or {}:
        if name not in known:
            raise ResultError(f"labels: no axis {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    if isinstance(cmap, str) and cmap not in colormaps:
        raise ResultError(f"matplotlib has no colour map {cmap!r}{nearest(cmap, colormaps)}")
    return Look(title, cmap, labels or {})


def ranked(
    result: Effects,
    k: int = 12,
    ax: Any = None,
    value: str | None = None,
    *,
    title: str | None = None,
    cmap: Any = None,
    labels: Mapping[str, str] | None = None,
) -> Axes:
    """Draw the k cells of the largest effect as bars, largest first, with 95 % bootstrap intervals.

    Args:
        result: a result with one metric.
        k: how many.
        ax: matplotlib axes to draw into; by default a figure of their own.
        value: "normalized" or "effect"; by default normalized where the result can be.
        title, cmap, labels: as in `heatmap`.

    Returns:
        The matplotlib axes.

    Raises:
        ResultError: the result has several metrics.
    """
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
    named = ".".join(axis.name for axis in result.axes)
    flat = replace(
        result,
        effect=result.effect[index],
        axes=(Axis(named, names),),
        several=False,
        status=result.status[index],
    )
    drawn = heatmap(flat, ax=ax, value=value, title=title, cmap=cmap, labels=labels)
    assert not isinstance(drawn, list)
    return drawn


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
    look: Look,
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
        figure = figure_of(width, height)
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
    colours: dict[str, Any] = {"cmap": look.cmap or _COLOURS, "vmin": -limit, "vmax": limit}
    cells: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest"}
    above = _selected(result) if look.title is None else look.title
    for ax, grid, title in zip(panels, grids, titles, strict=True):
        ax.set_facecolor("0.82")  # nan is transparent and shows it
        image = ax.imshow(
            np.clip(grid, -limit, limit), origin="lower" if y.name == "layer" else "upper", **colours, **cells
        )
        entitle(ax, title or above)
    bar = panels[0].figure.colorbar(image, ax=panels if len(panels) > 1 else panels[0], pad=0.02, aspect=25)
    absent = " (grey: in no row)" if np.isnan(grids).any() else ""
    for ax in bottom:
        ax.set_xlabel(printed(_title(x, look)) + absent, usetex=False)
    for ax in left:
        ax.set_ylabel(printed(_title(y, look)), usetex=False)
    if figure is not None and titles != [""] and above:
        figure.suptitle(printed(above, 60), usetex=False)

    def set_type() -> None:
        for ax in panels:
            tick_x(ax, x, shown=ax in bottom)
            tick_y(ax, y, shown=ax in left)
        say(bar.ax, [look.labels["value"]] if "value" in look.labels else _meaning(result, normalized))

    typeset(panels[0], set_type)
    return panels


def _bars(result: Effects, values: np.ndarray, normalized: bool, given: list[Axes] | None, look: Look) -> Axes:
    from matplotlib import colormaps

    (axis,) = result.axes
    figure = None if given else figure_of(_inches(axis, 0.24, 2.4, 6.4) + 0.9, 2.3 + room_of(axis))
    (ax,) = _as_many(given, 1) if figure is None else [figure.subplots()]
    low, high = result.ci(normalized=normalized)
    at = np.arange(len(axis))
    colours = look.cmap or _COLOURS
    blue, red = (colormaps[colours] if isinstance(colours, str) else colours)([0.12, 0.88])
    finite = np.where(np.isfinite(values), values, np.nan)  # an infinite bar has no end to draw
    ax.bar(at, finite, width=0.72, color=[red if v > 0 else blue for v in values])
    ax.vlines(at, low, high, color="black", linewidth=1.0)
    ax.axhline(0.0, color="black", linewidth=0.6)
    ax.set_xlim(-0.6, len(axis) - 0.4)
    ax.set_xlabel(printed(_title(axis, look)), usetex=False)
    entitle(ax, _selected(result) if look.title is None else look.title)
    said = [*_meaning(result, normalized), *(["95% intervals"] if np.isfinite(low).any() else [])]
    said = [look.labels["value"]] if "value" in look.labels else said

    def set_type() -> None:
        tick_x(ax, axis, shown=True)
        say(ax, said)

    typeset(ax, set_type)
    return ax


def _title(axis: Axis, look: Look) -> str:
    return look.labels.get(axis.name, _TITLES.get(axis.name, axis.name))


def _meaning(result: Effects, normalized: bool) -> list[str]:
    """Return what the numbers are, in pieces."""
    have = result.counts()
    few = f"{int(have[have > 0].min(initial=len(result.rows)))} to " if (have < len(result.rows)).any() else ""
    over = f"mean of {few}{len(result.rows)} row{'s' * (len(result.rows) != 1)}"
    named = shortened(visible(result.metrics[0]), 40)
    if not edits(result):
        return [f"{meaning(result)}: {named}", over]
    what = f"normalized {meaning(result)}" if normalized else meaning(result)
    return [f"{what} on {named}", "0 = base, 1 = source" if normalized else "edited − base", over]


def _selected(result: Effects) -> str:
    """Return what was done, and what `sel` picked."""
    picked = result.config.get("selected")
    chosen = ", ".join(f"{name} {value}" for name, value in picked.items()) if isinstance(picked, dict) else ""
    told = done(result) if "grid" in result.config else ""
    return f"{told}; {chosen}" if told and chosen else told or chosen


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
