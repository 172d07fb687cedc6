"""Plans held through training steps: functions of the batch, other worlds on the same call, checkpointing, dropout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hooks as hk
from hooks import Inputs, Plan, World, site
from hooks.errors import PlanError, ShapeError, UnfiredError
from tests import zoo

EXACT = {"rtol": 0.0, "atol": 1e-10}


def fresh(family: str = "gpt2") -> hk.Model:
    return hk.wrap(zoo.make(family))


def batch(model: hk.Model, seed: int = 1, rows: int = 2) -> Inputs:
    return model.inputs(*zoo.random_inputs(zoo.VOCAB, [6, 5, 6][:rows], "left", seed))


def call(model: hk.Model, x: Inputs) -> Tensor:
    out = model.module(input_ids=x.ids, attention_mask=x.mask.long(), position_ids=x.positions)
    return out if isinstance(out, Tensor) else out.logits


def by_token(inputs: Inputs) -> Plan:
    """A plan whose positions depend on the tokens: the row's largest token is what is scaled."""
    largest = inputs.ids.masked_fill(~inputs.mask, -1).argmax(1)
    pos = inputs.positions.gather(1, largest[:, None])
    return hk.scale(site("z", 0, pos=pos), 3.0) + hk.zero(site("attn_out", 1, pos=pos))


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "small_qk_norm"])
def test_a_plan_that_depends_on_the_batch(family):
    model = fresh(family)
    with model.apply(by_token) as audit:
        for seed in (1, 2, 3):
            x = batch(model, seed, rows=1 + seed % 3)
            torch.testing.assert_close(call(model, x)[x.mask], model.run(x).logits[x.mask], **EXACT)
            with model.suspended():
                expected = model.run(x, by_token(x)).logits
            torch.testing.assert_close(call(model, x)[x.mask], expected[x.mask], **EXACT)
    assert len(audit) == 2 and [e.status for e in audit] == ["fired", "fired"]


@torch.no_grad()
def test_functions_within_plans_within_functions():
    model = fresh()
    x = batch(model)
    plan = hk.scale(site("resid_pre", 1, pos=2), 2.0)
    last = lambda inputs: hk.scale(site("mlp_out", 1, pos=inputs.lengths - 1), 0.5)  # noqa: E731
    expected = model.run(x, by_token(x) + plan + last(x)).logits
    with model.apply(by_token) as one, model.apply(plan) as two:
        with model.apply(last) as three:
            torch.testing.assert_close(call(model, x)[x.mask], expected[x.mask], **EXACT)
            inside = list(hk.run_worlds(model, [World(x)], [site("logits")]))
            torch.testing.assert_close(torch.cat([o.values[0] for o in inside])[x.mask], expected[x.mask], **EXACT)
        call(model, x)
    assert [[e.calls for e in audit] for audit in (one, two, three)] == [[3, 3], [3], [2]]


@torch.no_grad()
def test_like_interventions_of_a_function_have_a_record_each():
    """Two of a kind at one site, call after call: the n-th is the n-th of the call before, and no other."""
    model = fresh()
    place, ones = site("resid_pre", 1), torch.ones(model.architecture.width).double()

    def plan(inputs: Inputs) -> Plan:
        rows = torch.arange(len(inputs)) == 0
        return hk.steer(place.at(pos=1), ones) + hk.steer(place.at(pos=(2, -1)), 4 * ones).where(rows)

    with model.apply(plan) as audit:
        for seed in (1, 2):
            call(model, batch(model, seed))
    assert [(e.calls, e.rows, e.positions) for e in audit] == [(2, 4, 4), (2, 2, 4)]
    torch.testing.assert_close(torch.tensor([e.change for e in audit]), torch.tensor([1.0, 4.0]))


@torch.no_grad()
def test_a_function_that_gives_nothing_or_the_wrong_thing():
    model = fresh()
    x = batch(model)

    def nothing_to_do(inputs: Inputs) -> None:
        return None

    with pytest.raises(UnfiredError, match="nothing_to_do"), model.apply(nothing_to_do):
        call(model, x)
    with pytest.raises(UnfiredError), model.apply(by_token):
        pass
    with pytest.raises(PlanError, match="str"), model.apply(lambda inputs: "zero"):
        call(model, x)
    with pytest.raises(hk.InterpError, match="layers 0"), model.apply(lambda inputs: hk.zero(site("z", 7))):
        call(model, x)
    with pytest.raises(ShapeError), model.apply(lambda inputs: hk.zero(site("z", 0)).where(torch.ones(9).bool())):
        call(model, x)
    with model.apply(lambda inputs: hk.zero(site("z", 0)) if len(inputs) == 2 else None) as audit:
        call(model, x)
        call(model, batch(model, rows=1))
    assert [e.calls for e in audit] == [1]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "small_attn_only"])
def test_this_world_under_another_plan(family):
    """A read of a plan is a read of a world on the same inputs, in every executor and while a plan is held."""
    model = fresh(family)
    x = batch(model)
    other = hk.scale(site("z", 0, head=1), 2.0) + hk.zero(site("attn_out", 1, pos=-1))
    deeper = other + hk.patch(site("resid_pre", 1, pos=1), hk.scale(site("z", 0), 0.0))
    for source in (other, deeper):
        plan = hk.zero(site("z", 0, head=0)) + hk.patch(site("pattern", 1), source) + hk.patch(site("v", 1), source)
        ready = World(x, source)
        same = hk.zero(site("z", 0, head=0)) + hk.patch(site("pattern", 1), ready) + hk.patch(site("v", 1), ready)
        expected = model.run(x, same).logits
        for executor in ("sequential", "batched", "shared"):
            found = list(hk.run_worlds(model, [World(x, plan), World(x)], [site("logits")], executor=executor))
            mine = torch.cat([o.values[0] for o in found if o.index == 0])
            torch.testing.assert_close(mine[x.mask], expected[x.mask], **EXACT)
        with model.apply(plan):
            torch.testing.assert_close(call(model, x)[x.mask], expected[x.mask], **EXACT)
        with model.apply(lambda inputs, source=source: hk.patch(site("pattern", 1), World(inputs, source))):
            held = call(model, x)
        torch.testing.assert_close(
            held[x.mask], model.run(x, hk.patch(site("pattern", 1), source)).logits[x.mask], **EXACT
        )
    assert float((expected - model.run(x).logits)[x.mask].abs().max()) > 1e-3


def test_what_is_read_of_this_world_has_the_same_dropout():
    """The call is made again with the same draws, and the user's own pass draws what it would have drawn anyway."""
    model = fresh()
    for module in model.module.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.module.train()
    x = batch(model)
    torch.manual_seed(3)
    bare, after = call(model, x), torch.rand(3)
    for plan in (hk.freeze(site("resid_post", 1)), hk.patch(site("resid_post", 1), Plan(), stop_gradient=True)):
        torch.manual_seed(3)
        with model.apply(hk.scale(site("z", 0), 5.0) + plan):
            held = call(model, x)
        assert torch.equal(torch.rand(3), after)
        torch.testing.assert_close(held, bare, **EXACT)
    assert float((call(model, x) - bare).abs().max()) > 1e-3


def gradients(model: hk.Model, x: Inputs) -> list[Tensor]:
    parameters = list(model.module.parameters())
    found = torch.autograd.grad(call(model, x)[x.mask].logsumexp(-1).sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


PLANS = {
    "sites": lambda: hk.scale(site("z", 0, head=1), 2.0) + hk.scale(site("pattern", 1), 0.5),
    "freeze": lambda: hk.zero(site("z", 0, head=1)) + hk.freeze(site("pattern", 1)),
    "constant": lambda: hk.zero(site("z", 0, head=1)) + hk.freeze(site("pattern", 1), stop_gradient=True),
    "world": lambda: hk.zero(site("z", 0)) + hk.patch(site("v", 1), hk.scale(site("z", 0), 3.0)),
    "function": lambda: by_token,
    "here": lambda: Plan(
        (hk.intervene(site("attn_out", 1), lambda v, first, ctx: v + first, hk.here(site("attn_out", 0))),)
    ),
}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", list(PLANS))
def test_gradient_checkpointing(family, name):
    """The same gradients, and each intervention counted once though it is computed twice."""
    model = fresh(family)
    x = batch(model)
    model.module.train()
    plan = PLANS[name]()
    with model.apply(plan):
        expected = gradients(model, x)
    bare = gradients(model, x)
    assert max(float((a - b).abs().max()) for a, b in zip(expected, bare, strict=True)) > 1e-6
    model.module.gradient_checkpointing_enable({"use_reentrant": False})
    with model.apply(plan) as audit:
        got = gradients(model, x)
        assert [e.calls for e in audit] == [1] * len(audit)
        got_again = gradients(model, x)
    assert [e.calls for e in audit] == [2] * len(audit)
    for one, two, three in zip(got, expected, got_again, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
        assert torch.equal(one, three)
    assert all(m.gradient_checkpointing for m in model.module.modules() if hasattr(m, "gradient_checkpointing"))


def test_reentrant_checkpointing_that_would_lose_a_gradient():
    model = fresh()
    model.module.train()
    model.module.gradient_checkpointing_enable({"use_reentrant": True})
    model.module.enable_input_require_grads()
    with pytest.raises(PlanError, match="use_reentrant=False"), model.apply(PLANS["here"]()):
        gradients(model, batch(model))


def test_checkpointing_by_hand_and_gradients_through_another_world():
    model = fresh("small_attn_only")
    x = batch(model)
    block = model.module.blocks[0]
    inner = block.attn.forward
    block.attn.forward = lambda *args: checkpoint(inner, *args, use_reentrant=False)
    with pytest.raises(RuntimeError, match="stop_gradient"), model.apply(PLANS["freeze"]()):
        gradients(model, x)
    with model.apply(PLANS["constant"]()) as audit:
        gradients(model, x)
    assert [e.calls for e in audit] == [1, 1]


@pytest.mark.parametrize("family", ["gpt2", "llama", "small_attn_only"])
@pytest.mark.parametrize("name", list(PLANS))
def test_autocast(family, name):
    """In bfloat16 as far as autocast goes; gradients reach the float32 weights."""
    model = hk.wrap(zoo.make(family, dtype=torch.float32))
    x = batch(model)
    with torch.autocast("cpu", torch.bfloat16), model.apply(PLANS[name]()) as audit:
        narrow = call(model, x)
    with model.apply(PLANS[name]()):
        wide = call(model, x)
    assert float((narrow.float() - wide)[x.mask].abs().max()) < 0.1 * float(wide[x.mask].abs().max())
    with torch.autocast("cpu", torch.bfloat16), model.apply(PLANS[name]()):
        found = gradients(model, x)
    assert all(g.dtype == torch.float32 and bool(g.isfinite().all()) for g in found)
    assert all(e.status == "fired" for e in audit) and any(float(g.abs().max()) > 0 for g in found)


def test_a_run_between_the_forward_and_the_backward_pass():
    """The plan that is held is still in force when checkpointed parts are computed again."""
    model = fresh()
    x = batch(model)
    model.module.train()
    model.module.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = list(model.module.parameters())
    for plan in (PLANS["sites"](), by_token):
        with model.apply(plan):
            expected = gradients(model, x)
            loss = call(model, x)[x.mask].logsumexp(-1).sum()
            model.module.eval()
            model.run(x)
            model.module.train()
            got = torch.autograd.grad(loss, parameters, allow_unused=True)
        for one, two in zip(got, expected, strict=True):
            torch.testing.assert_close(torch.zeros_like(two) if one is None else one, two, rtol=1e-9, atol=1e-9)
