"""Measure everything on a GPU, in under six minutes; with ``--cpu --quick`` only to see that it all runs.

python -m experiments.benchmarks.gpu --out experiments/benchmarks/gpu.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from experiments import machine
from experiments.benchmarks.gpu import card, parts, report
from experiments.benchmarks.gpu.commands import ensemble, tests
from experiments.benchmarks.gpu.deep import deep
from experiments.benchmarks.gpu.runner import Bench, Part, run_parts
from experiments.benchmarks.setting import Setting

SECONDS = 345.0
"""Of a whole run: under six minutes with what starting and ending it takes."""
PARTS = (
    Part("peaks", parts.peaks, 30),
    Part("tests", tests, 130),
    Part("forwards", parts.forwards, 40),
    Part("sweeps", parts.sweeps, 70),
    Part("masks", parts.masks, 40),
    Part("edges", parts.edges, 40),
    Part("deep", deep, 70),
    Part("decoding", parts.decoding, 60),
    Part("callbacks", parts.callbacks, 30),
    Part("ensemble", ensemble, 100),
)
FORWARDS = ((8, 512, 15), (1, 16, 40))
"""Rows, tokens and repetitions of the forward passes that are measured."""


def begun(device: str, quick: bool) -> dict[str, Any]:
    """A record without any part."""
    setting = Setting(device=device, forwards=FORWARDS, quick=quick)
    return {
        "setting": asdict(parts.quick(setting) if quick else setting),
        "quick": quick,
        "card": card.describe(device),
        "versions": machine.versions("triton", "pytest"),
        "commit": machine.commit(),
        "machine": machine.describe(device),
        "skipped": card.missing(),
        "parts": {},
    }


def measure(out: Path, record: dict[str, Any], names: Sequence[str], seconds: float) -> bool:
    """Run the parts named, saving as they go, and say whether nothing failed.

    Where an error leaves the device unusable, what is left runs in another process.
    """
    until = time.monotonic() + seconds
    sizes: dict[str, Any] = {
        name: _tuples(value) if isinstance(value, list) else value for name, value in record["setting"].items()
    }
    setting = Setting(**sizes)
    bench = Bench(setting.device, record["quick"], setting)
    for row in record["parts"].get("peaks", {}).get("rows", []):
        bench.peaks.update({name: value for name, value in row.items() if name != "what"})

    def save() -> None:
        out.write_text(json.dumps(record, indent=1) + "\n")

    save()
    # A run that may take longer, on a CPU say, gives each part as much more.
    longer = max(1.0, seconds / SECONDS)
    chosen = [replace(part, limit=part.limit * longer) for part in PARTS if part.name in names]
    left = run_parts(chosen, bench, record, save, until)
    if left:
        print(f"the device no longer answers; another process goes on with {', '.join(left)}", flush=True)
        again = ["--out", str(out), "--resume", "--parts", *left, "--seconds", str(until - time.monotonic())]
        subprocess.run([sys.executable, "-m", "experiments.benchmarks.gpu", *again], check=False)
        record.update(json.loads(out.read_text()))
    return all(found["status"] in ("done", "skipped") for found in record["parts"].values())


def _tuples(value: list[Any]) -> tuple[Any, ...]:
    return tuple(_tuples(each) if isinstance(each, list) else each for each in value)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, save and print; or bring the README up to date with what was saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--out", type=Path, required=True, help="the JSON file that is written")
    parser.add_argument("--cpu", action="store_true", help="on a CPU, where there is no GPU")
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that everything runs")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the whole run (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="add to what --out holds")
    parser.add_argument("--write-readme", action="store_true", help="measure nothing; put the tables in README.md")
    args = parser.parse_args(argv)
    if args.write_readme:
        report.write_readme(args.out, Path(__file__).parents[1] / "README.md")
        return 0
    if not args.cpu and not args.resume and not torch.cuda.is_available():
        print("there is no CUDA device; with --cpu --quick, everything runs on a CPU to see that it does")
        return 2
    warnings.filterwarnings("ignore", category=FutureWarning)
    record = json.loads(args.out.read_text()) if args.resume else begun("cpu" if args.cpu else "cuda", args.quick)
    print(f"{record['card']['name']}; " + ", ".join(f"{name} {v}" for name, v in record["versions"].items()))
    for name, what in record["skipped"].items():
        print(f"skipped: {what}, since {name} is not installed")
    fine = measure(args.out, record, args.parts, args.seconds)
    print(report.tables(record))
    for name, found in record["parts"].items():
        if found["status"] == "failed":
            print(f"\n{name} failed:\n{found['traceback']}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
