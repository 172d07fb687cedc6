"""The script that shows heads becoming induction heads: as short as it is said to be, and it runs."""

import runpy
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


@pytest.mark.filterwarnings("ignore:'pin_memory'")
def test_it_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "2"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    (log,) = tmp_path.rglob("log.jsonl")
    first = next(iter(tr.JsonLines(log).read()))
    assert first["step"] == 0 and len(first["heads"]["induction"]) == 4
    shown = capsys.readouterr().out
    assert "step" in shown and "\n    0 " in shown
