"""The logit lens as a picture: the likeliest token at each point and position of a prompt."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from hooks import Inputs, InputsError
from interp.typesetting import printed, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_POSITIONS = 16
"""How many positions are shown, the last ones of a longer prompt."""


class Read(Protocol):
    """What a picture needs of a lens; see `interp.LogitLens`."""

    @property
    def logits(self) -> Tensor:
        """[P, B, T, V]."""
        ...

    @property
    def points(self) -> tuple[str, ...]:
        """What was read out."""
        ...

    @property
    def inputs(self) -> Inputs:
        """The prompts."""
        ...

    @property
    def name(self) -> Any:
        """From an id to its text."""
        ...


def likeliest(lens: Read, row: int, last: int) -> tuple[list[str], list[list[tuple[str, float]]]]:
    """The tokens of a row's last positions, and at each point, from the last one up, what is likeliest, and how likely.

    Raises:
        InputsError: there is no such row, or no position is asked for.
    """
    if not 0 <= row < len(lens.inputs) or last < 1:
        raise InputsError(f"row {row} of {len(lens.inputs)}, {last} positions: nothing to show")
    length = int(lens.inputs.lengths[row])
    first = max(0, length - last)
    columns = lens.inputs.order[row, first:length]
    chances, ids = lens.logits[:, row, columns].float().softmax(-1).max(-1)
    cells = [
        [(lens.name(i), p) for i, p in zip(names, shares, strict=True)]
        for names, shares in zip(ids.tolist(), chances.tolist(), strict=True)
    ]
    return list(lens.inputs.labels(row)[first:length]), cells[::-1]


def drawn(lens: Read, row: int = 0) -> str:
    """The lens as an HTML table: points upwards, positions to the right, the darker the likelier."""
    tokens, cells = likeliest(lens, row, MOST_POSITIONS)
    style = "padding:2px 5px;text-align:center;font-size:11px;white-space:nowrap"
    lines = []
    for point, line in zip(lens.points[::-1], cells, strict=True):
        parts = [
            f"<td style='{style};background:rgba(33,102,172,{0.75 * p:.2f})' title='{p:.1%}'>"
            f"{html.escape(visible(text)[:14])}</td>"
            for text, p in line
        ]
        lines.append(f"<tr><th style='{style}'>{point}</th>{''.join(parts)}</tr>")
    below = "".join(f"<th style='{style}'>{html.escape(visible(token)[:14])}</th>" for token in tokens)
    rows = f", row 0 of {len(lens.inputs)}" if len(lens.inputs) > 1 else ""
    return (
        "<div style='font-family:sans-serif;font-size:12px'>logit lens: the likeliest next token after each layer"
        f"{rows}; the darker the likelier, to 100%</div><table>{''.join(lines)}<tr><th>layer</th>{below}</tr></table>"
    )


def lens_figure(lens: Read, row: int, last: int) -> Figure:
    """The lens as a figure; see `interp.LogitLens`."""
    from interp.canvas import figure_of

    tokens, cells = likeliest(lens, row, last)
    figure = figure_of(1.6 + 0.78 * len(tokens), 1.2 + 0.26 * len(cells))
    ax = figure.subplots()
    image = ax.imshow([[p for _, p in line] for line in cells], cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for y, line in enumerate(cells):
        for x, (text, p) in enumerate(line):
            ax.text(
                x, y, printed(visible(text), 9), ha="center", va="center", fontsize=7, color="w" if p > 0.55 else "k"
            )
    ax.set_xticks(range(len(tokens)), [printed(visible(token), 12) for token in tokens], rotation=90, fontsize=8)
    ax.set_yticks(range(len(cells)), lens.points[::-1], fontsize=8)
    ax.set_ylabel("layer")
    ax.set_title("logit lens", fontsize=10)
    figure.colorbar(image, ax=ax, pad=0.02, aspect=25).set_label("probability of the likeliest token", fontsize=8)
    return figure
