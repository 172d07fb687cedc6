"""Figure 3: the loss falls at once, from a plateau near ln 2 where classes share a mean, and induction heads form."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from experiments.induction_formation.records import committed, find, lengths
from figures.data import sequences_above


def draw() -> Figure:
    """Loss of every seed of two data sets; accuracies over the splits; strength of each head of the first seed."""
    records = committed()
    figure = Figure(figsize=(10.4, 3.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    colours = {0.0: "#2166ac", 0.8: "#b2182b"}
    for found in find(records, "plateau"):
        if (colour := colours.get(found.cosine)) is None:
            continue
        for number, loss in enumerate(found.loss):
            label = f"classes of cosine {found.cosine:g}" if not number else None
            left.plot(found.at, loss, linewidth=0.9, color=colour, label=label)
    left.axhline(math.log(2), color="0.5", linestyle=":", linewidth=1)
    left.set_ylabel("training loss (nats)")
    left.set_title("a: each seed; dotted: ln 2", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    record = records["free"]
    during, at = record["during"], np.array(record["updates_at"]) - record["setting"]["every"]
    shown = at <= record["figures"]["3 and 4"]["asked"]
    names = {"train": "training", "labels": "held-out label pairs", "classes": "held-out classes"}
    for split, label in names.items():
        each = np.array([line[split]["accuracy"] for line in during["splits"]])[shown]
        middle.plot(at[shown], each.mean(1), linewidth=1.2, label=label)
        middle.fill_between(at[shown], each.min(1), each.max(1), alpha=0.2, linewidth=0)
    middle.set_ylabel("accuracy")
    middle.set_title("cosine 0: mean and range of seeds", fontsize=10)
    middle.legend(frameon=False, fontsize=8, loc="lower right")
    strengths = np.array(during["strengths"])[shown, 0]
    for head, each in enumerate(strengths.T):
        right.plot(at[shown], each, linewidth=1.2, label=f"{head}")
    right.set_ylabel("induction strength")
    right.set_title("b: last-layer heads of seed 0", fontsize=10)
    right.legend(frameon=False, fontsize=7, ncols=2, title="head", title_fontsize=7)
    for ax in (left, middle, right):
        ax.set_xlabel("updates")
        ax.spines[["top", "right"]].set_visible(False)
        sequences_above(ax)
    figure.supxlabel(lengths(records, ("3 and 4", "plateau")), fontsize=8)
    return figure
