"""A plan held on the model while the user calls it: any call, any inputs, a training step, generation."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn

import hooks as hk
from hooks import Inputs, Model, Plan, World, patch, site
from hooks.models.calls import arguments_of_call
from tests import zoo
from tests.zoo import fresh, wrapped

EXACT = {"rtol": 0.0, "atol": 1e-10}
HF = [family for family in zoo.FAMILIES if not family.startswith("small")]

each_family = pytest.mark.parametrize("family", zoo.FAMILIES)
each_hf_family = pytest.mark.parametrize("family", HF)
each_padding = pytest.mark.parametrize("padding", ["none", "right", "left"])


def example(model: Model, padding: str, seed: int = 1) -> Inputs:
    lengths, side = {"none": ([6, 6], "right"), "right": ([6, 4], "right"), "left": ([6, 4], "left")}[padding]
    return model.inputs(*zoo.random_inputs(zoo.VOCAB, lengths, side, seed))


def logits_of(out: Tensor | object) -> Tensor:
    return out if isinstance(out, Tensor) else out.logits


def named(x: Inputs) -> dict[str, Tensor]:
    return {"input_ids": x.ids, "attention_mask": x.mask.long(), "position_ids": x.positions}


def some_plan(model: Model) -> Plan:
    width = model.architecture.width
    plan = hk.steer(site("resid_pre", 1, pos=1), torch.linspace(-1, 1, width).double(), scale=2.0)
    plan = plan + hk.zero(site("z", 0, head=1, pos=-1)) + hk.scale(site("pattern", 1, pos=2, key_pos=0), 0.5)
    return plan + hk.noise(site("k", 0), 0.3) + hk.scale(site("q_input", 1, head=0, pos=slice(2, None)), 0.5)


# Calls


@each_family
@each_padding
@torch.no_grad()
def test_a_call_by_name(family, padding):
    model = wrapped(family)
    x, plan = example(model, padding), some_plan(model)
    expected = model.run(x, plan).logits
    with model.apply(plan) as audit:
        got = logits_of(model.module(**named(x)))
    torch.testing.assert_close(got[x.mask], expected[x.mask], **EXACT)
    assert [entry.status for entry in audit] == ["fired"] * len(plan)
    plain = logits_of(model.module(**named(x)))
    assert float((plain - expected)[x.mask].abs().max()) > 1e-3
    torch.testing.assert_close(plain[x.mask], model.run(x).logits[x.mask], **EXACT)


@each_family
@each_padding
@torch.no_grad()
def test_a_call_by_place(family, padding):
    """All arguments without names, in the order in which this model takes them."""
    model = wrapped(family)
    x, plan = example(model, padding), some_plan(model)
    order = list(inspect.signature(model.module.forward).parameters)
    given = named(x)
    last = max(order.index(name) for name in given)
    arguments = [given.get(name) for name in order[: last + 1]]
    with model.apply(plan):
        got = logits_of(model.module(*arguments))
    torch.testing.assert_close(got[x.mask], model.run(x, plan).logits[x.mask], **EXACT)


@each_family
@each_padding
@torch.no_grad()
def test_a_call_with_embeddings(family, padding):
    model = wrapped(family)
    x = example(model, padding)
    plan = some_plan(model) + hk.scale(site("resid_post", 0, pos=-1), 1.5)
    given = named(x)
    given["inputs_embeds"] = model.architecture.embed(given.pop("input_ids"))
    with model.apply(plan):
        got = logits_of(model.module(**given))
    torch.testing.assert_close(got[x.mask], model.run(x, plan).logits[x.mask], **EXACT)
    with pytest.raises(hk.errors.UnfiredError, match="embed"), model.apply(hk.zero(site("embed"))):
        model.module(**given)


@each_family
@torch.no_grad()
def test_calls_of_several_shapes(family):
    """One plan, several batches; positions, rows and negative positions are those of each call."""
    model = wrapped(family)
    plan = (
        hk.scale(site("resid_pre", 1, pos=1), 2.0)
        + hk.zero(site("z", 1, head=0, pos=-1))
        + hk.freeze(site("attn_out", 0))
    )
    batches = [example(model, padding, seed) for seed, padding in enumerate(("none", "left", "right"))]
    batches.append(model.inputs(*zoo.random_inputs(zoo.VOCAB, [9, 2, 5], "left", 7)))
    with model.apply(plan):
        got = [logits_of(model.module(**named(x))) for x in batches]
    for x, logits in zip(batches, got, strict=True):
        torch.testing.assert_close(logits[x.mask], model.run(x, plan).logits[x.mask], **EXACT)


@each_family
@torch.no_grad()
def test_the_audit_grows_with_every_call(family):
    model = wrapped(family)
    plan = hk.zero(site("z", 0, head=1, pos=-1)) + hk.zero(site("attn_out", 1)).where(torch.tensor([True, False]))
    x = example(model, "right")
    with model.apply(plan) as audit:
        assert [(e.status, e.calls, e.rows, e.positions) for e in audit] == [("unfired", 0, 0, 0)] * 2
        for calls in (1, 2, 3):
            model.module(**named(x))
            assert [(e.calls, e.rows, e.positions) for e in audit] == [
                (calls, 2 * calls, 2 * calls),
                (calls, calls, 6 * calls),
            ]
        largest = audit[0].change
    assert largest == audit[0].change > 0
    assert str(audit).count("fired") == 2


@each_family
@torch.no_grad()
def test_the_plan_ends_with_the_context(family):
    model = wrapped(family)
    x = example(model, "none")
    before = logits_of(model.module(input_ids=x.ids))
    with model.apply(some_plan(model)) as audit:
        model.module(input_ids=x.ids)
    assert torch.equal(logits_of(model.module(input_ids=x.ids)), before)
    assert audit[0].calls == 1


@each_family
@torch.no_grad()
def test_sources_while_a_plan_is_held(family):
    model = wrapped(family)
    x, other = example(model, "left", 1), example(model, "left", 2)
    tape = model.run(other, capture=site("z", 0)).tape
    edited = World(other, hk.zero(site("attn_out", 0, pos=1)))
    plan = (
        patch(site("z", 0, head=2), tape)
        + patch(site("resid_post", 0, pos=-1), edited)
        + hk.mean(site("v", 1, pos=2), edited)
    )
    expected = model.run(x, plan).logits
    with model.apply(plan):
        for _ in range(2):
            got = logits_of(model.module(**named(x)))
            torch.testing.assert_close(got[x.mask], expected[x.mask], **EXACT)
    three = model.inputs(*zoo.random_inputs(zoo.VOCAB, [6, 4, 5], "left", 3))
    with pytest.raises(hk.errors.ShapeError, match="rows"), model.apply(patch(site("z", 0), tape)):
        model.module(**named(three))


@each_family
@torch.no_grad()
def test_a_function_that_reads_this_world_unedited_and_another(family):
    model = wrapped(family)
    x, other = example(model, "left", 1), example(model, "left", 2)
    reads = (hk.Read(hk.plan.plan.Origin.UNEDITED), hk.Read(World(other)), hk.here(site("resid_pre", 0)))
    mixed = hk.intervene(site("attn_out", 1), lambda v, own, theirs, first, ctx: v + 2 * own - theirs + first, reads)
    plan = hk.scale(site("resid_pre", 0, pos=1), 2.0) + mixed
    expected = model.run(x, plan).logits
    with model.apply(plan):
        got = logits_of(model.module(**named(x)))
    torch.testing.assert_close(got[x.mask], expected[x.mask], **EXACT)


@each_family
@torch.no_grad()
def test_frozen_sites_while_a_plan_is_held(family):
    """Frozen at what this very call would compute unedited, padding or not, more than once."""
    model = wrapped(family)
    plan = (
        hk.scale(site("resid_pre", 0, pos=1), 2.0)
        + hk.freeze(site("attn_out", 1))
        + hk.freeze(site("pattern", 0, head=1))
    )
    for padding in ("none", "left", "right"):
        for seed in (1, 2):
            x = example(model, padding, seed)
            with model.apply(plan) as audit:
                got = logits_of(model.module(**named(x)))
                again = logits_of(model.module(**named(x)))
            torch.testing.assert_close(got[x.mask], model.run(x, plan).logits[x.mask], **EXACT)
            assert torch.equal(got, again)
            assert [entry.calls for entry in audit] == [2, 2, 2]
            unfrozen = model.run(x, plan[0]).logits
            assert float((got - unfrozen)[x.mask].abs().max()) > 1e-6


@torch.no_grad()
def test_only_some_of_the_logits():
    """transformers computes the logits of the last tokens alone where it is asked to: correct, or refused."""
    model = wrapped("llama")
    x = example(model, "none")
    for plan in (
        hk.scale(site("logits", pos=-1), 2.0),
        hk.scale(site("logits", pos=1), 2.0),
        hk.scale(site("logits"), 2.0),
    ):
        expected = model.run(x, plan).logits[:, -1:]
        try:
            with model.apply(plan):
                got = logits_of(model.module(input_ids=x.ids, logits_to_keep=1))
        except hk.InterpError:
            continue
        torch.testing.assert_close(got, expected, **EXACT)
    everything = hk.scale(site("logits", pos=1), 2.0)
    with model.apply(everything):
        got = logits_of(model.module(input_ids=x.ids, logits_to_keep=0))  # 0 keeps all of them
    torch.testing.assert_close(got, model.run(x, everything).logits, **EXACT)
    with pytest.raises(hk.errors.PlanError, match="logits_to_keep"), model.apply(everything):
        model.module(input_ids=x.ids, logits_to_keep=torch.tensor([1]))
    inner = hk.scale(site("z", 1, pos=-1), 2.0)
    with model.apply(inner):
        got = logits_of(model.module(input_ids=x.ids, logits_to_keep=1))
    torch.testing.assert_close(got, model.run(x, inner).logits[:, -1:], **EXACT)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_the_body_called_without_its_head(family):
    """The plan holds there too, or the call is refused; it is never that of an earlier call."""
    model = wrapped(family)
    body = model.module.transformer if family == "gpt2" else model.module.model
    x, longer = example(model, "none"), model.inputs(*zoo.random_inputs(zoo.VOCAB, [8, 8], "right", 5))
    plan = hk.scale(site("resid_pre", 1, pos=-1), 2.0)
    expected = model.run(longer, plan, capture=site("ln_final")).tape["ln_final.hook_out"]
    for warm in (False, True):
        try:
            with model.apply(plan):
                if warm:
                    model.module(input_ids=x.ids)
                got = body(input_ids=longer.ids).last_hidden_state
        except hk.InterpError:
            continue
        torch.testing.assert_close(got, expected, **EXACT)


@each_family
@torch.no_grad()
def test_packed_sequences_are_refused(family):
    """Two texts in one row: position p would be that of the row, not of the text."""
    model = wrapped(family)
    ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(hk.InterpError, match="packed"), model.apply(hk.zero(site("z", 0, pos=1))):
        model.module(input_ids=ids, position_ids=packed)


@each_family
def test_a_call_without_ids_is_refused(family):
    model = wrapped(family)
    with pytest.raises(hk.errors.PlanError, match="input_ids"), model.apply(hk.zero(site("z", 0))):
        model.module()


# Training


@each_family
@each_padding
def test_a_training_step_has_the_gradients_of_a_run(family, padding):
    """Of every parameter, and of a direction and a strength that are learned."""
    model = fresh(family)
    x = example(model, padding)
    target = torch.roll(x.ids, -1, 1)[x.mask]
    vector = torch.linspace(-1, 1, model.architecture.width).double().requires_grad_()
    strength = torch.tensor([0.3, 0.8]).double().requires_grad_()
    learned = [*model.module.parameters(), vector, strength]

    def gradients(logits: Tensor) -> list[Tensor]:
        loss = nn.functional.cross_entropy(logits[x.mask], target)
        return list(torch.autograd.grad(loss, learned))

    def plan() -> Plan:
        learns = hk.steer(site("resid_post", 0, pos=slice(1, None)), vector, scale=2.0)
        learns = learns + hk.zero(site("z", 1, head=1)).strength(strength) + hk.scale(site("q_input", 1, pos=2), 1.5)
        return learns + hk.scale(site("pattern", 0, pos=2, key_pos=1), 0.5) + hk.zero(site("attn_out", 0, pos=-1))

    expected = gradients(model.run(x, plan(), grad=True).logits)
    with model.apply(plan()):
        got = gradients(logits_of(model.module(**named(x))))
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
        assert one.isfinite().all()
    assert float(got[-1].abs().min()) > 1e-6 and float(got[-2].abs().max()) > 1e-4
    plain = gradients_of_plain(model, x, target)
    assert any(float((a - b).abs().max()) > 1e-4 for a, b in zip(got, plain, strict=False))


def gradients_of_plain(model: Model, x: Inputs, target: Tensor) -> list[Tensor]:
    loss = nn.functional.cross_entropy(logits_of(model.module(**named(x)))[x.mask], target)
    return list(torch.autograd.grad(loss, list(model.module.parameters())))


def test_a_strength_that_is_learned_is_the_tensor_itself():
    """One plan, held through several steps: each sees what the last one made of the strength, and has its gradient."""
    model = fresh("small_ln_learned")
    x = example(model, "none")
    strength = torch.tensor(0.2).double().requires_grad_()
    plan = hk.zero(site("attn_out", 1)).strength(strength)
    for _ in range(3):
        with model.apply(plan):
            logits_of(model.module(**named(x))).cos().sum().backward()
        with torch.no_grad():
            strength.add_(0.3)
            expected = model.run(x, hk.zero(site("attn_out", 1)).strength(float(strength))).logits
            torch.testing.assert_close(model.run(x, plan).logits, expected, **EXACT)


@each_family
def test_gradients_through_what_is_read(family):
    """A frozen value depends on the parameters too, in a run as in a training step."""
    model = fresh(family)
    x = example(model, "right")
    plan = hk.freeze(site("attn_out", 1)) + hk.scale(site("resid_pre", 1), 1.5)
    weight = model.architecture.blocks[1].attention.v.module.weight

    def gradient(logits: Tensor) -> Tensor | None:
        return torch.autograd.grad(logits[x.mask].cos().sum(), weight, allow_unused=True)[0]

    ran = gradient(model.run(x, plan, grad=True).logits)
    with model.apply(plan):
        held = gradient(logits_of(model.module(**named(x))))
    assert (ran is None) == (held is None)
    assert held is not None and float(held.abs().max()) > 1e-6
    torch.testing.assert_close(held, ran, rtol=1e-9, atol=1e-9)


@each_family
def test_an_optimiser_changes_the_model_while_a_plan_is_held(family):
    model, twin = fresh(family), fresh(family)
    x = example(model, "left")
    plan = hk.scale(site("z", 0, head=0), 0.0) + hk.steer(
        site("resid_pre", 1, pos=-1), torch.ones(model.architecture.width).double()
    )
    for one in (model, twin):
        optimiser = torch.optim.SGD(one.module.parameters(), lr=1e-3)
        for _ in range(3):
            optimiser.zero_grad()
            if one is model:
                with one.apply(plan):
                    loss = logits_of(one.module(**named(x)))[x.mask].logsumexp(-1).mean()
            else:
                loss = one.run(x, plan, grad=True).logits[x.mask].logsumexp(-1).mean()
            loss.backward()
            optimiser.step()
    for a, b in zip(model.module.parameters(), twin.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox_sequential", "gemma2"])
def test_gradient_checkpointing(family):
    """Parts of the forward run a second time, backwards: the plan has to do there what it did the first time."""
    model = fresh(family)
    x = example(model, "right")
    plan = some_plan(model) + hk.scale(site("resid_mid", 1, pos=2), 1.5) + hk.scale(site("result", 0, head=1), 0.5)
    parameters = list(model.module.parameters())

    def gradients() -> list[Tensor]:
        logits = logits_of(model.module(**named(x), use_cache=False))
        return list(torch.autograd.grad(logits[x.mask].logsumexp(-1).sum(), parameters))

    model.module.train()
    with model.apply(plan):
        expected = gradients()
    model.module.gradient_checkpointing_enable({"use_reentrant": False})
    with model.apply(plan):
        got = gradients()
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


# Caches and generation


@each_hf_family
@torch.no_grad()
def test_a_call_that_continues_from_a_cache(family):
    """What was cached before the plan was applied cannot be reached; a cache that was filled under it goes on."""
    model = wrapped(family)
    x = example(model, "none")
    plan = hk.zero(site("z", 0, pos=1))
    cache = model.module(input_ids=x.ids[:, :4], use_cache=True).past_key_values
    with pytest.raises(hk.errors.PlanError, match="cache"), model.apply(plan):
        model.module(input_ids=x.ids[:, 4:], past_key_values=cache)
    order = list(inspect.signature(model.module.forward).parameters)
    arguments = [None] * order.index("past_key_values")
    arguments[0] = x.ids[:, 4:]
    with pytest.raises(hk.errors.PlanError, match="cache"), model.apply(plan):
        model.module(*arguments, cache)
    for by_place in (False, True):
        with model.apply(plan):
            first = model.module(input_ids=x.ids[:, :4], use_cache=True).past_key_values
            rest = model.module(*arguments, first) if by_place else model.module(x.ids[:, 4:], past_key_values=first)
        torch.testing.assert_close(logits_of(rest), model.run(x, plan).logits[:, 4:], **EXACT)


@each_hf_family
@torch.no_grad()
def test_a_call_that_only_fills_a_cache(family):
    from transformers import DynamicCache

    model = wrapped(family)
    x, plan = example(model, "left"), some_plan(model)
    expected = model.run(x, plan).logits
    with model.apply(plan):
        got = model.module(**named(x), use_cache=True, past_key_values=DynamicCache(config=model.module.config))
    torch.testing.assert_close(got.logits[x.mask], expected[x.mask], **EXACT)
    assert got.past_key_values.get_seq_length() == x.width


# Plans that are held


@each_family
@torch.no_grad()
def test_a_plan_that_does_not_fit_is_refused_before_anything_is_called(family):
    model = wrapped(family)
    entered = False
    for plan in (hk.zero(site("z", model.n_layers)), hk.zero(site("z", 0, head=77))):
        with pytest.raises(hk.errors.SiteError), model.apply(plan):
            entered = True
    with pytest.raises(hk.errors.PlanError), model.apply("z"):
        entered = True
    assert not entered


@each_family
@torch.no_grad()
def test_a_position_that_a_call_lacks_is_refused_in_that_call(family):
    model = wrapped(family)
    x = example(model, "right")
    with model.apply(hk.zero(site("z", 0, pos=3))):
        model.module(**named(x))
        with pytest.raises(hk.errors.SiteError, match="4 tokens"), model.apply(hk.zero(site("z", 0, pos=4))):
            model.module(**named(x))
        model.module(**named(x))


@each_family
@torch.no_grad()
def test_the_seed_of_random_interventions(family):
    model = wrapped(family)
    x, plan = example(model, "left"), hk.noise(site("resid_pre", 1), 1.0)
    got = []
    for seed in (0, 0, 5):
        with model.apply(plan, seed=seed):
            got.append(logits_of(model.module(**named(x))))
        torch.testing.assert_close(got[-1][x.mask], model.run(x, plan, seed=seed).logits[x.mask], **EXACT)
    assert torch.equal(got[0], got[1])
    assert float((got[0] - got[2])[x.mask].abs().max()) > 1e-3


@each_family
def test_a_held_plan_is_not_shared_with_another_wrapper(family):
    """Two wrappers of one module: a plan held through one is seen by runs and by worlds of the other."""
    model = fresh(family)
    twin = hk.wrap(model.module)
    x = example(model, "none")
    plan = hk.zero(site("attn_out", 0))
    expected = twin.run(x, plan).logits
    with model.apply(plan):
        torch.testing.assert_close(twin.run(x).logits, expected, **EXACT)
        (outcome,) = hk.run_worlds(twin, [World(x)], [site("logits")])
    torch.testing.assert_close(outcome.values[0], expected, **EXACT)


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox_sequential", "gemma2", "small_ln_learned"])
@torch.no_grad()
def test_plans_held_through_two_wrappers_compose(family):
    """As through one, at sites that are close enough to get in each other's way; or the second is refused."""
    model = fresh(family)
    twin = hk.wrap(model.module)
    x = example(model, "left")
    pairs = [("resid_post", "resid_mid"), ("resid_mid", "mlp_out"), ("q", "q_input"), ("result", "z")]
    for outer, inner in [*pairs, ("mlp_in", "resid_mid"), ("pattern", "scores"), ("scores", "pattern"), ("z", "q")]:
        a = hk.intervene(
            site(outer, 0, pos=2), lambda v, ctx: torch.where(v.isfinite(), 0.6 * v + torch.cos(3.0 * v), v)
        )
        b = hk.intervene(site(inner, 0, pos=2), lambda v, ctx: torch.where(v.isfinite(), 1.3 * v + 0.2 * v.abs(), v))
        expected = model.run(x, a + b).logits
        try:
            with model.apply(a), twin.apply(b):
                got = logits_of(model.module(**named(x)))
        except hk.errors.PlanError:
            continue
        assert float((got - expected)[x.mask].abs().max()) < 1e-10, f"{inner} in {outer}"


@torch.no_grad()
def test_all_plans_are_suspended_however_many_are_held():
    """Not the innermost alone: a run inside is a plain one, and afterwards all of them hold again."""
    model = fresh("gpt2")
    x = example(model, "none")
    a, b, c = (hk.scale(site("z", layer), 2.0) for layer in (0, 1, 0))
    plain, inner, both = (model.run(x, plan).logits for plan in (Plan(), c, a + b))
    assert float((plain - both).abs().max()) > 1e-3
    with model.apply(a) as one, model.apply(b) as two:
        with model.suspended():
            assert not model.holds
            assert torch.equal(model.run(x).logits, plain)
            assert torch.equal(logits_of(model.module(**named(x))), plain)
            with model.apply(c):
                torch.testing.assert_close(model.run(x).logits, inner, **EXACT)
            assert not model.holds
        assert model.holds
        torch.testing.assert_close(model.run(x).logits, both, **EXACT)
        torch.testing.assert_close(logits_of(model.module(**named(x))), both, **EXACT)
    assert [one[0].calls, two[0].calls] == [2, 2]
    assert not model.holds and torch.equal(logits_of(model.module(**named(x))), plain)


def test_arguments_that_a_forward_takes_under_any_name():
    class Around(nn.Module):
        def forward(self, first, *rest, last=None, **others):
            return first

    found = arguments_of_call(Around(), (1, 2), {"attention_mask": 3, "last": 4})
    assert found == {"first": 1, "rest": (2,), "attention_mask": 3, "last": 4}


@pytest.mark.parametrize("executor", ["sequential", "batched", "shared"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "small_qk_norm"])
def test_worlds_while_a_plan_is_held(family, executor):
    """Every world has it, and the audit of the plan says so, also where it can reach nothing that is read."""
    model = wrapped(family)
    x, other = example(model, "left", 1), example(model, "left", 2)
    held, last = hk.scale(site("z", 0, head=1), 2.0), model.n_layers - 1
    plans = [Plan(), hk.zero(site("attn_out", 1, pos=1)), patch(site("resid_post", 0, pos=1), World(other))]
    reads = [site("logits", pos=-1)]

    def run(worlds: list[World]) -> list[Tensor]:
        found = {o.index: o.values[0] for o in hk.run_worlds(model, worlds, reads, executor=executor)}
        return [found[index] for index in range(len(worlds))]

    expected = run([World(x, Plan((held,)) + plan) for plan in plans])
    with model.apply(held) as audit:
        got = run([World(x, plan) for plan in plans])
    torch.testing.assert_close(got, expected, **EXACT)
    assert audit[0].status == "fired"
    with model.apply(hk.scale(site("z", last), 2.0)) as audit:
        list(hk.run_worlds(model, [World(x)], [site("resid_pre", last)], executor=executor))
    assert audit[0].status == ("pruned" if executor == "shared" else "fired")
