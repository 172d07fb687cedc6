"""Circuits as pictures: layers upwards, edges as wide as their effect, their sign in colour."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.paths.members import Members
from interp.paths.nodes import QKV, Edge

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POSITIVE, NEGATIVE, UNSIGNED = "#b2182b", "#2166ac", "#666666"
MOST_EDGES = 400
DONE = {
    "denoising": "with its clean value in\nthe corrupt run, an edge",
    "noising": "with its corrupt value in\nthe clean run, an edge",
    "ablation": "ablated, an edge",
}
"""What was done to an edge whose colour says what that did to the metric, by the direction."""
Place = tuple[str, str | None]


def layout(circuit: Members) -> dict[Place, tuple[float, float]]:
    """Where each node stands: (x, y) by its name and span, in units of a node's width.

    One row for the input, then two a layer (heads, and above them the MLP), and one for the logits; rows without a node
    are left out. Spans stand side by side, each with all rows.
    """
    graph = circuit.graph
    spans = [s for s in graph.span_names if any(e.span == s for e in _edges(circuit))] or [None]
    time = {w.name: (w.time, w.head) for w in graph.writers} | {"logits": (2 * graph.layers + 1, None)}
    used: dict[str | None, set[str]] = {s: set() for s in spans}
    for edge in _edges(circuit):
        used[edge.span] |= {edge.writer.name, *circuit.targets(edge)}
    rows = sorted({time[name][0] for names in used.values() for name in names})
    places: dict[Place, tuple[float, float]] = {}
    left = 0.0
    for span in spans:
        by_row = [[n for n in time if n in used[span] and time[n][0] == at] for at in rows]
        width = max((len(names) for names in by_row), default=1)
        for y, names in enumerate(by_row):
            for i, name in enumerate(names):
                # Every other row is shifted, so that an arrow from a row to the next but one passes between nodes.
                places[name, span] = (left + (width - len(names)) / 2 + i + (0.18 if y % 2 else -0.18), float(y))
        left += width + 0.8
    return places


def _edges(circuit: Members) -> list[Edge]:
    return [circuit.graph.listed[i] for i in np.flatnonzero(circuit.members)]


def draw(circuit: Members, ax: Axes | None = None, *, title: str | None = None, widest: float = 4.0) -> Axes:
    """Draw a circuit as a layered graph.

    Args:
        circuit: what to draw; its scores give width (by size) and colour (red adds to the metric, blue takes away; grey
            without a score).
        ax: where; by default a new figure of a fitting size.
        title: default what the circuit says of itself.
        widest: width of the strongest edge, in points.
    """
    from matplotlib.patches import FancyArrowPatch

    if ax is None:
        return figure(circuit, title=title, widest=widest).axes[0]
    places, edges = layout(circuit), _edges(circuit)
    scores = np.array([circuit.scores[circuit.graph.index[edge.name]] for edge in edges])
    largest = float(np.nanmax(np.abs(scores), initial=0.0)) or 1.0
    crowded = len(edges) > 80
    ax.set_axis_off()
    arrows = [
        (edge, score, places[name, edge.span])
        for edge, score in zip(edges, scores, strict=True)
        for name in circuit.targets(edge)
    ]
    for edge, score, end in sorted(arrows, key=lambda arrow: abs(np.nan_to_num(arrow[1]))):
        start = places[edge.writer.name, edge.span]
        share = 0.3 if np.isnan(score) else abs(score) / largest
        shift = {"q": -0.22, "k": 0.0, "v": 0.22}.get(edge.reader.kind, 0.0)
        far = end[1] - start[1] > 1
        arrow = FancyArrowPatch(
            (start[0], start[1] + 0.2),
            (end[0] + shift, end[1] - (0.34 if edge.reader.kind in QKV else 0.22)),
            arrowstyle="-|>",
            mutation_scale=5 + 3 * share,
            shrinkA=0,
            shrinkB=0,
            connectionstyle=f"arc3,rad={0.12 if far else 0.0}",
            linewidth=0.4 + (widest - 0.4) * share,
            color=UNSIGNED if np.isnan(score) else POSITIVE if score > 0 else NEGATIVE,
            alpha=0.25 + (0.35 if crowded else 0.6) * share**0.5,
            zorder=1 + share,
        )
        ax.add_patch(arrow)
    _nodes(ax, places, circuit)
    xs, ys = zip(*places.values(), strict=True) if places else ((0.0,), (0.0,))
    ax.set_xlim(min(xs) - 0.8, max(xs) + 0.8)
    ax.set_ylim(min(ys) - 0.6, max(ys) + 0.5)
    _key(ax, scores, largest, circuit)
    ax.set_title(f"{len(circuit)} of {len(circuit.graph)} edges" if title is None else title, fontsize=10)
    return ax


def _nodes(ax: Axes, places: dict[Place, tuple[float, float]], circuit: Members) -> None:
    read: dict[Place, set[str]] = {}
    for edge in _edges(circuit):
        if edge.reader.kind in QKV:
            for name in circuit.targets(edge):
                read.setdefault((name, edge.span), set()).add(edge.reader.kind)
    columns: dict[str, list[tuple[float, float]]] = {}
    for (name, span), (x, y) in places.items():
        colour = "#fff3d6" if name.startswith("m") else "#e8eef7" if name.startswith("a") else "#eeeeee"
        box: dict[str, Any] = {"boxstyle": "round,pad=0.25", "facecolor": colour, "edgecolor": "0.35", "linewidth": 0.7}
        ax.text(x, y, name, ha="center", va="center", fontsize=8, bbox=box, zorder=4)
        for kind, shift in (("q", -0.22), ("k", 0.0), ("v", 0.22)):
            if kind in read.get((name, span), ()):
                ax.text(x + shift, y - 0.27, kind, ha="center", va="center", fontsize=6, color="0.25", zorder=5)
        columns.setdefault(name, []).append((x, y))
    for name, spots in columns.items():
        if name.startswith("a") and len(spots) > 1:  # one head at several positions: attention carries between them
            ax.plot(*zip(*spots, strict=True), color="0.6", linewidth=0.7, linestyle=":", zorder=0)
    tops: dict[str, list[float]] = {}
    for (_, span), (x, _y) in places.items():
        if span is not None:
            tops.setdefault(span, []).append(x)
    for span, xs in tops.items():
        low = min(y for _, y in places.values())
        ax.text(sum(xs) / len(xs), low - 0.5, span, ha="center", va="top", fontsize=9, style="italic")


def _key(ax: Axes, scores: np.ndarray, largest: float, circuit: Members) -> None:
    from matplotlib.lines import Line2D

    if np.isnan(scores).all():
        return
    lines = []
    if (scores > 0).any():
        lines.append(Line2D([], [], color=POSITIVE, linewidth=3, label="raises the metric"))
    if (scores < 0).any():
        lines.append(Line2D([], [], color=NEGATIVE, linewidth=3, label="lowers it"))
    lines.append(Line2D([], [], color="none", label=f"widest: {largest:.3g}"))
    done = DONE.get(str(circuit.config.get("direction")))
    ax.legend(
        handles=lines, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False,
        title=done, title_fontsize=8, alignment="left",
    )  # fmt: skip


def figure(circuit: Members, **options: Any) -> Figure:
    """A figure of a circuit, as large as its layers and heads need."""
    from matplotlib.figure import Figure

    places = layout(circuit)
    xs, ys = zip(*places.values(), strict=True) if places else ((0.0,), (0.0,))
    size = (max(3.2, 0.62 * (max(xs) - min(xs)) + 3.0), max(2.2, 0.62 * (max(ys) - min(ys)) + 1.2))
    made = Figure(figsize=size, layout="constrained")
    draw(circuit, made.subplots(), **options)
    return made


def svg(circuit: Members) -> str:
    """A circuit as a piece of SVG for a notebook; a sentence where it has too many edges to be seen."""
    if len(circuit) > MOST_EDGES:
        return f"<div>{len(circuit)} edges: too many to draw; take the strongest</div>"
    if not len(circuit):
        return "<div>no edges</div>"
    buffer = io.StringIO()
    figure(circuit).savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]
