"""What a run on a GPU found, as lines while it runs and as tables for the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.tables import table, times, written


def line(row: dict[str, Any]) -> str:
    """One measurement in a line."""
    parts = [row["what"]]
    if "counts" in row:
        parts.append(", ".join(f"{number} {name}" for name, number in row["counts"].items()) or "none")
    if row["what"] == "peaks":
        parts += [f"{name} {value:.2f} T" for name, value in row.items() if name != "what"]
    if "seconds" in row:
        parts.append(f"{row['dtype']} {_time(row['seconds'])}{' ' * bool(row.get('unit'))}{row.get('unit', '')}")
    parts += [f"{name} {over:.2f} times as long" for name, over in row.get("times_ours", {}).items()]
    if "over_bare" in row:
        parts.append(f"{row['over_bare']['ratio']:.3f} of bare")
    if "percent_of_peak" in row:
        parts.append(f"{row['percent_of_peak']:.2g} % of peak")
    if "difference" in row:
        parts.append(f"off by {row['difference']:.1e} of {row['of']:.2g}")
    if "peak_bytes" in row:
        parts.append(f"{row['peak_bytes'] / 2**20:.0f} MiB")
    return "; ".join(parts)


def part_line(name: str, found: dict[str, Any]) -> str:
    """How a part ended."""
    why = f": {found['error']}" if "error" in found else ""
    return f"{found['seconds']:4.0f} s  {name} {found['status']}{why}"


def tables(record: dict[str, Any]) -> str:
    """All tables, in Markdown."""
    card, parts = record["card"], record["parts"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    driver = f", driver {card['driver']}, CUDA {card['cuda']}" if card.get("driver") else ""
    text = [
        f"Measured on {card['name']}{driver}; {versions}; commit `{record['commit'][:12]}`; "
        f"{record['took_seconds']:.0f} s in all." + (" A quick run: times mean nothing." if record["quick"] else "")
    ]
    if record["skipped"]:
        text.append("Left out: " + "; ".join(f"{what} ({name})" for name, what in record["skipped"].items()) + ".")
    ended = [f"{name} ({found['status']})" for name, found in parts.items() if found["status"] != "done"]
    if ended:
        text.append(f"Not complete: {', '.join(ended)}.")
    text += [_peaks(card, row) for row in parts.get("peaks", {}).get("rows", [])]
    for row in parts.get("tests", {}).get("rows", []):
        text.append("Tests marked `gpu`: " + ", ".join(f"{n} {name}" for name, n in row["counts"].items()) + ".")
    rows = {name: found["rows"] for name, found in parts.items() if name not in ("peaks", "tests")}
    timed = [row for each in rows.values() for row in each if "over_bare" not in row]
    loops = [row for each in rows.values() for row in each if "over_bare" in row]
    if timed:
        text.append(_timed(timed))
    if loops:
        text.append("Time over the bare model's, or over the bare training loop's:\n\n" + _over(loops))
    return "\n\n".join(text)


def write_readme(path: Path, readme: Path) -> None:
    """Put the tables of a record between the README's markers for its file."""
    written(path, readme, tables)


def _peaks(card: dict[str, Any], found: dict[str, float]) -> str:
    nominal = card["nominal"] or {}
    names = [name for name in found if name not in ("what", "seconds")]
    rows = []
    for name in names:
        unit = "TB/s" if name == "bandwidth" else "TFLOP/s"
        said = f"{nominal[name]:g} {unit}" if name in nominal else ""
        share = f"{100 * found[name] / nominal[name]:.0f} %" if name in nominal else ""
        rows.append([name, f"{found[name]:.3g} {unit}", said, share])
    return table(["peak", "measured", "data sheet", "of it"], rows)


def _timed(rows: list[dict[str, Any]]) -> str:
    head = ["what", "dtype", "ours", "others, times ours", "largest difference", "of peak", "memory"]
    lines = []
    for row in rows:
        others = ", ".join(f"{name} {over:.1f}" for name, over in row.get("times_ours", {}).items())
        share = f"{row['percent_of_peak']:.2g} %" if "percent_of_peak" in row else ""
        memory = f"{row['peak_bytes'] / 2**20:.0f} MiB" if "peak_bytes" in row else ""
        off = f"{row['difference']:.1e} of {row['of']:.2g}"
        lines.append([row["what"], row["dtype"], _time(row["seconds"]), others, off, share, memory])
    return table(head, lines)


def _over(rows: list[dict[str, Any]]) -> str:
    lines = [
        [row["what"], row["dtype"], _time(row["seconds"]), times(row["over_bare"], digits=2),
         f"{row['percent_of_peak']:.2g} %" if "percent_of_peak" in row else ""]
        for row in rows
    ]  # fmt: skip
    return table(["what", "dtype", "time", "over bare", "of peak"], lines)


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"
