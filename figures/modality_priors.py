"""Pictures that a model gets wrong from its prior, what it says without it, and which decoders help."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from figures.data import read
from interp.attention import overlay

STUDY = ("modality_priors", "results")
SHOWN = {
    "no image, g 1": "no image",
    "language uniform all, g 1": "language, uniform",
    "language random all, mean of 4, g 1": "language, random (4 draws)",
    "to image uniform all, g 1": "text to image, uniform",
    "vision uniform all, g 1": "vision, uniform",
    "both uniform all, g 1": "vision + language, uniform",
    "VCD 900, g 1": "VCD, step 900",
    "DoLa 1, g 1": "DoLa, layer 1",
    "plain, eps 0.1": "the cut-off alone",
}


def draw() -> Figure:
    """Four pictures with what was said and is said; and the change of accuracy by decoder."""
    examples = read(*STUDY, "examples.json")["examples"]
    table = read(*STUDY, "priors.json")["decoders"]
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.35])
    axes = left.subplots(2, 2)
    largest = max(abs(x) for one in examples for line in one["effect of attention on the picture"] for x in line)
    for ax, one in zip(axes.flat, examples, strict=False):
        effect = np.array(one["effect of attention on the picture"])
        overlay(np.array(one["picture"]), effect, ax, largest=largest, alpha=0.35)
        ax.set_title(f"{one['question']}\nsaid {one['said']}, now {one['says now']}", fontsize=8)
    left.suptitle("without the text's prior\n(red: attention that speaks for the truth)", fontsize=9)
    ax = right.subplots()
    ways = {"sampled": "#999999", "greedy": "#0072b2"}
    for number, (kind, colour) in enumerate(ways.items()):
        for split, marker, shift in (("counter", "o", 0.0), ("iid", "s", 0.12)):
            entries = [table[split][f"{name} | {kind}"] for name in SHOWN]
            at = np.arange(len(SHOWN)) + 0.3 * number + shift
            middle = np.array([100 * one["change"] for one in entries])
            reach = [[m - 100 * e["low"] for m, e in zip(middle, entries, strict=True)],
                     [100 * e["high"] - m for m, e in zip(middle, entries, strict=True)]]  # fmt: skip
            label = f"{kind}, {'counter-prior' if split == 'counter' else 'i.i.d.'}"
            filled = colour if split == "counter" else "white"
            ax.errorbar(middle, at, xerr=np.abs(reach), fmt=marker, color=colour, markerfacecolor=filled, markersize=4,
                        linewidth=1, label=label)  # fmt: skip
    ax.axvline(0, color="0.5", linewidth=0.8)
    ax.set_yticks(np.arange(len(SHOWN)) + 0.2, list(SHOWN.values()), fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("change of accuracy against plain decoding, points (95 %)", fontsize=8)
    ax.tick_params(axis="x", labelsize=8)
    ax.legend(frameon=False, fontsize=7, loc="lower right")
    ax.spines[["top", "right"]].set_visible(False)
    return figure
