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
