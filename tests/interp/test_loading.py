"""Getting a model by name: folders that were saved, names that ship, and names that nobody knows."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import interp as ip
from hooks.errors import InterpError, ModelError
from interp import loading
from interp.models import Transformer, TransformerConfig
from tests import zoo

HUB = [family for family in zoo.FAMILIES if not family.startswith("small")]


def ids() -> torch.Tensor:
    return torch.randint(1, zoo.VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))


def small_folder(path, **changes) -> Transformer:
    """A folder of the project's own kind, written by hand."""
    config = TransformerConfig(vocab_size=zoo.VOCAB, n_layers=2, d_model=16, n_heads=2, d_mlp=24, n_ctx=32)
    module = zoo.prepare(Transformer(config), dtype=torch.float32)
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "interp", **config.to_dict(), **changes}))
    save_file(module.state_dict(), path / "model.safetensors")
    return module


@pytest.mark.parametrize("family", HUB)
def test_a_folder_that_save_pretrained_wrote(tmp_path, family):
    """A model alone, without a tokenizer, is a model: prompts are then token ids."""
    module = zoo.make(family, dtype=torch.float32, widen=False)
    module.save_pretrained(tmp_path / "m")
    for name in (tmp_path / "m", str(tmp_path / "m")):
        model = ip.load(name)
        assert isinstance(model, ip.Model) and model.tokenizer is None and not model.module.training
        assert model.dtype == torch.float32 and model.n_layers == module.config.num_hidden_layers
        with torch.no_grad():
            assert torch.equal(model.run(model.inputs(ids())).logits, module(ids()).logits)


def test_with_its_tokenizer(stories, tmp_path):
    folder = tmp_path / "copy of stories"
    shutil.copytree(stories, folder)
    model = ip.load(folder)
    text = "Once upon a time, there was a little girl"
    inputs = model.inputs(text)
    assert "".join(inputs.tokens[0]) == f"<s> {text}"
    assert model.decode([model.token("she")]) == " she"
    assert not model.module.training and model.n_layers == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(tmp_path, dtype):
    zoo.make("llama", dtype=torch.float32, widen=False).save_pretrained(tmp_path / "m")
    model = ip.load(tmp_path / "m", dtype=dtype)
    assert all(p.dtype == dtype for p in model.module.parameters())
    assert model.run(model.inputs(ids())).logits.dtype == dtype
    zoo.make("llama", dtype=dtype, widen=False).save_pretrained(tmp_path / "saved")
    assert ip.load(tmp_path / "saved").dtype == dtype  # as it was saved, where nothing else is asked for


def test_a_folder_of_the_projects_own_kind(tmp_path):
    module = small_folder(tmp_path / "m")
    model = ip.load(tmp_path / "m")
    assert isinstance(model.module, Transformer) and model.module.config == module.config
    with torch.no_grad():
        assert torch.equal(model.run(model.inputs(ids())).logits, module(ids()))
    assert ip.load(tmp_path / "m", dtype=torch.float64).dtype == torch.float64


def test_names_that_ship(monkeypatch, tmp_path):
    for name in loading.shipped():
        model = ip.load(name)
        assert model.n_layers >= 1 and not model.module.training
        first = 4 if model.architecture.tower is not None else 1  # the ids before are its image's place and others
        assert torch.isfinite(model.run(model.inputs(torch.tensor([[first, first + 1]]))).logits).all()
    monkeypatch.setattr(loading, "SHIPPED", tmp_path)
    small_folder(tmp_path / "tiny-mini")
    (tmp_path / "not-a-model").mkdir()
    assert loading.shipped() == ("tiny-mini",)
    assert ip.load("tiny-mini").n_layers == 2
    with pytest.raises(ModelError, match="did you mean 'tiny-mini'"):
        ip.load("tiny-mni")


@pytest.mark.parametrize("name", ["gpt2-smol", "nobody/has-this-model", "./not/here", "ioi-mni", "a b"])
def test_names_that_nobody_knows(name):
    """Offline, as the tests are: the error says what there is, and what was tried."""
    with pytest.raises(ModelError) as caught:
        ip.load(name)
    assert repr(name) in str(caught.value)
    for known in loading.shipped():
        assert known in str(caught.value)
    if name == "ioi-mni" and "ioi-mini" in loading.shipped():
        assert "did you mean 'ioi-mini'" in str(caught.value)


def test_what_cannot_be_on_the_hub_is_not_asked_for(monkeypatch):
    """A path, and a mistyped name of ours, are errors at once; another name is not tried for half a minute."""
    monkeypatch.setattr(loading, "_load_hub", lambda *_, **__: pytest.fail("the hub was asked"))
    for name in ("./not/here", "/not/here", "a b", "ioi-mni", "smollm2-135", "~/model", "one/two/three", "x.y/"):
        with pytest.raises(ModelError, match="no name on the hub"):
            ip.load(name)


def test_a_hub_that_cannot_be_reached_is_found_out_at_once(monkeypatch):
    from huggingface_hub import constants

    tried = []

    def refuse(address, timeout):
        tried.append((address, timeout))
        raise OSError("no network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(loading.urllib.request, "getproxies", lambda: {})
    monkeypatch.setattr(loading.socket, "create_connection", refuse)
    with pytest.raises(ModelError, match="the hub cannot be reached from here"):
        ip.load("nobody/has-this-model")
    assert tried == [(("huggingface.co", 443), 3)]


def test_folders_that_hold_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name in (tmp_path / "empty", tmp_path / "file", ""):
        with pytest.raises(ModelError):
            ip.load(name)
    for name, text in (
        ("garbage", "{"),
        ("list", "[1]"),
        ("nothing", "{}"),
        ("unknown", '{"model_type": "no-such-family"}'),
        ("no weights", '{"model_type": "llama"}'),
        ("own, no weights", '{"model_type": "interp", "vocab_size": 5, "n_layers": 1, "d_model": 4, "n_heads": 1}'),
        ("own, no numbers", '{"model_type": "interp"}'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
        with pytest.raises(InterpError) as caught:
            ip.load(tmp_path / name)
        assert name in str(caught.value)


def test_a_folder_whose_weights_are_of_another_model(tmp_path):
    small_folder(tmp_path / "m", n_layers=3)
    with pytest.raises(InterpError):
        ip.load(tmp_path / "m")


def test_a_family_that_is_not_known(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError):
        ip.load(tmp_path / "m")
