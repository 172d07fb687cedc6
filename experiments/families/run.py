"""Try every family with the conformance suite, and write down what it offers: in JSON, and as the README's table.

python -m experiments.families.run --out experiments/families/families.json --readme README.md
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import interp as ip
from experiments.families.models import FAMILIES, Family
from experiments.tables import written
from interp.checks import Check, Conformance

COLUMNS = {"reads, edits": "sites", "`shared`": "shared", "decodes": "generation", "paths": "paths"}
"""What the table says of a family, and what of the report that is."""


def tried(family: Family, name: str) -> dict[str, Any]:
    """What the suite says of a family."""
    start = time.perf_counter()
    torch.manual_seed(0)
    model = ip.wrap(family.make())
    report = ip.conformance(model)
    parts = {"sites": _sites(model, report), "shared": _of(report, "executors", "shared"),
             "generation": _of(report, "generation"), "paths": _of(report, "paths")}  # fmt: skip
    return {"family": name, "class": type(model.module).__name__, "by": family.by, "passed": report.passed,
            "checks": len(report.checks), "seconds": round(time.perf_counter() - start, 1),
            "failed": [str(check) for check in report.checks if check.passed is False], **parts}  # fmt: skip


def _sites(model: ip.Model, report: Conformance) -> dict[str, str]:
    """All sites, or what is missing and why, of which nobody would expect it."""
    lacking = {check.name: check.detail for check in report.of("sites") if check.passed is None}
    if any(s.name == "router" for s in model.sites()):
        lacking = {name: why for name, why in lacking.items() if name not in ("mlp_pre", "mlp_post")}
    if not lacking:
        return {"answer": "yes", "reason": ""}
    return {"answer": f"all but {', '.join(lacking)}", "reason": "; ".join(dict.fromkeys(lacking.values()))}


def _of(report: Conformance, group: str, name: str | None = None) -> dict[str, str]:
    checks: Sequence[Check] = [c for c in report.of(group) if name is None or c.name == name]
    told = next((check for check in checks if check.passed is not True), None)
    if told is None:
        return {"answer": "yes", "reason": ""}
    return {"answer": "no" if told.passed is None else "FAILS", "reason": told.detail}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table, with the reasons below it."""
    notes: dict[str, int] = {}
    lines = [f"| family | known by | {' | '.join(COLUMNS)} |", "| --- | --- |" + " --- |" * len(COLUMNS)]
    for row in rows:
        cells = []
        for key in COLUMNS.values():
            reason = _short(row[key]["reason"])
            mark = f" ({notes.setdefault(reason, len(notes) + 1)})" if reason else ""
            cells.append(row[key]["answer"] + mark)
        lines.append(f"| {row['family']} | {row['by']} | {' | '.join(cells)} |")
    told = [f"{number}. {reason[0].upper()}{reason[1:]}." for reason, number in notes.items()]
    return "\n".join([*lines, "", *told])


def _short(reason: str) -> str:
    """A reason without its numbers."""
    return re.sub(r" \(it differs by [^)]*\)", "", reason).rstrip(".")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where the results go")
    parser.add_argument("--readme", type=Path, help="a README whose table is made anew, of what --out holds")
    parser.add_argument(
        "--only", nargs="*", choices=list(FAMILIES), help="these families alone; of the others, what --out holds stays"
    )
    given = parser.parse_args(arguments)
    rows: dict[str, dict[str, Any]] = {}
    if given.only and given.out is not None and given.out.exists():
        rows = {row["family"]: row for row in json.loads(given.out.read_text(encoding="utf-8"))["families"]}
    for name in given.only or FAMILIES:
        row = rows[name] = tried(FAMILIES[name], name)
        print(f"{name}: {'conforms' if row['passed'] else 'DOES NOT CONFORM'}, {row['seconds']} s", flush=True)
        print("\n".join(row["failed"]), end="\n" if row["failed"] else "", flush=True)
    if given.out is not None:
        given.out.write_text(
            json.dumps({"families": [rows[name] for name in FAMILIES if name in rows]}, indent=1) + "\n",
            encoding="utf-8",
        )
    if given.readme is not None and given.out is not None:
        written(given.out, given.readme, lambda record: markdown(record["families"]))


if __name__ == "__main__":
    main()
