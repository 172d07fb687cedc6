"""What READMEs say of speed is what the committed records say."""

import json
from pathlib import Path

import pytest

from experiments.benchmarks import callbacks
from experiments.induction_formation import benchmark

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


@pytest.mark.parametrize(
    ("tables", "record"),
    [(benchmark.tables, "induction_formation/benchmark.json"), (callbacks.tables, "benchmarks/callbacks.json")],
)
def test_a_readme_has_the_numbers_of_its_record(tables, record):
    path = EXPERIMENTS / record
    text = tables(json.loads(path.read_text()))
    assert text.count("|") > 10 and text in (path.parent / "README.md").read_text()


def test_the_loop_loses_what_the_ensemble_loses():
    """Every treatment of the benchmark, and none: the loop that speed is compared with is the same training."""
    setting = benchmark.Setting(batch=4)
    for treatment in (benchmark.Treatment(), *benchmark.TREATMENTS):
        member, table = benchmark.Member(3, treatment), benchmark.exemplars(benchmark.Task()).float()
        loop = benchmark.Loop(member, treatment, table, setting)
        together = benchmark.Ensemble(benchmark.program(table, batch=4), [member], rate=setting.rate)
        found = together.train(3)[:, 0]
        assert found.tolist() == pytest.approx([loss.item() for loss in loop.train(3)], abs=1e-4)
        assert abs(found[0] - found[-1]) > 1e-3
