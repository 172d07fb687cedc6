"""The circuit of the indirect object in ioi-mini."""

from __future__ import annotations

from matplotlib.figure import Figure

from figures.data import EXPERIMENTS
from interp.paths import Circuit


def draw() -> Figure:
    """The circuit at 5 % of the edges, by exact effect of noising."""
    circuit = Circuit.load(EXPERIMENTS / "path_interventions" / "results" / "ioi_mini_circuit")
    return circuit.figure(title=f"ioi-mini: {len(circuit)} of {len(circuit.graph)} edges")
