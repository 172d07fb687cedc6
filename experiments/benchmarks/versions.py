"""Two versions of the library side by side: the same sweeps, edges and forward passes, in turn, and how they differ.

git worktree add /tmp/before <commit>
python -m experiments.benchmarks.versions --before /tmp/before --out experiments/benchmarks/versions.json

Each version runs in a process of its own, from its own checkout, and both measure only when they are asked to, so that
a slow spell of the machine falls on both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import machine
from experiments.tables import table, written
from experiments.timing import ratio

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
WORKER = HERE / "version_worker.py"


class Version:
    """A process that measures one checkout.

    Args:
        root: the checkout; its `hooks` and `interp` are what is measured.
        sizes: of the model, as JSON; see the worker.
        threads: of torch.
    """

    def __init__(self, root: Path, sizes: str, threads: int) -> None:
        environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), sizes], cwd=root, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.told = self.ask(None)
        self.commit = commit_of(root)

    def ask(self, task: str | None) -> dict[str, Any]:
        """What the process says of a task (of itself, without one)."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if task is not None:
            self.process.stdin.write(task + "\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"the process of {self.process.args} ended with {self.process.wait()}")

    def end(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def commit_of(root: Path) -> str:
    """The commit that a checkout stands at, marked where its files differ from it."""
    git = ["git", "-C", str(root)]
    name = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "hooks", "interp"], capture_output=True, text=True).stdout
    return name + ("+" if changed.strip() else "")


def measure(before: Path, sizes: dict[str, Any], repetitions: int, threads: int) -> dict[str, Any]:
    """Every task on both versions, in turn, as JSON data."""
    versions = {name: Version(root, json.dumps(sizes), threads) for name, root in (("before", before), ("after", ROOT))}
    rows = []
    for task in versions["after"].told["tasks"]:
        seconds: dict[str, list[float]] = {name: [] for name in versions}
        values: dict[str, Any] = {}
        for repetition in range(repetitions + 1):
            for name in versions if repetition % 2 else reversed(versions):
                said = versions[name].ask(task)
                values[name] = np.array(said["values"])
                if repetition:  # the first is a warm-up
                    seconds[name].append(said["seconds"])
        found = ratio(seconds["after"], seconds["before"])
        off = float(np.abs(values["after"] - values["before"]).max())
        largest = float(np.abs(values["after"]).max())
        rows.append(
            {"task": task, "seconds": seconds, "after_over_before": found, "difference": off, "largest": largest}
        )
        print(f"{task}: after / before {found['ratio']:.3f}, largest difference {off:.1e}", flush=True)
    certificate = versions["after"].ask("certificate")["values"]
    for version in versions.values():
        version.end()
    return {
        "certificate_in_forwards": certificate,
        "sizes": sizes, "repetitions": repetitions, "threads": threads, "versions": machine.versions(),
        "machine": machine.describe("cpu"), "rows": rows, "commits": {name: v.commit for name, v in versions.items()},
    }  # fmt: skip


def tables(record: dict[str, Any]) -> str:
    """The table of a record, in Markdown."""
    rows = [
        [row["task"], _spread(row["after_over_before"]), f"{row['difference']:.1e}", f"{row['largest']:.2g}"]
        for row in record["rows"]
    ]
    commits = record["commits"]
    return (
        f"Before: `{commits['before'][:12]}`, after: `{commits['after'][:12]}`; {record['machine']['cpu']}, "
        f"{record['threads']} threads, {record['repetitions']} repetitions in turn.\n\n"
        + table(["what runs", "time after / before", "largest difference", "largest value"], rows)
        + "\n\nIn brackets: the smallest and the largest ratio of a repetition. The certificate of a fresh model, made "
        f"once, takes {statistics.median(record['certificate_in_forwards']):.0f} forward passes of 16 tokens."
    )


def _spread(found: dict[str, float]) -> str:
    return f"{found['ratio']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, save and print; or put the table of what was saved into the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of the version to compare with")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file that is written")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that everything runs")
    parser.add_argument("--write-readme", action="store_true", help="measure nothing; put the table in README.md")
    args = parser.parse_args(argv)
    if args.write_readme:
        written(args.out, HERE / "README.md", tables)
        return
    if args.before is None:
        parser.error("name the version to compare with: --before CHECKOUT")
    sizes = {"layers": 2, "width": 64, "heads": 4, "vocabulary": 512} if args.quick else {}
    record = measure(args.before.resolve(), sizes, 1 if args.quick else args.repetitions, args.threads)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(tables(record))


if __name__ == "__main__":
    main()
