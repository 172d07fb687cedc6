"""Figure 4: induction heads add up, and each of them can do the task when it trains alone."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from experiments.induction_formation.records import committed, find, lengths
from figures.data import sequences_above


def draw() -> Figure:
    """Accuracy of a head alone, and without it, by its strength; losses of networks that train with one head."""
    records = committed()
    figure = Figure(figsize=(7.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    end = records["free"]["end"]
    strength = np.ravel(end["strengths"])
    for key, label, colour in (("only", "only this head", "#2166ac"), ("without", "without this head", "#b2182b")):
        left.scatter(strength, np.ravel(end[key]), s=16, color=colour, alpha=0.75, linewidths=0, label=label)
    left.axhline(0.5, color="0.5", linestyle=":", linewidth=1)
    left.set_xlabel("induction strength")
    left.set_ylabel("accuracy of the trained network")
    left.set_title("a: every head of every seed", fontsize=10)
    left.legend(frameon=False, fontsize=8, loc="lower right")
    for found in find(records, "3 and 4"):
        if found.name.startswith("head "):
            right.plot(found.at, found.loss[0], linewidth=1.2, label=found.name.removeprefix("head "))
    right.set_xlabel("updates")
    right.set_ylabel("training loss (nats)")
    right.set_title("b: one head kept throughout, seed 0", fontsize=10)
    right.legend(frameon=False, fontsize=7, ncols=2, title="head", title_fontsize=7)
    sequences_above(right)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(lengths(records, ("3 and 4",)), fontsize=8)
    return figure
