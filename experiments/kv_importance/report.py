"""The tables of the README, from the results: ``python -m experiments.kv_importance.report``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments.kv_importance.run import RESULTS
from experiments.kv_importance.task import ARMS
from experiments.tables import table, written

README = Path(__file__).with_name("README.md")


def recall(seeds: list[dict[str, Any]]) -> str:
    """Marked recall: what is right at a tenth of the keys, and the agreement of every policy, means of seeds."""
    setting, trained = seeds[0]["setting"], [model for one in seeds for model in one["models"]]
    right = ", ".join(f"{100 * model['accuracy']:.1f}" for model in trained)
    seconds = ", ".join(f"{model['seconds']:.0f}" for model in trained)
    told = (
        f"{len(seeds)} seeds, {setting['rows']} contexts an arm and seed; heads trained for {setting['head_steps']} "
        f"steps on {setting['label_rows']} contexts. From the full cache the models answer {right} % of 500 questions, "
        f"after {seconds} seconds of training."
    )
    lines = [{(r["policy"], r["budget"]): r for r in arm["table"]} for one in seeds for arm in one["arms"].values()]
    names = [name for name, budget in lines[0] if budget == 0.1 and not name.startswith("inverted ")]
    order = {name: -np.mean([line[name, 0.1]["accuracy"] for line in lines]) for name in names}

    def cell(name: str, arm: str, what: str, budget: float, digits: int = 2) -> str:
        each = [
            next(r[what] for r in one["arms"][arm]["table"] if (r["policy"], r["budget"]) == (name, budget))
            for one in seeds
        ]
        spread = f" ({min(each):.{digits}f} to {max(each):.{digits}f})" if len(each) > 1 else ""
        return f"{np.mean(each):.{digits}f}{spread}"

    blocks = [told]
    for what, budget, said in (
        ("accuracy", 0.05, "Share of answers that are right, with 5 % of the keys (two of 48)"),
        ("accuracy", 0.1, "With 10 % (five of 48)"),
        ("regret", 0.1, "Regret with 10 %, in nats"),
    ):
        rows = [
            [name, *(cell(name, arm, what, budget) for arm in ARMS)] for name in sorted(names, key=order.__getitem__)
        ]
        blocks.append(f"{said}, in brackets the least and the most of a seed:\n\n{table(('policy', *ARMS), rows)}")
    rows = [
        [
            name,
            *(
                f"{np.mean([line[name, 0.1][what] for line in lines]):.2f}"
                for what in ("spearman", "per_head", "recall")
            ),
        ]
        for name in sorted(names, key=order.__getitem__)
    ]
    head = ("policy", "Spearman, all units", "within each head", "recall of the top tenth")
    blocks.append(f"Agreement with the exact effect, means of arms and seeds:\n\n{table(head, rows)}")
    blocks.append(_streams(seeds))
    return "\n\n".join(blocks)


def _streams(seeds: list[dict[str, Any]]) -> str:
    """Accuracy after prefill in chunks under a budget."""
    every = [row for one in seeds for row in one["streamed"]]
    budgets = sorted({row["budget"] for row in every})
    names = list(dict.fromkeys(row["policy"] for row in every))

    def mean(name: str, budget: int) -> float:
        return float(np.mean([r["accuracy"] for r in every if (r["policy"], r["budget"]) == (name, budget)]))

    names.sort(key=lambda name: -mean(name, budgets[1]))
    rows = [[name, *(f"{mean(name, budget):.2f}" for budget in budgets)] for name in names]
    head = ("policy", *(f"{budget} of 48 keys" for budget in budgets))
    chunk = seeds[0]["setting"]["chunk"]
    return f"Right answers after prefill in chunks of {chunk} tokens, all arms and seeds:\n\n{table(head, rows)}"


def text(found: dict[str, Any]) -> str:
    """A real text: the concentration of effects, the estimates, and every policy's agreement."""
    told = (
        f"`{found['model']}`: {found['units']:,} units, {found['seconds']:.0f} seconds; the strongest 1 % hold "
        f"{100 * found['share_of_top_1_percent']:.0f} % of all effect, and a perfect score could reach a rank "
        f"correlation of about {found['ceiling']:.2f} (between halves of the queries). Estimates of the sizes: "
        + "; ".join(
            f"{name}, Spearman {one['spearman']:.2f}, Pearson {one['pearson']:.2f}"
            for name, one in found["estimates"].items()
        )
        + "."
    )
    rows = [
        [one["policy"], *(f"{one[what]:.2f}" for what in ("spearman", "spearman_per_head", "recall_of_top_tenth"))]
        for one in sorted(found["policies"], key=lambda one: -one["spearman_per_head"])
    ]
    return f"{told}\n\n{table(('policy', 'Spearman, all units', 'within each head', 'recall of the top tenth'), rows)}"


def long(found: dict[str, Any]) -> str:
    """Memory and speed at a fixed budget."""
    head = ("tokens", "eviction", "keys kept", "peak, MB", "cache, MB", "tokens a second", "decoding, ms a token")
    rows = [
        [
            f"{row['tokens']:,}", "yes" if row["evicting"] else "no", f"{row['kept']:,}",
            f"{row['peak_megabytes']:.0f}", f"{row['cache_megabytes']:.1f}", f"{row['prefill_tokens_a_second']:,.0f}",
            f"{row['decoding_milliseconds']:.1f}",
        ]
        for row in found["rows"]
    ]  # fmt: skip
    return table(head, rows)


def main() -> None:
    """Write the tables of whatever results there are."""
    first, *_ = recalls = sorted(RESULTS.glob("marked_recall_*.json"))
    written(first, README, lambda _: recall([json.loads(path.read_text()) for path in recalls]))
    for of, pattern in ((text, "text_*.json"), (long, "long_*.json")):
        for path in sorted(RESULTS.glob(pattern)):
            written(path, README, of)


if __name__ == "__main__":
    main()
