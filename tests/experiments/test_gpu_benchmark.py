"""The run on a GPU, on a CPU: every part on tiny models, and what it does where a part fails or takes too long."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from experiments.benchmarks.gpu import __main__ as gpu
from experiments.benchmarks.gpu import card, commands, report
from experiments.benchmarks.gpu.runner import Bench, Part, Skipped, run_parts
from experiments.benchmarks.setting import Setting

ROOT = Path(__file__).resolve().parents[2]


def test_every_part_runs_on_a_cpu(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    assert gpu.main(["--cpu", "--quick", "--out", str(out)]) == 0, capsys.readouterr().out
    record = json.loads(out.read_text())
    assert {name: found["status"] for name, found in record["parts"].items()} == {p.name: "done" for p in gpu.PARTS}
    rows = [row for found in record["parts"].values() for row in found["rows"]]
    compared = [row for row in rows if "difference" in row]
    assert len(compared) > 15
    for row in compared:
        assert row["difference"] < (1e-4 if row["dtype"] == "float32" else 2e-2), row
        assert row["of"] > (1e-5 if row["dtype"] == "float32" else 0), row
    assert {"float32", "bfloat16"} == {row["dtype"] for row in compared}
    assert any(row.get("percent_of_peak", 0) > 0 for row in rows)
    assert record["parts"]["tests"]["rows"][0]["counts"]["skipped"] > 5
    assert {"name", "nominal"} <= set(record["card"]) and record["commit"] is not None
    text = report.tables(record)
    assert all(row["what"] in text for row in rows if row["what"] not in ("peaks", "tests marked gpu"))
    readme = tmp_path / "README.md"
    readme.write_text("# Nothing yet\n")
    report.write_readme(out, readme)
    assert text in readme.read_text()


def test_a_part_stops_no_other(tmp_path, capsys):
    def fails(bench):
        yield {"what": "one row"}
        raise ValueError("of no use")

    def slow(bench):
        yield {"what": "in time"}
        time.sleep(30)

    def absent(bench):
        raise Skipped("it is not installed")
        yield

    def fine(bench):
        yield {"what": "twice the peak", "dtype": "float32", "seconds": 0.5, "operations": 10**12}

    parts = [Part("fails", fails, 9), Part("slow", slow, 1.5), Part("absent", absent, 9), Part("fine", fine, 9)]
    record, saved = {"parts": {}}, []
    bench = Bench("cpu", True, Setting(), {"float32": 1.0})
    left = run_parts(parts, bench, record, lambda: saved.append(len(record["parts"])), time.monotonic() + 60)
    assert left == [] and saved[-1] == 4
    ended = {name: (found["status"], len(found["rows"])) for name, found in record["parts"].items()}
    assert ended == {"fails": ("failed", 1), "slow": ("cut", 1), "absent": ("skipped", 0), "fine": ("done", 1)}
    assert record["parts"]["fails"]["error"] == "ValueError: of no use"
    assert record["parts"]["fine"]["rows"][0]["percent_of_peak"] == pytest.approx(200)
    assert "slow cut" in capsys.readouterr().out
    run_parts([Part("late", fine, 9)], bench, record, lambda: None, time.monotonic())
    assert record["parts"]["late"]["status"] == "cut"


def test_a_failure_is_told_and_a_run_resumed(tmp_path, monkeypatch, capsys):
    def fails(bench):
        raise ValueError("of no use")
        yield

    out = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu, "PARTS", (Part("peaks", gpu.parts.peaks, 9), Part("fails", fails, 9)))
    assert gpu.main(["--cpu", "--quick", "--out", str(out), "--parts", "fails"]) == 1
    assert "of no use" in capsys.readouterr().out
    assert gpu.main(["--resume", "--out", str(out), "--parts", "peaks"]) == 1
    assert list(json.loads(out.read_text())["parts"]) == ["fails", "peaks"]


def test_without_a_device_nothing_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 2
    assert "--cpu" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(card, "find_spec", lambda name: None if name == "nnsight" else True)
    assert list(card.missing()) == ["nnsight"]


def test_results_of_tests_are_counted():
    text = (
        "a.py::test[x-y] PASSED [ 5%]\na.py::test[b c] FAILED [ 9%]\nb.py::f PASSED\nb.py::g SKIPPED (no)\nFAILED a.py"
    )
    assert commands.counts(text) == {"passed": 2, "failed": 1, "skipped": 1}


@pytest.mark.parametrize(("given", "installs"), [(["PY=python3"], False), ([], True)])
def test_a_given_python_is_used_as_it_is(given, installs, tmp_path):
    command = ["make", "-n", "gpu", f"VENV={tmp_path}", *given]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert ("pip" in found) == installs and "-m experiments.benchmarks.gpu --out" in found
