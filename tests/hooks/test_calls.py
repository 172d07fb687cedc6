"""Whose call is this: contexts left in any order, threads, calls within calls, copies, what gradient checkpointing
computes again, and what the caller keeps.
"""

from __future__ import annotations

import copy
import gc
import json
import pickle
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

import hooks as hk
from hooks import Inputs, Model, Plan, World, site
from hooks.errors import PlanError
from tests import zoo
from tests.hooks.test_restore import State
from tests.turns import pairs
from tests.zoo import fresh

EXACT = {"rtol": 0.0, "atol": 1e-10}


def example(model: Model, seed: int = 1) -> Inputs:
    return model.inputs(*zoo.random_inputs(zoo.VOCAB, [6, 5], "left", seed))


def call(model: Model, x: Inputs) -> Tensor:
    out = model.module(input_ids=x.ids, attention_mask=x.mask.long(), position_ids=x.positions)
    return out if isinstance(out, Tensor) else out.logits


def differ(a: Tensor, b: Tensor, x: Inputs) -> float:
    return float((a - b)[x.mask].detach().abs().max())


# Contexts in any order

THREE = [hk.scale(site("mlp_out", layer), 0.5 + layer) for layer in (0, 1)] + [hk.zero(site("pattern", 1, pos=-1))]


@torch.no_grad()
@pytest.mark.parametrize("leave", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1), (1, 2, 0), (2, 0, 1)])
def test_contexts_are_left_in_any_order(leave):
    model = fresh("gpt2")
    x, state = example(model), State(model.module)
    plain = call(model, x)
    held = [model.apply(plan) for plan in THREE]
    audits = [one.__enter__() for one in held]
    call(model, x)
    left = list(range(3))
    for n, index in enumerate(leave):
        held[index].__exit__(None, None, None)
        left.remove(index)
        expected = model_under(model.module, [THREE[i] for i in left], x)
        assert differ(call(model, x), expected, x) < 1e-10
        assert [audit[0].calls for audit in audits] == [
            1 + leave.index(i) if i in leave[: n + 1] else n + 2 for i in range(3)
        ]
    assert not model.holds and torch.equal(call(model, x), plain)
    state.assert_kept()


def model_under(module: nn.Module, plans: list[hk.Intervention], x: Inputs) -> Tensor:
    """What plans give on a copy of the model, on which nothing is held."""
    return hk.wrap(copy.deepcopy(module)).run(x, Plan(tuple(plans))).logits


@torch.no_grad()
def test_wrappers_of_one_model_hold_together():
    model = fresh("llama")
    other, x = hk.wrap(model.module), example(model)
    first, second = model.apply(THREE[0]), other.apply(THREE[1])
    first.__enter__(), second.__enter__()
    both = model_under(model.module, THREE[:2], x)
    assert differ(call(model, x), both, x) < 1e-10 and differ(model.run(x).logits, both, x) < 1e-10
    first.__exit__(None, None, None)
    assert differ(other.run(x).logits, model_under(model.module, THREE[1:2], x), x) < 1e-10
    second.__exit__(None, None, None)


@torch.no_grad()
def test_each_plan_keeps_its_own_seed():
    model = fresh("gpt2")
    x, noise = example(model), hk.noise(site("resid_pre", 1), 0.5)
    seen: list[Tensor] = []

    def note(value: Tensor, ctx: hk.Context) -> Tensor:
        seen.append(value)
        return value.clone()

    def stream(*seeds: int) -> Tensor:
        with ExitStack() as stack:
            for seed in seeds:
                stack.enter_context(model.apply(noise, seed=seed))
            with model.apply(hk.intervene(site("resid_pre", 1), note)):
                call(model, x)
        out = torch.zeros(*x.mask.shape, seen[-1].shape[-1], dtype=torch.float64)
        out[x.mask] = torch.cat([row[:n] for row, n in zip(seen[-1], x.lengths.tolist(), strict=True)])
        return out

    alone, plain, both = [stream(3), stream(4)], stream(), stream(3, 4)
    torch.testing.assert_close((both - plain)[x.mask], (alone[0] + alone[1] - 2 * plain)[x.mask], **EXACT)
    assert differ(alone[0], alone[1], x) > 1e-3


# Calls within calls


@torch.no_grad()
@pytest.mark.parametrize("inner", ["run", "call", "sweep"])
@pytest.mark.parametrize("outer", ["run", "held"])
def test_a_function_that_runs_the_model(inner, outer):
    """What it runs is the model as the user has it; the pass that it stands in goes on as if it had not."""
    model = fresh("llama")
    x, y = example(model), example(model, 2)
    expected = model.run(y).logits
    seen: list[Tensor] = []

    def mine(value: Tensor, ctx: hk.Context) -> Tensor:
        if inner == "run":
            seen.append(model.run(y).logits)
        elif inner == "call":
            seen.append(call(model, y))
        else:
            (outcome,) = hk.run_worlds(model, [World(y)], [site("logits")])
            seen.append(outcome.values[0])
        return 2.0 * value

    plan = hk.intervene(site("z", 1), mine) + hk.zero(site("pattern", 1, pos=-1, head=0)) + hk.scale(site("v", 2), 0.5)
    want = model.run(x, hk.scale(site("z", 1), 2.0) + Plan(plan.interventions[1:])).logits
    if outer == "run":
        got = model.run(x, plan).logits
    else:
        with model.apply(plan) as audit:
            got = call(model, x)
        assert [e.calls for e in audit] == [1, 1, 1]
    assert len(seen) == 1
    torch.testing.assert_close(seen[0][y.mask], expected[y.mask], **EXACT)
    torch.testing.assert_close(got[x.mask], want[x.mask], **EXACT)


@torch.no_grad()
def test_an_interrupt_within_a_call_and_calls_after_it():
    """A keyboard interrupt leaves a model without its hooks being told, and the next call is one like any other."""
    model = fresh("gpt2")
    x, stop = example(model), [True]

    def interrupted(value: Tensor, ctx: hk.Context) -> Tensor:
        if stop:
            raise KeyboardInterrupt
        return 0.5 * value

    expected = model.run(x, hk.scale(site("mlp_out", 0), 0.5)).logits
    with model.apply(hk.intervene(site("mlp_out", 0), interrupted)) as audit:
        with pytest.raises(KeyboardInterrupt):
            call(model, x)
        stop.clear()
        assert differ(call(model, x), expected, x) < 1e-10
        assert differ(model.run(x).logits, expected, x) < 1e-10
        found: list[Tensor] = []
        thread = threading.Thread(target=lambda: found.append(call(model, x)))
        thread.start()
        thread.join(30)
        assert found and differ(found[0], expected, x) < 1e-10
    assert audit[0].calls == 3


# Threads


def in_threads(*works: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    [t.start() for t in threads]
    [t.join(120) for t in threads]
    assert not any(t.is_alive() for t in threads)
    if errors:
        raise errors[0]


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "small_ln_learned"])
def test_runs_and_plain_calls_in_threads(family):
    """Every thread gets what it would get alone, the ones that know nothing of plans too."""
    model = fresh(family)
    x = example(model)
    plans = [hk.zero(site("pattern", 1, pos=-1)) + hk.scale(site("logits"), 1.5), hk.scale(site("mlp_out", 0), 3.0)]
    want = [model.run(x, plan).logits for plan in plans]
    with torch.no_grad():
        plain = call(model, x)
    assert min(differ(a, b, x) for a, b in ((want[0], plain), (want[1], plain), (want[0], want[1]))) > 1e-3

    def running(index: int) -> Callable[[], None]:
        def work() -> None:
            for _ in range(15):
                assert differ(model.run(x, plans[index]).logits, want[index], x) < 1e-9

        return work

    def bare() -> None:
        with torch.no_grad():
            for _ in range(60):
                assert differ(call(model, x), plain, x) < 1e-9

    in_threads(running(0), running(1), bare)


def test_a_held_plan_binds_whichever_thread_calls():
    model = fresh("llama")
    x = [example(model, seed) for seed in (1, 2, 3)]
    plan = hk.zero(site("pattern", 1, pos=-1)) + hk.scale(site("mlp_out", 0), 0.5)
    want = [model.run(one, plan).logits for one in x]

    def calling(index: int) -> Callable[[], None]:
        def work() -> None:
            with torch.no_grad():
                for _ in range(10):
                    assert differ(call(model, x[index]), want[index], x[index]) < 1e-9

        return work

    with model.apply(plan) as audit:
        in_threads(*(calling(i) for i in range(3)))
    assert [e.calls for e in audit] == [30, 30]
    assert audit[1].positions == 30 * 11


# Copies and files


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma2", "gpt2", "small_ln_learned"])
def test_copies_that_are_made_under_a_plan(family, tmp_path):
    """A copy, a pickle and a saved model are of the model as it is without the plan, and stay so."""
    model = fresh(family)
    x = example(model)
    if family != "small_ln_learned":
        model.module.save_pretrained(tmp_path)  # which notes the class and the dtype on the config
    plain, state = call(model, x), State(model.module)
    plan = hk.scale(site("logits"), 1.5) + hk.zero(site("pattern", 0, pos=1)) + hk.zero(site("mlp_out", 1))
    with model.apply(plan):
        edited = call(model, x)
        twin = copy.deepcopy(model.module)
        # The zoo widens norms by classes that have no name to be pickled by.
        loaded = twin if family == "gemma2" else pickle.loads(pickle.dumps(model.module))
        if family != "small_ln_learned":
            model.module.save_pretrained(tmp_path)
            config = json.loads((tmp_path / "config.json").read_text())
            before = json.loads(copy.deepcopy(model.module.config).to_json_string())
            assert {k: v for k, v in config.items() if k in before} == {k: before[k] for k in config if k in before}
            assert "interp" not in json.dumps(config)
        for other in (twin, loaded):
            assert torch.equal(call(hk.wrap(other), x), plain)
        assert torch.equal(call(model, x), edited)
    assert differ(edited, plain, x) > 1e-3
    for other in (twin, loaded):
        wrapped = hk.wrap(other)
        assert torch.equal(call(wrapped, x), plain)
        assert wrapped.unshareable() == ""
        assert differ(wrapped.run(x, plan).logits, edited, x) < 1e-10
    state.assert_kept()


# What is computed again


def training(family: str = "llama", reentrant: bool | None = None) -> Model:
    model = fresh(family)
    model.module.train()
    if reentrant is not None:
        model.module.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.module.enable_input_require_grads()
    return model


def gradient(model: Model, loss: Tensor) -> Tensor:
    model.module.zero_grad(set_to_none=True)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.module.parameters() if p.grad is not None])


def loss_of(model: Model, x: Inputs) -> Tensor:
    return call(model, x)[x.mask].logsumexp(-1).sum()


def depends(inputs: Inputs) -> Plan:
    """A plan that differs from call to call."""
    return hk.scale(site("z", 1, pos=int(inputs.ids[0, -1]) % 3), 3.0) + hk.zero(site("mlp_out", 0))


PLANS: dict[str, Callable[[], object]] = {
    "sites": lambda: hk.scale(site("z", 0, head=1), 2.0) + hk.scale(site("pattern", 1), 0.5),
    "constant": lambda: hk.zero(site("mlp_out", 0)) + hk.freeze(site("attn_out", 1), stop_gradient=True),
    "function": lambda: depends,
    "here": lambda: hk.intervene(site("mlp_out", 1), lambda v, first, ctx: v + first, hk.here(site("attn_out", 0))),
}


BETWEEN = ["nothing", "a call", "a run", "the end", "the end, and another plan"]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize(
    ("name", "between", "reentrant"),
    # Reads of this world are refused under the reentrant kind: see test_apply_training.
    [*pairs(["sites", "constant", "function"], BETWEEN, [False, True]), *(("here", b, False) for b in BETWEEN)],
)
def test_what_checkpointing_computes_again_is_of_its_own_call(name, between, reentrant):
    x, y = example(fresh("llama")), example(fresh("llama"), 2)
    plain = training()
    with plain.apply(PLANS[name]()):
        expected = gradient(plain, loss_of(plain, x))
    model = training(reentrant=reentrant)
    held = model.apply(PLANS[name]())
    held.__enter__()
    loss = loss_of(model, x)
    if between == "a call":
        with torch.no_grad():
            call(model, y)
        loss_of(model, y)
    elif between == "a run":
        model.module.eval()
        model.run(y, hk.zero(site("z", 0)))
        model.module.train()
    elif between != "nothing":
        held.__exit__(None, None, None)
    if between.endswith("plan"):
        with model.apply(hk.zero(site("mlp_out", 1))):
            call(model, y)
            got = gradient(model, loss)
    else:
        got = gradient(model, loss)
    assert float((got - expected).abs().max()) < 1e-9
    bare = training()
    assert float((gradient(bare, loss_of(bare, x)) - expected).abs().max()) > 1e-6
    if between in ("nothing", "a call", "a run"):
        held.__exit__(None, None, None)
    assert not any(
        m._forward_hooks or m._forward_pre_hooks for m in model.module.modules() if m is not inputs_hook(model)
    )


def inputs_hook(model: Model) -> nn.Module:
    """Where transformers itself keeps a hook, for inputs that are to have gradients."""
    return model.module.get_input_embeddings()


def by_hand(reentrant: bool) -> Model:
    model = training("small_attn_only")
    for block in model.module.blocks:
        inner = block.attn.forward
        block.attn.forward = lambda *args, inner=inner: checkpoint(inner, *args, use_reentrant=reentrant)
    return model


def test_checkpointing_by_hand_is_right_or_refused():
    plan = hk.scale(site("z", 0), 3.0) + hk.scale(site("v", 1), 0.5)
    plain = training("small_attn_only")
    x, y = example(plain), example(plain, 2)
    with plain.apply(plan):
        expected = gradient(plain, loss_of(plain, x))
    model = by_hand(False)
    with model.apply(plan):
        for _ in range(2):
            got = gradient(model, loss_of(model, x))
            assert float((got - expected).abs().max()) < 1e-9
    with model.apply(plan):
        first, second = loss_of(model, x), loss_of(model, y)
        with pytest.raises(PlanError, match="several calls"):
            gradient(model, first)
    with model.apply(hk.steer(site("z", 0), torch.ones(model.sizes[site("z", 0).key]["dim"]).double())):
        loss = loss_of(model, x)
    # Torch says it, where an edit keeps tensors of its own for the backward pass, and we say it where none does.
    with pytest.raises((PlanError, CheckpointError), match=r"no longer held|different number of tensors"):
        gradient(model, loss)
    assert second.requires_grad
    model = by_hand(True)
    with pytest.raises(PlanError, match="use_reentrant=False"), model.apply(plan):
        loss_of(model, x)


# What the caller keeps


@torch.no_grad()
@pytest.mark.parametrize("place", ["by name", "by place"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_call_that_is_made_twice_writes_once_into_the_callers_cache(family, place):
    from transformers import DynamicCache

    model = fresh(family)
    x = model.inputs([[3, 4, 5, 6, 7]])
    plan = hk.zero(site("z", 0, head=0)) + hk.freeze(site("mlp_out", 1)) + hk.patch(site("v", 1), hk.zero(site("z", 0)))
    cache = DynamicCache(config=model.module.config)
    with model.apply(plan) as audit:
        if place == "by name":
            out = model.module(input_ids=x.ids, use_cache=True, past_key_values=cache)
        else:
            import inspect

            order = list(inspect.signature(model.module.forward).parameters)
            given = {"input_ids": x.ids, "past_key_values": cache}
            out = model.module(*(given.get(n) for n in order[: order.index("past_key_values") + 1]), use_cache=True)
    assert out.past_key_values is cache and cache.get_seq_length() == 5
    assert [e.calls for e in audit] == [1, 1, 1]
    torch.testing.assert_close(out.logits, model.run(x, plan).logits, **EXACT)


@torch.no_grad()
def test_the_users_own_hooks_on_the_model_see_a_call_that_is_made_twice_as_it_was_made():
    """A pre-hook of the user's that changes what the model is called with changes it once for each of the calls."""
    model = fresh("llama")
    x = example(model)
    shifted = Inputs.of((x.ids + 1) % zoo.VOCAB, x.mask)
    plan = hk.zero(site("z", 0)) + hk.freeze(site("mlp_out", 1))
    expected = model.run(shifted, plan).logits

    def shift(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, {**kwargs, "input_ids": (kwargs["input_ids"] + 1) % zoo.VOCAB}

    for when in ("before", "within"):
        if when == "before":
            handle = model.module.register_forward_pre_hook(shift, with_kwargs=True)
        with model.apply(plan):
            if when == "within":
                handle = model.module.register_forward_pre_hook(shift, with_kwargs=True)
            assert differ(call(model, x), expected, x) < 1e-10
        handle.remove()


class Counting(nn.Module):
    """A norm with running statistics, which a forward pass in training writes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        return self.inner(x)


def test_what_a_model_counts_in_training_is_counted_once():
    model = fresh("gpt2")
    x = example(model)
    counting = Counting(model.module.transformer.h[0].ln_2)
    model.module.transformer.h[0].ln_2 = counting
    model.module.train()
    with model.apply(hk.zero(site("z", 0)) + hk.freeze(site("mlp_out", 1))) as audit:
        call(model, x).sum().backward()
        assert float(counting.seen) == 1
        call(model, x)
    assert float(counting.seen) == 2 and audit[1].calls == 2


@pytest.mark.parametrize("use", ["run", "shared", "held", "held and read"])
def test_a_model_is_let_go(use):
    """Nothing of ours keeps a model, or the inputs that it was run on, once nobody else does."""
    model = fresh("gpt2")
    x = example(model)
    kept = weakref.ref(model.module), weakref.ref(x)
    if use == "run":
        model.run(x, hk.zero(site("z", 0)))
    elif use == "shared":
        list(hk.run_worlds(model, [World(x), World(x, hk.zero(site("z", 0, pos=1)))], [site("logits")]))
    else:
        plan = hk.zero(site("z", 0)) + (hk.freeze(site("mlp_out", 1)) if "read" in use else hk.zero(site("z", 1)))
        with model.apply(plan), torch.no_grad():
            call(model, x)
    del model, x
    gc.collect()
    assert [one() for one in kept] == [None, None]
