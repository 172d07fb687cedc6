"""Gradients through interventions and through what they read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import hooks
from hooks import Inputs, Plan, Span, World, here, site
from hooks.plan.plan import Read, as_plan
from tests import oracle, zoo
from tests.hooks.formulas import edit, normals
from tests.hooks.test_oracle_sites import (
    close,
    replaced,
    setting,
)

# Gradients


@dataclasses.dataclass
class Tiny:
    """A model small enough for numerical derivatives, and a function from interventions to some of its logits."""

    model: hooks.Model
    inputs: Inputs
    source: Inputs

    def logits(self, plan, apply: bool = False) -> Tensor:
        if not apply:
            return self.model.run(self.inputs, plan, grad=True).logits[self.inputs.mask][:, :6]
        with self.model.apply(plan):
            out = self.model.module(self.inputs.ids, attention_mask=self.inputs.mask.long())
        return (out if isinstance(out, Tensor) else out.logits)[self.inputs.mask][:, :6]


def tiny(family: str) -> Tiny:
    model = hooks.wrap(zoo.make(family))
    inputs = model.inputs([[1, 2, 3, 4], [5, 6, 7]], padding="right")
    return Tiny(model, inputs, model.inputs([[8, 9, 10, 11], [12, 13, 14]], padding="right"))


def learned(t: Tiny) -> dict[str, tuple[Callable, Tensor]]:
    """Plans with something in them to learn: a function from it to the plan, and where it starts."""
    width = t.model.architecture.width
    head = t.model.sizes["z", 0, None]["dim"]
    tape = t.model.run(t.source, capture=[site("resid_pre", 1), site("z", 0)]).tape
    resid, z = site("resid_pre", 1), site("z", 0, head=(1, 3))
    two = torch.full((2,), 0.4, dtype=torch.float64)
    world = World(t.source)
    return {
        "steer.vector": (lambda v: hooks.steer(resid, v, 2.0), normals(width)),
        "steer.vector a head": (lambda v: hooks.steer(z, v), normals(2, head)),
        "steer.scale": (lambda a: hooks.steer(resid, normals(width), a), torch.tensor(0.7).double()),
        "steer, last position": (lambda v: hooks.steer(site("attn_out", 0, pos=-1), v), normals(width)),
        "clamp": (lambda v: hooks.clamp(z, v), normals(2, head)),
        "scale": (lambda v: hooks.scale(resid, v), normals(width)),
        "noise.std": (lambda a: hooks.noise(resid, a), torch.tensor(0.5).double()),
        "project_out": (lambda v: hooks.project_out(resid, v), normals(width)),
        "project_out two": (lambda v: hooks.project_out(z, v), normals(2, head)),
        "interchange": (lambda v: hooks.interchange(resid, v, tape), normals(3, width)),
        "interchange one": (lambda v: hooks.interchange(z, v, world), normals(head)),
        "interchange.source": (lambda v: hooks.interchange(z, normals(2, head), v), normals(2, 4, 2, head)),
        "through an interchange": (
            lambda v: hooks.steer(site("embed"), v) + hooks.interchange(resid, normals(3, width), tape),
            normals(width),
        ),
        "through a projection": (
            lambda v: hooks.steer(site("embed"), v) + hooks.project_out(resid, normals(3, width)),
            normals(width),
        ),
        "through noise": (
            lambda v: hooks.steer(site("embed"), v) + hooks.noise(resid, 0.3) + hooks.scale(z, 0.5),
            normals(width),
        ),
        "patch.source": (lambda v: hooks.patch(z, v), normals(2, 4, 2, head)),
        "mean.source": (lambda v: hooks.mean(site("z", 0), v), normals(3, 4, *t.model.sizes["z", 0, None].values())),
        "strength": (lambda a: hooks.patch(resid, tape).strength(a), torch.tensor(0.3).double()),
        "strength above a half": (lambda a: hooks.patch(resid, tape).strength(a), torch.tensor(0.8).double()),
        "strength at 0": (lambda a: hooks.patch(resid, tape).strength(a), torch.tensor(0.0).double()),
        "strength at 1": (lambda a: hooks.zero(z).strength(a), torch.tensor(1.0).double()),
        "strength a row": (lambda a: hooks.patch(z, world).strength(a), two),
        "strength of a zeroed pattern": (lambda a: hooks.zero(site("pattern", 1, head=0)).strength(a), two),
        "strength of zeroed scores": (lambda a: hooks.zero(site("scores", 1, head=0)).strength(a), two),
        "scale of scores": (lambda a: hooks.scale(site("scores", 1), a), torch.tensor(0.6).double()),
        "clamped scores": (lambda a: hooks.clamp(site("scores", 1, key_pos=0), a), torch.tensor(0.6).double()),
        "a user's function": (
            lambda v: hooks.intervene(resid, lambda x, r, ctx: x + torch.sigmoid(v) * (r - x), Read(world)),
            normals(width),
        ),
        "through what is read here": (
            lambda v: (
                hooks.steer(site("embed"), v)
                + hooks.intervene(
                    site("resid_post", 1), lambda x, r, ctx: 0.1 * x + r.tanh(), here(site("attn_out", 0))
                )
            ),
            normals(width),
        ),
    }


@pytest.mark.parametrize("name", list(learned(tiny("small_ln_learned"))))
@pytest.mark.parametrize("family", ["small_ln_learned", "llama"])
def test_gradients_reach_what_is_learned(family, name):
    """Checked numerically, in run() and (for the first family) in a call of the user's own under apply()."""
    t = tiny(family)
    plan, start = learned(t)[name]
    start = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(t.logits(plan(start)).square().sum(), start)
    assert gradient.isfinite().all() and gradient.abs().max() > 1e-6
    assert torch.autograd.gradcheck(lambda v: t.logits(plan(v)), start, fast_mode=True)
    if family != "llama":
        assert torch.autograd.gradcheck(lambda v: t.logits(plan(v), apply=True), start, fast_mode=True)


@pytest.mark.parametrize("apply", [False, True], ids=["run", "apply"])
def test_gradients_reach_the_plan_of_a_world_that_is_read(apply):
    """They flow through what an intervention reads, unless its function stops them."""
    t = tiny("small_ln_learned")
    resid, width = site("resid_pre", 1), t.model.architecture.width

    def plan(v: Tensor) -> Plan:
        source = World(t.source, hooks.steer(site("embed"), v))
        return as_plan(hooks.patch(resid.at(pos=-1), source))

    start = normals(width).requires_grad_()
    (gradient,) = torch.autograd.grad(t.logits(plan(start), apply).sum(), start)
    assert gradient.abs().max() > 1e-6
    assert torch.autograd.gradcheck(lambda v: t.logits(plan(v), apply), start, fast_mode=True)


@pytest.mark.parametrize("apply", [False, True], ids=["run", "apply"])
@pytest.mark.parametrize("which", ["another world", "this world under a plan"])
@pytest.mark.parametrize("first", ["constant", "differentiable"])
def test_a_world_that_is_read_with_and_without_its_gradient(first, which, apply):
    """In one plan: the value taken as a constant is one, and what the other intervention reads is none."""
    t = tiny("small_ln_learned")
    resid, z = site("resid_pre", 1, pos=-1), site("z", 1, pos=(0, 2))

    def source(v: Tensor) -> World | Plan:
        inner = as_plan(hooks.steer(site("embed"), v))
        return World(t.source, inner) if which == "another world" else inner

    def plan(v: Tensor, constant: Tensor | World | Plan | None = None) -> Plan:
        read = source(v)
        parts = [hooks.patch(resid, read, stop_gradient=True), hooks.patch(z, read)]
        if constant is not None:
            parts[0] = hooks.patch(resid, constant)
        return Plan(tuple(parts if first == "constant" else parts[::-1]))

    start = normals(t.model.architecture.width)
    world = source(start)
    world = world if isinstance(world, World) else World(t.inputs, world)
    kept = t.model.run(world, capture=resid).tape[resid]

    def gradient(make: Callable[[Tensor], Plan], apply: bool = False) -> Tensor:
        v = start.clone().requires_grad_()
        return torch.autograd.grad(t.logits(make(v), apply).square().sum(), v)[0]

    found = gradient(plan, apply)
    wanted, both = gradient(lambda v: plan(v, kept)), gradient(lambda v: plan(v, source(v)))
    assert wanted.abs().max() > 1e-3 and (both - wanted).abs().max() > 1e-3
    close(found, wanted)


@pytest.mark.parametrize("apply", [False, True], ids=["run", "apply"])
@pytest.mark.parametrize("family", ["small_ln_learned", "gpt2", "llama", "qwen3"])
def test_gradients_of_the_weights_under_a_plan(family, apply):
    """A training step on an edited model: d loss / d weights as the oracle has them."""
    s = setting(family, "right" if apply else "left")  # without position ids, models misplace left-padded rows
    z, attn = site("z", 1, head=1), site("attn_out", 0, pos=Span(1, None))
    u = normals(s.model.architecture.width)
    plan = hooks.scale(z, 0.5) + hooks.knockout(site("scores", 0, head=2, key_pos=0)) + hooks.steer(attn, u)
    plan += hooks.zero(site("pattern", 1, pos=1)).strength(0.5)
    edits = {
        **edit(s, z, lambda x: 0.5 * x),
        **replaced(s, site("scores", 0, head=2, key_pos=0), -torch.inf),
        **edit(s, attn, lambda x: x + u),
        **edit(s, site("pattern", 1, pos=1), lambda x: 0.5 * x),
    }
    weights = dict(s.module.named_parameters())
    logits, _ = oracle.forward(s.module, s.corrupt.ids, s.mask, edits)
    expected = torch.autograd.grad(logits[s.mask].square().mean(), list(weights.values()), materialize_grads=True)
    if apply:
        with s.model.apply(plan):
            out = s.module(s.corrupt.ids, attention_mask=s.mask.long())
        out = out if isinstance(out, Tensor) else out.logits
    else:
        out = s.model.run(s.corrupt, plan, grad=True).logits
    close(out[s.mask], logits[s.mask])
    found = torch.autograd.grad(out[s.mask].square().mean(), list(weights.values()), materialize_grads=True)
    for name, a, b in zip(weights, found, expected, strict=True):
        close(a, b, name)
    assert max(float(g.abs().max()) for g in expected) > 1e-3


def test_gradients_of_frozen_values():
    """A frozen site depends on the weights before it, as it does in the unedited world."""
    s = setting("small_ln_learned", "none")
    place = site("attn_out", 1)
    plan = hooks.steer(site("embed"), normals(32)) + hooks.freeze(place)
    _, values = oracle.forward(s.module, s.corrupt.ids, s.mask)
    edits = {("embed", None): lambda x: x + normals(32), ("attn_out", 1): lambda x: values["attn_out", 1]}
    logits, _ = oracle.forward(s.module, s.corrupt.ids, s.mask, edits)
    weights = [s.module.blocks[1].attn.v_proj.weight, s.module.embed.weight]
    expected = torch.autograd.grad(logits.square().mean(), weights)
    found = torch.autograd.grad(
        s.model.run(s.corrupt, plan, grad=True).logits.square().mean(), weights, materialize_grads=True
    )
    with s.model.apply(plan):
        applied = torch.autograd.grad(s.module(s.corrupt.ids).square().mean(), weights, materialize_grads=True)
    for a, b, c in zip(found, applied, expected, strict=True):
        assert c.abs().max() > 1e-4
        close(b, c, "apply")
        close(a, c, "run")


def test_without_grad_nothing_is_kept_attached():
    t = tiny("small_ln_learned")
    vector = normals(32).requires_grad_()
    run = t.model.run(t.inputs, hooks.steer(site("embed"), vector), capture=site("z", 0))
    assert not run.logits.requires_grad and not run.tape[site("z", 0)].requires_grad
