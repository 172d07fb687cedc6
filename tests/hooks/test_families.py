"""Families that bend a block, against plain torch: experts, sinks, norms after the addition, multipliers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hooks as hk
from experiments.families.models import FAMILIES
from hooks import Model, World, site

EXECUTORS = ("sequential", "batched", "shared")
IDS = [[3, 9, 27, 31, 44, 12, 8], [5, 6, 40, 2, 17, 33, 21]]
CLOSE = {"rtol": 0.0, "atol": 2e-4}


@cache
def model(name: str) -> Model:
    """A model that nobody changes."""
    return hk.wrap(FAMILIES[name].make(torch.float64 if name not in ("BLOOM",) else torch.float32))


def plain(name: str, patch: Callable[[Any], None], ids: Any = IDS) -> Tensor:
    """Logits of a model of the same weights, to which something was done in plain torch."""
    module = FAMILIES[name].make(model(name).dtype)
    patch(module)
    with torch.no_grad():
        return module(input_ids=torch.tensor(ids)).logits


def agrees(name: str, plan: Any, expected: Tensor, executors: tuple[str, ...] = EXECUTORS) -> None:
    """Every executor gives the logits, which are not those without the plan."""
    m = model(name)
    x = m.inputs(IDS)
    assert float((m.run(x).logits - expected).abs().max()) > 1e-2
    for executor in executors:
        (outcome,) = hk.run_worlds(m, [World(x, hk.as_plan(plan))], [site("logits")], executor=executor)
        torch.testing.assert_close(outcome.values[0], expected, **CLOSE, msg=lambda t, e=executor: f"{e}: {t}")


# Experts

MIXTURES = ("Mixtral", "GPT-OSS", "Qwen 2-MoE", "Granite-MoE")


def mixture(module: Any, layer: int) -> Any:
    block = module.model.layers[layer]
    return getattr(block, "mlp", None) or block.block_sparse_moe


def by_hand(name: str, layer: int, route: Callable[[Tensor], Tensor], parts: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits where one mixture is written out: what its router says and what its experts add go through functions."""

    def patch(module: Any) -> None:
        mlp = mixture(module, layer)
        router, experts = getattr(mlp, "gate", None) or mlp.router, mlp.experts

        def forward(x: Tensor) -> Any:
            logits = nn.functional.linear(x, router.weight, getattr(router, "bias", None))
            logits = route(logits)
            top, chosen = logits.topk(2, dim=-1)
            weights = logits.softmax(-1).gather(-1, chosen) if name == "Qwen 2-MoE" else top.softmax(-1)
            each = x.new_zeros(*x.shape[:-1], 4, x.shape[-1])
            for expert in range(4):
                weight = torch.where(chosen == expert, weights, 0).sum(-1, keepdim=True)
                each[..., expert, :] = weight * one_expert(name, experts, expert, x)
            out = parts(each).sum(-2)
            if name == "Qwen 2-MoE":
                out = out + mlp.shared_expert_gate(x).sigmoid() * mlp.shared_expert(x)
            return (out, None) if name == "GPT-OSS" else out

        mlp.forward = forward

    return plain(name, patch)


def one_expert(name: str, experts: Any, expert: int, x: Tensor) -> Tensor:
    if name == "GPT-OSS":
        both = x @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        gate, up = both[..., ::2].clamp(max=experts.limit), both[..., 1::2].clamp(-experts.limit, experts.limit)
        hidden = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
        return hidden @ experts.down_proj[expert] + experts.down_proj_bias[expert]
    gate, up = (x @ experts.gate_up_proj[expert].T).chunk(2, -1)
    return (experts.act_fn(gate) * up) @ experts.down_proj[expert].T


def same(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize("name", MIXTURES)
def test_a_route_is_forced_banned_replayed_and_ablated(name):
    m, layer = model(name), 2
    torch.testing.assert_close(by_hand(name, layer, same, same), m.run(m.inputs(IDS)).logits, **CLOSE)

    def put(value: float, expert: int) -> Callable[[Tensor], Tensor]:
        def changed(logits: Tensor) -> Tensor:
            logits = logits.clone()
            logits[:, 2, expert] = value
            return logits

        return changed

    forced = hk.clamp(site("router", layer, expert=3, pos=2), 50.0)
    agrees(name, forced, by_hand(name, layer, put(50.0, 3), same))
    x = m.inputs(IDS)
    chosen = int(m.run(x, capture="blocks.2.mlp.hook_router").tape[site("router", layer)][0, 2].argmax())
    banned = hk.clamp(site("router", layer, expert=chosen, pos=2), -torch.inf)
    agrees(name, banned, by_hand(name, layer, put(-torch.inf, chosen), same))

    other = m.inputs([row[::-1] for row in IDS])
    said = m.run(other, capture=site("router", layer)).tape[site("router", layer)]
    agrees(name, hk.patch(site("router", layer), World(other)), by_hand(name, layer, lambda _: said, same))

    def without(each: Tensor) -> Tensor:
        each = each.clone()
        each[:, 2, chosen] = 0
        return each

    ablated = hk.zero(site("expert_out", layer, expert=chosen, pos=2))
    agrees(name, ablated, by_hand(name, layer, same, without))


def test_what_experts_add_is_what_the_mixture_adds():
    m = model("Mixtral")
    tape = m.run(m.inputs(IDS), capture=[site("expert_out", 1), site("mlp_out", 1), site("router", 1)]).tape
    each = tape[site("expert_out", 1)]
    assert each.shape == (2, 7, 4, 32) and bool(((each != 0).any(-1).sum(-1) == 2).all())
    torch.testing.assert_close(each.sum(2), tape[site("mlp_out", 1)], **CLOSE)
    top = tape[site("router", 1)].topk(2, dim=-1).indices.sort(-1).values
    assert torch.equal((each != 0).any(-1).nonzero()[:, 2].view(2, 7, 2), top)


def test_sites_of_experts_are_named_by_expert():
    assert site("router", 1, expert=2) == site("router", 1, dim=2)
    assert site("expert_out", 1).at(expert=(0, 3)) == site("expert_out", 1, head=(0, 3))
    with pytest.raises(hk.SiteError, match="has no experts"):
        site("z", 1, expert=0)
    m = model("Qwen 2-MoE")
    with pytest.raises(hk.SiteError, match="which others of the model have"):
        m.run(m.inputs(IDS), hk.zero(site("router", 1)))  # a dense layer
    with pytest.raises(hk.SiteError, match="mixture of experts"):
        m.run(m.inputs(IDS), hk.zero(site("mlp_post", 0)))


# What stands around a sublayer


def hook_out(part: Callable[[Any], Any], change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    """Change what a part returns, in plain torch."""

    def patch(module: Any) -> None:
        def hook(_m: Any, _a: Any, out: Any) -> Any:
            return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

        part(module).register_forward_hook(hook)

    return patch


def at(pos: int, vector: Tensor) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, pos] += vector.to(x)
        return x

    return change


VECTOR = torch.linspace(-2, 2, 32, dtype=torch.float64)


def test_granite_adds_by_its_multipliers():
    layer = lambda m: m.model.layers[1]  # noqa: E731
    # The site holds what is added, 0.4 times what the module returns.
    for name, part in (("attn_out", lambda m: layer(m).self_attn), ("mlp_out", lambda m: layer(m).mlp)):
        expected = plain("Granite", hook_out(part, at(2, VECTOR / 0.4)))
        agrees("Granite", hk.steer(site(name, 1, pos=2), VECTOR), expected)
    expected = plain("Granite", hook_out(lambda m: m.model.embed_tokens, at(2, VECTOR / 2.0)))
    agrees("Granite", hk.steer(site("embed", pos=2), VECTOR), expected)
    bias = torch.linspace(-1, 1, 50, dtype=torch.float64)
    expected = plain("Granite", hook_out(lambda m: m.lm_head, at(2, bias * 3.0)))
    agrees("Granite", hk.steer(site("logits", pos=2), bias), expected)


def test_bert_norms_after_the_addition():
    layer = lambda m: m.bert.encoder.layer[1]  # noqa: E731
    agrees(
        "BERT",
        hk.steer(site("attn_out", 1, pos=2), VECTOR),
        plain("BERT", hook_out(lambda m: layer(m).attention.output.dense, at(2, VECTOR))),
    )
    agrees(
        "BERT",
        hk.steer(site("resid_mid", 1, pos=2), VECTOR),
        plain("BERT", hook_out(lambda m: layer(m).attention.output, at(2, VECTOR))),
    )

    def mlp_alone(module: Any) -> None:
        layer(module).intermediate.register_forward_pre_hook(lambda _m, args: (at(2, VECTOR)(args[0]),))

    agrees("BERT", hk.steer(site("mlp_in", 1, pos=2), VECTOR), plain("BERT", mlp_alone))


@pytest.mark.parametrize("name", ["attn_in", "mlp_in"])
def test_gptj_reads_one_norm_twice(name):
    """An edit of what one sublayer reads is not seen by the other, which reads the same norm."""

    def patch(module: Any) -> None:
        block = module.transformer.h[1]
        streams: list[Tensor] = []
        block.ln_1.register_forward_pre_hook(lambda _m, args: streams.append(args[0]))
        normed = lambda: block.ln_1.forward(at(2, VECTOR)(streams[-1]))  # noqa: E731
        if name == "mlp_in":
            block.mlp.register_forward_pre_hook(lambda _m, _args: (normed(),))
        else:
            block.attn.register_forward_pre_hook(
                lambda _m, args, kwargs: (args, {**kwargs, "hidden_states": normed()}), with_kwargs=True
            )

    agrees("GPT-J", hk.steer(site(name, 1, pos=2), VECTOR), plain("GPT-J", patch))


def test_queries_before_norms_over_all_heads():
    vector = VECTOR.view(4, 8)
    expected = plain("OLMo 2", hook_out(lambda m: m.model.layers[1].self_attn.q_proj, at(2, VECTOR)))
    agrees("OLMo 2", hk.steer(site("q", 1, pos=2), vector), expected)


def test_halves_of_one_projection():
    both = torch.cat([torch.linspace(-1, 1, 40), torch.zeros(40)]).double()
    expected = plain("Phi-3", hook_out(lambda m: m.model.layers[1].mlp.gate_up_proj, at(2, both)))
    agrees("Phi-3", hk.steer(site("mlp_pre", 1, pos=2), both[:40]), expected)
    # q, k and v side by side: the keys begin after four heads of queries.
    keys = torch.zeros(64, dtype=torch.float64)
    keys[32:48] = torch.linspace(-1, 1, 16)
    expected = plain("Phi-3", hook_out(lambda m: m.model.layers[1].self_attn.qkv_proj, at(2, keys)))
    agrees("Phi-3", hk.steer(site("k", 1, pos=2), keys[32:48].view(2, 8)), expected)


@pytest.mark.parametrize("name", ["GPT-OSS", "GPT-J"])
def test_patterns_are_those_that_the_model_reports(name):
    m = model(name)
    module = FAMILIES[name].make(torch.float64)
    module.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = module(input_ids=torch.tensor(IDS), output_attentions=True).attentions
    tape = m.run(m.inputs(IDS), capture=[site("pattern", layer) for layer in range(3)]).tape
    for layer in range(3):
        torch.testing.assert_close(tape[site("pattern", layer)], wanted[layer].double(), **CLOSE)
    sums = tape[site("pattern", 1)].sum(-1)
    assert bool((sums < 0.999).any()) == (name == "GPT-OSS")  # sinks take a part


def test_keys_of_grouped_layouts():
    m = model("Falcon")
    value = m.run(m.inputs(IDS), capture=site("k", 1)).tape[site("k", 1)]
    attention: Any = m.architecture.blocks[1].attention.module
    kept: list[Tensor] = []
    handle = attention.query_key_value.register_forward_hook(lambda _m, _a, out: kept.append(out))
    m.module(input_ids=torch.tensor(IDS))
    handle.remove()
    _, k, _ = attention._split_heads(kept[0])
    torch.testing.assert_close(value.repeat_interleave(2, 2), k)


@pytest.mark.parametrize("name", ["Falcon", "BLOOM"])
@pytest.mark.parametrize("kind", ["scores", "pattern", "rot_q"])
def test_what_is_inside_is_refused_where_nobody_reaches_it(name, kind):
    m = model(name)
    with pytest.raises(hk.SiteError, match=r"computes its scores by itself|has no site"):
        m.run(m.inputs(IDS), capture=site(kind, 0))
    with pytest.raises(hk.SiteError), m.apply(hk.zero(site(kind, 0))):
        m.module(input_ids=torch.tensor(IDS))


def test_bloom_adds_what_its_projection_returns():
    m = model("BLOOM")
    names = ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"]
    tape = m.run(m.inputs(IDS), capture=[site(name, 1) for name in names]).tape
    pre, attn, mid, mlp, post = (tape[site(name, 1)] for name in names)
    torch.testing.assert_close(pre + attn, mid)
    torch.testing.assert_close(mid + mlp, post)
    choice = hk.choose(m, [World(m.inputs(IDS))])
    assert choice.executor == "batched" and "ALiBi" in choice.reason
    vector = VECTOR.float()
    agrees(
        "BLOOM",
        hk.steer(site("attn_out", 1, pos=2), vector),
        plain("BLOOM", hook_out(lambda x: x.transformer.h[1].self_attention.dense, at(2, vector))),
        EXECUTORS[:2],
    )


def test_encoders_read_positions_from_the_mask():
    m = model("BERT")
    alone = [m.run(m.inputs([row])).logits[0] for row in (IDS[0], IDS[1][:4])]
    for side in ("left", "right"):
        x = m.inputs([IDS[0], IDS[1][:4]], padding=side)
        logits = m.run(x).logits
        for row in range(2):
            torch.testing.assert_close(logits[row][x.mask[row]], alone[row], **CLOSE)


def test_gradients_reach_what_experts_add():
    m = model("Mixtral")
    where = site("expert_out", 1)
    run = m.run(m.inputs(IDS), capture=[where, site("router", 1)], grad=True)
    gradients = run.gradient(run.logits[:, -1, 3], where, site("router", 1))
    assert all(float(g.abs().max()) > 0 for g in gradients)
