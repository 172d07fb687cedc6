"""What the study found, in numbers: one column a setting that was run.

python -m experiments.induction_formation.report                  # print the table
python -m experiments.induction_formation.report --write-readme   # and put it into README.md
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
ORDER = ("full", "short", "quick")
Record = dict[str, Any]


def committed() -> dict[str, Record]:
    """The results that there are, by the name of their setting."""
    paths = {name: HERE / "results" / f"{name}.json" for name in ORDER}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def measured(record: Record) -> dict[str, str]:
    """Every statement of the README, by what it is about."""
    free, end, treated = record["free"], record["end"], record["clamped"]
    only, without, strengths = (np.ravel(end[name]) for name in ("only", "without", "strengths"))
    isolated = {kind.split(":")[0]: kind for kind in dict.fromkeys(size["kind"] for size in record["sizes"])}
    found = {
        "setting": "learning rate {rate:g}, {steps:,} steps, {seeds} seeds".format(**record["setting"]),
        "members, time": f"{record['members']}, in {record['seconds'] / 60:.0f} minutes",
        "normal training: phase change": spread(free["phase_change"]),
        "steps from 0.9 to 0.7 nats, and from 0.5 to 0.3": " and ".join(
            _between(record, free["loss"], *ends) for ends in ((0.9, 0.7), (0.5, 0.3))
        ),
        "heads' mean strength at a half, one and one and a half times the phase change": _strengths(record),
        "accuracy without layer 1's direct path; without layer 1": f"{extent(end['direct_path_ablated'])}; "
        f"{extent(end['first_layer_ablated'])}",
        "one head alone: correlation of accuracy with strength": f"{np.corrcoef(strengths, only)[0, 1]:.2f} "
        f"({len(only)} heads)",
        "one head removed: accuracy lost, at most": f"{np.max(np.repeat(end['whole'], 8) - without):.3f}",
        "trained with one head: phase change, of each": _alone(record),
    }
    for name, each in treated.items():
        found[f"treatment {name}: phase change"] = spread(each["phase_change"])
    found["treatments: steps from 0.9 to 0.7 nats"] = ", ".join(
        f"{name} {_between(record, each['loss'], 0.9, 0.7)}" for name, each in treated.items()
    )
    found["the toy: steps to a tenth of the loss"] = ", ".join(
        f"{name} {_tenth(record['toy'], each)}" for name, each in record["toy"]["loss"].items()
    )
    for axis, fixed, base in (("classes", "labels", 5), ("labels", "classes", 50)):
        for short, kind in isolated.items():
            sizes = [size for size in record["sizes"] if size["kind"] == kind and size[fixed] == base]
            steps = ", ".join(_middle(size["phase_change"]) for size in sizes)
            found[f"{', '.join(str(size[axis]) for size in sizes)} {axis}, {short}: phase change"] = steps
    last = free["splits"][-1]
    found["accuracy on held-out label pairs; on held-out classes, among the labels in context"] = (
        f"{np.mean(last['labels']['accuracy']):.2f}; {np.mean(last['classes']['context_accuracy']):.2f}"
    )
    found["progress measures, first and last loss in nats"] = ", ".join(
        f"{name} {np.mean(each[0]):.1f} to {np.mean(each[-1]):.2f}" for name, each in record["progress"].items()
    )
    return found


def spread(steps: Sequence[int | None]) -> str:
    """Median and range of steps; how many did not get there."""
    reached = [step for step in steps if step is not None]
    if not reached:
        return "none"
    missing = len(steps) - len(reached)
    return f"{_middle(steps)} ({min(reached):,} to {max(reached):,})" + (f", {missing} not" if missing else "")


def extent(values: Sequence[float]) -> str:
    """Smallest and largest, or the one that all are."""
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} to {high}"


def _middle(steps: Sequence[int | None]) -> str:
    return f"{np.median([np.inf if step is None else step for step in steps]):,.0f}"


def _between(record: Record, losses: Sequence[Sequence[float]], high: float, low: float) -> str:
    """Steps that the mean loss of the seeds takes from one value down to another."""
    mean = np.mean(losses, 0)
    if not (mean <= low).any():
        return "not reached"
    at = [record["steps_at"][int(np.argmax(mean <= value))] for value in (high, low)]
    return f"{at[1] - at[0]:,}"


def _strengths(record: Record) -> str:
    change = np.median([step or np.inf for step in record["free"]["phase_change"]])
    at = np.array(record["steps_at"]) - record["setting"]["every"]  # strengths are measured before a line's steps
    means = np.array(record["free"]["strengths"]).mean((1, 2))
    return ", ".join(f"{means[int(np.argmin(np.abs(at - share * change)))]:.2f}" for share in (0.5, 1, 1.5))


def _alone(record: Record) -> str:
    steps = [step for each in record["alone"] for step in each["phase_change"]]
    first = [each["phase_change"][0] for each in record["alone"]]
    return f"{spread(steps)}; {spread(first)} for the heads of seed 0"


def _tenth(toy: Record, losses: Sequence[Sequence[float]]) -> str:
    mean = np.mean(losses, 0)
    return f"{int(np.argmax(mean <= 0.1 * mean[0])) * toy['every']}"


def table(records: dict[str, Record]) -> str:
    """The columns side by side, in Markdown."""
    columns = {name: measured(record) for name, record in records.items()}
    head = f"| | {' | '.join(f'`{name}`' for name in columns)} |\n|---|{'---|' * len(columns)}\n"
    rows = [[what, *(column[what] for column in columns.values())] for what in next(iter(columns.values()))]
    return head + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table of all settings that were run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write-readme", action="store_true", help="put the table into README.md")
    args = parser.parse_args(argv)
    text = table(committed())
    print(text)
    if args.write_readme:
        readme = HERE / "README.md"
        begin, end = "<!-- begin results -->", "<!-- end results -->"
        block = f"{begin}\n\n{text}\n\n{end}"
        readme.write_text(re.sub(f"{begin}.*?{end}", lambda _: block, readme.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
