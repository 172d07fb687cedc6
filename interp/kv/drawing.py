"""Effects drawn over the text that they are of."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import numpy as np

from hooks import ResultError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from interp.effects import Effects

COLUMNS = 96
"""Characters in a line of a drawn text."""


def of_tokens(result: Effects, row: int = 0, metric: str | None = None) -> tuple[list[str], int, np.ndarray]:
    """The tokens of a row, how many are context, and the effect of each of those, summed over all other axes.

    Raises:
        ResultError: there is no such row or metric, or the result does not go through tokens.
    """
    names = [axis.name for axis in result.axes]
    if not -len(result.rows) <= row < len(result.rows):
        raise ResultError(f"there is no row {row}: the result has {len(result.rows)}")
    if metric is not None and metric not in result.metrics:
        raise ResultError(f"there is no metric {metric!r}: the result has {', '.join(result.metrics)}")
    along = next((name for name in ("token", "span") if name in names), None)
    if along is None or "tokens" not in result.config:
        raise ResultError(f"only effects of tokens or spans are drawn over a text, and these are of {', '.join(names)}")
    effect = result.effect[result.metrics.index(metric or result.metrics[0])] if result.several else result.effect
    effect = np.moveaxis(effect[..., row], names.index(along), 0)
    sums = effect.reshape(len(effect), -1).sum(1)
    tokens, context = list(result.config["tokens"][row]), result.config["context"][row]
    each = np.zeros(context)
    for value, amount in zip(result.axes[names.index(along)].values, sums, strict=True):
        start, stop = (value, value + 1) if along == "token" else map(int, value.split(":"))
        each[start:stop] += np.nan_to_num(amount)
    return tokens, context, each


def over_text(result: Effects, row: int = 0, metric: str | None = None, ax: Any = None) -> Axes:
    """Draw a row's text, every token of the context in the colour of its effect (red raises, blue lowers the
    metric).
    """
    from interp.canvas import figure_of

    tokens, context, each = of_tokens(result, row, metric)
    lines = _lines(tokens)
    if ax is None:
        figure = figure_of(10, 0.8 + 0.24 * len(lines))
        ax = figure.add_axes((0.01, 0.02, 0.98, 1 - 0.62 / figure.get_size_inches()[1]))
    most = np.abs(each).max() or 1.0
    ax.set_xlim(0, COLUMNS)
    ax.set_ylim(len(lines), 0)
    ax.axis("off")
    for y, line in enumerate(lines):
        x = 0
        for index, piece in line:
            colour = _rgb(each[index] / most) if index < context else (1, 1, 1)
            ax.add_patch(_box(x, y, len(piece), colour))
            weight = "normal" if index < context else "bold"
            ax.text(x, y + 0.5, piece, family="monospace", fontsize=7.6, va="center", weight=weight)
            x += len(piece)
    name = metric or result.metrics[0]
    ax.set_title(
        f"effect of removing each cached token on {name} (strongest {each[np.abs(each).argmax()]:+.3g}); "
        "what follows in bold",
        fontsize=9,
        loc="left",
    )
    return ax


def text_html(result: Effects, row: int = 0, metric: str | None = None) -> str:
    """A row's text as HTML, which tells every token's effect on hover."""
    tokens, context, each = of_tokens(result, row, metric)
    most = np.abs(each).max() or 1.0
    pieces = []
    for index, token in enumerate(tokens):
        shown = html.escape(token).replace("\n", "⏎<br>")
        if index < context:
            r, g, b = (round(255 * c) for c in _rgb(each[index] / most))
            pieces.append(
                f'<span style="background:rgb({r},{g},{b});color:#111" title="{each[index]:+.4g}">{shown}</span>'
            )
        else:
            pieces.append(f"<b>{shown}</b>")
    return f'<div style="font-family:monospace;white-space:pre-wrap">{"".join(pieces)}</div>'


def _lines(tokens: list[str]) -> list[list[tuple[int, str]]]:
    """Tokens with their numbers, broken into lines of at most `COLUMNS` characters."""
    lines: list[list[tuple[int, str]]] = [[]]
    used = 0
    for index, token in enumerate(tokens):
        piece = token.replace("\n", "⏎").replace("\t", "→")[:COLUMNS] or "∅"
        if used + len(piece) > COLUMNS:
            lines.append([])
            used = 0
        lines[-1].append((index, piece))
        used += len(piece)
    return lines


def _rgb(share: float) -> tuple[float, float, float]:
    """White for nothing, towards red for more and blue for less."""
    away = 1 - 0.75 * min(abs(share), 1.0) ** 0.5 if share else 1.0
    return (1.0, away, away) if share > 0 else (away, away, 1.0)


def _box(x: float, y: float, width: float, colour: tuple[float, float, float]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y + 0.04), width, 0.92, facecolor=colour, edgecolor="none")
