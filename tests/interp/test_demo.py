"""The main job: its numbers are those of the sweeps that it stands for."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import interp as ip
from interp.cli import shipped_task
from interp.demo import Task, run_demo
from interp.evaluation import evaluate


@pytest.fixture(scope="module")
def model():
    return ip.load("ioi-mini")


@pytest.fixture(scope="module")
def task():
    return shipped_task(16)


@pytest.fixture(scope="module")
def report(model, task):
    return run_demo(model, task, progress=False)


def sides(model, task):
    metric = ip.logit_diff(list(task.answer), list(task.foil))
    return model.inputs(task.clean), model.inputs(task.corrupt), metric


def test_what_was_asked(model, task, report):
    clean, corrupt, metric = sides(model, task)
    found = evaluate(model, clean, metric)
    assert report.clean_metric == pytest.approx(found.mean().item(), rel=1e-5)
    assert report.corrupt_metric == pytest.approx(evaluate(model, corrupt, metric).mean().item(), rel=1e-5)
    assert report.accuracy == 1.0 and report.pairs == 16
    logits = model.run(clean).logits[:, -1].softmax(-1)
    answers = torch.tensor([model.tokenizer.token(a) for a in task.answer])
    assert report.clean_probability == pytest.approx(logits[torch.arange(16), answers].mean().item(), rel=1e-5)


def test_the_heads_reported_are_the_strongest_of_the_sweep(model, task, report):
    clean, corrupt, metric = sides(model, task)
    sweep = ip.sweep(model, clean, corrupt, ip.grid("z", layer="all", head="all"), metric=metric, progress=False)
    share = sweep.normalized()
    assert report.heads
    for head in report.heads:
        assert head["share"] == pytest.approx(share[head["layer"], head["head"]], abs=1e-5)
        assert head["low"] <= head["share"] <= head["high"]
    strongest = np.unravel_index(np.abs(share).argmax(), share.shape)
    assert (report.heads[0]["layer"], report.heads[0]["head"]) == strongest


def test_the_check_puts_back_and_knocks_out_together(model, task, report):
    """Against plans written out here."""
    clean, corrupt, metric = sides(model, task)
    places = [ip.site("z", layer=h["layer"], head=h["head"]) for h in report.heads]
    whole = (evaluate(model, clean, metric) - evaluate(model, corrupt, metric)).mean()
    back = ip.World(corrupt, ip.Plan(tuple(ip.patch(place, ip.World(clean)) for place in places)))
    out = ip.World(clean, ip.Plan(tuple(ip.patch(place, ip.World(corrupt)) for place in places)))
    gained = (evaluate(model, back, metric) - evaluate(model, corrupt, metric)).mean() / whole
    lost = (evaluate(model, clean, metric) - evaluate(model, out, metric)).mean() / whole
    assert report.check.put_back == pytest.approx(gained.item(), abs=1e-5)
    assert report.check.knocked_out == pytest.approx(lost.item(), abs=1e-5)
    assert report.check.put_back > 0.5 > abs(report.check.random_put_back)


def test_the_report_reads_as_text_and_saves_as_json(model, task, tmp_path):
    report = run_demo(model, replace(task, lists=False), tmp_path, progress=False)
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["heads"][0]["head"] == report.heads[0]["head"]
    assert f"head {report.heads[0]['layer']}.{report.heads[0]['head']}" in str(report)
    assert ip.Result.load(tmp_path / "heads").normalized().shape == (3, 4)


def test_the_first_sentence_says_what_came_out(report):
    first, second = str(report).split("WHAT WAS ASKED")[0].split("On a repeated list,")
    assert first.startswith(f"Head{'s' * (len(report.heads) > 1)} {report.heads[0]['layer']}.{report.heads[0]['head']}")
    assert f"of {report.all_heads}" in first.replace("\n", " ") and f"{report.check.put_back:.0%}" in first
    assert f"{report.check.knocked_out:.0%}" in first and report.all_heads == 12
    assert "which word came before" in second.replace("\n", " ") and f"{report.lists.lost:.0%}" in second


def test_few_pairs_give_no_interval_and_say_so(model):
    report = run_demo(model, replace(shipped_task(2), lists=False), progress=False)
    assert "On a repeated list" not in str(report) and report.lists is None
    assert "no interval" in str(report)


def test_no_pair_is_refused(model):
    with pytest.raises(ValueError, match="no pair"):
        run_demo(model, Task((), (), (), ()), progress=False)
