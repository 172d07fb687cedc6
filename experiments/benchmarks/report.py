"""The tables of a benchmark's record, for a terminal and for the README."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from experiments.tables import table, times, written

TARGETS = {
    ("resid_pre", 16, 0): 12,
    ("resid_pre", 16, 3): 12,
    ("z", 16, 0): 7,
    ("z", 16, 3): 9,
    ("resid_pre", 64, 0): 5,
    ("resid_pre", 64, 3): 5,
    ("z", 64, 0): 2,
    ("z", 64, 3): 2,
}
"""How many times faster than TransformerLens a sweep is to be, by site, tokens and tokens that the prompts share."""
FORWARD_TARGET, DIFFERENCE_TARGET = 1.10, 1e-4
NAMES = {"resid_pre": "`resid_pre`", "z": "heads (`z`)"}


def sweep_line(sweep: dict[str, Any]) -> str:
    """One sweep in a line, while the rest is running."""
    times = {name: statistics.median(each) for name, each in sweep["seconds"].items()}
    return f"{_which(sweep)}: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in times.items())


def forward_line(forward: dict[str, Any]) -> str:
    """One size of forward passes in a line, while the rest is running."""
    ratios = ", ".join(f"{name} {found['ratio']:.3f}" for name, found in forward["over_bare"].items())
    return f"forward pass, {forward['batch']} × {forward['tokens']} tokens, over bare: {ratios}"


def tables(record: dict[str, Any]) -> str:
    """All tables, in Markdown."""
    setting, machine = record["setting"], record["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    rates = [sweep["operations"] / sweep["bound_seconds"] / 1e9 for sweep in record["sweeps"]]
    sized = f"{setting['layers']} layers, {setting['heads']} heads, width {setting['width']}"
    parts = [
        f"Measured on {where}; {versions}; commit `{record['commit'][:12]}`; {record['took_seconds']:.0f} s in all.",
        f"Model: {sized}, float32." + (" A quick run: targets do not apply." if setting["quick"] else ""),
        _speed(record),
        f"Largest absolute differences of effects (target: under {DIFFERENCE_TARGET:g}). Work is in forward passes; "
        "the bound is the time that bare matrix products take for it, "
        f"{statistics.median(rates):.0f} GFLOP/s in the median:",
        _agreement(record),
        "Inside attention (targets: key knock-outs at most 1.5 of their bound, patterns 1.2 of `z`, spans 0.70 of a "
        "forward pass each):",
        _inside(record),
        "Memory that a sweep takes at most beyond the loaded model, in MiB:",
        _memory(record),
        f"Forward passes, time over the bare model's (target: at most {FORWARD_TARGET:.2f}):",
        _forwards(record),
    ]
    return "\n\n".join(parts)


def write_readme(path: Path, readme: Path) -> None:
    """Put the tables of a record between the README's markers for its file, at the end where there are none yet."""
    written(path, readme, tables)


def _which(sweep: dict[str, Any]) -> str:
    return f"{NAMES[sweep['site']]}, {sweep['tokens']} tokens, from token {sweep['shared'] + 1}"


def _speed(record: dict[str, Any]) -> str:
    head = ["sweep", "cells", "ours", "`batched`", "TransformerLens", "times ours", "target", "hook loop", "times ours"]
    rows = []
    for sweep in record["sweeps"]:
        seconds = {name: f"{statistics.median(each):.2f} s" for name, each in sweep["seconds"].items()}
        others = {name: seconds[name] + ("*" if sweep["sampled"] else "") for name in ("transformer_lens", "hook_loop")}
        target = TARGETS.get((sweep["site"], sweep["tokens"], sweep["shared"]))
        rows.append(
            [
                _which(sweep),
                sweep["cells"],
                seconds["ours"],
                seconds.get("batched", ""),
                others["transformer_lens"],
                times(sweep["over_ours"]["transformer_lens"]),
                "" if target is None or record["setting"]["quick"] else f"≥ {target}",
                others["hook_loop"],
                times(sweep["over_ours"]["hook_loop"]),
            ]
        )
    note = f"\\* extrapolated from {record['setting']['sample']} cells. "
    return table(head, rows) + f"\n\n{note}In brackets: the smallest and the largest ratio of a repetition."


def _agreement(record: dict[str, Any]) -> str:
    head = [
        "sweep",
        "largest effect",
        "TransformerLens − ours",
        "loop − ours",
        "work",
        "of cells",
        "bound",
        "ours / bound",
    ]
    rows = [
        [
            _which(sweep),
            f"{sweep['largest_effect']:.3g}",
            f"{sweep['largest_difference']['transformer_lens']:.1e}",
            f"{sweep['largest_difference']['hook_loop']:.1e}",
            f"{sweep['forwards']:.1f}",
            sweep["cells"],
            f"{sweep['bound_seconds']:.2f} s",
            times(sweep["over_bound"], digits=2),
        ]
        for sweep in record["sweeps"]
    ]
    return table(head, rows)


def _inside(record: dict[str, Any]) -> str:
    rows = []
    for row in record.get("inside", []):
        if "over_bound" in row:
            found = f"{times(row['over_bound'], digits=2)} of the bound, {row['bound_seconds']:.2f} s"
        elif "over_z" in row:
            found = f"{times(row['over_z'], digits=2)} of the sweep of `z`"
        else:
            each = row["forwards_a_span"]
            found = (
                f"{times(each['ours'], digits=2)} of a forward pass a span, a loop with 4-D masks "
                f"{times(each['loop'], digits=2)}; "
                + ", ".join(f"{name} {bytes_ / 2**20:.0f} MiB" for name, bytes_ in row["memory"].items())
            )
        off = f"{row['largest_difference']:.1e} of {row['largest_effect']:.2g}"
        rows.append([f"{row['what']}, {row['tokens']} tokens", row["cells"], found, off])
    return table(["sweep", "worlds", "time", "largest difference from the model itself"], rows)


def _memory(record: dict[str, Any]) -> str:
    found: dict[tuple[str, int], dict[str, float]] = {}
    for row in record["memory"]:
        found.setdefault((row["site"], row["tokens"]), {})[row["side"]] = row["bytes"] / 2**20
    rows = [
        [f"{NAMES[site]}, {tokens} tokens", *(f"{sides[s]:.0f}" for s in ("ours", "transformer_lens", "hook_loop"))]
        for (site, tokens), sides in found.items()
    ]
    return table(["sweep", "ours", "TransformerLens", "hook loop"], rows)


def _forwards(record: dict[str, Any]) -> str:
    sizes = record["forwards"]
    head = ["", *(f"{s['batch']} × {s['tokens']} tokens ({s['seconds']['bare'] * 1000:.1f} ms)" for s in sizes)]
    rows = []
    for name in sizes[0]["over_bare"]:
        cells = []
        for size in sizes:
            found = size["over_bare"][name]
            cells.append(f"{found['ratio']:.3f} ({found['lower_quartile']:.3f} to {found['upper_quartile']:.3f})")
        rows.append([name, *cells])
    return table(head, rows) + "\n\nIn brackets: the quartiles of the repetitions' ratios."
