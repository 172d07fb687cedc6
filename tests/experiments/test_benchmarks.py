"""What READMEs say of speed is what the committed records say."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import interp as ip
from experiments.benchmarks import backends, by_hand, callbacks, long, overhead
from experiments.benchmarks.setting import Setting
from experiments.induction_formation import benchmark
from experiments.tables import written
from tests.hooks import bridged

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
backward = pytest.fixture(autouse=True, scope="module")(bridged.torch_backward)


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
    hands = {f"{name}, by hand" for name in ("torch hooks", "TransformerLens", "nnsight")}
    assert set(record["prefill"]) == tools | hands | {"native, held"} and set(record["decoding"]) == tools | hands
    assert all(set(record["decoding"][name]["seconds"]) == {"none", "read", "edit"} for name in tools)
    text = backends.tables(record)
    assert record["forward"]["over_bare"] and record["took_seconds"] > 0 and text.count("µs") == 24
    readme = tmp_path / "README.md"
    readme.write_text("<!-- begin overhead.json -->\n\n<!-- end overhead.json -->\n\nafter\n")
    written(tmp_path / "overhead.json", readme, backends.tables)
    assert text in readme.read_text() and readme.read_text().endswith("after\n")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not (find_spec("transformer_lens") and find_spec("nnsight")), reason="a tool is not installed")
def test_by_hand_is_what_plans_do():
    """What is compared with ours does the same."""
    setting = Setting(layers=2, width=32, heads=2, vocabulary=256, quick=True)
    bare, ids, vector = setting.model(), setting.ids(1, 8), torch.linspace(-3, 3, 32)
    hands, model = by_hand.ByHand(setting, bare, ids, vector, backends.GREEDY), ip.wrap(bare)
    plan = ip.Plan(tuple(ip.steer(ip.site("resid_post", layer=layer), vector) for layer in range(2)))
    inputs = model.inputs(ids)
    logits = {"none": model.run(inputs).logits, "edit": model.run(inputs, plan).logits}
    texts = {
        kind: model.generate(inputs, p, **backends.GREEDY).sequences for kind, p in (("none", None), ("edit", plan))
    }
    assert not torch.equal(texts["none"], texts["edit"])
    for name, kinds in hands.prefill().items():
        for kind, enter in kinds.items():
            with enter() as run:
                found = run()
            if kind != "read":
                assert torch.allclose(found, logits[kind], atol=1e-5), (name, kind)
    for name, kinds in hands.decoding().items():
        for kind, enter in kinds.items():
            with enter() as run:
                found = run()
            if kind != "read":
                assert torch.equal(found, texts[kind]), (name, kind)


def test_the_readme_has_a_place_for_what_visits_cost():
    path = EXPERIMENTS / "benchmarks" / "overhead.json"
    text = (path.parent / "README.md").read_text()
    assert text.count("<!-- begin overhead.json -->") == text.count("<!-- end overhead.json -->") == 1
    if path.exists():
        assert backends.tables(json.loads(path.read_text())) in text


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
