"""How long the same sweeps take with TransformerLens, with a loop over hooks, and here."""

from __future__ import annotations

import statistics

import numpy as np
from matplotlib.figure import Figure

from figures.data import read

SIDES = {"transformer_lens": ("TransformerLens", "#b2182b"), "hook_loop": ("hook loop", "#f4a582")}
KINDS = {"resid_pre": "resid_pre", "z": "heads"}


def draw() -> Figure:
    """Time over ours, one group of bars a sweep; the line at 1 is ours."""
    sweeps = read("benchmarks", "patching.json")["sweeps"]
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    ax = figure.subplots()
    at, width = np.arange(len(sweeps)), 0.38
    for shift, (side, (label, colour)) in zip((-0.5, 0.5), SIDES.items(), strict=True):
        ratios = [statistics.median(s["seconds"][side]) / statistics.median(s["seconds"]["ours"]) for s in sweeps]
        bars = ax.bar(at + shift * width, ratios, width, color=colour, label=label)
        ax.bar_label(bars, fmt="%.1f", fontsize=8, padding=1)
    ax.axhline(1, color="black", linewidth=1)
    ax.set_xticks(
        at, [f"{KINDS[s['site']]}\n{s['tokens']} tokens\nfrom {s['shared'] + 1}." for s in sweeps], fontsize=8
    )
    ax.set_xlabel("what is swept, and the first token at which the prompts differ")
    ax.set_ylabel("time over ours")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return figure
