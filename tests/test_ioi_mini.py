"""The model that ships with the package: it loads without a network, is small, and does what its study says."""

from __future__ import annotations

import hashlib
import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import interp as ip
from experiments.ioi_mini import train as study
from experiments.ioi_mini.evaluate import accuracies, correct
from hooks.errors import InterpError
from interp.models import WordTokenizer
from interp.models.english import INDIRECT_OBJECT, SPLITS, TASKS, Example, indirect_object, vocabulary

SMALLEST = replace(study.Settings(), steps=20, batch=16, warmup=5)


@pytest.fixture(scope="module")
def model() -> ip.Model:
    return ip.load("ioi-mini")


@pytest.fixture(scope="module")
def results() -> dict:
    return json.loads((study.STUDY / "results.json").read_text())


# What ships


def test_it_loads_without_a_network(monkeypatch):
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("loading a shipped model reached for the network")

    monkeypatch.setattr(socket, "socket", refuse)
    loaded = ip.load("ioi-mini")
    assert not loaded.module.training
    assert loaded.tokenizer.words[1:] == vocabulary()


def test_it_loads_from_its_folder_too(model):
    other = ip.load(study.SHIPPED)
    assert other.tokenizer.words == model.tokenizer.words
    for a, b in zip(model.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_folder_without_a_tokenizer_loads_without_one(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((study.SHIPPED / name).read_bytes())
    assert ip.load(tmp_path).tokenizer is None


def test_a_name_close_to_it_says_so():
    with pytest.raises(InterpError, match="did you mean 'ioi-mini'"):
        ip.load("ioi-mimi")


def test_it_is_small_and_has_attention_and_mlps(model):
    files = {path.name: path.stat().st_size for path in study.SHIPPED.iterdir()}
    assert files.keys() == {"config.json", "model.safetensors", "tokenizer.json"}
    assert sum(files.values()) < 2_000_000
    assert model.dtype == torch.float32
    assert 2 < model.n_layers < 5
    assert model.module.config.d_mlp is not None


def test_prompts_read_well(model):
    prompt = "When Mary and John went to the store, John gave a drink to"
    inputs = model.inputs(prompt)
    assert inputs.tokens is not None
    assert inputs.tokens[0][:4] == ("<s>", " When", " Mary", " and")
    assert model.decode(inputs.ids[0].tolist()) == f"<s> {prompt}"
    said = model.run(inputs).logits[0, -1]
    assert model.decode([int(said.argmax())]) == " Mary"
    assert model.token("Mary") == model.token(" Mary") == int(said.argmax())


def test_an_unknown_word_is_named(model):
    with pytest.raises(InterpError, match="'shop' is not a word of this model"):
        model.inputs("When Mary went to the shop")


# What it can do


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_it_is_right_on_what_it_never_saw(model, task, split):
    """Measured afresh, on other examples than those of the study."""
    n = 200
    assert correct(model, TASKS[task](n, 20, split)) >= 0.99 * 2 * n


@pytest.mark.parametrize("order", ["ABBA", "BABA"])
@pytest.mark.parametrize("template", INDIRECT_OBJECT[::50])
def test_it_is_right_in_both_orders(model, template, order):
    assert correct(model, indirect_object(50, 21, "names", template=template, order=order)) >= 98


def test_the_check_can_fail(model):
    swapped = [
        Example(x.clean, x.corrupt, x.foil, x.answer, x.text)
        for split in SPLITS
        for x in indirect_object(50, 22, split)
    ]
    assert correct(model, swapped) < 10


def test_patching_the_corrupt_word_restores_the_answer(model):
    """Sentences of one template align, so a sweep can be read position by position."""
    pairs = indirect_object(16, 23, template=INDIRECT_OBJECT[0], order="ABBA")
    clean, corrupt = model.inputs([x.clean for x in pairs]), model.inputs([x.corrupt for x in pairs])
    metric = ip.logit_diff([x.answer for x in pairs], [x.foil for x in pairs])
    result = ip.sweep(model, clean, corrupt, ip.grid("resid_pre", layer=[0], pos="all"), metric=metric)
    restored = result.normalized()[0]
    changed = int((clean.ids[0] != corrupt.ids[0]).nonzero())
    assert restored[changed] == pytest.approx(1, abs=1e-4)
    assert abs(restored).sum() == pytest.approx(1, abs=1e-3)


# What the study says


def test_the_results_are_those_of_the_shipped_weights(results, model):
    weights = (study.SHIPPED / "model.safetensors").read_bytes()
    assert results["sha256"] == hashlib.sha256(weights).hexdigest()
    assert results["bytes"] == len(weights)
    assert results["parameters"] == sum(p.numel() for p in model.module.parameters())
    assert results["vocabulary"] == len(model.tokenizer)
    assert results["settings"] == json.loads(json.dumps(study.asdict(study.Settings())))


def test_the_results_meet_the_claim(results):
    assert results["accuracy"].keys() == TASKS.keys()
    for splits in results["accuracy"].values():
        assert splits.keys() == set(SPLITS)
        for found in splits.values():
            assert found["of"] >= 1000
            assert found["accuracy"] == found["right"] / found["of"] >= 0.99


@pytest.mark.slow
def test_the_results_can_be_measured_again(results, model):
    settings = results["settings"]
    again = accuracies(model, settings["evaluate_pairs"], settings["evaluate_seed"])
    for task, splits in results["accuracy"].items():
        for split, found in splits.items():
            # A near-tie may turn on how another machine rounds.
            assert abs(again[task][split]["right"] - found["right"]) <= 2


def test_the_readme_has_the_numbers(results):
    readme = (study.STUDY / "README.md").read_text()
    for task, splits in results["accuracy"].items():
        cells = " | ".join(f"{splits[split]['accuracy']:.2%}" for split in SPLITS)
        assert f"| `{task}` | {cells} |" in readme
    assert f"{results['bytes']:,} bytes" in readme
    assert f"{results['parameters']:,} parameters" in readme


# Training


def test_training_twice_gives_the_same_weights():
    tokenizer = WordTokenizer(vocabulary())
    torch.manual_seed(1)
    first, losses = study.train(SMALLEST, tokenizer, progress=False)
    torch.manual_seed(2)
    second, _ = study.train(SMALLEST, tokenizer, progress=False)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert losses[-1] < losses[0]
    other, _ = study.train(replace(SMALLEST, seed=1), tokenizer, progress=False)
    assert not torch.equal(first.unembed.weight, other.unembed.weight)


def test_training_leaves_torch_as_it_was():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    study.train(replace(SMALLEST, steps=1), WordTokenizer(vocabulary()), progress=False)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_a_quick_run_writes_a_model_that_loads(tmp_path, capsys):
    shipped = digests(study.SHIPPED)
    found = study.main(["--quick", "--steps", "3", "--out", str(tmp_path / "model")])
    assert "bytes of weights" in capsys.readouterr().out
    loaded = ip.load(tmp_path / "model")
    assert loaded.run(loaded.inputs("Mary went home.")).logits.shape == (1, 5, len(vocabulary()) + 1)
    assert sorted(digests(tmp_path / "model")) == ["config.json", "model.safetensors", "results.json", "tokenizer.json"]
    assert json.loads((tmp_path / "model" / "results.json").read_text()) == found
    assert digests(study.SHIPPED) == shipped


def test_an_interrupted_run_leaves_the_files_as_they_were(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    study.main(["--quick", "--steps", "2", "--out", str(folder)])
    before = digests(folder)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "accuracies", interrupt)
    with pytest.raises(KeyboardInterrupt):
        study.main(["--quick", "--steps", "3", "--out", str(folder)])
    assert digests(folder) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "1"], "give --out FOLDER"),
        (["--steps", "3"], "give --out FOLDER"),
        (["--steps", "0", "--out", "nowhere"], "--steps must be positive; got 0"),
    ],
)
def test_other_settings_do_not_replace_what_ships(arguments, message, capsys):
    shipped = digests(study.SHIPPED)
    with pytest.raises(SystemExit) as left:
        study.main(arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err
    assert digests(study.SHIPPED) == shipped


def test_the_learning_rate_rises_then_falls():
    settings = study.Settings()
    rates = [study.schedule(step, settings) for step in range(settings.steps)]
    assert rates[0] == pytest.approx(1 / settings.warmup)
    assert max(rates) == 1.0 and rates.index(1.0) in (settings.warmup - 1, settings.warmup)
    assert rates[-1] < 1e-4
