"""Figure 5: three factors that must all be learned make a plateau; holding some of them removes it."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from experiments.induction_formation.records import committed, lengths, one
from figures.data import read, sequences_above

TOY = {"none": "0.2", "c": "#f4a582", "b and c": "#b2182b"}
COLOURS = {
    "none": "0.2",
    "previous token": "#ff7f00",
    "layer 1": "#e31a1c",
    "copy": "#1f78b4",
    "match": "#33a02c",
    "layer 1 + copy": "#984ea3",
}


def draw() -> Figure:
    """The product of three vectors, and the network, each under its treatments; middle and range of seeds."""
    records, toy = committed(), read("induction_formation", "results", "toy.json")
    figure = Figure(figsize=(9.0, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.45))
    for name, colour in TOY.items():
        curves = np.array(toy["loss"][name])
        at = np.arange(0, toy["steps"], toy["every"])
        left.plot(at, np.median(curves, 0), color=colour, linewidth=1.6, label=name)
        for curve in curves:
            left.plot(at, curve, color=colour, linewidth=0.5, alpha=0.45)
    left.axhline(1, color="0.5", linestyle=":", linewidth=1)
    left.set_ylim(0, 2)
    left.set_xlabel("steps")
    left.set_ylabel("loss / (half the mean squared target)")
    left.set_title("a: toy, a ⊗ b ⊗ c; each seed and the median", fontsize=10)
    for name, colour in COLOURS.items():
        found = one(records, "5b", name)
        right.plot(found.at, found.loss.mean(0), color=colour, linewidth=1.4, label=name)
        low, high = found.loss.min(0), found.loss.max(0)
        right.fill_between(found.at, low, high, color=colour, alpha=0.18, linewidth=0)
    right.axhline(math.log(2), color="0.5", linestyle=":", linewidth=1)
    right.set_xlabel("updates")
    right.set_ylabel("training loss (nats)")
    right.set_title("b: one last-layer head; dotted: ln 2", fontsize=10)
    sequences_above(right)
    for ax in (left, right):
        ax.legend(frameon=False, fontsize=8, title="held", title_fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(lengths(records, ("5b",)), fontsize=8)
    return figure
