"""Figure 5: three factors that must all be learned make a plateau; holding some of them removes it."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from figures.data import induction, mark_reduced

TOY = {"none": "0.2", "c": "#f4a582", "b and c": "#b2182b"}
COLOURS = {
    "none": "0.2",
    "previous token": "#92c5de",
    "layer 1": "#2166ac",
    "copy": "#f4a582",
    "layer 1 + copy": "#b2182b",
    "match": "#1b7837",
}


def draw() -> Figure:
    """The product of three vectors, and the network, each under its treatments; mean and range of seeds."""
    record = induction()
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
    toy = record["toy"]
    for name, colour in TOY.items():
        _band(left, np.arange(0, toy["steps"], toy["every"]), toy["loss"][name], colour, name)
    left.set_ylabel("loss")
    left.set_title("a: a b c against a* b* c*", fontsize=10)
    for name, colour in COLOURS.items():
        _band(right, record["steps_at"], record["clamped"][name]["loss"], colour, name)
    right.axhline(math.log(2), color="0.5", linestyle=":", linewidth=1)
    right.set_xscale("log")
    right.set_ylabel("training loss (nats)")
    right.set_title("b: one last-layer head; dotted: ln 2", fontsize=10)
    for ax in (left, right):
        ax.set_xlabel("step")
        ax.legend(frameon=False, fontsize=8, title="held", title_fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    mark_reduced(figure, record)
    return figure


def _band(ax, at, each, colour, label) -> None:
    each = np.array(each)
    ax.plot(at, each.mean(0), color=colour, linewidth=1.2, label=label)
    ax.fill_between(at, each.min(0), each.max(0), color=colour, alpha=0.18, linewidth=0)
