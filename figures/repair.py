"""What ablating the edges of a planted cue does to a vision transformer."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from figures.data import read

SETS = ("own mark", "another mark", "no mark")
BARS = {"before": "0.75", "causal graph": "#0072b2", "gradient (eap), as many": "#d55e00", "random": "#999933"}
LABELS = {"causal graph": "causal graph's edges ablated", "gradient (eap), as many": "as many by gradient (EAP)",
          "random": "as many at random"}  # fmt: skip


def draw() -> Figure:
    """Accuracy on three sets of images, mean over models, one dot a model."""
    models = [m for m in read("path_interventions", "results", "vision.json")["models"] if m["repair"]]
    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    ax = figure.subplots()
    width = 0.8 / len(BARS)
    for i, (name, colour) in enumerate(BARS.items()):
        values = np.array([[_accuracy(model["repair"], name, kind) for kind in SETS] for model in models])
        at = np.arange(len(SETS)) + (i - 1.5) * width
        ax.bar(at, values.mean(0), width, color=colour, label=LABELS.get(name, name))
        for each in values:
            ax.plot(at, each, "o", color="black", markersize=2.5)
    ax.axhline(0.25, color="0.5", linewidth=0.8, linestyle=":")
    ax.set_xticks(np.arange(len(SETS)), SETS)
    ax.set_xlabel("images with")
    ax.set_ylabel("accuracy (dotted: chance)")
    ax.set_ylim(0, 1.02)
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def _accuracy(repair: dict, name: str, kind: str) -> float:
    if name == "before":
        return repair["causal graph"]["before"][kind]
    some = [found for key, found in repair.items() if key.startswith(name)]
    return float(np.mean([found["after"][kind] for found in some]))
