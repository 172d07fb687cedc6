"""Which cached tokens cause the next words of a real text, and how policies' scores agree with that."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures.data import EXPERIMENTS, read
from interp import Axis
from interp.kv import KVEffects


def draw() -> Figure:
    """For each text that was measured: the text in the colours of its effects, and the agreement of policies."""
    paths = sorted((EXPERIMENTS / "kv_importance" / "results").glob("text_*.json"), reverse=True)
    records = [read(*path.relative_to(EXPERIMENTS).parts) for path in paths]
    figure = Figure(figsize=(9.5, 4.6 * len(records)), layout="constrained")
    axes = figure.subplots(2 * len(records), 1, height_ratios=(1.15, 1) * len(records))
    for number, record in enumerate(records):
        _effects(record).text(ax=axes[2 * number])
        if len(records) > 1:
            axes[2 * number].set_title(record["model"], fontsize=9, loc="left")
        _agreement(record, axes[2 * number + 1], legend=number == 0)
    return figure


def _effects(record: dict[str, Any]) -> KVEffects:
    """The effects of a text's tokens."""
    text = record["text"]
    count = text["context"]
    return KVEffects(
        effect=np.array(text["token_effects"])[:, None],
        axes=(Axis("token", tuple(range(count))),),
        metrics=("nll",),
        several=False,
        base=[record["base_nll"]],
        source=None,
        status=np.zeros(count, int),
        noise_floor=record["noise_floor"],
        rows=("text",),
        config={"tokens": [text["tokens"]], "context": [count]},
    )


def _agreement(record: dict[str, Any], ax: Axes, legend: bool) -> None:
    """Bars of every policy's rank correlation with the exact effects."""
    policies = sorted(record["policies"], key=lambda one: one["spearman_per_head"])
    at = np.arange(len(policies))
    for offset, what, colour, label in (
        (0.2, "spearman", "#0072b2", "all units pooled"),
        (-0.2, "spearman_per_head", "#e69f00", "within each head"),
    ):
        ax.barh(at + offset, [one[what] for one in policies], 0.38, color=colour, label=label)
    ax.set_yticks(at, [one["policy"] for one in policies], fontsize=8)
    ax.axvline(0, color="black", lw=0.6)
    ax.set_xlabel(f"Spearman of the score with the exact effect of {record['units']:,} units (layer, head, token)")
    if legend:
        ax.legend(frameon=False, fontsize=8, loc="lower right")
    ax.spines[["top", "right"]].set_visible(False)
