"""Models whose linear layers are not plain: adapters of peft's, quantised layers; and classifiers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hooks as hk
from experiments.families.models import FAMILIES
from hooks import Model, World, site
from tests import zoo

IDS = [[3, 9, 27, 31, 44, 12, 8], [5, 6, 40, 2]]
EXECUTORS = ("sequential", "batched", "shared")


def agree(model: Model, plain: Model, atol: float = 2e-4) -> None:
    """Edits at every kind of site are those of a model of plain layers that computes the same, in every executor."""
    x, other = (m.inputs(IDS, padding="left") for m in (model, plain))
    assert {s.name for s in model.sites()} == {s.name for s in plain.sites()}
    kinds = [s.name for s in model.sites() if s.layers]
    edits = [edited(plain, name) for name in kinds if name != "scores"]
    wanted = [plain.run(other, edit).logits for edit in edits]
    clean = plain.run(other).logits
    assert all(float((w - clean)[x.mask].abs().max()) > 1e-4 for w in wanted)
    assert hk.choose(model, [World(x)]).executor == "shared"
    for executor in EXECUTORS:
        worlds = [World(x, hk.as_plan(edit)) for edit in edits]
        for outcome in hk.run_worlds(model, worlds, [site("logits")], executor=executor):
            torch.testing.assert_close(
                outcome.values[0][x.mask], wanted[outcome.index][x.mask], rtol=0.0, atol=atol,
                msg=lambda t, e=executor, i=outcome.index: f"{e}, {edits[i]}: {t}",
            )  # fmt: skip


def edited(model: Model, name: str) -> hk.Intervention:
    where = site(name, 1, pos=1)
    return hk.scale(where, 0.3) if name == "pattern" else hk.steer(where, torch.linspace(-1, 2, _width(model, where)))


def _width(model: Model, where: hk.Site) -> int:
    return model.sizes[where.key]["dim"]


def randomised(module: Any) -> Any:
    for name, p in module.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.2)
    return module.eval()


@pytest.mark.parametrize("name", ["Phi-3", "GPT-2"])
def test_low_rank_adapters_of_peft(name):
    peft = pytest.importorskip("peft")
    targets = {"Phi-3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], "GPT-2": ["c_attn", "c_proj", "c_fc"]}
    config = peft.LoraConfig(r=4, target_modules=targets[name], lora_dropout=0.1)
    adapted = randomised(peft.get_peft_model(FAMILIES[name].make(), config))
    model = hk.wrap(adapted)
    assert model.module is adapted.get_base_model()
    with torch.no_grad():
        logits = adapted(input_ids=torch.tensor(IDS[:1])).logits
    torch.testing.assert_close(model.run(model.inputs(IDS[:1])).logits, logits)
    # A call of the user's own model is under the plan.
    with model.apply(hk.zero(site("z", 1))) as audit, torch.no_grad():
        held = adapted(input_ids=torch.tensor(IDS[:1])).logits
        adapted.generate(input_ids=torch.tensor(IDS[:1]), max_new_tokens=2, pad_token_id=0)
    assert audit[0].status == "fired" and float((held - logits).abs().max()) > 1e-3
    again = randomised(peft.get_peft_model(FAMILIES[name].make(), config))
    again.load_state_dict(adapted.state_dict())
    agree(model, hk.wrap(again.merge_and_unload().eval()))


def test_an_adapter_that_is_switched_off():
    peft = pytest.importorskip("peft")
    adapted = randomised(peft.get_peft_model(FAMILIES["Phi-3"].make(), peft.LoraConfig(target_modules=["o_proj"])))
    model, bare = hk.wrap(adapted), hk.wrap(FAMILIES["Phi-3"].make())
    x, reads = model.inputs(IDS), [site("logits", pos=-1)]
    for executor in EXECUTORS:
        with adapted.disable_adapter():
            (off,) = hk.run_worlds(model, [World(x)], reads, executor=executor)
        torch.testing.assert_close(off.values[0][:, 0], bare.run(bare.inputs(IDS)).logits[[0, 1], [6, 3]])
        (on,) = hk.run_worlds(model, [World(x)], reads, executor=executor)
        assert float((on.values[0] - off.values[0]).abs().max()) > 1e-3


def test_tokens_before_the_prompt_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(hk.ModelError, match="puts tokens before the prompt"):
        hk.wrap(peft.get_peft_model(FAMILIES["Phi-3"].make(), config))


class EightBit(nn.Module):
    """A linear layer that keeps whole numbers and a scale for each output, and shows no weight."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = inner.in_features, inner.out_features
        scale = inner.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("packed", (inner.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if inner.bias is None else inner.bias.detach())

    def dense(self) -> Tensor:
        return self.packed * self.scale  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense(), self.bias)  # type: ignore[arg-type]


def put_in(module: nn.Module, make: Any) -> nn.Module:
    for part in list(module.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, nn.Linear):
                setattr(part, name, make(child))
    return module.eval()


def rounded(inner: nn.Linear) -> nn.Linear:
    with torch.no_grad():
        inner.weight.copy_(EightBit(inner).dense())
    return inner


@pytest.mark.parametrize("name", ["Llama", "Phi-3"])
def test_layers_that_show_no_weight(name):
    """Every linear layer, the unembedding included: what addresses heads in a weight runs the layer on each head."""
    model = hk.wrap(put_in(FAMILIES[name].make(), EightBit))
    plain = hk.wrap(put_in(FAMILIES[name].make(), rounded))
    agree(model, plain)
    x = model.inputs(IDS)
    columns = site("logits", pos=-1, dim=(3, 7))
    (outcome,) = hk.run_worlds(model, [World(x)], [columns], executor="shared")
    torch.testing.assert_close(outcome.values[0], plain.run(x, capture=columns).tape[columns])


def test_what_needs_the_weight_itself_names_the_class():
    import interp as ip

    model = ip.wrap(put_in(FAMILIES["Llama"].make(), EightBit))
    with pytest.raises(hk.ModelError, match=r"test_adapted_layers\.EightBit is something else"):
        ip.direct_logit_attribution(model, model.inputs(IDS), answer=3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["Llama", "BERT, tokens", "CLIP, images", "T5"])
def test_layers_whose_scale_is_that_of_all_rows(name):
    """What they make of a row depends on the rows beside it, so worlds are not put beside one another."""
    quantised = torch.ao.quantization.quantize_dynamic(FAMILIES[name].make(), {nn.Linear}, dtype=torch.qint8)
    model = hk.wrap(quantised)
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 16, 16, generator=draw)
    x = model.inputs(images if model.architecture.images else [row[:4] for row in IDS])
    worlds = [World(x, hk.as_plan(hk.scale(site("z", layer, head=1), 3.0))) for layer in (0, 1)]
    end = model.architecture.end
    plain, wanted = model.run(x).output, [model.run(world).output for world in worlds]
    assert all(float((one - plain).abs().max()) > 1e-4 for one in wanted)
    for executor in ("auto", *EXECUTORS):
        choice = hk.choose(model, worlds, executor)
        assert choice.executor == "sequential"
        assert bool(choice.reason) == (executor != "sequential") and (
            "all rows at once" in choice.reason or not choice.reason
        )
        for outcome in hk.run_worlds(model, worlds, [end], executor=executor):
            assert torch.equal(outcome.values[0], wanted[outcome.index])


@pytest.mark.full
@pytest.mark.parametrize(("name", "targets"), [("T5", ["q", "v", "wo"]), ("CLIP, images", ["q_proj", "fc1"])])
def test_low_rank_adapters_of_other_stacks(name, targets):
    """Of an encoder, a decoder and what is between, and of a tower, as of the model that they are merged into."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=targets)
    adapted = randomised(peft.get_peft_model(FAMILIES[name].make(), config))
    again = randomised(peft.get_peft_model(FAMILIES[name].make(), config))
    again.load_state_dict(adapted.state_dict())
    model, merged = hk.wrap(adapted), hk.wrap(again.merge_and_unload().eval())
    draw = torch.Generator().manual_seed(0)
    given = torch.randn(2, 3, 16, 16, generator=draw) if model.architecture.images else [row[:4] for row in IDS]
    stacks = (None,) if model.architecture.encoder is None else ("encoder", "decoder", "cross")
    more = {"decoded": [[5, 6], [7, 8]]} if len(stacks) > 1 else {}
    x, other = (m.inputs(given, **more) for m in (model, merged))
    plain = model.run(x).output
    for place in [site(kind, 1, stack=stack) for kind in ("q", "v", "z", "result") for stack in stacks]:
        one, two = model.run(x, hk.scale(place, 3.0)).output, merged.run(other, hk.scale(place, 3.0)).output
        torch.testing.assert_close(one, two, rtol=0.0, atol=5e-4)
        assert float((one - plain).abs().max()) > 1e-4


# Classifiers


def test_a_classifier_of_sequences_has_logits_at_every_token():
    family = FAMILIES["Llama, sequences"]
    model = hk.wrap(family.make())
    x = model.inputs(IDS)
    run = model.run(x, capture=site("logits", pos=-1))
    with torch.no_grad():
        own = family.make()(input_ids=x.ids, attention_mask=x.mask.long()).logits
    torch.testing.assert_close(run.tape[site("logits", pos=-1)][:, 0], own)
    vector = torch.tensor([1.0, -2.0, 0.5])
    (shared,) = hk.run_worlds(
        model, [World(x, hk.as_plan(hk.steer(site("logits", pos=-1), vector)))], [site("logits", pos=-1)]
    )
    torch.testing.assert_close(shared.values[0][:, 0], own + vector)
    with model.apply(hk.zero(site("attn_out", 1))), torch.no_grad():
        held = model.module(input_ids=x.ids, attention_mask=x.mask.long()).logits
    assert held.shape == own.shape and float((held - own).abs().max()) > 1e-3
    with pytest.raises(hk.InputsError, match="outside the vocabulary"):
        model.inputs([[zoo.VOCAB]])
    with pytest.raises(hk.ModelError, match="logits of one token"):
        model.compile()


def test_a_classifier_of_tokens():
    model = hk.wrap(FAMILIES["BERT, tokens"].make())
    assert model.architecture.vocabulary == 5 and model.run(model.inputs(IDS)).logits.shape[-1] == 5
    with pytest.raises(hk.SiteError, match="reads the last block's output"):
        model.run(model.inputs(IDS), capture=site("ln_final"))
