"""Families that nobody has described: found out where that can be confirmed, and refused with a reason where not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hooks as hk
from experiments.families.models import FAMILIES, Family
from hooks import World, site
from hooks.discovery import discover
from hooks.model import Model
from hooks.models import describe
from hooks.models.blocks import Mlp
from tests import zoo
from tests.hooks.test_certificate import subclassed

SIZES: dict[str, Any] = {**zoo.GROUPED, "hidden_size": 32, "num_hidden_layers": 2}
KNOWN = ["Gemma 3", "Granite", "GPT-OSS", "BERT"]
MORE = ["GPT-2", "Gemma 2", "OLMo 2", "Phi-3", "Mixtral", "Qwen 2-MoE", "OPT", "OPT, norms after", "Llama", "OLMoE"]
full = pytest.mark.full


@pytest.mark.parametrize("name", [*KNOWN, *(pytest.param(name, marks=full) for name in MORE)])
def test_what_is_found_out_is_what_an_adapter_says(name):
    module = FAMILIES[name].make()
    found, known = discover(module), describe(module)
    assert Model(module, None, discover).sizes == Model(module, None, describe).sizes
    for one, two in zip(found.blocks, known.blocks, strict=True):
        a, b = one.attention, two.attention
        assert (a.q, a.k, a.v, a.out, a.window, a.causal, a.softcap, a.sinks) == (
            b.q, b.k, b.v, b.out, b.window, b.causal, b.softcap, b.sinks
        )  # fmt: skip
        assert a.scaling == pytest.approx(b.scaling) and (a.rotary is None) == (b.rotary is None)
        for left, right in zip(one.sublayers, two.sublayers, strict=True):
            assert (left.pre, left.post, left.post_add) == (right.pre, right.post, right.post_add)
            assert left.scale == pytest.approx(right.scale)
    assert (found.embed_scale, found.logit_scale) == (known.embed_scale, pytest.approx(known.logit_scale))


def llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return zoo.prepare(LlamaForCausalLM(LlamaConfig(**(SIZES | options))), dtype=torch.float32, widen=False)


def unknown(module: Any) -> nn.Module:
    """The same model, of a family that nobody has heard of."""
    module.config.__class__ = type("Config", (type(module.config),), {"model_type": "unheard_of"})
    return module


def test_wrap_finds_out_what_no_adapter_knows():
    module = unknown(llama())
    model = hk.wrap(module)
    assert model.architecture.family == "unheard_of"
    x = model.inputs([[3, 9, 27, 31], [5, 6, 40]], padding="left")
    plan = hk.zero(site("z", 1, head=2))
    assert hk.choose(model, [World(x, hk.as_plan(plan))]).executor == "shared"
    other = hk.wrap(llama())
    torch.testing.assert_close(model.run(x, plan).logits[x.mask], other.run(x, plan).logits[x.mask])
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_a_model_is_as_it_was():
    module = unknown(llama(attention_dropout=0.5)).train()
    module.model.layers[0].eval()
    before = [part.training for part in module.modules()]
    values = [p.clone() for p in module.parameters()]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        hk.wrap(module)
        drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))
    assert [part.training for part in module.modules()] == before
    assert all(torch.equal(a, b) for a, b in zip(values, module.parameters(), strict=True))
    assert all("_attn" not in vars(part) for part in module.modules())


# What is something else


def gated_attention(module: Any) -> None:
    attention = module.model.layers[1].self_attn
    subclassed(attention, lambda self, x=None, hidden_states=None, **more: _gated(self, hidden_states, more))


def _gated(self: Any, x: torch.Tensor, more: dict[str, Any]) -> Any:
    out, weights = self.old(hidden_states=x, **more)
    return out * x.mean(-1, keepdim=True).sigmoid(), weights


def mixed_tokens(module: Any) -> None:
    subclassed(module.model.layers[0].mlp, lambda self, x: self.old(x) + 0.3 * x.roll(1, 1))


def clipped_stream(module: Any) -> None:
    subclassed(module.model.layers[1], lambda self, x, **more: self.old(x, **more).clamp(-0.5, 0.5))


def third_sublayer(module: Any) -> None:
    layer = module.model.layers[0]
    layer.extra = nn.Linear(32, 32)
    subclassed(layer, lambda self, x, **more: self.old(x, **more) + self.extra(x))


def squashed_queries(module: Any) -> None:
    subclassed(module.model.layers[0].self_attn.q_proj, lambda self, x: self.old(x).tanh())


def longer_embeddings(module: Any) -> None:
    subclassed(module.model.embed_tokens, lambda self, ids: self.old(ids) + self.old(ids.flip(-1)))


def squashed_logits(module: Any) -> None:
    def forward(self: Any, **call: Any) -> Any:
        out = self.old(**call)
        out.logits = out.logits.tanh()
        return out

    subclassed(module, forward)


@pytest.mark.parametrize(
    "change",
    [gated_attention, mixed_tokens, clipped_stream, third_sublayer, longer_embeddings, squashed_logits],
    ids=lambda f: f.__name__,
)
def test_what_does_something_else_is_refused(change):
    module = unknown(llama())
    change(module)
    with pytest.raises(hk.ModelError, match=r"nobody has described a .*wrap\(model, adapter=function\)"):
        hk.wrap(module)


def test_a_projection_of_another_kind_is_what_it_is():
    """Whatever a projection computes, q is what it returns."""
    module = unknown(llama())
    squashed_queries(module)
    model = hk.wrap(module)
    x = model.inputs([[3, 9, 27, 31]])
    assert float(model.run(x, capture=site("q", 0)).tape[site("q", 0)].abs().max()) <= 1


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        (Family("Mamba", {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2}), "no attention function"),
        (Family("Mpt", {"vocab_size": 50, "d_model": 32, "n_heads": 4, "n_layers": 2}), "no attention function"),
        (Family("HunYuanDenseV1", {**SIZES, "head_dim": 8, "pad_token_id": None}), "queries before they meet"),
        (Family("Olmo", {**SIZES, "clip_qkv": 0.5, "pad_token_id": None}), "values"),
    ],
    ids=lambda x: getattr(x, "stem", ""),
)
def test_families_that_are_not_understood_say_why(family, reason):
    with pytest.raises(hk.ModelError, match=reason):
        hk.wrap(family.make())


def test_a_part_that_is_not_understood_runs_as_it_is():
    """An MLP of three matrices one after another has no inside, and everything else is there."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.b(self.a(x).tanh()).tanh())

    module = unknown(llama())
    for layer in module.model.layers:
        layer.mlp = Deep()
    model = hk.wrap(module.eval())
    assert all(isinstance(block.mlp, Mlp) and not block.mlp.width for block in model.architecture.blocks)
    x = model.inputs([[3, 9, 27, 31]])
    assert hk.choose(model, [World(x)]).executor == "shared"
    with pytest.raises(hk.SiteError, match="nobody knows how the parts of a Deep work together"):
        model.run(x, hk.zero(site("mlp_post", 0)))


def test_weights_that_are_not_there():
    with torch.device("meta"):
        module = unknown(llama_on_meta())
    with pytest.raises(hk.ModelError, match="meta"):
        hk.wrap(module)


def llama_on_meta() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES))
