"""Outputs of norms, what they divide by, and the branch of a gated MLP that is multiplied: in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPTJConfig, GPTJForCausalLM, Phi3Config, Phi3ForCausalLM

import hooks as hk
import interp as ip
from hooks.models.norms import Scale, scale_of
from tests import zoo

LOGITS = ip.metric(lambda x: x.square().sum((1, 2)), "logits")
EXECUTORS = ("sequential", "batched", "shared")


def measured(model, inputs, plan) -> list[torch.Tensor]:
    return [ip.evaluate(model, ip.World(inputs, plan), LOGITS, executor=executor) for executor in EXECUTORS]


def with_output(module: nn.Module, edit, run):
    """What a run gives where a module's output is another."""
    handle = module.register_forward_hook(lambda m, args, out: edit(args[0], out))
    try:
        return run()
    finally:
        handle.remove()


def test_one_norm_that_attention_and_mlp_read():
    """GPT-J's: there is no ln2, an edit of ln1 reaches both, and worlds do not share it."""
    config = GPTJConfig(
        vocab_size=50, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    model = ip.wrap(GPTJForCausalLM(config).eval().double())
    inputs = model.inputs([[3, 4, 5, 6], [9, 8, 7, 6]])
    assert {"ln1", "ln1_scale"} <= {s.name for s in model.sites()}
    with pytest.raises(ip.SiteError, match="the output of one norm, which is ln1"):
        model.run(inputs, ip.zero(ip.site("ln2", 0)))
    norm = model.module.transformer.h[1].ln_1
    plain = ip.evaluate(model, inputs, LOGITS)
    expected = with_output(
        norm, lambda x, out: out * 1.5, lambda: ip.evaluate(model, inputs, LOGITS, executor="batched")
    )
    assert float((expected - plain).abs().min()) > 1e-3
    for found in measured(model, inputs, ip.scale(ip.site("ln1", 1), 1.5)):
        torch.testing.assert_close(found, expected)
    result = ip.sweep(model, inputs, None, ip.grid("ln1", layer="all", pos="all"), metric=LOGITS, intervention=ip.zero)
    assert "attention and MLP alike" in result.config["executor_reason"]


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox"])
@torch.no_grad()
def test_a_norm_that_is_computed_anew_takes_what_was_changed_in_its_output(family):
    """Where heads read a copy of their own, what an edit changed in the norm's output is added to the copy's norm."""
    model = ip.wrap(zoo.make(family))
    inputs = model.inputs([[3, 4, 5, 6], [9, 8, 7, 6]])
    block = model.architecture.blocks[1]
    norm, projection = block.of_attention.pre, block.attention.q
    step = torch.linspace(-1.0, 1.0, model.architecture.width).double()
    add = ip.steer(ip.site("ln1", 1, pos=2), step)
    head = ip.scale(ip.site("q_input", 1, head=1, pos=slice(1, 3)), 2.0)
    stream = model.run(inputs, capture=ip.site("attn_in", 1)).tape[ip.site("attn_in", 1)]
    copies = stream[:, :, None].repeat(1, 1, projection.heads, 1)
    copies[:, 1:3, 1] *= 2.0
    normed = norm(copies)
    normed[:, 2] += step
    keep = ip.site("q", 1)
    torch.testing.assert_close(model.run(inputs, add + head, capture=keep).tape[keep], projection.per_head(normed))
    with model.apply(add):
        torch.testing.assert_close(model.run(inputs, head, capture=keep).tape[keep], projection.per_head(normed))
    both, worlds = add + head, [ip.World(inputs, add), ip.World(inputs, head), ip.World(inputs, add + head)]
    want = model.run(inputs, both).logits
    assert float((want - model.run(inputs, head).logits).abs().max()) > 1e-3
    for executor in ("sequential", "batched", "shared"):
        found = {o.index: o.values[0] for o in ip.run_worlds(model, worlds, [ip.site("logits")], executor=executor)}
        torch.testing.assert_close(found[2], want)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_what_a_norm_divides_by(family):
    """Another scale divides instead, the weight and bias after it as they are."""
    model = ip.wrap(zoo.make(family))
    inputs = model.inputs([[3, 4, 5, 6], [9, 8, 7, 6]])
    norm = model.architecture.blocks[1].of_attention.pre
    bias = getattr(norm, "bias", None)
    site = ip.site("blocks.1.ln1.hook_scale")
    scale = model.run(inputs, capture=site).tape[site]
    x = model.run(inputs, capture=ip.site("attn_in", 1)).tape[ip.site("attn_in", 1)]
    centered = x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x
    eps = getattr(norm, "eps", None) or norm.variance_epsilon
    torch.testing.assert_close(scale, (centered.square().mean(-1, keepdim=True) + eps).sqrt())

    def twice(_x, out):
        return out / 2 if bias is None else (out - bias) / 2 + bias

    expected = with_output(norm, twice, lambda: ip.evaluate(model, inputs, LOGITS, executor="batched"))
    assert float((expected - ip.evaluate(model, inputs, LOGITS)).abs().min()) > 1e-3
    for found in measured(model, inputs, ip.scale(site, 2.0)):
        torch.testing.assert_close(found, expected)


def test_the_branch_that_is_multiplied_in_a_fused_weight():
    """Phi-3 keeps gate and up in one weight, the gate first."""
    config = Phi3Config(
        vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = ip.wrap(Phi3ForCausalLM(config).eval().double())
    inputs = model.inputs([[3, 4, 5, 6], [9, 8, 7, 6]])

    def edit(_x, out):
        return torch.cat([out[..., :40], out[..., 40:] * -0.5], -1)

    fused = model.module.model.layers[1].mlp.gate_up_proj
    expected = with_output(fused, edit, lambda: ip.evaluate(model, inputs, LOGITS, executor="batched"))
    for found in measured(model, inputs, ip.scale(ip.site("mlp_pre_linear", 1), -0.5)):
        torch.testing.assert_close(found, expected)
    gpt2 = ip.wrap(zoo.make("gpt2"))
    with pytest.raises(ip.SiteError, match="not gated"):
        gpt2.run(gpt2.inputs([[3, 4]]), ip.zero(ip.site("mlp_pre_linear", 0)))


def test_worlds_that_edit_the_norm_beside_worlds_that_edit_what_heads_read():
    """Rows of one batch: what one of them does to the norm stays in it, and reaches all that it reads."""
    model = ip.wrap(zoo.make("llama"))
    inputs = model.inputs([[3, 4, 5, 6], [9, 8, 7, 6]])
    plans = [ip.scale(ip.site(name, 1, pos=2), 1.7) for name in ("ln1", "q_input", "ln1_scale", "v_input", "ln2")]
    worlds = [ip.World(inputs, hk.Plan((plan,))) for plan in plans]
    alone = [hk.run_worlds(model, [world], [ip.site("logits")], executor="sequential") for world in worlds]
    expected = torch.cat([next(iter(found)).values[0] for found in alone])
    for executor in ("batched", "shared"):
        found = hk.run_worlds(model, worlds, [ip.site("logits")], executor=executor)
        torch.testing.assert_close(torch.cat([one.values[0] for one in found]), expected)


class Halved(nn.Module):
    """A norm of the user's that divides by no root of a mean square."""

    eps = 1e-5

    def forward(self, x):
        return x / (x.abs().mean(-1, keepdim=True) + self.eps)


def test_a_scale_is_found_out_by_trying():
    torch.manual_seed(0)
    ln = nn.LayerNorm(16)
    nn.init.normal_(ln.weight), nn.init.normal_(ln.bias)
    assert scale_of(ln, 16) == Scale(True, 1e-5)
    rms = nn.RMSNorm(16, eps=1e-3)
    nn.init.normal_(rms.weight)
    assert scale_of(rms, 16) == Scale(False, 1e-3)
    assert scale_of(ln.half(), 16) == Scale(True, 1e-5)
    assert scale_of(Halved(), 16) is None and scale_of(nn.Identity(), 16) is None and scale_of(None, 16) is None
    wrong = nn.LayerNorm(16)
    wrong.forward = lambda x: nn.functional.layer_norm(x, (16,), eps=1e-2)  # not the eps that it says
    assert scale_of(wrong, 16) is None
