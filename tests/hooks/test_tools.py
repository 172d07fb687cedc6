"""A plan on a model of another tool does what it does on the model of the same weights that we run ourselves."""

from __future__ import annotations

import pytest
import torch

import interp as ip
from tests import zoo
from tests.hooks import bridged
from tests.hooks.bridged import close

FAMILIES = ["gpt2", "llama", "neox", "gemma2"]
SCALES = {"ln1_scale", "ln2_scale", "ln_final_scale"}
MISSING = {("transformer_lens", "neox"): {"rot_q", "rot_k"}, **{("nnsight", family): SCALES for family in FAMILIES}}
"""Sites that a tool does not show."""
pytestmark = bridged.each_tool
backward = pytest.fixture(autouse=True, scope="module")(bridged.torch_backward)


def both(tool: str, family: str) -> tuple[ip.Model, ip.Model]:
    return bridged.native(family), bridged.TOOLS[tool](family)


def inputs(model: ip.Model, padded: bool = False, seed: int = 0) -> ip.Inputs:
    return model.inputs(*zoo.random_inputs(zoo.VOCAB, [7, 5] if padded else [7, 7], seed=seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_captures(tool: str, family: str) -> None:
    ours, theirs = both(tool, family)
    shared = [place for place in bridged.sites(ours) if place.key in theirs.sizes]
    missing = {place.name for place in bridged.sites(ours)} - {place.name for place in shared}
    assert missing == MISSING.get((tool, family), set())
    assert {place.name for place in bridged.sites(theirs)} <= {place.name for place in shared}
    for padded in (False, True):
        given = inputs(ours, padded)
        one, two = ours.run(given, capture=shared), theirs.run(given, capture=shared)
        close(one.logits, two.logits, given.mask)
        for place in shared:
            a, b = one.tape[place], two.tape[place]
            if place.name in ("scores", "pattern"):
                a, b = a.transpose(1, 2), b.transpose(1, 2)
            close(a, b, given.mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_interventions(tool: str, family: str) -> None:
    ours, theirs = both(tool, family)
    given, other = inputs(ours, padded=True), inputs(ours, padded=True, seed=3)
    base = ours.run(given).logits
    for place in bridged.sites(theirs):
        if place.layer == 0 and place.name not in ("resid_pre", "attn_in", "q_input", "scores"):
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


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gradients(tool: str, family: str) -> None:
    ours, theirs = both(tool, family)
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
def test_generation(tool: str, family: str) -> None:
    ours, theirs = both(tool, family)
    given = inputs(ours)
    plan = (
        ip.steer(ip.site("resid_post", 0, pos="new"), torch.ones(theirs.architecture.width), scale=2.0)
        + ip.scale(ip.site("k", 1, pos=-1), 3.0)
        + ip.knockout(ip.site("scores", 1, head=0, key_pos=1)).at(pos="new")
        + ip.freeze(ip.site("mlp_out", 1))
    )
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "logits": True}
    keep = ["resid_post", "pattern", "k"]
    one, two = (model.generate(given, plan, capture=keep, **options) for model in (ours, theirs))
    assert torch.equal(one.sequences, two.sequences)
    assert one.logits is not None and two.logits is not None
    close(one.logits, two.logits, atol=1e-4)
    for place, value in one.values:
        close(value, two[place], atol=1e-4)
    assert all(entry.status == "fired" for entry in two.audit)
    bare = theirs.generate(given, **options)
    assert bare.logits is not None
    assert float((bare.logits[:, -1] - one.logits[:, -1]).abs().max()) > 1e-3


def test_sweep(tool: str) -> None:
    ours, theirs = both(tool, "llama")
    clean, corrupt = inputs(ours), inputs(ours, seed=3)
    metric = ip.logit_diff([3, 4], [5, 6])
    for grid in (ip.grid("resid_pre", layer="all", pos=[2, 6]), ip.grid("pattern", layer=[0], head="all")):
        one, two = (ip.sweep(model, clean, corrupt, grid, metric=metric) for model in (ours, theirs))
        three = ip.sweep(theirs, clean, corrupt, grid, metric=metric, executor="sequential")
        assert float(abs(one.effect).max()) > 1e-2
        assert abs(one.effect - two.effect).max() <= 1e-4
        assert abs(three.effect - two.effect).max() <= 1e-4
