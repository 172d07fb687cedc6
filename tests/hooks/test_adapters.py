"""What single families have: their options, fused projections, dropout outside sublayers, caps, windows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import hooks as hk
from hooks import Model, World, site
from hooks.errors import ModelError
from hooks.models import describe
from hooks.models.attention import softcap
from hooks.models.masks import read_mask
from hooks.models.positions import rotate
from hooks.models.projections import Projection, linear_weight
from tests import oracle, zoo

EXACT = {"rtol": 0.0, "atol": 1e-10}
EXECUTORS = ("sequential", "batched", "shared")


def example(model: Model, side: str = "left", seed: int = 1) -> hk.Inputs:
    return model.inputs(*zoo.random_inputs(zoo.VOCAB, [7, 5], side, seed))


def neox(**options) -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"vocab_size": zoo.VOCAB, "hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 20}
    return zoo.prepare(GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_hidden_layers=2, **options)))


def gemma(**options) -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"vocab_size": zoo.VOCAB, "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 6, "intermediate_size": 20, "query_pre_attn_scalar": 7, "pad_token_id": None}
    return zoo.prepare(Gemma2ForCausalLM(Gemma2Config(**(sizes | {"num_hidden_layers": 2} | options))))


# Options


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (neox, {"rotary_pct": 1.0}),
        (neox, {"rotary_pct": 0.34, "attention_bias": False}),  # 2 of 6 dimensions
        (neox, {"rotary_pct": 0.67, "tie_word_embeddings": True, "layer_norm_eps": 0.1}),
        (neox, {"use_parallel_residual": False, "rotary_pct": 0.67, "rotary_emb_base": 100}),
        (gemma, {"attn_logit_softcapping": None}),
        (gemma, {"final_logit_softcapping": None, "attn_logit_softcapping": 2.0}),
        (gemma, {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0, "sliding_window": 2}),
        (gemma, {"layer_types": ["full_attention"] * 2, "attention_bias": True, "rms_norm_eps": 0.1}),
        (gemma, {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 3, "head_dim": 4}),
    ],
    ids=lambda x: x.__name__ if callable(x) else "-".join(map(str, x)),
)
@torch.no_grad()
def test_options_of_a_family(make, options):
    """Every site of every layer, edited, against the oracle, which agrees with the model itself.

    Each is edited in two of the executors, which differ from one to the next.
    """
    model = hk.wrap(make(**options))
    x, other = example(model), example(model, seed=2)
    logits, values = oracle.forward(model.module, x.ids, x.mask)
    _, source = oracle.forward(model.module, other.ids, other.mask)
    torch.testing.assert_close(model.forward(x.ids, x.mask, x.positions)[x.mask], logits[x.mask], **EXACT)
    places = [site(*key) for key in values]
    worlds = [World(x), *(World(x, hk.patch(place, World(other))) for place in places)]
    expected = [logits]
    for key in values:
        edit = {key: lambda v, key=key: source[key]}
        expected.append(oracle.forward(model.module, x.ids, x.mask, edit)[0])
    assert all((e - logits)[x.mask].abs().max() > 1e-3 for e in expected[1:])
    for turn, executor in enumerate(EXECUTORS):
        some = [i for i in range(len(worlds)) if i % 3 != turn]
        reads = [site("logits"), places[-4]]
        for outcome in hk.run_worlds(model, [worlds[i] for i in some], reads, executor=executor):
            index = some[outcome.index]
            what = f"{executor}, {worlds[index].plan}"
            torch.testing.assert_close(
                outcome.values[0][x.mask], expected[index][x.mask], **EXACT, msg=lambda m, w=what: f"{w}: {m}"
            )


def test_what_a_family_cannot_be():
    from transformers import LlamaForQuestionAnswering

    config = zoo.make("llama").config
    with pytest.raises(ModelError, match="LlamaForQuestionAnswering has no language-model head"):
        hk.wrap(LlamaForQuestionAnswering(config))
    with pytest.raises(ModelError, match="use_bidirectional_attention"):
        hk.wrap(gemma(use_bidirectional_attention=True))
    late = gemma()
    late.model.embed_tokens = nn.Embedding(zoo.VOCAB, 24)
    with pytest.raises(ModelError, match="embeddings outside"):
        hk.wrap(late)


class WithLoss(nn.Module):
    """A model of somebody's own, which returns its logits and a loss."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **call) -> tuple[Tensor, None]:
        return self.inner(**call), None


def test_a_model_that_returns_its_logits_in_a_tuple():
    inner = zoo.make("small_ln_learned")
    one, two = hk.wrap(inner), hk.wrap(WithLoss(inner), adapter=lambda module: describe(module.inner))
    plan = hk.zero(site("attn_out", 0))
    assert torch.equal(two.run(example(one), plan).logits, one.run(example(one), plan).logits)


def test_a_wrapped_model_is_wrapped_again():
    first = hk.wrap(zoo.make("small_ln_learned"))
    assert hk.wrap(first) is first
    tokenizer = object()
    second = hk.wrap(first, tokenizer)
    assert second.tokenizer is tokenizer and second.module is first.module and first.tokenizer is None
    third = hk.wrap(second, adapter=lambda module: dataclasses.replace(describe(module), family="mine"))
    assert third.tokenizer is tokenizer and third.architecture.family == "mine"
    with pytest.raises(ModelError, match="Architecture, this one a dict"):
        hk.wrap(first.module, adapter=lambda module: {})


# Parts


class Adapted(nn.Linear):
    """A linear layer with more to it than its weight and its bias."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean()


class Curved(nn.Linear):
    """A layer that is not linear at all."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) ** 2


class Named(nn.Linear):
    """A linear layer by another name."""


def test_a_linear_layer_that_is_more_than_its_weight():
    """What addresses heads goes by weight and bias alone, and would leave the rest of such a layer out."""
    module = zoo.make("small_ln_learned")
    own = module.blocks[0].attn.o_proj
    x = hk.wrap(module).inputs([[3, 4, 5]])
    plan = hk.scale(site("result", 0, head=1), 2.0)
    expected = hk.wrap(module).run(x, plan).logits
    for kind in (Named, Adapted):
        changed = kind(own.in_features, own.out_features, bias=own.bias is not None, dtype=own.weight.dtype)
        changed.load_state_dict(own.state_dict())
        module.blocks[0].attn.o_proj = changed
        if kind is Named:
            assert torch.equal(hk.wrap(module).run(x, plan).logits, expected)
            continue
        # The rest of it is of heads too, as far as it is linear.
        whole = hk.wrap(module).run(x, hk.scale(site("z", 0, head=1), 2.0)).logits
        found = hk.wrap(module).run(x, plan).logits
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-10)
    module.blocks[0].attn.o_proj = Curved(own.in_features, own.out_features, dtype=own.weight.dtype)
    with pytest.raises(ModelError, match="Curved"):
        hk.wrap(module).run(x, plan)
    whole = nn.Linear(4, 4)
    whole.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="plain linear"):
        linear_weight(whole)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("start", "stride", "offset"),
    [(None, None, 0), (0, None, 0), (6, None, 0), (12, None, 0), (0, 6, 0), (0, 6, 2), (0, 6, 4), (2, 5, 1)],
)
def test_a_part_of_a_fused_projection(start, stride, offset, bias):
    """Three heads of two columns, found by listing the columns of each."""
    module = nn.Linear(5, 6 if start is None else 18, bias=bias).double()
    part = Projection(module, 3, 2, start, stride, offset)
    columns = torch.tensor([[(start or 0) + h * (stride or 2) + offset + d for d in range(2)] for h in range(3)])
    x, copies, value = torch.randn(4, 7, 5).double(), torch.randn(4, 3, 5).double(), torch.randn(4, 7, 3, 2).double()
    out = module(x)
    assert torch.equal(part.read(out), out[..., columns])
    torch.testing.assert_close(part(x), out[..., columns], **EXACT)
    each = torch.stack([module(copies[:, h])[:, columns[h]] for h in range(3)], 1)
    torch.testing.assert_close(part.per_head(copies), each, **EXACT)
    expected, before = out.clone(), out.clone()
    expected[..., columns] = value
    assert torch.equal(part.write(out, value), expected)
    assert torch.equal(out, before)


def test_dimensions_that_are_not_turned():
    x, angle = torch.randn(2, 5, 3, 8).double(), torch.randn(2, 5, 2).double().repeat(1, 1, 2)
    turned = rotate(x, angle.cos(), angle.sin())
    assert torch.equal(turned[..., 4:], x[..., 4:])
    torch.testing.assert_close(turned[..., :4], rotate(x[..., :4], angle.cos(), angle.sin()), **EXACT)
    pairs = torch.complex(x[..., :2], x[..., 2:4]) * torch.polar(torch.ones(()).double(), angle[..., None, :2])
    torch.testing.assert_close(turned[..., :2], pairs.real, **EXACT)
    torch.testing.assert_close(turned[..., 2:4], pairs.imag, **EXACT)


def test_a_soft_cap():
    x = torch.tensor([-1e9, -0.001, 0.0, 3.0, 1e9], dtype=torch.float64)
    expected = torch.tensor([-2.0, -0.001, 0.0, 2 * torch.tanh(torch.tensor(1.5)).item(), 2.0]).double()
    torch.testing.assert_close(softcap(x, 2.0), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("window", [None, 1, 3, 9])
def test_masks_that_do_not_tell_the_window(window):
    """None and 2-D masks say which keys are real; that attention is causal, and how far back, the layer knows."""
    real = torch.tensor([[False, True, True, True, True], [True, True, True, True, False]])
    for queries in (5, 2):
        for mask in (None, real, real.long()):
            allowed, bias = read_mask(mask, queries, 5, torch.device("cpu"), window)
            assert bias is None
            for row in range(2):
                for i in range(queries):
                    q = 5 - queries + i
                    seen = [k <= q and (window is None or k > q - window) for k in range(5)]
                    if mask is not None:
                        seen = [s and bool(r) for s, r in zip(seen, real[row], strict=True)]
                    assert allowed.expand(2, 1, queries, 5)[row, 0, i].tolist() == seen


# Where the cap of the logits is


@pytest.mark.parametrize("value", [9.0, -1.0])
def test_an_edit_of_capped_logits_reaches_the_loss(value):
    """Beyond the cap, where nothing that is edited before it could come; a loss that the model computes sees it."""
    model = hk.wrap(zoo.make("gemma2"))
    x = example(model, "right")
    config = model.module.config
    with model.apply(hk.clamp(site("logits", dim=7), value)):
        out = model.module(input_ids=x.ids, labels=x.ids, use_cache=False)
        listed = model.module(input_ids=x.ids, use_cache=False, return_dict=False)[0]
    assert model.module.config is config and config.final_logit_softcapping == 4.0
    plain = model.module(input_ids=x.ids, labels=x.ids, use_cache=False)
    expected = plain.logits.clone()
    expected[..., 7] = value
    torch.testing.assert_close(out.logits, expected, **EXACT)
    torch.testing.assert_close(listed, expected, **EXACT)
    loss = nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), x.ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss.double(), loss, rtol=0, atol=1e-6)
    assert abs(float((out.loss - plain.loss).detach())) > 1e-2


# Dropout outside the sublayers


@pytest.mark.parametrize("family", ["neox", "neox_sequential"])
def test_what_is_added_is_what_dropout_leaves(family):
    """In training, where GPT-NeoX drops entries between a sublayer's output and the residual."""
    module = zoo.make(family)
    model = hk.wrap(module)
    x = example(model, "right")
    module.train()
    for layer in module.gpt_neox.layers:
        layer.post_attention_dropout.p = layer.post_mlp_dropout.p = 0.5
    names = ["resid_pre", "attn_out", "mlp_out", "resid_post"] + (["resid_mid"] if "sequential" in family else [])

    def run(plan: hk.Plan | None = None) -> tuple[hk.Tape, Tensor]:
        torch.manual_seed(3)
        done = model.run(x, plan, capture=[site(name, 1) for name in names])
        return done.tape, done.logits

    tape, logits = run()
    added = tape[site("attn_out", 1)] + tape[site("mlp_out", 1)]
    torch.testing.assert_close(tape[site("resid_post", 1)], tape[site("resid_pre", 1)] + added, **EXACT)
    assert 0.3 < (tape[site("attn_out", 1)] == 0).double().mean() < 0.7
    same = hk.Plan(tuple(hk.intervene(site(name, 1), lambda v, ctx: v.clone()) for name in names))
    torch.testing.assert_close(run(same)[1], logits, **EXACT)
