"""Where the difference between clean and corrupt prompts lies, by layer and position."""

from __future__ import annotations

from matplotlib.figure import Figure

from figures.data import result
from interp import plots


def draw() -> Figure:
    """A heatmap of the recovery by residual-stream patching in ioi-mini."""
    figure = Figure(figsize=(6.0, 3.0), layout="constrained")
    plots.heatmap(result("residual"), ax=figure.subplots())
    return figure
