"""How many times faster than one forward pass a cell."""

from __future__ import annotations

import statistics

from matplotlib.figure import Figure

from figures.data import read

_LABELS = {"resid_pre": "resid_pre", "z": "heads"}


def draw() -> Figure:
    """Ratios of a sweep's time to ours, for TransformerLens and a plain hook loop, from the committed benchmark."""
    record = read("benchmarks", "patching.json")
    sweeps = record["sweeps"]
    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    ax = figure.subplots()
    for shift, ((side, name), colour) in enumerate(((("transformer_lens", "TransformerLens"), "#b2182b"), (("hook_loop", "hook loop"), "#2166ac"))):
        ratios = [[t / o for t, o in zip(s["seconds"][side], s["seconds"]["ours"], strict=True)] for s in sweeps]
        at = [i + 0.38 * shift - 0.19 for i in range(len(sweeps))]
        middle = [statistics.median(r) for r in ratios]
        ax.bar(at, middle, width=0.36, color=colour, label=name)
        for x, r in zip(at, ratios, strict=True):
            ax.vlines(x, min(r), max(r), color="black", linewidth=1)
            ax.text(x, max(r), f"{statistics.median(r):.1f}", ha="center", va="bottom", fontsize=7)
    names = [f"{_LABELS[s['site']]}\n{s['tokens']} tokens\n{s['shared']} shared" for s in sweeps]
    ax.set_xticks(range(len(sweeps)), names, fontsize=7)
    ax.set_ylabel("times the time of interp")
    ax.axhline(1, color="0.5", linewidth=0.8)
    ax.legend(frameon=False, fontsize=8)
    ax.margins(y=0.12)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return figure
