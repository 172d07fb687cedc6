"""The study of how induction heads form: interrupted, it continues; its measurements are there; its toy is right."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from experiments.induction_formation import report, run, toy
from experiments.induction_formation.settings import QUICK, SHORT, SIZES, TREATMENTS, Settings, roster
from experiments.induction_formation.task import Task, exemplars
from hooks.errors import InputsError

SMALL = Settings(name="small", rate=1e-3, steps=8, seeds=1, alone_seeds=1, every=2, evaluated=8, checkpoint=4)
TABLE = exemplars(Task(), 16)
ALWAYS = math.inf


def trained(work, until=ALWAYS, settings=SMALL, table=TABLE):
    return run.train(settings, roster(settings), table, work, "cpu", False, until)


def test_interrupted_it_continues_and_is_the_uninterrupted_run(tmp_path):
    whole = trained(tmp_path / "whole")
    stopped = trained(tmp_path / "parts", until=0.0)
    assert stopped.step == 4
    log = tmp_path / "parts" / "log.jsonl"
    with open(log, "a") as file:  # what was measured after the checkpoint, and half a line
        file.write('{"step": 4, "lost": 1}\n{"st')
    parts = trained(tmp_path / "parts")
    assert parts.step == whole.step == 8
    assert all(torch.equal(parts.params[name], value) for name, value in whole.params.items())
    lines = log.read_text()
    assert lines == (tmp_path / "whole" / "log.jsonl").read_text()
    assert [json.loads(line)["step"] for line in lines.splitlines()] == [0, 2, 4, 6]
    with pytest.raises(InputsError, match="other exemplars"):
        trained(tmp_path / "parts", table=TABLE + 1)


def test_results_hold_what_every_figure_reads(tmp_path):
    people = roster(SMALL)
    found = run.results(SMALL, people, trained(tmp_path), TABLE, tmp_path)
    assert json.loads(json.dumps(found))["steps_at"] == [2, 4, 6, 8]
    assert found["members"] == len(people.members) == len(set(people.members))
    loss = np.array(found["free"]["loss"])
    assert loss.shape == (1, 4) and loss[0, -1] < loss[0, 0]
    assert np.array(found["free"]["strengths"]).shape == (4, 1, 8)
    assert set(found["clamped"]) == set(TREATMENTS) and len(found["alone"]) == 8
    assert len(found["sizes"]) == 3 * len(SIZES)
    end = found["end"]
    assert np.array(end["only"]).shape == np.array(end["without"]).shape == (1, 8)
    assert 0 <= end["whole"][0] <= 1 and end["whole"] != end["first_layer_ablated"]
    # What is held at the answer is learned first, also in so short a run.
    assert found["clamped"]["match"]["loss"][0][-1] < found["clamped"]["none"]["loss"][0][-1]


def test_the_toy_descends_as_its_gradient_says():
    """One step by hand; and the more is held at the truth, the sooner the loss is down."""
    generator = torch.Generator().manual_seed(3)
    truth = 0.5 + torch.rand(3, toy.LENGTH, generator=generator, dtype=torch.float64)
    a, b, _ = 0.2 * torch.rand(3, toy.LENGTH, generator=generator, dtype=torch.float64)
    c, target = truth[2], truth.prod(0)
    off = a * b * c - target
    a, b = a - off * b * c / toy.LENGTH, b - off * a * c / toy.LENGTH
    found = toy.train(("c",), 3)
    assert found[0] == pytest.approx(float(off.square().mean()) / 2, rel=1e-12)
    assert found[1] == pytest.approx(float((a * b * c - target).square().mean()) / 2, rel=1e-12)
    tenth = {name: next(i for i, x in enumerate(curve) if x < curve[0] / 10)
             for name, curve in ((name, toy.train(held, 0)) for name, held in toy.HELD.items())}  # fmt: skip
    assert tenth["b and c"] < tenth["c"] < tenth["none"]


def test_what_is_refused(tmp_path, capsys):
    for given, words in (
        (["--steps", "50", "--name", "x"], "multiple of 40"),
        (["--steps", "0", "--name", "x"], "got 0"),
    ):
        with pytest.raises(SystemExit):
            run.main(["--quick", *given])
        assert words in capsys.readouterr().err
    save_file({"features": TABLE}, tmp_path / "wrong.safetensors")
    with pytest.raises(InputsError, match="expected 'exemplars'"):
        run.features(tmp_path / "wrong.safetensors")


def test_the_readme_has_the_numbers_of_the_committed_runs():
    records = report.committed()
    assert set(records) == {"short", "quick"}
    for setting in (SHORT, QUICK):
        assert records[setting.name]["setting"] == asdict(setting)
    assert report.table(records) in (report.HERE / "README.md").read_text()


def test_numbers_of_the_report_by_hand():
    assert report.spread([300, 100, None, 200]) == "250 (100 to 300), 1 not"
    assert report.spread([None, None]) == "none"
    assert report.extent([0.5, 0.25]) == "0.250 to 0.500" and report.extent([1, 1]) == "1.000"
    record = {"steps_at": [10, 20, 30, 40]}
    losses = [[1.0, 0.8, 0.6, 0.2], [1.0, 1.0, 0.6, 0.2]]
    assert report._between(record, losses, 0.9, 0.5) == "20"
    assert report._between(record, losses, 0.9, 0.1) == "not reached"
    assert report._tenth({"every": 10}, [[2.0, 1.0, 0.2, 0.1]]) == "20"
