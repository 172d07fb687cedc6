"""A plan on a TransformerBridge does what it does on the model of the same weights that we run ourselves."""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

import interp as ip
from tests import zoo
from tests.hooks import bridged
from tests.hooks.bridged import close

FAMILIES = ["gpt2", "llama", "neox", "gemma2"]
pytestmark = pytest.mark.skipif(find_spec("transformer_lens") is None, reason="TransformerLens is not installed")


def inputs(model: ip.Model, padded: bool = False, seed: int = 0) -> ip.Inputs:
    ids, mask = zoo.random_inputs(zoo.VOCAB, [7, 5] if padded else [7, 7], seed=seed)
    return model.inputs(ids, mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_captures(family: str) -> None:
    ours, theirs = bridged.native(family), bridged.bridge(family)
    shared = [place for place in bridged.sites(ours) if place.key in theirs.sizes]
    missing = {place.name for place in bridged.sites(ours)} - {place.name for place in shared}
    assert missing == ({"rot_q", "rot_k"} if family == "neox" else set())
    assert {place.name for place in bridged.sites(theirs)} <= {place.name for place in shared}
    for padded in (False, True):
        given = inputs(ours, padded)
        one, two = ours.run(given, capture=shared), theirs.run(given, capture=shared)
        real = given.mask
        close(one.logits, two.logits, real)
        for place in shared:
            a, b = one.tape[place], two.tape[place]
            if place.name in ("scores", "pattern"):
                a, b = a.transpose(1, 2), b.transpose(1, 2)
            close(a, b, real)


@pytest.mark.parametrize("family", FAMILIES)
def test_interventions(family: str) -> None:
    ours, theirs = bridged.native(family), bridged.bridge(family)
    given, other = inputs(ours, padded=True), inputs(ours, padded=True, seed=3)
    base = ours.run(given).logits
    for place in bridged.sites(theirs):
        if place.layer == 0 and place.name not in ("resid_pre", "attn_in", "scores"):
            continue
        width = {} if place.name in ("scores", "pattern") else {"dim": -1}
        plans = [
            ip.patch(place, source=ip.World(other)),
            ip.scale(place.at(pos=-1, **width), -2.0) + ip.scale(place.at(pos=0), 1.5),
        ]
        for plan in plans:
            one, two = ours.run(given, plan), theirs.run(given, plan)
            close(one.logits, two.logits, given.mask, 2e-5)
            # Learned positions are those of every prompt, so patching them changes nothing.
            inert = place.name == "pos_embed" and plan is plans[0]
            assert inert == (float((one.logits - base)[given.mask].abs().max()) < 1e-4), plan
            assert [e.positions for e in one.audit] == [e.positions for e in two.audit]


@pytest.mark.parametrize("family", FAMILIES)
def test_attention(family: str) -> None:
    ours, theirs = bridged.native(family), bridged.bridge(family)
    given = inputs(ours)
    last = ours.n_layers - 1
    everything = ip.knockout(ip.site("scores", last, pos=3))  # a query that may attend to nothing
    plans = [
        ip.knockout(ip.site("scores", 0, head=1, key_pos=0, pos=slice(1, None))),
        everything,
        ip.scale(ip.site("scores", 0, head=0), 2.0) + ip.scale(ip.site("pattern", 0, head=0, pos=-1), 0.5),
    ]
    for plan in plans:
        keep = [ip.site("pattern", 0), ip.site("scores", 0), ip.site("pattern", last), ip.site("z", last)]
        one, two = ours.run(given, plan, capture=keep), theirs.run(given, plan, capture=keep)
        close(one.logits, two.logits)
        for place in keep:
            close(one.tape[place], two.tape[place])
    assert not bool(theirs.run(given, everything, capture=keep[2]).tape[keep[2]][:, :, 3].any())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gradients(family: str) -> None:
    ours, theirs = bridged.native(family), bridged.bridge(family)
    given, other = inputs(ours), inputs(ours, seed=3)
    keep = [ip.site(name, 1) for name in ("resid_pre", "q", "v", "pattern", "z", "resid_mid", "mlp_out")]
    plan = ip.patch(ip.site("z", 0, head=1), source=ip.World(other))
    found = []
    for model in (ours, theirs):
        run = model.run(given, plan, capture=keep, grad=True)
        found.append(run.gradient(run.logits[:, -1, 3]))
    for one, two in zip(*found, strict=True):
        assert float(one.abs().max()) > 1e-4
        close(one, two, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation(family: str) -> None:
    ours, theirs = bridged.native(family), bridged.bridge(family)
    given = inputs(ours)
    plan = (
        ip.steer(ip.site("resid_post", 0, pos="new"), torch.ones(theirs.architecture.width), scale=2.0)
        + ip.scale(ip.site("k", 1, pos=-1), 3.0)
        + ip.knockout(ip.site("scores", 1, head=0, key_pos=1)).at(pos="new")
    )
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "output_logits": True}
    found: list[list[Tensor]] = []
    for model in (ours, theirs):
        with model.apply(plan) as audit:
            module: Any = model.module
            out = module.generate(given.ids, return_dict_in_generate=True, **options)
        found.append([out.sequences.float(), *out.logits])
        assert all(entry.status == "fired" for entry in audit)
    for one, two in zip(*found, strict=True):
        close(one, two, atol=1e-4)
    module = ours.module
    bare = module.generate(given.ids, return_dict_in_generate=True, **options)
    assert float((bare.logits[-1] - found[0][-1]).abs().max()) > 1e-3


def test_own_calls() -> None:
    """A held plan binds the bridge's own calls: forward, run_with_cache, generate."""
    model = bridged.bridge("gpt2")
    given, bridge = inputs(model), model.tool.bridge
    plan = ip.zero(ip.site("mlp_out", 0))
    want = model.run(given, plan, capture="blocks.1.hook_resid_pre")
    with model.apply(plan):
        close(bridge(given.ids), want.logits)
        logits, cache = bridge.run_with_cache(given.ids)
        close(logits, want.logits)
        close(cache["blocks.1.hook_resid_pre"], want.tape["blocks.1.hook_resid_pre"])
        close(bridge(given.ids), want.logits)
    with model.apply(ip.scale(ip.site("resid_post", 0, pos="new"), 3.0)) as audit:
        bridge.generate(given.ids, max_new_tokens=4, do_sample=False, verbose=False, stop_at_eos=False)
    assert audit[0].positions == 2 * 3


def test_sweep() -> None:
    ours, theirs = bridged.native("llama"), bridged.bridge("llama")
    clean, corrupt = inputs(ours), inputs(ours, seed=3)
    metric = ip.logit_diff([3, 4], [5, 6])
    for grid in (ip.grid("resid_pre", layer="all", pos=[2, 6]), ip.grid("pattern", layer=[0], head="all")):
        one = ip.sweep(ours, clean, corrupt, grid, metric=metric)
        two = ip.sweep(theirs, clean, corrupt, grid, metric=metric)
        assert float(abs(one.effect).max()) > 1e-2
        assert abs(one.effect - two.effect).max() <= 1e-4
        three = ip.sweep(theirs, clean, corrupt, grid, metric=metric, executor="sequential")
        assert abs(two.effect - three.effect).max() <= 1e-4


def state(bridge: Any) -> tuple[object, ...]:
    modules = [(name, type(part), part.training) for name, part in bridge.original_model.named_modules()]
    hooks = [
        (len(part._forward_hooks), len(part._forward_pre_hooks), len(getattr(part, "fwd_hooks", ())))
        for part in bridge.original_model.modules()
    ]
    cfg = bridge.cfg
    flags = [getattr(cfg, f) for f in ("use_split_qkv_input", "use_attn_result", "use_attn_in", "use_hook_mlp_in")]
    return modules, hooks, flags, sorted(bridge.original_model.state_dict())


def test_left_as_it_was() -> None:
    model = bridged.bridge("gpt2")
    bridge, given = model.tool.bridge, inputs(model)
    logits = bridge(given.ids)
    before = state(bridge)
    for name in ("q_input", "result", "attn_in", "scores", "resid_mid", "logits"):
        place = ip.site(name, None if name == "logits" else 0)
        model.run(given, ip.scale(place, 0.5), capture=place)
        with suppress(RuntimeError), model.apply(ip.scale(place, 0.5)):
            bridge(given.ids)
            raise RuntimeError
    assert state(bridge) == before
    assert torch.equal(bridge(given.ids), logits)


def test_users_own_setup() -> None:
    """Flags and hooks of the user's stay in force."""
    model = bridged.bridge("gpt2")
    bridge, given = model.tool.bridge, inputs(model)
    want = model.run(given, ip.zero(ip.site("q_input", 0, head=1)) + ip.zero(ip.site("attn_in", 1))).logits
    bridge.set_use_split_qkv_input(True)
    seen: list[Tensor] = []
    bridge.add_hook("blocks.0.hook_q_input", lambda x, hook: seen.append(x))
    try:
        got = model.run(given, ip.zero(ip.site("q_input", 0, head=1)) + ip.zero(ip.site("attn_in", 1))).logits
        close(want, got)
        assert len(seen) == 1
        assert bridge.cfg.use_split_qkv_input
    finally:
        bridge.reset_hooks()
        bridge.set_use_split_qkv_input(False)
    # An edit of what q, k and v read together comes before the copies for each head.
    both = ip.scale(ip.site("attn_in", 0), 2.0) + ip.zero(ip.site("q_input", 0, head=1))
    close(bridged.native("gpt2").run(given, both).logits, model.run(given, both).logits, atol=2e-5)


def test_refused_by_name() -> None:
    model = bridged.bridge("neox")
    given = inputs(model)
    with pytest.raises(ip.SiteError, match="no site 'rot_q'"):
        model.run(given, ip.zero(ip.site("rot_q", 0)))
    with pytest.raises(ip.SiteError, match="no site 'pos_embed'"):
        model.run(given, capture="hook_pos_embed")
    with pytest.raises(ip.ModelError, match="TransformerLens"):
        model.compile()


def test_left_padding_in_float64() -> None:
    model = ip.wrap(bridged.boot(bridged.make("llama", torch.float64)))
    ids, mask = zoo.random_inputs(zoo.VOCAB, [7, 5], padding="left")
    with pytest.raises(ip.ModelError, match="padded on the left in float64"):
        model.run(model.inputs(ids, mask))
    right = model.inputs(*zoo.random_inputs(zoo.VOCAB, [7, 5]))
    assert bool(model.run(right).logits[right.mask].isfinite().all())


def test_left_padding() -> None:
    ours, theirs = bridged.native("gpt2"), bridged.bridge("gpt2")
    given = ours.inputs(*zoo.random_inputs(zoo.VOCAB, [7, 5], padding="left"))
    plan = ip.knockout(ip.site("scores", 0, key_pos=0)).at(pos=slice(1, None)) + ip.scale(ip.site("v", 1, pos=-1), 2.0)
    one, two = (model.run(given, plan, capture=[ip.site("pattern", 1)]) for model in (ours, theirs))
    close(one.logits, two.logits, given.mask)
    close(one.tape[ip.site("pattern", 1)], two.tape[ip.site("pattern", 1)])
