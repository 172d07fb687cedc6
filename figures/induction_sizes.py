"""Figure 6: more classes slow the match, more labels slow the copy."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from figures.data import induction, mark_reduced


def draw() -> Figure:
    """Step of the phase change by number of classes and of labels: the whole network, and each subcircuit isolated."""
    record = induction()
    kinds = list(dict.fromkeys(size["kind"] for size in record["sizes"]))
    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    axes = figure.subplots(2, 3)
    for row, (axis, fixed, label) in enumerate((("classes", "labels", "classes"), ("labels", "classes", "labels"))):
        base = {"labels": 5, "classes": 50}[fixed]
        for ax, kind in zip(axes[row], kinds, strict=True):
            sizes = [s for s in record["sizes"] if s["kind"] == kind and s[fixed] == base]
            limit = record["setting"]["steps"]
            for at, size in enumerate(sizes):
                reached = [c for c in size["phase_change"] if c is not None]
                spread = np.linspace(-0.12, 0.12, len(size["phase_change"]))
                ax.scatter(at + spread[: len(reached)], reached, s=16, color="#2166ac", alpha=0.8, linewidths=0)
                if missing := len(size["phase_change"]) - len(reached):
                    ax.annotate(f"{missing} not by {limit}", (at, limit), fontsize=7, ha="center", va="top")
                if not missing:
                    ax.plot([at - 0.2, at + 0.2], [np.median(reached)] * 2, color="black", linewidth=1.2)
            ax.set_xticks(range(len(sizes)), [str(size[axis]) for size in sizes])
            ax.set_xlim(-0.5, len(sizes) - 0.5)
            highest = max(step or limit for size in sizes for step in size["phase_change"])
            ax.set_ylim(0, 1.08 * highest)
            ax.set_xlabel(label)
            ax.spines[["top", "right"]].set_visible(False)
            if row == 0:
                ax.set_title(kind, fontsize=9)
        axes[row][0].set_ylabel("step of the phase change")
    mark_reduced(figure, record)
    return figure
