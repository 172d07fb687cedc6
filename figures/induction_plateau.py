"""What the plateau depends on: the mean that classes share makes it, and hardly touches what isolated circuits take."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from experiments.induction_formation.records import PLATEAU, committed, find, lengths
from figures.data import sequences_above

COLOURS = {0.0: "#2166ac", 0.3: "#67a9cf", 0.5: "#ef8a62", 0.8: "#b2182b"}
CLAMPS = {"layer 1 + copy": "#984ea3", "match": "#33a02c", "copy": "#1f78b4", "layer 1": "#e31a1c"}


def draw() -> Figure:
    """Losses by the cosine between classes; the plateau's length; phase changes, of all heads and under clamps."""
    records = committed()
    figure = Figure(figsize=(11.0, 3.7), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.35, 1, 1))
    free = sorted(find(records, "plateau"), key=lambda found: found.cosine)
    for found in free:
        colour = COLOURS[found.cosine]
        left.plot(found.at, found.loss.mean(0), color=colour, linewidth=1.4, label=f"{found.cosine:g}")
        lengths_of = found.plateaus
        middle.scatter([found.cosine] * len(lengths_of), lengths_of, s=16, color=colour, linewidths=0)
    left.axhspan(*sorted(PLATEAU), color="0.92", zorder=0)
    left.axhline(math.log(2), color="0.5", linestyle=":", linewidth=1)
    left.set_ylim(0, 1.5)
    left.set_xlabel("updates")
    left.set_ylabel("training loss (nats)")
    left.set_title("all heads, mean of seeds; dotted: ln 2", fontsize=10)
    left.legend(frameon=False, fontsize=8, title="cosine", title_fontsize=8)
    sequences_above(left)
    cosines = [found.cosine for found in free]
    middle.plot(cosines, [np.median(found.plateaus) for found in free], color="0.3", linewidth=1)
    middle.set_ylabel(f"updates from {PLATEAU[0]} to {PLATEAU[1]} nats")
    middle.set_ylim(0)
    middle.set_title("length of the plateau, each seed", fontsize=10)
    curves = {"all heads, nothing held": (free, "0.2")}
    curves |= {f"{name} held": (find(records, "plateau, clamped", name), colour) for name, colour in CLAMPS.items()}
    for label, (each, colour) in curves.items():
        steps = np.array([found.middle for found in each])
        right.plot([f.cosine for f in each], steps / steps[0], color=colour, marker="o", markersize=4, label=label)
    right.axhline(1, color="0.5", linestyle=":", linewidth=1)
    right.set_ylabel("phase change, over that at cosine 0")
    right.set_title("what is slower for it", fontsize=10)
    right.legend(frameon=False, fontsize=7, loc="upper left")
    for ax in (middle, right):
        ax.set_xlabel("cosine between classes")
    for ax in (left, middle, right):
        ax.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(lengths(records, ("plateau", "plateau, clamped")), fontsize=8)
    return figure
