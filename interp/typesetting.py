"""Type in figures: text that prints as it is, in the largest size that there is room for."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from interp.axes import Axis

SMALLEST = 6.0  # points: nothing is set smaller, labels are left out instead
LONGEST = 22  # characters of a tick label


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


def printed(text: str, longest: int = 40) -> str:
    """Return text that matplotlib prints as it is, the middle left out of what is too long."""
    return _unmathed(shortened(visible(text), longest))


def _unmathed(text: str) -> str:
    return text.replace("$", r"\$")  # an escaped dollar never begins mathematics


def shortened(text: str, longest: int) -> str:
    """Return text of at most `longest` characters, the middle left out."""
    head = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[:head]}…{text[head + 1 - longest :]}"


def say(ax: Axes, pieces: Sequence[str]) -> None:
    """Label the vertical axis, in the largest type that takes three lines at most."""
    room, own = _points(ax)[1], _rc_points("axes.labelsize")
    for size in (own, *(points for points in (8.0, 7.0, SMALLEST) if points < own)):
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


def entitle(ax: Axes, title: str) -> None:
    """Write a title, where there is one, in type that fits above the axes."""
    if title:
        ax.set_title(printed(title), fontsize=_fitting(printed(title), _points(ax)[0], "axes.titlesize"), usetex=False)


def typeset(ax: Axes, set_type: Callable[[], None]) -> None:
    """Set type to the room there is, which a layout engine decides only once something has been set."""
    set_type()
    figure = ax.figure.figure  # the whole of it, where the axes are in a subfigure
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        set_type()


def room_of(axis: Axis) -> float:
    """Return the inches that an axis's longest label takes, written away from the axis."""
    return 0.075 * max((len(printed(label, LONGEST)) for label in axis.labels), default=0)


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
    return max(min(_rc_points(rc), room / (0.6 * max(len(text), 1))), SMALLEST)


def tick_x(ax: Axes, axis: Axis, shown: bool) -> None:
    """Label the columns with an axis's values, as many as there is room for, or turned; ticks alone unless shown."""
    cell = _points(ax)[0] / max(len(axis), 1)
    labels = [printed(label, LONGEST) for label in axis.labels]
    widest = max(map(len, labels), default=0)
    size = _rc_points("xtick.labelsize")
    numbers = all(label.lstrip("-").isdigit() for label in labels)
    upright = numbers or widest * 0.62 * size < cell
    if upright:
        size = max(min(size, cell / (0.62 * widest + 0.4)), min(size, 8.0)) if widest else size
        step = _step((0.62 * widest + 0.4) * size / cell, numbers)
    else:
        size = max(min(size, 0.95 * cell), SMALLEST)
        step = _step(size / cell, numbers)
    set_ticks(ax.xaxis, labels, step, shown, size, 0 if upright else 90)


def tick_y(ax: Axes, axis: Axis, shown: bool) -> None:
    """Label the rows with an axis's values, as many as there is room for; ticks alone unless shown."""
    cell = _points(ax)[1] / max(len(axis), 1)
    labels = [printed(label, LONGEST) for label in axis.labels]
    size = max(min(_rc_points("ytick.labelsize"), 0.95 * cell), SMALLEST)
    numbers = all(label.lstrip("-").isdigit() for label in labels)
    set_ticks(ax.yaxis, labels, _step(size / cell, numbers), shown, size, 0)


def _step(needed: float, numbers: bool) -> int:
    """Return how many cells lie between labels, for numbers one of 1, 2, 5, 10, ..."""
    if needed < 1.001:
        return 1
    if not numbers:
        return math.ceil(needed)
    return next(n * 10**k for k in range(20) for n in (1, 2, 5) if n * 10**k >= needed)


def set_ticks(axis: Any, labels: Sequence[str], step: int, shown: bool, size: float, rotation: float) -> None:
    """Set every `step`-th label of a matplotlib axis, in type of a size in points, turned by degrees."""
    at = range(0, len(labels), step)
    axis.set_ticks(at, [labels[i] for i in at] if shown else [""] * len(at), usetex=False)
    axis.set_tick_params(labelsize=size, labelrotation=rotation, length=2)
