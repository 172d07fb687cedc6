"""Marked recall: what each policy keeps is worth, arm by arm."""

from __future__ import annotations

from matplotlib.figure import Figure

from figures.data import read

ARMS = {"before": "marker before the pair", "unmarked": "no marker", "after": "marker after the pair",
        "question": "question first", "duplicated": "pair stands twice"}  # fmt: skip
SHOWN = {
    "heads, interventional label": ("#d55e00", "-"), "heads, published label": ("#0072b2", "-"),
    "SnapKV": ("#009e73", "-"), "H2O": ("#cc79a7", "-"), "TOVA": ("#56b4e9", "-"), "key norm": ("#e69f00", "-"),
    "StreamingLLM": ("#8c6d31", "-"), "leave-one-out": ("black", "--"), "random": ("0.6", "--"),
}  # fmt: skip


def draw() -> Figure:
    """Regret against budget in each arm, mean over rows and seeds, one dot a seed."""
    record = read("kv_importance", "results", "marked_recall.json")
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    rows = figure.subplots(2, len(ARMS), sharex=True, sharey="row")
    for column, (arm, title) in enumerate(ARMS.items()):
        table = record["arms"][arm]["table"]
        for name, (colour, style) in SHOWN.items():
            mine = sorted((line for line in table if line["policy"] == name), key=lambda line: line["budget"])
            budgets = [100 * line["budget"] for line in mine]
            for ax, what in zip(rows[:, column], ("accuracy", "regret"), strict=True):
                ax.plot(budgets, [line[what] for line in mine], color=colour, linestyle=style, lw=1.3, label=name)
                for line, budget in zip(mine, budgets, strict=True):
                    each = line[f"{what}_by_seed"]
                    ax.plot([budget] * len(each), each, ".", color=colour, ms=3)
        rows[0, column].set_title(title, fontsize=9)
        rows[1, column].set_xlabel("kept keys, %")
        rows[1, column].axhline(0, color="black", lw=0.5)
    for ax in rows.flat:
        ax.set_xscale("log")
        ax.set_xticks([5, 10, 20, 50], ["5", "10", "20", "50"])
        ax.minorticks_off()
        ax.spines[["top", "right"]].set_visible(False)
    rows[0, 0].set_ylabel("answers that are right")
    rows[1, 0].set_ylabel("regret (NLL above the\ngreedy oracle's)")
    handles, labels = rows[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure
