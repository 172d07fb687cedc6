"""The study of how induction heads form: it continues where it stopped, and its numbers are those that are stored."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from experiments.induction_formation import records, report, run, settings, toy
from experiments.induction_formation.settings import (
    CLAMPED,
    FIGURES,
    FREE,
    ISOLATED,
    SHARED,
    SIZED,
    SIZES,
    TRAININGS,
    TREATMENTS,
    quick,
    roster,
)
from experiments.induction_formation.task import Task, exemplars
from experiments.induction_formation.treatments import Treatment
from hooks.errors import InputsError, ModelError, ResultError

FEWER = {"seeds": 1, "clamp_seeds": 1, "size_seeds": 1, "rate": 1e-3, "window": 1, "evaluated": 8}
SMALL = replace(SHARED, name="small", shorter=2000, every=2, checkpoint=4, cosines=(0.0, 0.8), **FEWER)
TABLES = torch.stack([exemplars(Task(), 16, cosine=cosine) for cosine in SMALL.cosines])
ALWAYS = math.inf


def trained(work, until=ALWAYS, setting=SMALL, table=TABLES):
    return run.train(setting, roster(setting), table, work, "cpu", False, until)


def test_interrupted_it_continues_and_is_the_uninterrupted_run(tmp_path):
    whole = trained(tmp_path / "whole")
    assert trained(tmp_path / "parts", until=0.0).step == 0
    stopped = trained(tmp_path / "parts", until=1e-9)
    assert stopped.step == 4
    log = tmp_path / "parts" / "log.jsonl"
    with open(log, "a") as file:  # what was measured after the checkpoint, and half a line
        file.write('{"step": 4, "lost": 1}\n{"st')
    parts = trained(tmp_path / "parts")
    assert parts.step == whole.step == SMALL.updates == 10
    assert all(torch.equal(parts.params[name], value) for name, value in whole.params.items())
    lines = log.read_text()
    assert lines == (tmp_path / "whole" / "log.jsonl").read_text()
    assert [json.loads(line)["step"] for line in lines.splitlines()] == [0, 2, 4, 6, 8]
    with pytest.raises(InputsError, match="other exemplars"):
        trained(tmp_path / "parts", table=TABLES + 1)
    with pytest.raises(InputsError, match="other window"):
        trained(tmp_path / "parts", setting=replace(SMALL, window=2))


def test_results_hold_what_every_table_and_figure_reads(tmp_path, monkeypatch):
    """Three small trainings, from the command's parts to the report."""
    found = {}
    for name, setting in TRAININGS.items():
        small = replace(setting, shorter=3125, every=1, checkpoint=1, **FEWER)
        table = torch.stack([exemplars(Task(), 16, cosine=cosine) for cosine in small.cosines])
        ended = trained(tmp_path / name, setting=small, table=table)
        found[name] = json.loads(json.dumps(run.results(small, roster(small), ended, table, tmp_path / name)))
        assert ended.step == found[name]["updates"] == small.updates
    assert {figure for record in found.values() for figure in record["figures"]} == set(FIGURES)
    free = records.one(found, "3 and 4", "all heads")
    assert free.loss.shape == (1, 10) and free.at.tolist() == list(range(1, 11)) and free.changes == (None,)
    assert np.array(found["free"]["during"]["strengths"])[:10].shape == (10, 1, 8)
    progress = [line["previous token"] for line in found["shared"]["during"]["progress"]]
    assert np.array(progress).shape == (6, 1, 8) and report.progress_curves(found["shared"])["match"].shape == (1, 6)
    assert {f.name for f in records.find(found, "5b")} == set(TREATMENTS)
    assert len(records.find(found, "6")) == len(SIZES) and len(records.find(found, "6, clamped")) == 3 * len(SIZES)
    assert len(records.one(found, "6, clamped", "C: copy (match held)", classes=50, labels=5).at) == 3  # 9,375 / 3,125
    # What is held at the answer is learned first, also in so short a run.
    assert records.one(found, "5b", "match").loss[0, 5] < records.one(found, "5b", "none").loss[0, 5]
    end = found["free"]["end"]
    assert np.array(end["only"]).shape == np.array(end["without"]).shape == (1, 8)
    assert 0 <= end["whole"][0] <= 1 and end["whole"] != end["first_layer_ablated"]
    text = report.tables(found)
    assert "a reduced setting" in text and all(f"| {name}" in text for name in (*FIGURES, *ISOLATED))
    with pytest.raises(ResultError, match="no results of figure 5b, nothing"):
        records.find(found, "5b", "nothing")
    with pytest.raises(ResultError, match="5 conditions"):
        records.one(found, "6")


def test_settings_are_what_the_paper_ran():
    """In updates of 32 sequences: its axes say 1,000,000, 600,000, 2,000,000 and 300,000."""
    said = {"3 and 4": 1_000_000, "5b": 600_000, "6": 2_000_000, "6, clamped": 300_000}
    assert {figure: FIGURES[figure].sequences for figure in said} == said
    assert [s.updates for s in (CLAMPED, SHARED, SIZED)] == [18_750, 20_000, 62_500]
    for setting in TRAININGS.values():
        assert not setting.reduced and (setting.rate, setting.batch) == (1e-5, 32)
        assert quick(setting).reduced and quick(setting).updates == pytest.approx(setting.updates / 10, rel=0.01)
        assert len(set(roster(setting).members)) == len(roster(setting).members)
    # Figure 6 keeps one last-layer head in every panel.
    for setting in TRAININGS.values():
        people = roster(setting)
        for condition in people.find("6") + people.find("6, clamped"):
            for index in condition.members:
                held = people.members[index].treatment
                assert isinstance(held, Treatment) and len(held.ablate_last) == 7


def test_initialisation_and_batches_vary_apart():
    for vary, starts, batches in (
        ("both", [0, 1, 2], [0, 1, 2]),
        ("initialisation", [0, 1, 2], [0, 0, 0]),
        ("batches", [0, 0, 0], [0, 1, 2]),
    ):
        people = roster(replace(CLAMPED, vary=vary, clamp_seeds=3))
        members = [people.members[i] for i in people.conditions[0].members]
        assert [m.seed for m in members] == starts and [m.data_seed for m in members] == batches
    with pytest.raises(InputsError, match="did you mean 'batches'"):
        replace(CLAMPED, vary="batch")
    with pytest.raises(InputsError, match="did you mean 'clamped'"):
        replace(CLAMPED, training="clamp")


def test_members_stop_when_nothing_more_is_read_of_them():
    people = roster(CLAMPED)
    changed: list[int | None] = [1000] * len(people.members)
    assert run.going(CLAMPED, people, changed, 1250) == []
    assert run.going(CLAMPED, people, changed, 1125) == list(range(len(people.members)))
    copy = people.find("5b", "copy")[0].members
    changed[copy[-1]] = None  # all seeds of a condition go on with it
    assert run.going(CLAMPED, people, changed, 9_375) == list(copy) and not run.going(CLAMPED, people, changed, 18_750)
    assert run.going(CLAMPED, people, [], 0) == list(range(len(people.members)))
    # Where more is read than phase changes, it is as long as the paper's.
    free = roster(FREE)
    more = run.going(FREE, free, [1000] * len(free.members), 31_050)
    assert set(more) == {i for c in free.find("3 and 4") for i in c.members}


def four_clamps(setting, add):
    for name in ("layer 1", "copy", "match", "layer 1 + copy"):
        add("5b", name, TREATMENTS[name], setting.clamp_seeds)


def test_members_that_stopped_stay_as_they_are_and_the_others_go_on(tmp_path, monkeypatch):
    few = {**FEWER, "clamp_seeds": 1, "every": 2, "checkpoint": 2}
    setting = replace(CLAMPED, name="small", figures=("5b",), shorter=1875, cosines=(0.0,), **few)
    table = exemplars(Task(), 16)
    monkeypatch.setitem(settings._ADD, "clamped", four_clamps)
    whole = trained(tmp_path / "whole", setting=setting, table=table)
    part = trained(tmp_path / "part", until=1e-9, setting=setting, table=table)
    assert (part.step, whole.step) == (2, 10)
    monkeypatch.setattr(run, "going", lambda setting, people, changed, step: [0, 3] if step < 10 else [])
    after = trained(tmp_path / "part", setting=setting, table=table)
    assert after.step == 10
    for name, value in after.params.items():
        assert torch.equal(value[[1, 2]], part.params[name][[1, 2]])
        torch.testing.assert_close(value[[0, 3]], whole.params[name][[0, 3]], rtol=0, atol=1e-6)
    lines = run.lines_of(tmp_path / "part")
    assert [len(curve) for curve in run.curves(lines, 4)] == [10, 2, 2, 10]
    record = run.results(setting, roster(setting), after, table, tmp_path / "part")
    assert [len(member["loss"]) for member in record["members"]] == [5, 1, 1, 5]
    assert records.trained(record, "5b") == (2, 10)


def test_a_phase_change_is_the_end_of_the_first_window_below():
    setting = replace(CLAMPED, every=50, window=25, checkpoint=50)
    lines = [
        {"members": [0, 1], "windows": [[1.0, 0.2], [0.29, 0.9]]},
        {"members": [0], "windows": [[0.27], [0.1]]},
    ]
    assert run.changes(lines, setting) == [75, 25]
    assert run.changes([{"members": [0, 1], "windows": [[0.28, 1.0]]}], setting) == [None, None]
    assert run.changes([], setting) == []


def test_the_toy_descends_as_its_gradient_says():
    """One step by hand; and the more is held at the truth, the sooner the loss is down."""
    generator = torch.Generator().manual_seed(3)
    truth, (a, b, _) = torch.randn(2, 3, toy.LENGTH, generator=generator, dtype=torch.float64)
    c, target, n = truth[2], truth[0][:, None, None] * truth[1][:, None] * truth[2], toy.LENGTH**3
    off = a[:, None, None] * b[:, None] * c - target
    step_a, step_b = ((off * b[:, None] * c).sum((1, 2)) / n, (off * a[:, None, None] * c).sum((0, 2)) / n)
    found, height = toy.train(("c",), 3)
    assert found[0] == pytest.approx(float(off.square().mean()) / 2, rel=1e-12)
    after = (a - step_a)[:, None, None] * (b - step_b)[:, None] * c - target
    assert found[1] == pytest.approx(float(after.square().mean()) / 2, rel=1e-12)
    assert height == pytest.approx(float(target.square().mean()) / 2, rel=1e-12)


def test_the_toys_numbers_are_those_committed():
    record = json.loads(toy.OUT.read_text())
    curve, height = toy.train((), 2)
    thinned = [float(f"{x / height:.4g}") for x in curve[:: toy.EVERY]]
    np.testing.assert_allclose(record["loss"]["none"][2], thinned, rtol=2e-3)
    half = {name: np.median(steps) for name, steps in record["half"].items()}
    assert half["b and c"] < half["c"] / 2 < half["none"] / 4
    assert len(record["half"]["none"]) == toy.SEEDS and 200 <= half["none"] <= 600


def test_what_is_refused(tmp_path, capsys):
    for given, words in (
        (["free", "--seeds", "2"], "give --name"),
        (["free", "--vary", "batches"], "give --name"),
        (["free", "--seeds", "0", "--name", "x"], "at least 1"),
        (["everything"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            run.main(given)
        assert words in capsys.readouterr().err
    save_file({"features": TABLES[0]}, tmp_path / "wrong.safetensors")
    with pytest.raises(InputsError, match="expected 'exemplars'"):
        run.features(tmp_path / "wrong.safetensors")
    for bad in (TABLES[0][:-1], TABLES, TABLES[0].long(), TABLES[0] * math.nan):
        save_file({"exemplars": bad}, tmp_path / "bad.safetensors")
        with pytest.raises(InputsError, match="finite numbers"):
            run.features(tmp_path / "bad.safetensors")
    with pytest.raises(ModelError, match=r"updates 0 and 2, the losses of members \[0\] are not finite"):
        trained(tmp_path / "nan", table=torch.stack([TABLES[0], TABLES[1] * math.nan]))
    with pytest.raises(InputsError, match="each divides on"):
        replace(CLAMPED, window=7)


def test_the_readme_has_the_numbers_of_the_committed_runs():
    found = records.committed()
    assert {"free", "clamped"} <= set(found) <= set(TRAININGS)
    for name, record in found.items():
        assert record["setting"] == json.loads(json.dumps(asdict(TRAININGS[name]))) and not record["reduced"]
    assert report.tables(found) in report.README.read_text()
    # Every phase change of the reference, within a quarter of it.
    for name, reference in report.REFERENCE.items():
        own = records.one(found, "3 and 4" if name == "all heads" else "5b", name)
        assert own.middle == pytest.approx(np.median(reference), rel=report.CLOSE), name


def test_numbers_of_the_report_by_hand():
    assert report.both(9_375) == "9,375 (300,000)"
    assert report.spread([300, 100, None, 200]) == "250 (100 to 300), 1 not"
    assert report.spread([None, None]) == "none"
    assert report.extent([0.5, 0.25]) == "0.250 to 0.500" and report.extent([1, 1]) == "1.000"
    at, losses = np.array([10, 20, 30]), np.array([[1.0, 0.6, 0.5], [0.7, 0.7, 0.9], [1.0, 1.0, 1.0]])
    found = records.crossings(at, losses, 0.8)
    assert found[:2] == [pytest.approx(15), 10] and math.isnan(found[2])
    one = records.Found("x", 50, 5, 0.0, (10, None), at, np.array([[1.0, 0.6, 0.5], [0.9, 0.7, 0.5]]))
    assert one.plateaus == [pytest.approx(5), pytest.approx(10)] and one.middle == math.inf
