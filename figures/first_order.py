"""How far a first-order estimate is from the exact effect."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from figures.data import result


def draw() -> Figure:
    """Attribution patching against exact patching, one point a cell, for the residual stream and the heads."""
    figure = Figure(figsize=(6.0, 3.0), layout="constrained")
    for ax, name, title in zip(figure.subplots(1, 2), ("residual", "heads"), ("resid_pre", "z of a head"), strict=True):
        exact, guess = (np.ravel(result(n).normalized()) for n in (name, f"{name}_first_order"))
        low, high = min(exact.min(), guess.min()), max(exact.max(), guess.max())
        ax.plot([low, high], [low, high], color="0.6", linewidth=1, zorder=0)
        ax.scatter(exact, guess, s=14, color="#2166ac", alpha=0.7, linewidths=0)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("exact effect (normalized)")
        ax.set_ylabel("first-order estimate")
    return figure
