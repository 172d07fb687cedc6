"""Descriptions are believed only when they are compared with the model: mutants are refused, every family passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import hooks as hk
from hooks import Model, World, site
from hooks.certificate import ALLOWED, short_row
from hooks.models import describe
from hooks.models.architecture import Architecture
from hooks.models.blocks import Attention, Block, Mlp
from hooks.models.positions import Rotary
from hooks.record import choose
from tests import zoo
from tests.hooks.executing import Ran, agree, inputs
from tests.zoo import fresh, wrapped

ORACLE = {"rtol": 0.0, "atol": 1e-10}


def trusted(model: Model, layout: str = "flat") -> str:
    """Why a model is not shared; empty where it is."""
    return choose(model, [World(inputs(model, layout, 1))]).reason


def shared_is_wrong_unless_refused(model: Model, layout: str = "flat") -> None:
    """What a refusal is for: auto gives what the model itself gives."""
    x, other = inputs(model, layout, 1), inputs(model, layout, 2)
    worlds = [World(x), World(x, hk.patch(site("resid_pre", 1, pos=1), World(other)))]
    reads = [site("logits", pos=-1)]
    agree(Ran(model, worlds, reads, "sequential"), Ran(model, worlds, reads, "auto"), worlds, reads)


@pytest.mark.parametrize("layout", ["flat", "left", "right"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_family_passes(family, layout):
    assert trusted(wrapped(family), layout) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "neox", "small_rms_rotary_gqa"])
def test_every_dtype_passes(family, dtype):
    assert trusted(hk.wrap(zoo.make(family, dtype=dtype))) == ""


# A model that does something else than its description says


def subclassed(part: nn.Module, forward: Callable[..., object]) -> None:
    """Give one module a class of its own, with a forward that goes by the old one."""
    kind = type(part)
    part.__class__ = type(kind.__name__, (kind,), {"forward": forward, "old": kind.forward})


def scaled_mlp(module: nn.Module) -> None:
    subclassed(module.model.layers[1].mlp, lambda self, x: 1.1 * self.old(x))


def token_mixing_mlp(module: nn.Module) -> None:
    subclassed(module.model.layers[0].mlp, lambda self, x: self.old(x) + 0.3 * x.roll(1, 1))


def norm_moved(module: nn.Module) -> None:
    layer = module.model.layers[0]
    subclassed(layer, lambda self, x, **more: self.old(self.input_layernorm(x), **more))


def residual_multiplier(module: nn.Module) -> None:
    subclassed(module.model.layers[2], lambda self, x, **more: self.old(x, **more) + 0.2 * x)


def rotary_base_changed(module: nn.Module) -> None:
    def forward(self, position_embeddings, **more):
        cos, sin = position_embeddings
        angle = torch.atan2(sin, cos) * 0.7
        return self.old(position_embeddings=(angle.cos(), angle.sin()), **more)

    subclassed(module.model.layers[1].self_attn, forward)


def bias_added_outside(module: nn.Module) -> None:
    attention = module.model.layers[0].self_attn
    extra = torch.linspace(-1, 1, module.config.hidden_size).double()
    subclassed(attention, lambda self, **more: (self.old(**more)[0] + extra, None))


def positions_shifted(module: nn.Module) -> None:
    """Only where a window is near does a shift of rotary positions show; an offset for every second token does."""

    def forward(self, x, position_ids):
        return self.old(x, position_ids + position_ids % 2)

    subclassed(module.model.rotary_emb, forward)


def embedding_multiplier(module: nn.Module) -> None:
    def forward(self, input_ids=None, inputs_embeds=None, **more):
        return self.old(inputs_embeds=3.0 * self.embed_tokens(input_ids), **more)

    subclassed(module.model, forward)


def logits_scaled(module: nn.Module) -> None:
    def forward(self, **call):
        out = self.old(**call)
        out.logits = out.logits / 8.0
        return out

    subclassed(module, forward)


def zero_low_rank_branch(module: nn.Module) -> None:
    """A fresh low-rank adapter: its second matrix is zero, so nothing shows before it is trained."""
    mlp = module.model.layers[1].mlp
    mlp.down_low = nn.Linear(module.config.hidden_size, 2, bias=False, dtype=torch.float64)
    mlp.up_low = nn.Linear(2, module.config.hidden_size, bias=False, dtype=torch.float64)
    nn.init.zeros_(mlp.up_low.weight)
    mlp.eval()
    subclassed(mlp, lambda self, x: self.old(x) + self.up_low(self.down_low(x.flip(1))))


MUTANTS = [
    scaled_mlp,
    token_mixing_mlp,
    norm_moved,
    residual_multiplier,
    rotary_base_changed,
    bias_added_outside,
    embedding_multiplier,
    logits_scaled,
    zero_low_rank_branch,
]


@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda f: f.__name__)
def test_a_model_that_does_something_else_is_refused(mutate):
    module = zoo.make("llama")
    model = hk.wrap(module)
    assert trusted(model) == ""
    before = [p.clone() for p in module.parameters()]
    mutate(module)
    reason = trusted(model)
    assert reason.startswith("batched instead of shared: ") and "training mode" not in reason
    # Weights are what they were, versions and all, also where noise stood in for zeros.
    now = list(module.parameters())[: len(before)]
    if mutate is not zero_low_rank_branch:
        assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    if mutate not in (logits_scaled, zero_low_rank_branch):
        shared_is_wrong_unless_refused(model)


def test_a_rotary_module_of_the_models_own_is_called_as_it_is():
    """Both go through the model's module, so a change of it is a change of neither's description."""
    module = zoo.make("llama")
    positions_shifted(module)
    model = hk.wrap(module)
    assert trusted(model) == ""
    shared_is_wrong_unless_refused(model)


# A description that says something else than the model does


def adapted(change: Callable[[Block], Block]) -> Callable[[nn.Module], Architecture]:
    def adapter(module: nn.Module) -> Architecture:
        found = describe(module)
        return dataclasses.replace(found, blocks=tuple(change(block) for block in found.blocks))

    return adapter


def with_attention(**fields: object) -> Callable[[Block], Block]:
    def change(block: Block) -> Block:
        sublayers = [
            dataclasses.replace(s, fn=dataclasses.replace(s.fn, **fields)) if isinstance(s.fn, Attention) else s
            for s in block.sublayers
        ]
        return dataclasses.replace(block, sublayers=tuple(sublayers))

    return change


def with_mlp(**fields: object) -> Callable[[Block], Block]:
    def change(block: Block) -> Block:
        sublayers = [
            dataclasses.replace(s, fn=dataclasses.replace(s.fn, **fields)) if isinstance(s.fn, Mlp) else s
            for s in block.sublayers
        ]
        return dataclasses.replace(block, sublayers=tuple(sublayers))

    return change


def other_base(positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = positions[..., None] / 1e5 ** (torch.arange(4) / 4)
    angle = torch.cat([angle, angle], -1).to(dtype)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize(
    ("family", "change", "layout"),
    [
        ("llama", with_attention(scaling=0.36), "flat"),
        ("llama", with_attention(rotary=Rotary(other_base)), "flat"),
        ("llama", with_attention(rotary=None), "flat"),
        ("llama", with_attention(causal=False), "flat"),
        ("mistral", with_attention(window=zoo.WINDOW + 1), "flat"),
        ("mistral", with_attention(window=zoo.WINDOW - 1), "flat"),
        ("mistral", with_attention(window=None), "flat"),
        ("gemma2", with_attention(softcap=None), "flat"),
        ("qwen3", with_attention(q_norm=None), "flat"),
        ("qwen3", with_attention(k_norm=None), "left"),
        ("gpt2", with_mlp(whole=lambda x: x), "flat"),
        ("gpt2", with_mlp(act=torch.relu), "flat"),  # seen only where somebody looks inside
        ("neox", lambda block: dataclasses.replace(block, parallel=False), "right"),
        (
            "gemma2",
            lambda block: dataclasses.replace(
                block, sublayers=tuple(dataclasses.replace(s, post=None) for s in block.sublayers)
            ),
            "flat",
        ),
        ("gpt2", lambda block: dataclasses.replace(block, sublayers=block.sublayers[:1]), "flat"),
    ],
)
def test_a_description_that_says_something_else_is_refused(family, change, layout):
    model = hk.wrap(zoo.make(family), adapter=adapted(change))
    assert "the model" in trusted(model, layout)
    shared_is_wrong_unless_refused(model, layout) if family != "gpt2" else None


def test_the_cap_of_the_logits():
    module = zoo.make("gemma2")
    model = hk.wrap(module, adapter=lambda m: dataclasses.replace(describe(m), cap=None))
    assert "unembedding" in trusted(model)


# When it is made, and on what


def test_once_for_what_a_model_is_made_of(monkeypatch):
    import hooks.certificate as certificate

    made: list[object] = []
    compare = certificate.compare
    monkeypatch.setattr(certificate, "compare", lambda network, row: made.append(row) or compare(network, row))
    model = fresh("llama")
    for layout in ("flat", "flat", "left", "left", "right", "flat"):
        assert trusted(model, layout) == ""
    assert len(made) == 3
    model.module.model.layers[0].mlp = zoo.make("llama").model.layers[0].mlp
    assert trusted(model) == "" and len(made) == 4
    with torch.no_grad():
        model.module.model.layers[0].mlp.down_proj.weight.mul_(2.0)  # training goes on: the parts are the same
    assert trusted(model) == "" and len(made) == 4
    model.module.float()
    assert trusted(model) == "" and len(made) == 5


def test_the_row_is_as_short_as_its_regime_allows():
    model = wrapped("mistral")
    long = model.inputs([list(range(1, 31))])
    row, regime = short_row(model, long)
    assert row.width == 8 and regime[-1] == (zoo.WINDOW,)
    row, regime = short_row(model, model.inputs([[1, 2, 3]]))
    assert row.width == 3 and regime[-1] == ()
    row, _ = short_row(model, inputs(model, "left", 1))
    assert row.mask[0].tolist() == [False, False, True, True, True, True, True, True, True]


def test_a_window_wider_than_the_row_is_passed_where_the_inputs_pass_it():
    """A window of 12: within it nobody sees an error of one; past it the row is long enough to."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**{**zoo.GROUPED, "hidden_size": 32, "num_hidden_layers": 2, "sliding_window": 12})
    module = zoo.prepare(MistralForCausalLM(config))
    model = hk.wrap(module, adapter=adapted(with_attention(window=13)))
    draw = torch.Generator().manual_seed(0)
    short, long = (model.inputs(torch.randint(1, 50, (2, n), generator=draw)) for n in (10, 30))
    assert choose(model, [World(short)]).executor == "shared"
    assert choose(model, [World(long)]).executor == "batched"
    assert choose(model, [World(long), World(short)]).executor == "batched"


def test_tolerances_are_of_the_dtype():
    assert ALLOWED[torch.float64] < ALLOWED[torch.float32] < ALLOWED[torch.float16] < ALLOWED[torch.bfloat16]


# What is refused when a model is wrapped, and what follows its changes


def test_two_layers_that_are_one_module():
    for share in (
        lambda layers: layers.__setitem__(2, layers[1]),
        lambda layers: setattr(layers[2], "mlp", layers[0].mlp),
        lambda layers: setattr(layers[2], "self_attn", layers[1].self_attn),
        lambda layers: setattr(layers[2].self_attn, "v_proj", layers[1].self_attn.v_proj),
    ):
        module = zoo.make("llama")
        share(module.model.layers)
        with pytest.raises(hk.InterpError, match="are one module"):
            hk.wrap(module)
        model = fresh("llama")
        share(model.module.model.layers)
        with pytest.raises(hk.InterpError, match="are one module"):
            model.run(model.inputs([[1, 2, 3]]))


def test_a_model_that_was_compiled():
    module = zoo.make("gpt2")
    for compiled in (torch.compile(module, backend="eager"), nn.Sequential(torch.compile(module, backend="eager"))):
        with pytest.raises(hk.InterpError, match="compiled"):
            hk.wrap(compiled)
    model = hk.wrap(module)
    module.transformer.h[1].compile(backend="eager")
    for use in (lambda: model.run(model.inputs([[1, 2]])), lambda: model.apply(hk.zero(site("z", 0))).__enter__()):
        with pytest.raises(hk.InterpError, match=r"transformer\.h\.1 was compiled"):
            use()


def test_hooks_on_all_modules():
    model = fresh("gpt2")
    x = inputs(model, "flat", 1)
    worlds, reads = [World(x), World(x, hk.zero(site("z", 0, head=1)))], [site("logits", pos=-1)]

    def louder(module: nn.Module, args: object, out: object) -> object:
        return 1.01 * out if isinstance(module, nn.LayerNorm) else None

    plain = Ran(model, worlds, reads, "auto")
    handle = nn.modules.module.register_module_forward_hook(louder)
    try:
        choice = choose(model, worlds)
        assert choice.executor == "batched" and "hooks of yours on all modules" in choice.reason
        oracle = Ran(model, worlds, reads, "sequential")
        agree(oracle, Ran(model, worlds, reads, "auto"), worlds, reads)
    finally:
        handle.remove()
    assert float((oracle.values[0][0] - plain.values[0][0]).abs().max()) > 1e-3


def test_embeddings_that_were_resized_after_wrapping():
    model = fresh("llama")
    assert model.architecture.vocabulary == zoo.VOCAB
    with pytest.raises(hk.InterpError, match="outside the vocabulary"):
        model.inputs([[zoo.VOCAB]])
    model.module.resize_token_embeddings(zoo.VOCAB + 5)
    x = model.inputs([[zoo.VOCAB + 1, 3, 4]])
    assert model.run(x).logits.shape[-1] == zoo.VOCAB + 5
    (shared,) = hk.run_worlds(model, [World(x)], [site("logits")], executor="shared")
    torch.testing.assert_close(shared.values[0], model.run(x).logits, **ORACLE)


class LowRank(nn.Module):
    """A linear layer with a low-rank change, as adapters are put in."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.a = nn.Parameter(torch.randn(2, inner.in_features, dtype=inner.weight.dtype))
        self.b = nn.Parameter(torch.randn(inner.out_features, 2, dtype=inner.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x @ self.a.T @ self.b.T


@pytest.mark.parametrize("name", ["self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
def test_adapters_that_were_put_in_after_wrapping(name):
    model = fresh("llama")
    x, other = inputs(model, "left", 1), inputs(model, "left", 2)
    before = model.run(x).logits
    for layer in model.module.model.layers:
        parent, child = name.split(".")
        part = layer.get_submodule(parent)
        setattr(part, child, LowRank(getattr(part, child)).eval())
    after = model.run(x).logits
    assert float((after - before)[x.mask].abs().max()) > 1e-3
    worlds = [World(x), World(x, hk.patch(site("v", 1, pos=1), World(other))), World(x, hk.zero(site("mlp_post", 0)))]
    reads = [site("logits", pos=-1), site("v", 2), site("mlp_out", 1)]
    assert choose(model, worlds).executor == "shared"
    oracle = Ran(model, worlds, reads, "sequential")
    agree(oracle, Ran(model, worlds, reads, "shared"), worlds, reads)
    with model.apply(hk.zero(site("v", 1))) as audit, torch.no_grad():
        model.module(input_ids=x.ids, attention_mask=x.mask.long(), position_ids=x.positions)
    assert audit[0].status == "fired"
