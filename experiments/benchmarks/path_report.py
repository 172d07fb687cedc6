"""The tables of a benchmark of edges."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.benchmarks.setting import SIZES, Setting
from experiments.benchmarks.work import edges_operations, prompt_operations
from experiments.tables import table, times, written

TARGETS = {("GPT-2 small", 0): 8, ("GPT-2 small", 8): 16}
"""How many times faster than the loop the sweep is to be, by model and tokens shared."""


def sweep_line(sweep: dict[str, Any]) -> str:
    """One sweep in a line."""
    return (
        f"{sweep['model']}, {sweep['edges']} edges, {sweep['shared']} tokens shared: {sweep['seconds']:.1f} s, "
        f"the loop {sweep['over_ours']:.1f} times as long; {sweep['forward_equivalents']:.0f} forwards"
    )


def score_line(scores: dict[str, Any]) -> str:
    """One method in a line."""
    return f"{scores['model']}, {scores['method']}: hooks {scores['over_ours']['ratio']:.1f} times as long"


def tables(record: dict[str, Any]) -> str:
    """All tables, in Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    where = record["machine"]["gpu"] or f"{record['machine']['cpu']}, {record['machine']['threads']} threads"
    parts = [
        f"Measured on {where}; {versions}; commit `{record['commit'][:12]}`; {record['took_seconds']:.0f} s in all.",
        _sweeps(record),
        _scores(record),
    ]
    if record["memory"]:
        rows = [[side, f"{size / 2**20:.0f}"] for side, size in record["memory"].items()]
        parts += ["Memory at most beyond the loaded GPT-2-small-sized model, in MiB:", table(["side", "MiB"], rows)]
    return "\n\n".join(parts)


def _sweeps(record: dict[str, Any]) -> str:
    head = [
        "model",
        "tokens shared",
        "edges",
        "ours",
        "loop",
        "times ours",
        "target",
        "forwards",
        "counted",
        "largest difference",
    ]
    rows = []
    for s in record["sweeps"]:
        key, setting = (s["model"], s["shared"]), replace(Setting(), **SIZES[s["model"]])
        star = "" if s["sampled"] == s["edges"] else "*"
        rows.append(
            [
                s["model"],
                f"{s['shared']} of {s['tokens']}",
                s["edges"],
                f"{s['seconds']:.1f} s",
                f"{statistics.mean(s['loop_seconds']):.0f} s{star}",
                f"{s['over_ours']:.1f}",
                f"≥ {TARGETS[key]}" if key in TARGETS else "",
                f"{s['forward_equivalents']:.0f}",
                f"{edges_operations(setting, s['tokens'], s['shared']) / prompt_operations(setting, s['tokens']):.0f}",
                f"{s['largest_difference']:.1e} of {s['largest_effect']:.2g}",
            ]
        )
    return table(head, rows) + f"\n\n\\* extrapolated from {record['sample']} edges drawn at random."


def _scores(record: dict[str, Any]) -> str:
    head = ["model", "method", "edges", "hooks' time over ours", "largest difference"]
    rows = [
        [
            s["model"],
            s["method"],
            s["edges"],
            times(s["over_ours"]),
            f"{s['largest_difference']:.1e} of {s['largest_score']:.2g}",
        ]
        for s in record["scores"]
    ]
    return table(head, rows)


def write_readme(path: Path, readme: Path) -> None:
    """Put the tables of a record between the README's markers for its file."""
    written(path, readme, tables)
