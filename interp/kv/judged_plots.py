"""Judged policies as figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTROLS = ("random", "inverted")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#5e3c99", "#1b7837", "#b2182b")


def lines(table: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Accuracy and regret against budget, and agreement with the exact effect, of a table of `Judged`.

    Policies are named at the end of the figure, in the order of their agreement; inverted controls are left out of the
    lines and shown as bars alone.
    """
    from interp.canvas import figure_of

    names = sorted({line["policy"] for line in table}, key=lambda name: -_at(table, name, "spearman"))
    shown = [name for name in names if not name.startswith("inverted ")]
    colours = {name: COLOURS[i % len(COLOURS)] if name != "random" else "#888888" for i, name in enumerate(shown)}
    figure = figure_of(11, 3.6)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    for name in shown:
        mine = sorted((line for line in table if line["policy"] == name), key=lambda line: line["budget"])
        budgets = [100 * line["budget"] for line in mine]
        dashed = {"linestyle": "--"} if name == "random" else {}
        for ax, what in ((left, "accuracy"), (middle, "regret")):
            ax.plot(
                budgets,
                [line[what] for line in mine],
                marker="o",
                ms=3,
                lw=1.3,
                color=colours[name],
                label=name,
                **dashed,
            )
            if f"{what}_low" in mine[0]:
                ax.fill_between(
                    budgets, [line[f"{what}_low"] for line in mine], [line[f"{what}_high"] for line in mine],
                    color=colours[name], alpha=0.08, linewidth=0,
                )  # fmt: skip
    left.set_ylabel("share of answers that are right")
    middle.set_ylabel("regret: NLL above the greedy oracle's")
    middle.axhline(0, color="black", lw=0.6)
    for ax in (left, middle):
        ax.set_xlabel("kept keys, % of the context")
        ax.set_xscale("log")
        ticks = sorted({100 * line["budget"] for line in table})
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
    places = list(range(len(shown)))[::-1]
    for place, name in zip(places, shown, strict=True):
        value = _at(table, name, "spearman")
        low, high = _at(table, name, "spearman_low", value), _at(table, name, "spearman_high", value)
        right.barh(place, value, color=colours[name], height=0.7)
        right.plot([low, high], [place, place], color="black", lw=1)
    right.set_yticks(places, shown)
    right.axvline(0, color="black", lw=0.6)
    right.set_xlabel("Spearman with the exact effect")
    for ax in (left, middle, right):
        ax.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _at(table: Sequence[Mapping[str, Any]], name: str, what: str, default: float = 0.0) -> float:
    found = next((line.get(what) for line in table if line["policy"] == name), None)
    return default if found is None or found != found else float(found)
