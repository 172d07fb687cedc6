"""Parts that are other commands: the tests marked `gpu`, and the ensemble of a study."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from experiments.benchmarks.gpu.runner import Bench, Row, Skipped, TooLong

ROOT = Path(__file__).resolve().parents[3]
KEPT = 12_000
"""Characters of a failed command's output that are kept."""


def tests(bench: Bench) -> Iterator[Row]:
    """The tests marked `gpu`, in a process of their own."""
    if find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").rglob("test_*.py")) if _marked(path)]
    options = ["-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
    code, text = _ran([sys.executable, "-m", "pytest", *options, *files], bench.left - 2)
    row: Row = {"what": "tests marked gpu", "counts": counts(text), "files": files, "exit": code}
    if code != 0:
        row["failures"] = sorted(set(re.findall(r"^(?:FAILED|ERROR) \S.*$", text, flags=re.MULTILINE)))
        row["output"] = text[-KEPT:]
    yield row
    if code is None:
        raise TooLong
    if code != 0:
        raise RuntimeError(f"pytest ended with {code}: {row['counts']}; {'; '.join(row['failures'])[:2000]}")


def ensemble(bench: Bench) -> Iterator[Row]:
    """Member-steps a second of a study's ensemble, compiled and replayed, beside a plain loop."""
    compiler = any(shutil.which(name) for name in ("cc", "gcc", "clang")) and find_spec("triton") is not None
    command = [sys.executable, "-m", "experiments.induction_formation.benchmark", "--device", bench.device]
    small = ["--quick", "--members", "1", "--treatments", "none", "--repetitions", "1"]
    command += small if bench.quick else ["--members", "256", "--treatments", "none", "--repetitions", "3"]
    compiled = bench.device.startswith("cuda") and compiler
    if not compiled:
        command.append("--eager")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "ensemble.json"
        code, text = _ran([*command, "--out", str(out)], bench.left - 2)
        if code is None:
            raise TooLong
        if code != 0:
            raise RuntimeError(f"{' '.join(command[1:])} ended with {code}:\n{text[-KEPT:]}")
        sizes = json.loads(out.read_text())["sizes"]
    for size in sizes:
        for way, over in size["over_loop"].items():
            rate = size["member_steps_per_second"]
            yield {
                "what": f"ensemble, {size['members']} members, {way}",
                "dtype": "float32",
                "seconds": 1 / rate[way],
                "unit": "a member's step",
                "times_ours": {"loop": over["ratio"]},
                "difference": size["largest_difference"][way],
                "of": size["loss_range"][1],
                "member_steps_per_second": rate,
                "first_call_seconds": size["first_call_seconds"],
                "note": "" if compiled else "not compiled: no GPU, no triton or no C compiler",
            }


def counts(text: str) -> dict[str, int]:
    """How many tests passed, failed and so on, by what pytest printed of each."""
    found = re.findall(r"^\S+::.* (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", text, flags=re.MULTILINE)
    return {name.lower(): found.count(name) for name in dict.fromkeys(found)}


def _marked(path: Path) -> bool:
    text = path.read_text()
    return "mark.gpu" in text or "tests.devices" in text


def _ran(command: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """A command's exit status (None where its time was over) and what it printed."""
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+") as output:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=max(seconds, 1)
            )
            code = done.returncode
        except subprocess.TimeoutExpired:
            code = None
        output.seek(0)
        return code, output.read()
