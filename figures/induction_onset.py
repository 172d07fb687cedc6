"""Figure 3: the loss sits on a plateau near ln 2 and falls at once, and last-layer heads become induction heads."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from figures.data import induction, mark_reduced


def draw() -> Figure:
    """Loss of every seed; accuracies over the splits; induction strength of each head of the first seed."""
    record = induction()
    figure = Figure(figsize=(9.6, 3.0), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    steps, free = record["steps_at"], record["free"]
    for loss in free["loss"]:
        left.plot(steps, loss, linewidth=1)
    left.axhline(math.log(2), color="0.5", linestyle=":", linewidth=1)
    left.set_ylabel("training loss (nats)")
    left.set_title("a: each seed; dotted: ln 2", fontsize=10)
    at = np.array(steps) - record["setting"]["every"]
    names = {"train": "training", "labels": "held-out label pairs", "classes": "held-out classes"}
    for split, label in names.items():
        each = np.array([line[split]["accuracy"] for line in free["splits"]])
        middle.plot(at, each.mean(1), linewidth=1.2, label=label)
        middle.fill_between(at, each.min(1), each.max(1), alpha=0.2, linewidth=0)
    middle.set_ylabel("accuracy")
    middle.set_title("mean and range of seeds", fontsize=10)
    middle.legend(frameon=False, fontsize=8, loc="lower right")
    strengths = np.array(free["strengths"])[:, 0]
    for head, each in enumerate(strengths.T):
        right.plot(at, each, linewidth=1.2, label=f"{head}")
    right.set_ylabel("induction strength")
    right.set_title("b: last-layer heads of seed 0", fontsize=10)
    right.legend(frameon=False, fontsize=7, ncols=2, title="head", title_fontsize=7)
    for ax in (left, middle, right):
        ax.set_xlabel("step")
        ax.spines[["top", "right"]].set_visible(False)
    mark_reduced(figure, record)
    return figure
