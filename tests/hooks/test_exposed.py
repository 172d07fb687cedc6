"""Attention whose inside is exposed is the model's own: its keyword arguments, its weights, its masks."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hooks as hk
from hooks import Model, site
from hooks.models.attention import exposed_attention
from tests import zoo

EXACT = {"rtol": 0.0, "atol": 1e-10}


def llama(implementation: str, dtype: torch.dtype = torch.float64) -> Model:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {**zoo.GROUPED, "hidden_size": 32, "num_hidden_layers": 3}
    return hk.wrap(zoo.prepare(LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation=implementation))).to(dtype))


# Weights that a caller asks for


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_attentions_that_a_call_returns(padding):
    """All layers, edited ones as they were used, also those that the plan does not touch."""
    model = llama("eager")
    x = model.inputs(*zoo.random_inputs(zoo.VOCAB, [6, 4], padding, 1))
    given = {"input_ids": x.ids, "attention_mask": x.mask.long(), "position_ids": x.positions}
    plain = model.module(**given, output_attentions=True).attentions
    plan = hk.knockout(site("pattern", 1, key_pos=0, pos=slice(1, None))) + hk.scale(site("pattern", 2, head=1), 0.5)
    with model.apply(plan):
        got = model.module(**given, output_attentions=True).attentions
        assert model.module(**given).attentions is None
    sites = [site("pattern", layer) for layer in range(3)]
    tape = model.run(x, plan, capture=sites).tape
    assert len(got) == 3
    for layer, place in enumerate(sites):
        real = x.mask[:, None, :, None] & x.mask[:, None, None, :]
        torch.testing.assert_close(
            torch.where(real, got[layer], 0), torch.where(real, tape[place], 0), rtol=0, atol=1e-6
        )
    assert torch.equal(got[0], plain[0])
    assert float((got[1] - plain[1]).abs().max()) > 0.05 and float((got[2] - plain[2]).abs().max()) > 0.05


# Keyword arguments


class WithSinks(nn.Module):
    """Softmax over keys and one sink a head, written out."""

    @staticmethod
    def by_hand(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        z, pattern = torch.zeros(*q.shape[:3], v.shape[-1]).double(), torch.zeros(*q.shape[:3], k.shape[2]).double()
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                kv = h * k.shape[1] // q.shape[1]
                for t in range(q.shape[2]):
                    terms = [math.exp(float(q[b, h, t] @ k[b, kv, s]) * 0.5) for s in range(t + 1)]
                    total = sum(terms) + math.exp(float(sinks[h]))
                    for s, term in enumerate(terms):
                        pattern[b, h, t, s] = term / total
                        z[b, h, t] += term / total * v[b, kv, s]
        return z.transpose(1, 2), pattern


def test_sinks_take_their_share():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 3).double(), torch.randn(2, 2, 5, 3).double(), torch.randn(2, 2, 5, 3).double()
    sinks, allowed = torch.randn(4).double(), torch.ones(5, 5).tril().bool()[None, None]
    seen = {}

    def visit(name: str, x: Tensor, guard: object) -> Tensor:
        seen[name] = x
        return x

    z, pattern = exposed_attention(q, k, v, allowed, 0.5, visit, sinks=sinks)
    expected_z, expected = WithSinks.by_hand(q, k, v, sinks)
    torch.testing.assert_close(z, expected_z, **EXACT)
    torch.testing.assert_close(pattern, expected, **EXACT)
    assert torch.equal(seen["pattern"], pattern) and float(pattern.sum(-1).max()) < 1
    forbidden = torch.zeros(5, 5).bool()[None, None]
    nothing, _ = exposed_attention(q, k, v, forbidden, 0.5, visit, sinks=sinks)
    assert torch.equal(nothing, torch.zeros_like(nothing))


def passing(model: Model, **more: object) -> None:
    """Make the second layer hand its attention function some more keyword arguments."""
    attention = model.module.model.layers[1].self_attn
    kind = type(attention)

    def forward(self, *args, **kwargs):
        return kind.forward(self, *args, **kwargs, **more)

    attention.__class__ = type(kind.__name__, (kind,), {"forward": forward})


@torch.no_grad()
def test_keyword_arguments_that_change_attention_are_understood_or_refused():
    model = llama("eager")
    x = model.inputs([[3, 4, 5, 6]])
    plan, look = hk.scale(site("pattern", 1), 0.5), [site("pattern", 1)]
    plain = model.run(x, capture=look).tape[look[0]]
    passing(model, s_aux=torch.zeros(4).double())
    sunk = model.run(x, capture=look).tape[look[0]]
    assert 0 < float(sunk.sum(-1).max()) < 1 and float((plain.sum(-1) - 1).abs().max()) < 1e-6
    model = llama("eager")
    passing(model, position_bias=torch.zeros(1, 4, 4, 4).double())
    for use in (lambda: model.run(x, plan), lambda: model.run(x, capture=look), lambda: held(model, plan, x)):
        with pytest.raises(hk.errors.ModelError, match="position_bias"):
            use()
    model.run(x, hk.scale(site("z", 1), 0.5))  # which needs nothing of its inside
    passing(model := llama("eager"), position_bias=None, num_items_in_batch=3)
    torch.testing.assert_close(model.run(x, capture=look).tape[look[0]], plain, rtol=0, atol=1e-6)


def held(model: Model, plan: hk.Intervention, x: hk.Inputs) -> None:
    with model.apply(plan):
        model.module(input_ids=x.ids)


# Masks


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 3])
def test_the_block_masks_of_flex_attention(window):
    """A block mask says the same as the mask of another kernel, padded or not, windows and all."""
    from torch.nn.attention.flex_attention import create_block_mask

    from hooks.models.masks import read_mask

    real = torch.tensor([[False, True, True, True, True], [True, True, True, True, False]])

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= query) & real[row, key]
        return seen if window is None else seen & (key > query - window)

    mask = create_block_mask(allowed, 2, None, 5, 5, device="cpu")
    got, bias = read_mask(mask, 5, 5, torch.device("cpu"))
    expected, _ = read_mask(real, 5, 5, torch.device("cpu"), window)
    assert bias is None and torch.equal(got.expand(2, 1, 5, 5), expected.expand(2, 1, 5, 5))
    with pytest.raises(hk.errors.ModelError, match="SimpleNamespace"):
        read_mask(SimpleNamespace(), 5, 5, torch.device("cpu"))


@torch.no_grad()
def test_a_kernel_that_is_told_not_to_be_causal():
    """Without a mask, the module's word is what the model's own kernel goes by, and so does ours."""
    model = llama("sdpa")
    for layer in model.module.model.layers:
        layer.self_attn.is_causal = False
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    attention = model.module.model.layers[1].self_attn
    kind = type(attention)
    attention.__class__ = type(kind.__name__, (kind,), {"forward": unmasked(kind)})
    x, place = model.inputs(ids), site("pattern", 1)
    plain = model.run(x).logits
    run = model.run(x, capture=[place])
    torch.testing.assert_close(run.logits, plain, rtol=0, atol=1e-6)
    assert float(run.tape[place][0, :, 0, 1:].max()) > 1e-3  # the first query looks ahead


def unmasked(kind: type) -> object:
    def forward(self, *args, attention_mask=None, **kwargs):
        return kind.forward(self, *args, attention_mask=None, **kwargs)

    return forward


@pytest.mark.full
@torch.no_grad()
def test_flex_attention():
    """The patterns of a model that runs flex attention, whose masks are functions, are those of SDPA."""
    models = [llama(name, torch.float32) for name in ("sdpa", "flex_attention")]
    models[1].module.load_state_dict(models[0].module.state_dict())
    x = models[0].inputs(*zoo.random_inputs(zoo.VOCAB, [6, 4], "left", 1))
    place, plan = site("pattern", 1), hk.knockout(site("pattern", 0, key_pos=0, pos=slice(1, None)))
    one, two = (model.run(x, plan, capture=[place]) for model in models)
    torch.testing.assert_close(one.tape[place], two.tape[place], rtol=0, atol=1e-5)
    torch.testing.assert_close(one.logits[x.mask], two.logits[x.mask], rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_kernel_that_leaves_out_the_cap_is_exposed_without_it():
    """Gemma 2 under SDPA, which older transformers allow: looking inside changes nothing, and nothing is shared."""
    module: Any = zoo.make("gemma2")
    if not module._supports_sdpa:
        pytest.skip("this version of transformers knows that SDPA leaves out the cap")
    capped = module(torch.tensor([[1, 2, 3, 4]])).logits
    module.set_attn_implementation("sdpa")
    model = hk.wrap(module)
    x = model.inputs([[1, 2, 3, 4]])
    plain = module(x.ids).logits
    assert float((plain - capped).abs().max()) > 1e-3
    for place in (site("pattern", 1), site("scores", 0), site("rot_q", 2)):
        torch.testing.assert_close(model.run(x, capture=place).logits, plain, rtol=0, atol=1e-10)
    assert hk.choose(model, [hk.World(x, hk.as_plan(hk.zero(site("z", 0))))]).executor == "batched"
