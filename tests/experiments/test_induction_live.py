"""The script that shows heads becoming induction heads: as short as it is said to be, and it runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from interp import training as tr

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "experiments" / "induction_live" / "train.py"


def test_it_is_forty_lines():
    assert len([line for line in SCRIPT.read_text().splitlines() if line.strip()]) <= 40  # blank ones aside


def test_the_first_page_shows_it():
    assert f"```python\n{SCRIPT.read_text().rstrip()}\n```" in (ROOT / "README.md").read_text()


def test_it_runs(tmp_path):
    pytest.importorskip("accelerate")
    done = subprocess.run(
        [sys.executable, SCRIPT, "2"], cwd=tmp_path, capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    (log,) = tmp_path.rglob("log.jsonl")
    first = next(iter(tr.JsonLines(log).read()))
    assert first["step"] == 0 and len(first["heads"]["induction"]) == 4
    assert "step" in done.stdout and "\n    0 " in done.stdout


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}
