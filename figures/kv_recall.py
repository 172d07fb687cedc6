"""What answers are left of marked recall when policies choose what a cache keeps, arm by arm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from figures.data import EXPERIMENTS, read

ARMS = {
    "before": "marked before",
    "unmarked": "unmarked",
    "after": "marked after",
    "question": "question first",
    "duplicated": "pair twice",
}
HEADS = {
    "heads, published label": "#56b4e9",
    "heads, both labels": "#009e73",
    "heads, interventional label": "#0072b2",
}
OTHERS = {
    "expected attention": "#d55e00", "KeyDiff": "#cc79a7", "H2O": "#e69f00", "attention x value x gradient": "#8c6d31",
    "TOVA": "#b2182b", "SnapKV": "#5e3c99", "StreamingLLM": "#1b7837", "key norm": "#999933", "random": "#888888",
    "leave-one-out": "#000000",
}  # fmt: skip


def draw() -> Figure:
    """Accuracy above, regret below; a line a policy, the mean of seeds, with bars from the least to the most."""
    folder = EXPERIMENTS / "kv_importance" / "results"
    seeds = [read(*Path(path).relative_to(EXPERIMENTS).parts) for path in sorted(folder.glob("marked_recall_*.json"))]
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    axes = figure.subplots(2, len(ARMS), sharex=True, sharey="row")
    for column, (arm, title) in enumerate(ARMS.items()):
        tables = [{(line["policy"], line["budget"]): line for line in seed["arms"][arm]["table"]} for seed in seeds]
        budgets = sorted({budget for _, budget in tables[0]})
        for row, what in enumerate(("accuracy", "regret")):
            ax = axes[row, column]
            for number, (name, colour) in enumerate((OTHERS | HEADS).items()):
                each = np.array([[table[name, budget][what] for budget in budgets] for table in tables])
                # Side by side, so that bars can be told apart.
                at = 100 * np.array(budgets) * 1.022 ** (number - 6)
                low, high, strong = each.min(0), each.max(0), name in HEADS
                middle = each.mean(0).clip(low, high)
                ax.errorbar(
                    at, middle, [middle - low, high - middle], color=colour, label=name,
                    lw=2 if strong else 0.9, elinewidth=0.6, marker="o" if strong else ".", ms=4 if strong else 3,
                    linestyle="--" if name in ("random", "leave-one-out") else "-", zorder=3 if strong else 2,
                )  # fmt: skip
            ax.set_xscale("log")
            ax.set_xticks([100 * budget for budget in budgets], [f"{100 * budget:g}" for budget in budgets])
            ax.minorticks_off()
            ax.spines[["top", "right"]].set_visible(False)
        axes[0, column].set_title(title, fontsize=10)
        axes[1, column].axhline(0, color="black", lw=0.6)
        axes[1, column].set_xlabel("kept keys, % of the context")
    axes[0, 0].set_ylabel("share of answers that are right")
    axes[1, 0].set_ylabel("regret in nats, to a greedy oracle")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure
