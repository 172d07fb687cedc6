"""Which heads carry the answer, with intervals, and what the strongest attends to."""

from __future__ import annotations

from matplotlib.figure import Figure

from figures.data import read, result
from interp import plots


def draw() -> Figure:
    """Heads of ioi-mini by effect, beside the mean pattern of the strongest."""
    pattern = read("patching_ioi_mini", "results", "report.json")["pattern"]
    figure = Figure(figsize=(7.0, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    plots.ranked(result("heads"), k=12, ax=left)
    plots.attention(pattern["mean_over_pairs"], pattern["tokens"], ax=right, title=pattern["site"])
    return figure
