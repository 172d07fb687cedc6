"""Figure 6: more classes slow the match, more labels slow the copy, with one last-layer head throughout."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from experiments.induction_formation.records import committed, find, lengths
from experiments.induction_formation.report import AXES
from experiments.induction_formation.settings import ISOLATED
from figures.data import sequences_above

COLOURS = ("#e377c2", "#7f7fd5", "#17becf")


def draw() -> Figure:
    """Losses by number of classes and of labels: normal training, and training with all but some subcircuits held."""
    records = committed()
    figure = Figure(figsize=(11.6, 5.4), layout="constrained")
    axes = figure.subplots(2, 4, sharey="row", sharex="col")
    all_heads = {(s["classes"], s["labels"]): s["phase_change"] for s in records["free"]["all_heads_by_size"]}
    for column, (panel, held) in enumerate(ISOLATED.items()):
        conditions = {(f.classes, f.labels): f for f in find(records, "6" if held == "none" else "6, clamped", panel)}
        marks = [found.middle for found in conditions.values() if np.isfinite(found.middle)]
        for row, (what, keys) in enumerate(AXES.items()):
            ax = axes[row, column]
            for key, colour in zip(keys, COLOURS, strict=True):
                if held == "none":
                    marks.append(float(np.median(all_heads[key])))
                    ax.plot([marks[-1]], [0.04], marker="^", color=colour, markersize=6, fillstyle="none")
                if (found := conditions.get(key)) is None:
                    continue
                ax.plot(found.at, found.loss.mean(0), color=colour, linewidth=1.4, label=key[row])
                if np.isfinite(found.middle):
                    ax.plot([found.middle], [0.04], marker="^", color=colour, markersize=5)
            ax.axhline(math.log(2), color="0.5", linestyle=":", linewidth=1)
            ax.set_ylim(0, 1.5)
            ax.spines[["top", "right"]].set_visible(False)
            if row == 0:
                sequences_above(ax)
                ax.set_title(panel, fontsize=9)
            else:
                ax.set_xlabel("updates")
            if column == 0:
                ax.set_ylabel("training loss (nats)")
            if column == 3:
                ax.legend(frameon=False, fontsize=8, title=what, title_fontsize=8)
        last = max(found.at[-1] for found in conditions.values())
        axes[1, column].set_xlim(0, max(min(last, 1.5 * max(marks)), 1.1 * max(marks)))
    said = "mean of seeds; marks: median phase change, hollow: of five seeds with all heads kept"
    figure.supxlabel(f"{said}; {lengths(records, ('6', '6, clamped'))}", fontsize=8)
    return figure
