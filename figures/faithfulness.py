"""How much of three behaviours circuits of growing size keep, by how their edges were scored."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from figures.data import read

COLOURS = {"exact": "#000000", "receiver-exact": "#0072b2", "eap-ig": "#009e73", "eap": "#d55e00"}
STUDIES = {"ioi_mini": "ioi-mini", "stories": "stories260k", "vision": "vision transformer"}


def draw() -> Figure:
    """One panel a model, one line a method, random circuits in grey."""
    figure = Figure(figsize=(7.6, 3.0), layout="constrained")
    for ax, (name, title) in zip(figure.subplots(1, 3, sharey=True), STUDIES.items(), strict=True):
        record = read("path_interventions", "results", f"{name}.json")
        for method, colour in COLOURS.items():
            sizes, shares = _curve(record, method)
            ax.plot(100 * sizes, shares, color=colour, marker="o", markersize=3, linewidth=1.3, label=method)
        sizes, shares = _random(record)
        ax.plot(100 * sizes, shares, color="0.6", linewidth=1.3, linestyle="--", label="random edges")
        ax.axhline(1, color="0.8", linewidth=0.8, zorder=0)
        ax.set_xscale("log")
        ax.set_xticks([1, 10, 100], ["1", "10", "100"])
        ax.set_xlabel("edges kept (%)")
        ax.set_title(title, fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    first = figure.axes[0]
    first.set_ylabel("faithfulness")
    first.legend(frameon=False, fontsize=8, loc="center right")
    return figure


def _curve(record: dict[str, Any], method: str) -> tuple[np.ndarray, np.ndarray]:
    if "models" not in record:
        curve = record["methods"][method]["curves"]["greedy"]
        return np.array(curve["sizes"]), np.array(curve["faithfulness"])
    curves = [model["methods"][method]["curve"] for model in record["models"]]
    return np.array(curves[0]["sizes"]), np.mean([curve["faithfulness"] for curve in curves], axis=0)


def _random(record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    found = [model["random"] for model in record["models"]] if "models" in record else [record["random"]]
    return np.array(found[0]["sizes"]), np.mean([each["mean"] for each in found], axis=0)
