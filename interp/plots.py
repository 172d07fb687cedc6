"""Pictures of results: a heatmap for two axes, bars for one, a panel for each site for three.

matplotlib is imported on use, pyplot never: a figure made here belongs to whoever holds it, and nothing global changes.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from hooks.errors import ResultError, nearest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from interp.axes import Axis
    from interp.results import Result

# Red-white-blue keeps its two ends apart in every common form of colour blindness.
_COLOURS = "RdBu_r"
_SMALLEST = 6.0  # points: nothing is set smaller, labels are left out instead
_LONGEST = 22  # characters of a tick label
_TITLES = {"pos": "position", "key_pos": "key position"}


def visible(text: str) -> str:
    r"""Return text with what the eye cannot see made visible: spaces at the ends as '·', newlines and the like escaped.

    >>> print(visible(" Mary"), visible("a b "), visible("\n"))
    ·Mary a b· \n
    """
    inner = text.strip(" ")
    left = len(text) - len(text.lstrip(" "))
    right = len(text) - left - len(inner)
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in inner)
    return "·" * left + "".join(shown) + "·" * right


def heatmap(result: Result, ax: Any = None, metric: str | None = None, value: str | None = None) -> Axes | list[Axes]:
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
    one = result.sel(metric=result.metrics[0] if metric is None else metric)
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


def ranked(result: Result, k: int = 12, ax: Any = None, value: str | None = None) -> Axes:
    """Draw the k cells of the largest effect as bars, largest first, with 95 % bootstrap intervals.

    Args:
        result: a result with one metric.
        k: how many.
        ax: matplotlib axes to draw into; by default a figure of their own.
        value: "normalized" or "effect"; by default normalized where the result can be.

    Returns:
        The matplotlib axes.
    """
    from interp.axes import Axis
    from interp.results import Result

    means = np.abs(np.nan_to_num(result.mean()))
    order = np.argsort(-means, axis=None)[:k]
    index = np.unravel_index(order, means.shape)
    names = tuple(
        ".".join(str(axis.values[i]) for axis, i in zip(result.axes, cell, strict=True))
        for cell in zip(*index, strict=True)
    )
    title = ".".join(axis.name for axis in result.axes)
    flat = Result(
        effect=result.effect[index],
        axes=(Axis(title, names),),
        metrics=result.metrics,
        several=False,
        base=result.base,
        source=result.source,
        status=result.status[index],
        noise_floor=result.noise_floor,
        rows=result.rows,
        config=result.config,
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
    labels = [_text(visible(token), _LONGEST) for token in tokens]
    size = min(9.0, max(_SMALLEST, 150.0 / len(tokens)))
    _set_ticks(ax.xaxis, labels, 1, True, size, 90)
    _set_ticks(ax.yaxis, labels, 1, True, size, 0)
    ax.set_xlabel("key", fontsize=9)
    ax.set_ylabel("query", fontsize=9)
    _entitle(ax, title)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return ax


def _values(result: Result, value: str | None) -> tuple[np.ndarray, bool]:
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
    result: Result,
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
        width = min(_inches(x, 0.22, 1.8, 6.0), 6.0 / across) * across + 1.4 + _room(y)
        height = (_inches(y, 0.19, 2.0, 5.5) + 0.3 * (titles != [""])) * down + 0.5 + _room(x)
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
        _entitle(ax, title or _selected(result))
    bar = panels[0].figure.colorbar(image, ax=panels if len(panels) > 1 else panels[0], pad=0.02, aspect=25)
    absent = " (grey: in no row)" if np.isnan(grids).any() else ""
    for ax in bottom:
        ax.set_xlabel(_text(_title(x)) + absent, usetex=False)
    for ax in left:
        ax.set_ylabel(_text(_title(y)), usetex=False)
    if figure is not None and titles != [""] and _selected(result):
        figure.suptitle(_text(_selected(result), 60), usetex=False)

    def set_type() -> None:
        for ax in panels:
            _tick_x(ax, x, shown=ax in bottom)
            _tick_y(ax, y, shown=ax in left)
        _say(bar.ax, _meaning(result, normalized))

    _typeset(panels[0], set_type)
    return panels


def _bars(result: Result, values: np.ndarray, normalized: bool, given: list[Axes] | None) -> Axes:
    from matplotlib import colormaps

    (axis,) = result.axes
    figure = None if given else _figure(_inches(axis, 0.24, 2.4, 6.4) + 0.9, 2.3 + _room(axis))
    (ax,) = _as_many(given, 1) if figure is None else [figure.subplots()]
    low, high = result.ci(normalized=normalized)
    at = np.arange(len(axis))
    blue, red = colormaps[_COLOURS]([0.12, 0.88])
    finite = np.where(np.isfinite(values), values, np.nan)  # an infinite bar has no end to draw
    ax.bar(at, finite, width=0.72, color=[red if v > 0 else blue for v in values])
    ax.vlines(at, low, high, color="black", linewidth=1.0)
    ax.axhline(0.0, color="black", linewidth=0.6)
    ax.set_xlim(-0.6, len(axis) - 0.4)
    ax.set_xlabel(_text(_title(axis)), usetex=False)
    _entitle(ax, _selected(result))
    meaning = [*_meaning(result, normalized), *(["95% intervals"] if np.isfinite(low).any() else [])]

    def set_type() -> None:
        _tick_x(ax, axis, shown=True)
        _say(ax, meaning)

    _typeset(ax, set_type)
    return ax


# Text


def _text(text: str, longest: int = 40) -> str:
    """Return text that matplotlib prints as it is, the middle left out of what is too long."""
    return _unmathed(_shortened(visible(text), longest))


def _unmathed(text: str) -> str:
    return text.replace("$", r"\$")  # an escaped dollar never begins mathematics


def _shortened(text: str, longest: int) -> str:
    head = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[:head]}…{text[head + 1 - longest :]}"


def _title(axis: Axis) -> str:
    return _TITLES.get(axis.name, axis.name)


def _meaning(result: Result, normalized: bool) -> list[str]:
    """Return what the numbers are, in pieces."""
    over = f"mean of {len(result.rows)} row{'s' * (len(result.rows) != 1)}"
    what, scale = ("normalized effect", "0 = base, 1 = source") if normalized else ("effect", "edited − base")
    return [f"{what} on {_shortened(visible(result.metrics[0]), 40)}", scale, over]


def _say(ax: Axes, pieces: Sequence[str]) -> None:
    """Label the vertical axis, in the largest type that takes three lines at most."""
    room, own = _points(ax)[1], _rc_points("axes.labelsize")
    for size in (own, *(points for points in (8.0, 7.0, _SMALLEST) if points < own)):
        wide = max(int(room / (0.6 * size)), 8)
        lines: list[str] = []
        for piece in pieces:
            if lines and len(lines[-1]) + len(piece) + 2 <= wide:
                lines[-1] += f"; {piece}"
            else:
                lines += textwrap.wrap(piece, wide)
        if len(lines) <= 3:
            break
    ax.set_ylabel(_unmathed("\n".join(lines)), fontsize=size, usetex=False)


def _selected(result: Result) -> str:
    """Return what `sel` picked."""
    picked = result.config.get("selected")
    return ", ".join(f"{name} {value}" for name, value in picked.items()) if isinstance(picked, dict) else ""


def _entitle(ax: Axes, title: str) -> None:
    if title:
        ax.set_title(_text(title), fontsize=_fitting(_text(title), _points(ax)[0], "axes.titlesize"), usetex=False)


# Sizes


def _typeset(ax: Axes, set_type: Callable[[], None]) -> None:
    """Set type to the room there is, which a layout engine decides only once something has been set."""
    set_type()
    figure = ax.figure.figure  # the whole of it, where the axes are in a subfigure
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        set_type()


def _rank(axis: Axis) -> int:
    """Return how far from the vertical an axis belongs."""
    return {"layer": 0, "head": 2, "pos": 3, "key_pos": 4}.get(axis.name, 1)


def _inches(axis: Axis, cell: float, least: float, most: float) -> float:
    return min(max(cell * len(axis), least), most)


def _room(axis: Axis) -> float:
    """Return the inches that an axis's longest label takes, written away from the axis."""
    return 0.075 * max((len(_text(label, _LONGEST)) for label in axis.labels), default=0)


def _points(ax: Axes) -> tuple[float, float]:
    """Return the width and height of the axes in points."""
    box = ax.get_window_extent()
    scale = 72 / ax.figure.dpi
    return box.width * scale, box.height * scale


def _rc_points(name: str) -> float:
    from matplotlib import rcParams
    from matplotlib.font_manager import FontProperties

    return FontProperties(size=rcParams[name]).get_size_in_points()  # pyright: ignore[reportArgumentType]


def _fitting(text: str, room: float, rc: str) -> float:
    """Return the user's size for such text, or the smaller one at which it takes `room` points."""
    return max(min(_rc_points(rc), room / (0.6 * max(len(text), 1))), _SMALLEST)


def _tick_x(ax: Axes, axis: Axis, shown: bool) -> None:
    cell = _points(ax)[0] / max(len(axis), 1)
    labels = [_text(label, _LONGEST) for label in axis.labels]
    widest = max(map(len, labels), default=0)
    size = _rc_points("xtick.labelsize")
    numbers = all(label.lstrip("-").isdigit() for label in labels)
    upright = numbers or widest * 0.62 * size < cell
    if upright:
        size = max(min(size, cell / (0.62 * widest + 0.4)), min(size, 8.0)) if widest else size
        step = _step((0.62 * widest + 0.4) * size / cell, numbers)
    else:
        size = max(min(size, 0.95 * cell), _SMALLEST)
        step = _step(size / cell, numbers)
    _set_ticks(ax.xaxis, labels, step, shown, size, 0 if upright else 90)


def _tick_y(ax: Axes, axis: Axis, shown: bool) -> None:
    cell = _points(ax)[1] / max(len(axis), 1)
    labels = [_text(label, _LONGEST) for label in axis.labels]
    size = max(min(_rc_points("ytick.labelsize"), 0.95 * cell), _SMALLEST)
    numbers = all(label.lstrip("-").isdigit() for label in labels)
    _set_ticks(ax.yaxis, labels, _step(size / cell, numbers), shown, size, 0)


def _step(needed: float, numbers: bool) -> int:
    """Return how many cells lie between labels, for numbers one of 1, 2, 5, 10, ..."""
    if needed < 1.001:
        return 1
    if not numbers:
        return math.ceil(needed)
    return next(n * 10**k for k in range(20) for n in (1, 2, 5) if n * 10**k >= needed)


def _set_ticks(axis: Any, labels: Sequence[str], step: int, shown: bool, size: float, rotation: float) -> None:
    at = range(0, len(labels), step)
    axis.set_ticks(at, [labels[i] for i in at] if shown else [""] * len(at), usetex=False)
    axis.set_tick_params(labelsize=size, labelrotation=rotation, length=2)


# Figures


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
