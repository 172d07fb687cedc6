"""Activations of many prompts on disk: what a run gives, shard by shard, resumed, and never those of something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import interp as ip
from interp import activations
from tests import zoo

SITES = ["z", ip.site("resid_post", 1), "ln_final"]


def prompts(rows: int = 7) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, zoo.VOCAB, (3 + n % 4,), generator=generator).tolist() for n in range(rows)]


def save(model: ip.Model, path: Path, given: Any = None, **more: Any) -> ip.Activations:
    given = prompts() if given is None else given
    return ip.save_activations(model, given, SITES, path, rows_per_shard=3, progress=False, **more)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_a_run_gives(family: str, tmp_path: Path) -> None:
    model = zoo.wrapped(family)
    plan = ip.noise(ip.site("resid_pre", 0), 0.3)
    saved = save(model, tmp_path / "a", plan=plan, seed=4)
    whole = model.inputs(prompts())
    run = model.run(whole, plan, capture=SITES, seed=4)
    assert len(saved.shards) == 3
    assert len(saved) == int(whole.mask.sum())
    for place in [*(ip.site("z", n) for n in range(model.n_layers)), ip.site("resid_post", 1), ip.site("ln_final")]:
        want = run.tape[place][whole.mask]
        assert float(want.abs().max()) > 0.1
        assert bool(((saved[place] - want).abs() <= 1e-10).all())
        assert bool((torch.cat(list(saved.batches(place, 4))) == saved[place]).all())
    assert torch.equal(saved["token"], whole.ids[whole.mask])
    assert torch.equal(saved["pos"], whole.positions[whole.mask])
    assert torch.equal(saved["row"], whole.row_ids[:, None].expand_as(whole.ids)[whole.mask])
    mixed = torch.cat(list(saved.batches("ln_final", 5, seed=1)))
    assert not torch.equal(mixed, saved["ln_final"])
    assert torch.equal(mixed.sort(0).values, saved["ln_final"].sort(0).values)


def test_inputs_and_dtypes(tmp_path: Path) -> None:
    model = zoo.wrapped("llama")
    given = model.inputs(prompts(), row_ids=torch.arange(10, 17))
    saved = save(model, tmp_path, given, dtype=torch.bfloat16)
    assert saved["blocks.1.hook_resid_post"].dtype == torch.bfloat16
    assert saved["row"].unique().tolist() == list(range(10, 17))


def test_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, want = zoo.wrapped("llama"), save(zoo.wrapped("llama"), tmp_path / "whole")
    own, done = activations._shard, []

    def stops(*args: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return own(*args)

    monkeypatch.setattr(activations, "_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        save(model, tmp_path / "part")
    with pytest.raises(ip.ResultError, match="missing"):
        ip.Activations.open(tmp_path / "part")
    # A file that was cut off is written anew.
    first = tmp_path / "part" / "00000.safetensors"
    first.write_bytes(first.read_bytes()[:100])
    runs: list[int] = []
    monkeypatch.setattr(activations, "_shard", lambda *args: (runs.append(1), own(*args))[1])
    got = save(model, tmp_path / "part")
    assert len(runs) == 2
    assert torch.equal(got["ln_final"], want["ln_final"])
    save(model, tmp_path / "part")
    assert len(runs) == 2


def test_something_else_is_refused(tmp_path: Path) -> None:
    model = zoo.wrapped("llama")
    save(model, tmp_path / "a")
    with pytest.raises(ip.ResultError, match="differ in prompts"):
        save(model, tmp_path / "a", [*prompts()[:-1], [1, 2, 3]])
    with pytest.raises(ip.ResultError, match="differ in plan"):
        save(model, tmp_path / "a", plan=ip.zero(ip.site("z", 0)))
    with pytest.raises(ip.ResultError, match="weights"):
        save(ip.wrap(zoo.make("llama", seed=1)), tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("keep")
    with pytest.raises(ip.ResultError, match="no activations"):
        save(model, tmp_path / "b")
    with pytest.raises(ip.ResultError, match="no activations"):
        ip.Activations.open(tmp_path / "b")
    other = save(model, tmp_path / "c", plan=ip.zero(ip.site("z", 0)))
    other.shards[1].replace(tmp_path / "a" / "00001.safetensors")
    with pytest.raises(ip.ResultError, match="not of these activations"):
        ip.Activations.open(tmp_path / "a")


def test_what_cannot_be_written(tmp_path: Path) -> None:
    model = zoo.wrapped("llama")
    for place, word in ((ip.site("pattern", 0), "each token"), (ip.site("z", 0, head=1), "whole sites")):
        with pytest.raises(ip.ResultError, match=word):
            ip.save_activations(model, prompts(), place, tmp_path / "x", progress=False)
    with model.apply(ip.zero(ip.site("z", 0))):
        model.module(torch.ones(1, 3, dtype=torch.int64))
        with pytest.raises(ip.ResultError, match="is held"):
            save(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_capture_all() -> None:
    model = zoo.wrapped("gpt2")
    given = model.inputs(prompts(2))
    everything = model.run(given, capture="all").tape
    assert {place.key for place in everything} == set(model.sizes)
    assert len(list(everything)) == len(model.sizes)
    by_name = model.run(given, capture="z").tape
    (entry,) = [info for info in model.sites() if info.name == "z"]
    by_entry = model.run(given, capture=entry).tape
    for layer in range(model.n_layers):
        # Where scores are kept, too, attention is computed with its inside shown, which rounds differently.
        close = (by_name[ip.site("z", layer)] - everything[ip.site("z", layer)])[given.mask].abs() <= 1e-10
        assert bool(close.all())
        assert torch.equal(by_entry[ip.site("z", layer)], by_name[ip.site("z", layer)])
    some = model.run(given, capture=["mlp_out", ip.site("z", 0, head=1)]).tape
    assert len(list(some)) == model.n_layers + 1
    with pytest.raises(ip.SiteError, match="no site 'rot_q'"):
        model.run(given, capture="rot_q")
    with pytest.raises(ip.SiteError, match="did you mean"):
        model.run(given, capture="resid_pst")
