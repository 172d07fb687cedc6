"""Which cached tokens cause the next words of a real text, and how policies' scores agree with that."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from figures.data import read
from interp import Axis
from interp.kv import KVEffects


def draw() -> Figure:
    """The text in the colours of its effects, and below it the agreement of policies."""
    record = read("kv_importance", "results", "text_stories.json")
    text = record["text"]
    count = text["context"]
    effects = KVEffects(
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
    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=(1.15, 1))
    effects.text(ax=upper)
    policies = sorted(record["policies"], key=lambda one: one["spearman_per_head"])
    names = [one["policy"] for one in policies]
    at = np.arange(len(names))
    lower.barh(at + 0.2, [one["spearman"] for one in policies], 0.38, color="#0072b2", label="all units pooled")
    lower.barh(
        at - 0.2, [one["spearman_per_head"] for one in policies], 0.38, color="#e69f00", label="within each head"
    )
    lower.set_yticks(at, names, fontsize=8)
    lower.axvline(0, color="black", lw=0.6)
    lower.set_xlabel(f"Spearman of the score with the exact effect of {record['units']:,} units (layer, head, token)")
    lower.legend(frameon=False, fontsize=8, loc="lower right")
    lower.spines[["top", "right"]].set_visible(False)
    return figure
