"""What the study found, in numbers, each beside the reference's where there is one.

python -m experiments.induction_formation.report                  # print the tables
python -m experiments.induction_formation.report --write-readme   # and put them into README.md
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.induction_formation import toy
from experiments.induction_formation.records import (
    BATCH,
    PLATEAU,
    Found,
    Record,
    committed,
    crossings,
    find,
    one,
    trained,
)
from experiments.induction_formation.settings import FIGURES, ISOLATED, TREATMENTS
from experiments.tables import table

README = Path(__file__).parent / "README.md"
REFERENCE: dict[str, tuple[int, ...]] = {
    "all heads": (11_100,),
    "none": (12_250, 10_400),
    "previous token": (7_800, 6_750),
    "layer 1": (3_000, 3_190),
    "copy": (2_500, 2_060),
    "match": (2_060, 1_875),
    "layer 1 + copy": (870, 810),
}
"""Phase changes in updates, of the authors' code on zero-mean Gaussian vectors, two seeds (one with all heads)."""
CLOSE = 0.25
AXES = {"classes": [(50, 5), (100, 5), (200, 5)], "labels": [(50, 5), (50, 10), (50, 15)]}
"""The rows of figure 6, by what grows: numbers of classes and labels."""
PLATEAU_CLAMPS = ("layer 1 + copy", "match", "copy", "layer 1")


def trainings(records: dict[str, Record]) -> str:
    """What was run, beside what the paper ran."""
    rows = []
    for name, record in records.items():
        for figure in record["figures"]:
            members = {i for c in record["conditions"] if c["figure"] == figure for i in c["members"]}
            least, most = trained(record, figure)
            paper = FIGURES[figure].updates
            ours = figure.startswith("plateau")
            rows.append(
                [
                    figure,
                    f"`{name}`",
                    len(members),
                    both(least) if least == most else f"{both(least)} to {both(most)}",
                    "this study's own" if ours else both(paper),
                    _cut(record, figure) if record["reduced"] or least < record["figures"][figure]["asked"] else "",
                ]
            )
    head = ["figure", "training", "members", "updates (sequences)", "the paper's", "less than the paper's because"]
    return table(head, rows)


def phase_changes(records: dict[str, Record]) -> str:
    """Figure 5b: phase changes beside the reference's."""
    rows = []
    for name in ("all heads", *TREATMENTS):
        found = one(records, "3 and 4", name) if name == "all heads" else one(records, "5b", name)
        reference, middle = np.median(REFERENCE[name]), found.middle
        rows.append(
            [
                name if name != "none" else "none: one last-layer head",
                spread(found.changes),
                f"{BATCH * middle:,.0f}" if np.isfinite(middle) else "",
                " and ".join(f"{x:,}" for x in REFERENCE[name]),
                f"{100 * (middle / reference - 1):+.0f} %" if np.isfinite(middle) else "",
                "yes" if abs(middle / reference - 1) <= CLOSE else "no",
            ]
        )
    head = ["held", "phase change, updates", "sequences", "reference, updates", "off", f"within {CLOSE:.0%}"]
    return table(head, rows)


def sizes(records: dict[str, Record]) -> str:
    """Figure 6: median phase changes by number of classes and of labels."""
    rows = []
    for panel in ISOLATED:
        figure = "6" if ISOLATED[panel] == "none" else "6, clamped"
        by = {(f.classes, f.labels): f for f in find(records, figure, panel)}
        for axis, keys in AXES.items():
            cells = [middle(by[key]) if key in by else "not trained" for key in keys]
            growth = by[keys[-1]].middle / by[keys[0]].middle if keys[-1] in by else np.inf
            shown = ", ".join(str(key[axis == "labels"]) for key in keys)
            rows.append([panel, f"{shown} {axis}", *cells, f"{growth:.2f}" if np.isfinite(growth) else ""])
    earlier = {(s["classes"], s["labels"]): s["phase_change"] for s in records["free"].get("all_heads_by_size", ())}
    for axis, keys in AXES.items() if earlier else ():
        medians = [np.median([np.inf if c is None else c for c in earlier[key]]) for key in keys]
        shown = ", ".join(str(key[axis == "labels"]) for key in keys)
        cells = [f"{median:,.0f}" for median in medians]
        rows.append(["normal training, all heads kept", f"{shown} {axis}", *cells, f"{medians[-1] / medians[0]:.2f}"])
    return table(["panel", "sizes", "smallest", "middle", "largest", "largest / smallest"], rows)


def plateaus(records: dict[str, Record]) -> str:
    """How long the plateau is, and when members change, by the cosine between classes."""
    measured = {c: m for r in records.values() for c, m in r["exemplars"]["cosine"]}
    rows = []
    for found in sorted(find(records, "plateau"), key=lambda found: found.cosine):
        lengths = np.array(found.plateaus)
        clamped = {f.name: f for f in find(records, "plateau, clamped", cosine=found.cosine)}
        rows.append(
            [
                f"{found.cosine:g} ({abs(measured[found.cosine]):.2f})",
                *(
                    (
                        f"{np.median(lengths):,.0f} ({lengths.min():,.0f} to {lengths.max():,.0f})",
                        f"{BATCH * np.median(lengths):,.0f}",
                    )
                    if np.isfinite(lengths).all()
                    else ("not all left it", "")
                ),
                f"{np.median(crossings(found.at, found.loss, PLATEAU[0])):,.0f}",
                spread(found.changes),
                *(middle(clamped[name]) if name in clamped else "" for name in PLATEAU_CLAMPS),
            ]
        )
    high, low = PLATEAU
    head = [
        "cosine (measured)",
        f"plateau ({high} to {low} nats), updates",
        "sequences",
        f"begins (loss below {high})",
        "phase change",
        *(f"{name} held" for name in PLATEAU_CLAMPS),
    ]
    return table(head, rows)


def statements(records: dict[str, Record]) -> str:
    """All else that the README states."""
    record = records["free"]
    free, end, during = one(records, "3 and 4", "all heads"), record["end"], record["during"]
    only, without, strengths = (np.ravel(end[name]) for name in ("only", "without", "strengths"))
    alone = [one(records, "3 and 4", f"head {head}") for head in range(8)]
    last = during["splits"][-1]
    rows = [
        ["heads' mean strength at a half, one and one and a half times the phase change", _strengths(record, free)],
        [
            "accuracy without layer 1's direct path; without layer 1",
            f"{extent(end['direct_path_ablated'])}; {extent(end['first_layer_ablated'])}",
        ],
        [
            "one head alone: correlation of accuracy with strength",
            f"{np.corrcoef(strengths, only)[0, 1]:.2f} ({len(only)} heads)",
        ],
        ["one head removed: accuracy lost, at most", f"{np.max(np.repeat(end['whole'], 8) - without):.3f}"],
        ["trained with one head, each of the eight: phase change", spread([c for f in alone for c in f.changes])],
        ["updates from 0.9 to 0.7 nats", ", ".join(f"{name} {_fall(records, name)}" for name in TREATMENTS)],
        [
            "accuracy on held-out label pairs; on held-out classes, among the labels in context",
            f"{np.mean(last['labels']['accuracy']):.2f}; {np.mean(last['classes']['context_accuracy']):.2f}",
        ],
        ["the toy: steps to half of the plateau's height, median (range) of 10 seeds", _toy()],
    ]
    if "shared" in records:
        rows += [
            ["progress measures: updates until the loss under them is below 0.4 ln 2", _progress(records)],
            ["the one that fails, layer 1 + copy: first and last loss in nats", _failing(records["shared"])],
        ]
    return table(["", "found"], rows)


def both(updates: int) -> str:
    """Updates, and the sequences that they are."""
    return f"{updates:,} ({BATCH * updates:,})"


def spread(steps: Sequence[int | None]) -> str:
    """Median and range of steps; how many did not get there."""
    reached = [step for step in steps if step is not None]
    if not reached:
        return "none"
    missing = len(steps) - len(reached)
    median = np.median([np.inf if step is None else step for step in steps])
    shown = f"{median:,.0f}" if np.isfinite(median) else "none by half of them"
    return f"{shown} ({min(reached):,} to {max(reached):,})" + (f", {missing} not" if missing else "")


def extent(values: Sequence[float]) -> str:
    """Smallest and largest, or the one that all are."""
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} to {high}"


def middle(found: Found) -> str:
    """The median phase change, or that it lies beyond what was trained."""
    return f"{found.middle:,.0f}" if np.isfinite(found.middle) else f"> {found.at[-1]:,}"


def _cut(record: Record, figure: str) -> str:
    members = {i for c in record["conditions"] if c["figure"] == figure for i in c["members"]}
    changed = [record["members"][i]["phase_change"] for i in members]
    if record["reduced"]:
        return "a reduced setting"
    if FIGURES[figure].change_only and None not in changed:
        return "every member had changed, the last at " + f"{max(changed):,}"
    return "time"


def _fall(records: dict[str, Record], name: str) -> str:
    found = one(records, "5b", name)
    mean = found.loss.mean(0, keepdims=True)
    high, low = (crossings(found.at, mean, level)[0] for level in (0.9, 0.7))
    return f"{low - high:,.0f}" if np.isfinite(low) else "not reached"


def _strengths(record: Record, free: Found) -> str:
    at = np.array(record["updates_at"]) - record["setting"]["every"]  # strengths are measured before a line's updates
    means = np.array(record["during"]["strengths"]).mean((1, 2))
    return ", ".join(f"{means[int(np.argmin(np.abs(at - share * free.middle)))]:.2f}" for share in (0.5, 1, 1.5))


def progress_curves(record: Record) -> dict[str, np.ndarray]:
    """Losses [members, n] of the networks with one head that hold nothing, evaluated under each treatment.

    Under "previous token", the head that attends so is the one that does it most when training ends.
    """
    during = record["during"]
    curves = {
        name: np.array([line[name] for line in during["progress"]]).T
        for name in during["progress"][0]
        if name != "previous token"
    }
    each = np.array([line["previous token"] for line in during["progress"]])
    heads = np.array(during["previous_single"][-1]).argmax(1)
    curves["previous token"] = np.stack([each[:, member, head] for member, head in enumerate(heads)])
    return curves


def _progress(records: dict[str, Record]) -> str:
    record = records["shared"]
    at = np.array(record["updates_at"]) - record["setting"]["every"]
    curves = {"without any": one(records, "10", "none").loss} | progress_curves(record)
    shown = []
    for name in ("match", "copy", "previous token", "without any"):
        curve = curves[name].mean(0, keepdims=True)
        when = crossings(at[: curve.shape[1]], curve, 0.4 * np.log(2))[0]
        shown.append(f"{name} {when:,.0f}" if np.isfinite(when) else f"{name} not reached")
    return ", ".join(shown)


def _failing(record: Record) -> str:
    curve = progress_curves(record)["layer 1 + copy"].mean(0)
    return f"{curve[0]:.2f} to {curve[-1]:.2f}"


def _toy() -> str:
    record: dict[str, Any] = json.loads(toy.OUT.read_text())
    return ", ".join(f"{name} {spread(steps)}" for name, steps in record["half"].items())


def tables(records: dict[str, Record]) -> str:
    """Every table of the README, in Markdown."""
    parts = [
        ("What was trained", trainings),
        ("Phase changes (figures 3 and 5b)", phase_changes),
        ("Phase changes by size (figure 6), updates", sizes),
        ("The plateau by the cosine between classes; medians, in updates", plateaus),
        ("What else was measured", statements),
    ]
    return "\n\n".join(f"**{title}**\n\n{make(records)}" for title, make in parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables of all that was trained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write-readme", action="store_true", help="put the tables into README.md")
    parser.add_argument("--quick", action="store_true", help="of the reduced settings")
    args = parser.parse_args(argv)
    if args.quick and args.write_readme:
        parser.error("the README has the tables of the whole settings")
    text = tables(committed("-quick" if args.quick else ""))
    print(text)
    if args.write_readme:
        begin, end = "<!-- begin results -->", "<!-- end results -->"
        block = f"{begin}\n\n{text}\n\n{end}"
        README.write_text(re.sub(f"{begin}.*?{end}", lambda _: block, README.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
