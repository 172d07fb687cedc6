"""What READMEs say of speed is what the committed records say."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from experiments.benchmarks import backends, callbacks, long, overhead
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not (find_spec("transformer_lens") and find_spec("nnsight")), reason="a tool is not installed")
def test_every_backend_is_timed(tmp_path):
    overhead.main(["--quick", "--out", str(tmp_path / "overhead.json")])
    record = json.loads((tmp_path / "overhead.json").read_text())
    tools = {"native", "TransformerBridge", "nnsight"}
    assert set(record["prefill"]) == tools | {"native, held"} and set(record["decoding"]) == tools
    assert all(set(record["decoding"][name]["seconds"]) == {"none", "read", "edit"} for name in tools)
    assert record["forward"]["over_bare"] and backends.tables(record).count("µs") > 8


def test_a_long_text_is_measured():
    plain, knocked = (long.measure(64, plan, "cpu") for plan in (False, True))
    assert plain["seconds"] > 0 and knocked["seconds"] > 0
    text = long.tables({"lengths": [{"tokens": 64, "plain": plain, "knockout": knocked}]})
    assert "| 64 |" in text


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
