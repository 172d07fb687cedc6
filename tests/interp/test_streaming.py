"""Sweeps that stream to disk: interrupted anywhere, resumed where they stopped, and never mixed with one another."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import interp as ip
from hooks.errors import InterpError, ResultError
from interp import streaming
from tests import zoo

ROOT = Path(__file__).resolve().parents[2]
METRIC = ip.logit_diff(7, 9)
GRID = ip.grid("z", layer="all", head="all")
CELLS, WORLDS = 8, 10  # the base and the base computed again are worlds too


@pytest.fixture
def model() -> ip.Model:
    return ip.wrap(zoo.make("gpt2"))


def prompts(model: ip.Model, seed: int = 0, rows: int = 3) -> tuple[ip.Inputs, ip.Inputs]:
    ids = torch.randint(1, zoo.VOCAB, (2, rows, 5), generator=torch.Generator().manual_seed(seed))
    return model.inputs(ids[0]), model.inputs(ids[1])


def run(model: ip.Model, path: Path | None, **options) -> ip.Result:
    clean, corrupt = options.pop("inputs", None) or prompts(model)
    if "intervention" in options:
        options = {"direction": "denoising", **options}
    return ip.sweep(model, clean, corrupt, options.pop("grid", GRID), **{"metric": METRIC, **options}, path=path)


@contextmanager
def counted(stop_at: int | None = None) -> Iterator[list[tuple[int, slice]]]:
    """Note every cell that is written to a stream; after `stop_at` of them it is interrupted."""
    written: list[tuple[int, slice]] = []
    original = streaming.Stream.write

    def write(self, values, cells: Sequence[int], rows: slice, status: Sequence[int]) -> None:
        room = len(cells) if stop_at is None else min(len(cells), stop_at - len(written))
        if room:
            original(self, values[:, :room], cells[:room], rows, status[:room])
            written.extend((cell, rows) for cell in cells[:room])
        if room < len(cells):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming.Stream, "write", write)
        yield written


def interrupt(model: ip.Model, path: Path, after: int = 4, **options) -> list[tuple[int, slice]]:
    with counted(after) as written, pytest.raises(KeyboardInterrupt):
        run(model, path, **options)
    assert len(written) == after
    return written


def same(a: ip.Result, b: ip.Result) -> None:
    for name in ("effect", "base", "source"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=0, atol=1e-10)
    np.testing.assert_array_equal(a.status, b.status)
    assert a.axes == b.axes and a.metrics == b.metrics and a.rows == b.rows
    assert np.abs(a.effect).max() > 1e-3


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Resuming


@pytest.mark.parametrize("executor", ["sequential", "batched", "shared"])
@pytest.mark.parametrize("after", [0, 1, 4, 9])
def test_an_interrupted_sweep_goes_on_where_it_stopped(model, tmp_path, executor, after):
    whole = run(model, None, executor=executor)
    done = interrupt(model, tmp_path / "z", after, executor=executor)
    assert not (tmp_path / "z.json").exists() and not (tmp_path / "z.safetensors").exists()
    with counted() as rest:
        result = run(model, tmp_path / "z", executor=executor)
    assert len(done) + len(rest) == WORLDS
    assert {cell for cell, _ in done} | {cell for cell, _ in rest} == set(range(WORLDS))
    same(result, whole)
    assert files(tmp_path) == ["z.json", "z.safetensors"]
    same(ip.Result.load(tmp_path / "z"), whole)


def test_interrupted_again_and_again_in_small_chunks(model, tmp_path):
    """With memory for a row at a time, what was computed is kept too, so that every attempt gets further."""
    whole = run(model, None)
    for attempt in range(20):
        try:
            with counted(4):
                result = run(model, tmp_path / "z", budget=1)
            break
        except KeyboardInterrupt:
            assert attempt < 15, "no progress"
    same(result, whole)
    assert files(tmp_path) == ["z.json", "z.safetensors"]


@pytest.mark.parametrize("after", [1, 11, 25])
def test_a_cell_of_which_some_rows_are_missing_is_not_done(model, tmp_path, after):
    interrupt(model, tmp_path / "z", after, budget=1)
    result = run(model, tmp_path / "z", budget=1)
    assert np.isfinite(result.effect).all()
    same(result, run(model, None))


def test_rows_that_were_done_one_by_one_do_not_stand_for_those_beside_them(model, tmp_path):
    """Begun a row at a time and gone on with all rows at once."""
    (*_, (cell, rows)) = interrupt(model, tmp_path / "z", 11, budget=1)
    assert (rows.start, rows.stop) != (0, 3) and cell < WORLDS
    result = run(model, tmp_path / "z")
    assert np.isfinite(result.effect).all()
    same(result, run(model, None))


def test_interrupted_in_the_middle_of_the_metric(model, tmp_path):
    calls = []

    def fussy(logits: torch.Tensor) -> torch.Tensor:
        calls.append(len(logits))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return logits[:, 0, 7]

    metric = ip.metric(fussy, ip.site("logits", pos=-1))
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "z", metric=metric)
    result = run(model, tmp_path / "z", metric=metric)
    assert len(calls) == 6 + (WORLDS - 5) + 1  # five were done; the last call measures the source
    expected = run(model, None, metric=ip.logit(7))
    np.testing.assert_allclose(result.effect, expected.effect, rtol=0, atol=1e-10)


def test_all_but_the_result_was_written(model, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ip.Result, "save", lambda self, path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "z")
    with counted() as written:
        result = run(model, tmp_path / "z")
    assert written == []
    same(result, run(model, None))
    assert files(tmp_path) == ["z.json", "z.safetensors"]


def test_interrupted_while_the_folder_was_made(model, tmp_path):
    """Whatever is missing of it, the sweep starts over."""
    interrupt(model, tmp_path / "z")
    (tmp_path / "z.partial" / "header.json").unlink()
    with counted() as written:
        same(run(model, tmp_path / "z"), run(model, None))
    assert len([w for w in written if w]) >= WORLDS
    (tmp_path / "y.partial").mkdir()
    same(run(model, tmp_path / "y"), run(model, None))


def test_in_another_process(tmp_path, monkeypatch, capsys):
    """What a sweep is known by does not depend on the process: hashes, addresses, the order of a dict."""
    monkeypatch.setattr(streaming.Stream, "write", streaming.Stream.write)  # which the script replaces
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path / "r"), "go"])
    script = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
import interp as ip
from interp import streaming
from tests import zoo

model = ip.wrap(zoo.make("small_ln_learned"))
ids = torch.arange(1, 31).reshape(2, 3, 5)
v = torch.ones(32, dtype=torch.float64)

def outer(scale):
    def add(x, ctx):
        return (lambda y: y + scale * v)(x)
    return lambda site: ip.intervene(site, add)

writes, original = [], streaming.Stream.write
def write(self, values, cells, rows, status):
    room = 2 if sys.argv[2] == "stop" else len(cells)
    original(self, values[:, :room], cells[:room], rows, status[:room])
    writes.extend(cells[:room])
    if room < len(cells):
        raise KeyboardInterrupt
streaming.Stream.write = write
try:
    ip.sweep(model, model.inputs(ids[0]), None, ip.grid("resid_post", layer="all", pos="all"), metric=ip.logit(3),
             intervention=outer(2.0), path=sys.argv[1])
except KeyboardInterrupt:
    pass
print(len(writes))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "r"), "stop"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1"},
    )
    assert done.returncode == 0 and int(done.stdout) == 2, done.stderr
    exec(compile(script, "<string>", "exec"), {"__name__": "__main__"})  # here, where hashes are others
    assert int(capsys.readouterr().out) == 10
    assert files(tmp_path) == ["r.json", "r.safetensors"]


def test_without_a_path_nothing_is_written(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(model, None)
    with counted(3), pytest.raises(KeyboardInterrupt):
        run(model, None)
    assert files(tmp_path) == []


@pytest.mark.parametrize("name", ["z", "z.json", "z.safetensors", "z.v2", "deep/er/z"])
def test_where_the_files_are(model, tmp_path, name):
    interrupt(model, tmp_path / name)
    run(model, tmp_path / name)
    stem = name.removesuffix(".json").removesuffix(".safetensors")
    assert [f for f in files(tmp_path) if "." in f] == [f"{stem}.json", f"{stem}.safetensors"]
    same(ip.Result.load(tmp_path / name), run(model, None))


def test_a_finished_sweep_is_known_again(model, tmp_path):
    first = run(model, tmp_path / "z")
    before = contents(tmp_path)
    (tmp_path / "z.partial").mkdir()  # of a sweep that was killed after it had saved, and before it could tidy up
    (tmp_path / "z.partial" / "header.json").write_text(json.dumps({"identity": first.config["identity"]}))
    with counted() as written:
        again = run(ip.wrap(zoo.make("gpt2")), tmp_path / "z", budget=100_000, progress=False)
    assert written == []
    same(again, first)
    assert again.config == first.config and contents(tmp_path) == before


def test_what_is_no_result_of_a_sweep_is_left_alone(model, tmp_path):
    (tmp_path / "a.json").write_text('{"notes": "mine"}')
    (tmp_path / "b.safetensors").write_bytes(b"weights of mine")
    run(model, None).save(tmp_path / "c")  # by hand
    run(model, tmp_path / "d")
    (tmp_path / "d.safetensors").unlink()
    before = contents(tmp_path)
    for name in ("a", "b", "c", "d"):
        with pytest.raises(ResultError, match="Delete it, or give another path"):
            run(model, tmp_path / name)
    assert contents(tmp_path) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder) if (folder / name).is_file()}


# What does not belong together


def changed_weights(model: ip.Model) -> dict:
    with torch.no_grad():
        model.module.transformer.h[1].mlp.c_proj.weight[0, 0] += 1e-9
    return {}


def changed_norm(model: ip.Model) -> dict:
    model.module.transformer.ln_f.eps *= 10
    return {}


def hooked(model: ip.Model) -> dict:
    model.module.transformer.ln_f.register_forward_hook(lambda module, args, out: 2 * out)
    return {}


CHANGES: dict[str, tuple[Callable[[ip.Model], dict], str]] = {
    "weights": (changed_weights, "weights"),
    "base inputs": (lambda m: {"inputs": (prompts(m)[0], prompts(m, 1)[1])}, "inputs"),
    "source inputs": (lambda m: {"inputs": (prompts(m, 1)[0], prompts(m)[1])}, "source"),
    "direction": (lambda m: {"direction": "noising"}, "inputs"),
    "other heads": (lambda m: {"grid": ip.grid("z", layer="all", head=[0, 1, 3, 2])}, "plan"),
    "another site": (lambda m: {"grid": ip.grid("q", layer="all", head="all")}, "plan"),
    "intervention": (lambda m: {"intervention": ip.zero}, "plan"),
    "seed": (lambda m: {"seed": 1}, "seed"),
    "metric": (lambda m: {"metric": ip.logit_diff(7, 8)}, "metric"),
    "position": (lambda m: {"metric": ip.logit_diff(7, 9, pos=-2)}, "metric"),
    "kind of metric": (lambda m: {"metric": ip.log_prob(7)}, "metric"),
    "number of cells": (lambda m: {"grid": ip.grid("z", layer="all", head=[0, 1])}, "plan"),
    "number of metrics": (lambda m: {"metric": [METRIC, ip.logit(1)]}, "metric"),
    "executor": (lambda m: {"executor": "sequential"}, "executor"),
    "axes": (lambda m: {"grid": ip.grid("z", layer="all", head={f"h{n}": n for n in range(4)})}, "grid"),
    "several metrics": (lambda m: {"metric": [METRIC]}, "metric"),
    "epsilon of a norm": (changed_norm, "model"),
    "a hook of the user's": (hooked, "model"),
    "number of rows": (lambda m: {"inputs": prompts(m, 0, 4)}, "inputs"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("how", ["interrupted", "finished"])
def test_another_sweep_is_refused_by_name(model, tmp_path, change, how):
    if how == "interrupted":
        interrupt(model, tmp_path / "z")
    else:
        run(model, tmp_path / "z")
    before, place = contents(tmp_path), "z.partial" if how == "interrupted" else "z.json"
    options, named = CHANGES[change][0](model), CHANGES[change][1]
    with pytest.raises(ResultError) as caught:
        run(model, tmp_path / "z", **options)
    assert named in str(caught.value) and place in str(caught.value) and "Delete it" in str(caught.value)
    assert contents(tmp_path) == before, "what was there is lost"


def test_buffers_are_weights_too(tmp_path):
    model = ip.wrap(zoo.make("llama"))
    interrupt(model, tmp_path / "z")
    model.module.model.rotary_emb.inv_freq.mul_(1.0 + 1e-6)
    with pytest.raises(ResultError, match="weights"):
        run(model, tmp_path / "z")


def own(column: int, name: str = "own") -> ip.Metric:
    return ip.metric(lambda x: x[:, 0, column], ip.site("logits", pos=-1), name=name)


def weighted(weights: torch.Tensor) -> ip.Metric:
    return ip.metric(lambda x: x[:, 0] @ weights, ip.site("logits", pos=-1), name="weighted")


IDS: Any = [3, 4]
LAST = ip.site("logits", pos=-1)


def picked(ids: Any) -> ip.Metric:
    return ip.metric(lambda x: x[:, 0, list(ids)].mean(-1), LAST, name="picked")


def nested(ids: Any) -> ip.Metric:
    def inner(x):
        return [x[:, 0, i] for i in ids]

    return ip.metric(lambda x: torch.stack(inner(x)).mean(0), LAST, name="picked")


def taken(x: torch.Tensor, ids: Any) -> torch.Tensor:
    return x[:, 0, ids].mean(-1)


def partially(ids: Any) -> ip.Metric:
    return ip.metric(functools.partial(taken, ids=ids), LAST, name="picked")


def by_default(ids: Any) -> ip.Metric:
    def fn(x, ids=ids):
        return x[:, 0, ids].mean(-1)

    return ip.metric(fn, LAST, name="picked")


class Picker:
    def __init__(self, ids: Any) -> None:
        self.ids = ids

    def fn(self, x):
        return x[:, 0, self.ids].mean(-1)


def of_an_object(ids: Any) -> ip.Metric:
    return ip.metric(Picker(ids).fn, LAST, name="picked")


def own_bind(ids: Any) -> ip.Metric:
    return ip.Metric("picked", lambda model, inputs: ip.metrics.Bound((LAST,), lambda rows, x: x[:, 0, ids].mean(-1)))


def reads_globals(x: torch.Tensor) -> torch.Tensor:
    return called_by_name(x) + 0 * x[:, 0, 0]


def called_by_name(x: torch.Tensor) -> torch.Tensor:
    return x[:, 0, IDS].mean(-1)


@pytest.mark.parametrize("value", [[8, 9], np.array([8, 9]), torch.tensor([8, 9])], ids=["list", "numpy", "torch"])
def test_globals_that_a_function_reads_by_name(model, tmp_path, monkeypatch, value):
    """Also those of functions that it calls by name."""
    metric = ip.metric(reads_globals, LAST)
    interrupt(model, tmp_path / "z", metric=metric)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "IDS", value)
        with pytest.raises(ResultError, match="metric"):
            run(model, tmp_path / "z", metric=metric)
    run(model, tmp_path / "z", metric=metric)


@pytest.mark.parametrize(
    "metrics",
    [
        lambda clean, corrupt: (ip.log_prob(7), ip.log_prob(8)),
        lambda clean, corrupt: (ip.prob(7), ip.prob(8)),
        lambda clean, corrupt: (ip.rank(7), ip.rank(8)),
        lambda clean, corrupt: (ip.log_prob([7, 8, 9]), ip.log_prob([7, 9, 8])),
        lambda clean, corrupt: (ip.logit_diff([[7, 8]] * 3, 9), ip.logit_diff(7, [[8, 9]] * 3)),
        lambda clean, corrupt: (ip.kl(ip.World(clean)), ip.kl(ip.World(corrupt))),
        lambda clean, corrupt: (ip.kl(ip.World(clean)), ip.kl(ip.World(clean, ip.zero("blocks.0.attn.hook_z")))),
        lambda clean, corrupt: (ip.kl(), ip.kl(ip.World(corrupt))),
        lambda clean, corrupt: (own(1), own(2)),
        lambda clean, corrupt: (weighted(torch.ones(50).double()), weighted(torch.arange(50).double())),
        lambda clean, corrupt: (picked([3, 4]), picked([8, 9])),
        lambda clean, corrupt: (picked(np.array([3, 4])), picked(np.array([8, 9]))),
        lambda clean, corrupt: (picked(range(3, 5)), picked(range(8, 10))),
        lambda clean, corrupt: (nested([3, 4]), nested([8, 9])),
        lambda clean, corrupt: (partially([3, 4]), partially([8, 9])),
        lambda clean, corrupt: (by_default([3, 4]), by_default([8, 9])),
        lambda clean, corrupt: (of_an_object([3, 4]), of_an_object([8, 9])),
        lambda clean, corrupt: (own_bind([3, 4]), own_bind([8, 9])),
    ],
    ids=[
        "log_prob",
        "prob",
        "rank",
        "rows",
        "answers",
        "kl",
        "kl-plan",
        "kl-source",
        "own",
        "own-weights",
        "list",
        "numpy",
        "range",
        "nested",
        "partial",
        "default",
        "method",
        "bind",
    ],
)
def test_metrics_that_read_the_same_are_not_the_same(model, tmp_path, metrics):
    """The file knows what was measured, not only what was read: no result is half of one metric, half of another."""
    first, second = metrics(*prompts(model))
    interrupt(model, tmp_path / "z", metric=first)
    with pytest.raises(ResultError, match="metric"):
        run(model, tmp_path / "z", metric=second)
    run(model, tmp_path / "z", metric=first)


def test_functions_that_differ_in_what_they_close_over(model, tmp_path):
    one, other = torch.zeros(5000, dtype=torch.float64), torch.zeros(5000, dtype=torch.float64)
    one[2500], other[2500] = 1.0, 2.0  # in the middle, which printing a tensor leaves out

    def add(values: torch.Tensor):
        return lambda site: ip.intervene(site, lambda x, ctx: x + values[2500])

    interrupt(model, tmp_path / "z", intervention=add(one))
    with pytest.raises(ResultError, match="plan"):
        run(model, tmp_path / "z", intervention=add(other))

    def scale(x: torch.Tensor, ctx, factor: float) -> torch.Tensor:
        return factor * x

    def scaled(factor: float):
        return lambda site: ip.intervene(site, functools.partial(scale, factor=factor))

    interrupt(model, tmp_path / "y", intervention=scaled(2.0))
    with pytest.raises(ResultError, match="plan"):
        run(model, tmp_path / "y", intervention=scaled(3.0))

    def shifted(by: float):
        def shift(x: torch.Tensor, ctx, by: float = by) -> torch.Tensor:
            return x + by

        return lambda site: ip.intervene(site, shift)

    interrupt(model, tmp_path / "x", intervention=shifted(2.0))
    with pytest.raises(ResultError, match="plan"):
        run(model, tmp_path / "x", intervention=shifted(3.0))


def test_the_same_sweep_stated_again(model, tmp_path):
    """Equal values in other objects are the same sweep: a script that is run again states everything anew."""
    vector = torch.arange(32).double()
    interrupt(
        model,
        tmp_path / "z",
        intervention=lambda s: ip.steer(s.whole, vector),
        grid=ip.grid("attn_out", layer="all", dim=[0, 1]),
    )
    again = [torch.arange(32).double() for _ in range(2)]
    with counted() as written:
        run(
            ip.wrap(zoo.make("gpt2")),
            tmp_path / "z",
            intervention=lambda s: ip.steer(s.whole, again[s.layer]),
            grid=ip.grid("attn_out", layer="all", dim=[0, 1]),
            budget=50_000,
        )
    assert len({cell for cell, _ in written}) == 2


# Folders that are broken


@pytest.mark.parametrize("name", ["header.json", "values.npy", "status.npy", "done.npy"])
@pytest.mark.parametrize("damage", ["garbage", "empty", "missing", "other"])
def test_a_damaged_folder_is_refused_or_started_over(model, tmp_path, name, damage):
    interrupt(model, tmp_path / "z")
    target = tmp_path / "z.partial" / name
    if damage == "missing":
        target.unlink()
    elif name == "header.json":
        target.write_text({"garbage": "{not json", "empty": "", "other": "[1, 2]"}[damage])
    elif damage == "other":
        np.save(target, np.zeros((1, 2, 3)))
    else:
        target.write_bytes(b"" if damage == "empty" else b"garbage")
    try:
        result = run(model, tmp_path / "z")
    except ResultError as error:
        assert "z.partial" in str(error)  # noqa: PT017 - either is right: a clear refusal, or the whole sweep again
        return
    same(result, run(model, None))
    same(ip.Result.load(tmp_path / "z"), result)


def test_a_place_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").write_text("a file of the user's")
    (tmp_path / "y.partial").write_text("another")
    for path in (tmp_path / "file" / "z", tmp_path / "y"):
        with pytest.raises((InterpError, OSError)) as caught:
            run(model, path)
        assert str(path) in str(caught.value)
    assert (tmp_path / "file").read_text() == "a file of the user's"
    assert (tmp_path / "y.partial").read_text() == "another"
    assert not any(m._forward_hooks for m in model.module.modules())


def test_a_file_of_the_users_in_the_folder_is_left(model, tmp_path):
    interrupt(model, tmp_path / "z")
    (tmp_path / "z.partial" / "notes.txt").write_text("mine")
    same(run(model, tmp_path / "z"), run(model, None))
    assert (tmp_path / "z.partial" / "notes.txt").read_text() == "mine"
    assert files(tmp_path) == ["z.json", "z.partial", "z.partial/notes.txt", "z.safetensors"]


def test_an_error_leaves_an_old_result_as_it_was(model, tmp_path):
    run(model, tmp_path / "z")
    before = (tmp_path / "z.json").read_bytes(), (tmp_path / "z.safetensors").read_bytes()
    with pytest.raises(InterpError):
        run(model, tmp_path / "z", direction="sideways")
    with pytest.raises(ResultError):
        run(model, tmp_path / "z", metric=ip.logit(3))
    assert before == ((tmp_path / "z.json").read_bytes(), (tmp_path / "z.safetensors").read_bytes())


def test_a_plan_that_is_held_belongs_to_the_sweep(model, tmp_path):
    plan = ip.scale(ip.site("resid_post", 0), 0.5)
    with model.apply(plan):
        interrupt(model, tmp_path / "z")
    with pytest.raises(ip.InterpError, match="differs in held"):
        run(model, tmp_path / "z")
    with model.apply(plan):
        result, whole = run(model, tmp_path / "z"), run(model, None)
    same(result, whole)
    assert np.abs(result.effect - run(model, None).effect).max() > 1e-3


def test_the_header_says_what_the_numbers_depend_on(model, tmp_path):
    interrupt(model, tmp_path / "z")
    header = json.loads((tmp_path / "z.partial" / "header.json").read_text())
    assert header["shape"] == [1, WORLDS, 3]
    assert {"weights", "inputs", "source", "plan", "metrics", "seed"} <= set(header["identity"])
    result = run(model, tmp_path / "z")
    assert result.config["identity"]["weights"] == header["identity"]["weights"]
