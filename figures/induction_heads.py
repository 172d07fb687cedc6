"""Figure 4: induction heads add up, and each of them can do the task when it trains alone."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from figures.data import induction, mark_reduced


def draw() -> Figure:
    """Accuracy of a head alone, and without it, by its strength; losses of networks that train with one head."""
    record = induction()
    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    end = record["end"]
    strength = np.ravel(end["strengths"])
    for key, label, colour in (("only", "only this head", "#2166ac"), ("without", "without this head", "#b2182b")):
        left.scatter(strength, np.ravel(end[key]), s=16, color=colour, alpha=0.75, linewidths=0, label=label)
    left.axhline(0.5, color="0.5", linestyle=":", linewidth=1)
    left.set_xlabel("induction strength")
    left.set_ylabel("accuracy of the trained network")
    left.set_title("a: every head of every seed", fontsize=10)
    left.legend(frameon=False, fontsize=8, loc="lower right")
    for head, each in enumerate(record["alone"]):
        right.plot(record["steps_at"], each["loss"][0], linewidth=1.2, label=f"{head}")
    right.set_xlabel("step")
    right.set_ylabel("training loss (nats)")
    right.set_title("b: one head kept throughout, seed 0", fontsize=10)
    right.legend(frameon=False, fontsize=7, ncols=2, title="head", title_fontsize=7)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    mark_reduced(figure, record)
    return figure
