"""The command line: what it prints, what it writes, and how it refuses what cannot be right."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import interp as ip
from interp.cli import main, shipped_task

ROOT = Path(__file__).resolve().parents[2]
PAIR = [
    "--clean", "When Mary and John went to the store, John gave a book to",
    "--corrupt", "When Mary and John went to the store, Mary gave a book to",
    "--answer", "Mary", "--foil", "John",
]  # fmt: skip


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""
    try:
        code = main(arguments)
    except SystemExit as stopped:  # argparse
        code = int(stopped.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def changed(option: str, value: str | None) -> list[str]:
    """The good pair with one option's value changed, or left out."""
    at = PAIR.index(option)
    return [*PAIR[:at], *([] if value is None else [option, value]), *PAIR[at + 2 :]]


def test_as_a_program(tmp_path, monkeypatch, capsys):
    """`python -m interp`, from a folder that is not the repository; and its exit status where it fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "interp", "sites"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "resid_pre" in ended.stdout and "attn.hook_z" in ended.stdout
    monkeypatch.setattr(sys, "argv", ["interp", "sites", "--model", "ioi-mimi"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("interp", run_name="__main__")
    assert stopped.value.code == 2 and "ioi-mini" in capsys.readouterr().err


def test_without_a_command_it_explains_itself(capsys):
    code, out, _ = run(capsys)
    assert code == 2
    assert all(name in out for name in ("demo", "sites", "patch"))


@pytest.mark.parametrize("command", ["demo", "sites", "patch"])
def test_help(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0 and "--model" in out


def test_sites_as_json_are_what_the_model_offers(capsys):
    code, out, _ = run(capsys, "sites", "--json")
    assert code == 0
    listed = {entry["name"]: entry for entry in json.loads(out)}
    assert set(listed) == {row.name for row in ip.load("ioi-mini").sites()}
    assert listed["pattern"]["axes"] == ["B", "H", "T", "S"]


def test_patch_prints_the_effects_of_a_sweep(capsys):
    """Numbers of `patch --json` beside those of `ip.sweep` in a script."""
    code, out, _ = run(capsys, "patch", *PAIR, "--site", "z", "--axes", "layer,head", "--json")
    assert code == 0
    told = json.loads(out)
    model = ip.load("ioi-mini")
    clean, corrupt = model.inputs([PAIR[1]]), model.inputs([PAIR[3]])
    result = ip.sweep(
        model, clean, corrupt, ip.grid("z", layer="all", head="all"), metric=ip.logit_diff("Mary", "John")
    )
    grid = np.zeros(result.mean().shape)
    for cell in told["cells"]:
        grid[cell["layer"], cell["head"]] = cell["effect"]
    np.testing.assert_allclose(grid, result.mean(), atol=1e-5)
    assert np.abs(grid).max() > 1
    assert told["pairs"] == 1 and told["cells"][0]["low"] is None  # one pair has no interval
    assert told["base"] == pytest.approx(float(result.base.mean()), abs=1e-5)


def test_patch_prints_a_table(capsys):
    code, out, _ = run(capsys, "patch", *PAIR, "--top", "3")
    lines = out.strip().splitlines()
    assert code == 0 and len(lines) == 2 + 3  # what it is about, the header, and three rows
    assert lines[1].split()[:2] == ["layer", "pos"]


def test_patch_draws_saves_and_goes_on_from_what_it_saved(capsys, tmp_path):
    figure, saved = tmp_path / "sweep.png", tmp_path / "sweep"
    options = ["patch", *PAIR, "--figure", str(figure), "--save", str(saved), "--json"]
    code, first, _ = run(capsys, *options)
    assert code == 0 and figure.read_bytes().startswith(b"\x89PNG")
    assert ip.Result.load(saved).status.size == len(json.loads(first)["cells"])
    code, second, _ = run(capsys, *options)
    assert code == 0 and json.loads(second) == json.loads(first)


def test_noising_and_zero_are_other_questions(capsys):
    found = {}
    for name, options in {"denoising": [], "noising": ["--direction", "noising"], "zero": ["--zero"]}.items():
        code, out, _ = run(capsys, "patch", *PAIR, "--site", "z", "--axes", "layer,head", "--json", *options)
        assert code == 0
        found[name] = json.loads(out)
    assert found["noising"]["base"] == pytest.approx(found["denoising"]["source"])
    assert found["zero"]["base"] == pytest.approx(found["noising"]["base"]) and found["zero"]["source"] is None
    assert found["noising"]["cells"][0]["effect"] < 0 < found["denoising"]["cells"][0]["effect"]


def test_demo_writes_a_report_and_its_figures(capsys, tmp_path):
    code, out, _ = run(capsys, "demo", "--pairs", "8", "--out", str(tmp_path / "demo"))
    assert code == 0
    assert all(heading in out for heading in ("WHAT WAS ASKED", "WHAT WAS FOUND", "HOW SURE", "WHAT TO DO NEXT"))
    figures = sorted(path.name for path in (tmp_path / "demo").glob("*.png"))
    assert figures == ["attention.png", "blocks.png", "heads.png", "heads_ranked.png", "residual.png", "two_steps.png"]
    assert all(str(tmp_path / "demo" / name) in out for name in figures)


WRONG = {
    "no such command": (["pach"], "invalid choice"),
    "no such model": (["sites", "--model", "ioi-mimi"], "ioi-mini"),
    "no such device": (["sites", "--device", "quda"], "quda"),
    "no such site": (["patch", "--site", "resid_prr"], "resid_pre"),
    "no such axis": (["patch", *PAIR, "--axes", "layer,posn"], "pos"),
    "an axis the site lacks": (["patch", *PAIR, "--site", "mlp_out", "--axes", "layer,head"], "head"),
    "an answer missing": (["patch", *changed("--answer", None)], "--answer"),
    "clean without corrupt": (["patch", *changed("--corrupt", None)], "--corrupt"),
    "more clean than corrupt": (["patch", "--clean", "Mary", *PAIR], "2 times --clean"),
    "other lengths": (["patch", *changed("--corrupt", "When Mary and John went to the store, Mary gave to")], "13"),
    "a word the model lacks": (["patch", *changed("--answer", "Zebedee")], "Zebedee"),
    "an answer of two tokens": (["demo", *changed("--answer", "Mary John")], "Mary John"),
    "the same prompt twice": (["patch", *changed("--corrupt", PAIR[1])], "none of the 45 cells"),
    "an empty prompt": (["patch", *changed("--clean", "")], ""),
    "a negative number of rows": (["patch", *PAIR, "--top", "-3"], "-3"),
    "no type of figure": (["patch", *PAIR, "--figure", "{folder}/x.pmg"], "png"),
    "a figure without a type": (["patch", *PAIR, "--figure", "{folder}/x"], "no type"),
    "a figure that is a folder": (["patch", *PAIR, "--figure", "{folder}"], "that is a folder"),
    "a result that is a folder": (["patch", *PAIR, "--save", "{folder}"], "that is a folder"),
    "output below a file": (["patch", *PAIR, "--save", "{file}/x"], "not a folder"),
    "a demo into a file": (["demo", "--out", "{file}"], "that is a file"),
    "a file that is not there": (["sites", "--model", "{folder}/nothing.bin"], "nothing.bin"),
    "a path that is not there": (["sites", "--model", "./not/here"], "./not/here"),
    "no pairs": (["demo", "--pairs", "0"], "--pairs 0"),
    "not a number": (["demo", "--pairs", "many"], "many"),
    "prompts missing for another model": (["patch", "--model", "{folder}"], "--clean"),
    "a folder without a model": (["sites", "--model", "{folder}"], "config.json"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_refused_with_a_reason(capsys, tmp_path, name):
    arguments, hint = WRONG[name]
    file = tmp_path.parent / f"{tmp_path.name}.txt"
    file.write_text("x")
    code, out, err = run(capsys, *(a.format(folder=tmp_path, file=file) for a in arguments))
    assert code in (1, 2) and out == ""
    assert hint in err and "Traceback" not in err and len(err) < 1500
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["{folder}/x.pmg", "{file}/x.png"])
def test_where_nothing_can_be_written_nothing_is_run(capsys, tmp_path, monkeypatch, name):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr("interp.loading.load", lambda *_, **__: pytest.fail("the model was loaded first"))
    code, _, err = run(capsys, "patch", *PAIR, "--figure", name.format(folder=tmp_path, file=tmp_path / "file"))
    assert code == 2 and "--figure" in err


def test_an_interrupt_is_not_a_failure_of_the_program(capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("interp.loading.load", interrupted)
    code, _, err = run(capsys, "sites")
    assert code == 130 and "interrupted" in err


def test_the_shipped_task_means_the_same_by_a_position_in_every_pair():
    task = shipped_task(12)
    assert len(set(task.clean)) == 12
    assert len({len(prompt.split()) for prompt in (*task.clean, *task.corrupt)}) == 1
