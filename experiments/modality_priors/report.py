"""Print what came out, as the tables of the README: ``python -m experiments.modality_priors.report``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "priors.json"
SHOWN = (
    "no image", "blank image", "VCD 500", "VCD 900", "DoLa 0", "DoLa 1", "language uniform all", "language random all",
    "language random all, mean of 4", "language reversed all", "language shuffled all", "language uniform 0",
    "language uniform 1", "language uniform 2", "to image uniform all", "to image reversed all", "vision uniform all",
    "vision random all", "vision reversed all", "vision shuffled all", "both uniform all", "both random all",
)  # fmt: skip


def change(entry: dict[str, Any]) -> str:
    """A difference in points, with its interval."""
    return f"{100 * entry['change']:+.1f} [{100 * entry['low']:+.1f}, {100 * entry['high']:+.1f}]"


def decoders(table: dict[str, Any], composition: dict[str, Any], names: tuple[str, ...], g: str = "1") -> list[str]:
    """One line a decoder: what its branch reads, and what subtracting it does."""
    lines = [
        "| branch, g = "
        + g
        + " | lambda | mu language | mu vision | counter, greedy | i.i.d., greedy | counter, sampled"
        " with cut-off | of it beyond the cut-off |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        if f"{name}, g {g} | greedy" not in table["counter"]:
            continue
        made = composition[name]
        cut = table["counter"][f"{name}, g {g}, eps 0.1 | sampled"]
        lines.append(
            f"| {name} | {made['evidence']:.2f} | {made['language']:.2f} | {made['vision']:.2f} | "
            f"{change(table['counter'][f'{name}, g {g} | greedy'])} | "
            f"{change(table['iid'][f'{name}, g {g} | greedy'])} | "
            f"{change(cut)} | {change(cut['beyond the cut-off'])} |"
        )
    return lines


def main() -> None:
    """The command."""
    report = json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else RESULTS).read_text())
    table = report["decoders"]
    print(f"models {report['settings']['models']}, questions {report['settings']['rows']} a split")
    for split in ("iid", "counter", "blank"):
        plain, alone = (table[split][f"plain{cut} | sampled"]["mean"] for cut in ("", ", eps 0.1"))
        print(
            f"{split}: plain greedy {table[split]['plain | greedy']['mean']:.3f}, "
            f"sampled {plain:.3f}, cut off {alone:.3f}"
        )
    print("ideal on counter:", report["ideal"], "own:", report["composition"]["own"])
    print("\n".join(decoders(table, report["composition"], SHOWN)))
    both = np.array([[(p["predicted"], p["measured"]) for p in one.values()] for one in report["predicted by model"]])
    print(
        "regression predicts counter accuracy, correlation by model:",
        [round(float(np.corrcoef(x.T)[0, 1]), 2) for x in both],
    )
    print("  mean |error|", round(float(np.abs(both[..., 0] - both[..., 1]).mean()), 3))
    print("captions, wrong colour:", report["captions"])
    for kind, found in report["claims"].items():
        some = ("plain", "no image", "language uniform all", "vision uniform all", "to image uniform all", "VCD 900")
        print("claims", kind, {n: {k: round(v, 3) for k, v in found[n].items()} for n in some})
    for name in ("vision", "language", "to the image"):
        print(
            "effect of attention,", name, np.mean([one[name]["mean"] for one in report["effects"]], 0).round(3).tolist()
        )
    heads = report["heads"]
    for split in heads[0]["accuracy"]:
        shared = set.intersection(*(set(one["accuracy"][split]) for one in heads))
        means = {
            w: np.mean([one["accuracy"][split][w] for one in heads]) for w in heads[0]["accuracy"][split] if w in shared
        }
        print("heads:", split, {what: round(float(x), 3) for what, x in means.items()})
    for what in ("plain", "driving by word x 0.5", "driving by word x 0", "random x 0"):
        made = [one["composition"][what] for one in heads]
        print("  made of", what, {k: round(float(np.mean([m[k] for m in made])), 2) for k in made[0]})
    routes = [one["routes"] for one in heads]
    print("routes, first order with exact:", [round(one["correlation of means"], 3) for one in routes],
          "by row", [round(one["correlation of rows"], 3) for one in routes],
          "worst", [one["worst"] for one in routes])  # fmt: skip
    if "balanced" in report:
        print("balanced models", report["balanced"]["models"])
        print("\n".join(decoders(report["balanced"]["decoders"], report["balanced"]["composition"], SHOWN)))


if __name__ == "__main__":
    main()
