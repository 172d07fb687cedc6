"""The study of the cache runs from end to end on an untrained model, and its task is what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import interp as ip
from experiments.benchmarks import kv as benchmark
from experiments.kv_importance import model as small
from experiments.kv_importance import report, run, text
from experiments.kv_importance.task import ARMS, ASK, CONTEXT, LATE, MARK, PAIRS, draw

LONG = ("peak_megabytes", "cache_megabytes", "prefill_tokens_a_second", "decoding_milliseconds")


@pytest.mark.parametrize("arm", ARMS)
def test_the_answer_stands_where_the_task_says(arm):
    task = draw(20, 3, arm)
    assert task.context.shape == (20, CONTEXT) and set(task.arms) == {arm}
    for context, suffix, where in zip(task.context.tolist(), task.suffix.tolist(), task.where.tolist(), strict=True):
        assert suffix[0] == ASK and context[where - 1 : where + 1] == suffix[1:]
        copies = sum(context[i : i + 2] == suffix[1:] for i in range(CONTEXT - 1))
        assert copies == (2 if arm == "duplicated" else 1)
        assert (MARK in context, LATE in context) == (arm == "before", arm == "after")
        if arm == "before":
            assert context[where - 2] == MARK
        if arm == "after":
            assert context[where + 1] == LATE
        if arm == "question":
            assert context[1:3] == suffix[:2]
    assert torch.equal(draw(20, 3, arm).context, task.context)
    assert task.drill.shape == (20, 3 * PAIRS)


def test_the_study_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ARMS", ("before",))
    monkeypatch.setattr(run, "BUDGETS", (0.2, 0.5))
    monkeypatch.setattr(run, "STREAM_BUDGETS", (10,))
    small.train(0, tmp_path, steps=2, rows=4)
    found = run.study([0], rows=1, label_rows=2, steps=2, folder=tmp_path)
    table = found["arms"]["before"]["table"]
    assert {"heads, published label", "heads, interventional label", "leave-one-out", "random"} <= {
        line["policy"] for line in table
    }
    assert len(found["streamed"]) == 11 and json.loads(json.dumps(found))["setting"]["rows"] == 1


def test_the_readme_says_what_the_results_say(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text(report.README.read_text())
    monkeypatch.setattr(report, "README", readme)
    report.main()
    assert readme.read_text() == Path(report.__file__).with_name("README.md").read_text()
    assert (
        report.long({"rows": [dict.fromkeys(LONG, 1.0) | {"tokens": 8, "kept": 4, "evicting": True}]}).count("|") > 20
    )


def test_real_text_runs():
    module = small.fresh(1).eval()
    found = text.measured(ip.wrap(module), list(range(8, 30)), [9, 12, 33])
    assert found["units"] == 2 * 2 * 22 and len(found["policies"]) == 9
    assert np.isfinite([one["spearman"] for one in found["policies"]]).all()


def test_the_benchmark_agrees_with_its_loop(monkeypatch):
    monkeypatch.setattr(benchmark, "CONTEXT", 12)
    monkeypatch.setattr(benchmark, "SAMPLE", 3)
    model = benchmark.small()
    found = benchmark.exact(model, 4, None)
    assert found["apart"] < 1e-5 and found["largest"] > 0 and found["units"] == 2 * 2 * 12
    assert benchmark.gradients(model, 16)["seconds"] > 0
    rows = list(benchmark.eviction(model, 32, 8, 8))
    assert len(rows) == 6 and rows[-1]["overhead_milliseconds_a_chunk"] == 0
    assert all(0 < row["overhead_milliseconds_a_chunk"] < row["milliseconds_a_chunk"] for row in rows[:-1])
    assert benchmark.decoding(model, 32, 8, tokens=2)["times"]["ratio"] > 0
