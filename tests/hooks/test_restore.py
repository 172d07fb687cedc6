"""The model, and everything global that a run could touch, is as it was, however the run or the plan on it ended."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from collections.abc import Callable
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hooks as hk
from hooks import Inputs, Model, Site, World, patch, site
from tests import zoo
from tests.turns import in_turn, pairs
from tests.zoo import fresh, wrapped

EXECUTORS = ("sequential", "batched", "shared")

each_family = pytest.mark.parametrize("family", zoo.FAMILIES)
each_executor = pytest.mark.parametrize("executor", EXECUTORS)


def example(model: Model, side: str = "left", seed: int = 1) -> Inputs:
    return model.inputs(*zoo.random_inputs(zoo.VOCAB, [5, 3], side, seed))


def call(model: Model, x: Inputs) -> Tensor:
    out = model.module(input_ids=x.ids, attention_mask=x.mask.long(), position_ids=x.positions)
    return out if isinstance(out, Tensor) else out.logits


def every_site(model: Model) -> list[Site]:
    return [
        site(info.name, layer if info.layers else None) for info in model.sites() for layer in range(info.layers or 1)
    ]


def attributes(module: nn.Module) -> dict[str, Any]:
    """Of every submodule, each attribute by identity, and what is in its dicts of hooks, parameters and buffers."""
    found: dict[str, Any] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        for key, value in vars(part).items():
            inside = [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else None
            found[f"{name}.{key}"] = (id(value) if not isinstance(value, (bool, int, float, str)) else value, inside)
    return found


class State:
    """All that must not change; `assert_kept` says what did."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = attributes(module)
        self.tensors = {name: value.clone() for name, value in module.state_dict().items()}
        self.versions = {name: value._version for name, value in module.named_parameters()}
        self.requires = {name: (value.requires_grad, value.grad is None) for name, value in module.named_parameters()}
        configs = {id(c): c for part in module.modules() if (c := getattr(part, "config", None)) is not None}
        self.configs = [(config, copy.deepcopy(vars(config))) for config in configs.values()]
        self.random = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
        self.modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()

    def assert_kept(self) -> None:
        now = attributes(self.module)
        assert set(now) == set(self.attributes)
        changed = [name for name, value in now.items() if value != self.attributes[name]]
        assert not changed
        for name, value in self.module.state_dict().items():
            assert torch.equal(value, self.tensors[name]), name
        assert {name: value._version for name, value in self.module.named_parameters()} == self.versions
        for name, value in self.module.named_parameters():
            assert (value.requires_grad, value.grad is None) == self.requires[name], name
        for config, values in self.configs:
            assert vars(config) == values
        assert torch.equal(torch.get_rng_state(), self.random[0])
        assert random.getstate() == self.random[1]
        assert np.array_equal(np.random.get_state()[1], self.random[2])
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()) == self.modes


def everywhere(model: Model, source: World) -> hk.Plan:
    """An intervention at every site that the model has."""
    return hk.Plan(tuple(patch(place.at(pos=1), source) for place in every_site(model))) + hk.freeze(
        site("z", 0, pos=0)
    )


# Runs that end well


@each_family
def test_after_runs(family):
    model = wrapped(family)
    x = example(model)
    state = State(model.module)
    plan = everywhere(model, World(example(model, seed=2)))
    model.run(x)
    state.assert_kept()
    model.run(x, plan, capture=every_site(model))
    state.assert_kept()
    model.run(x, plan, capture=every_site(model), grad=True).logits.sum().item()
    state.assert_kept()
    with model.apply(plan), torch.no_grad():
        call(model, x)
    state.assert_kept()
    model.run(x, hk.noise(site("z", 0), 1.0) + hk.resample(site("v", 1, pos=(0, -1)), World(x)))
    state.assert_kept()


@pytest.mark.parametrize(
    "names",
    [("z", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post"), ("q_input", "result")],
    ids=["modules", "heads"],
)
@torch.no_grad()
def test_no_activation_outlives_its_call(names):
    """A plan that is held for a whole training run keeps no layer's values from one call to the next."""
    model = wrapped("gpt2")
    x = example(model)
    seen = []

    def note(value: Tensor, ctx: Any) -> Tensor:
        doubled = 2.0 * value
        seen.append(weakref.ref(doubled))
        return doubled

    with model.apply(hk.Plan(tuple(hk.intervene(site(name, 0), note) for name in names))):
        call(model, x)
        gc.collect()
        assert [kept() for kept in seen] == [None] * len(names)


@pytest.mark.parametrize(("family", "executor"), in_turn(zoo.FAMILIES, EXECUTORS))
def test_after_worlds(family, executor):
    model = wrapped(family)
    x = example(model)
    state = State(model.module)
    source = World(example(model, seed=2))
    worlds = [World(x, everywhere(model, source)), World(x, hk.noise(site("resid_pre", 1), 1.0)), World(x)]
    reads = [site("logits", pos=-1), site("attn_out", 0), site("pattern", 1, pos=0)]
    list(hk.run_worlds(model, worlds, reads, executor=executor, budget=1))
    state.assert_kept()


@each_family
def test_in_training_mode(family):
    model = fresh(family)
    model.module.train()
    x = example(model)
    state = State(model.module)
    model.run(x, everywhere(model, World(example(model, seed=2))))
    with model.apply(hk.zero(site("pattern", 0, pos=1))):
        call(model, x)
    state.assert_kept()
    assert all(part.training for part in model.module.modules())


@each_executor
def test_the_callers_gradient_mode_between_chunks(executor):
    """A generator that turns gradients off while it computes must not turn them off for whoever it yields to."""
    model = wrapped("gpt2")
    x = example(model)
    worlds = [World(x), World(x, hk.zero(site("z", 0)))]
    for _ in hk.run_worlds(model, worlds, [site("logits", pos=-1)], executor=executor, budget=1):
        assert torch.is_grad_enabled()
    with torch.no_grad():
        for outcome in hk.run_worlds(model, worlds, [site("logits", pos=-1)], executor=executor):
            assert not torch.is_grad_enabled()
            assert not outcome.values[0].requires_grad


# Runs that end badly


def raising(error: BaseException) -> Callable[..., Tensor]:
    def fail(x: Tensor, ctx: hk.Context) -> Tensor:
        raise error

    return fail


PLACES = ("embed", "q_input", "v", "pattern", "scores", "result", "attn_out", "resid_post", "ln_final", "logits")


@each_family
def test_after_an_exception_in_the_users_function(family):
    model = wrapped(family)
    x = example(model)
    state = State(model.module)
    everything = everywhere(model, World(example(model, seed=2)))
    mine = PLACES[zoo.FAMILIES.index(family) % 2 :: 2]
    for name, error in zip(mine, cycle([RuntimeError("mine"), KeyboardInterrupt(), SystemExit(3)]), strict=False):
        bomb = hk.intervene(site(name, 1 if hk.KINDS[name].per_layer else None, pos=1), raising(error))
        plan = everything + bomb
        with pytest.raises(type(error)):
            model.run(x, plan)
        state.assert_kept()
        with pytest.raises(type(error)), model.apply(plan):
            call(model, x)
        state.assert_kept()
        with pytest.raises(type(error)):
            model.run(x, patch(site("z", 0), World(x, bomb)))
        state.assert_kept()


@each_executor
@each_family
def test_after_an_exception_in_a_world(family, executor):
    model = wrapped(family)
    x = example(model)
    state = State(model.module)
    for name in PLACES[(zoo.FAMILIES.index(family) + EXECUTORS.index(executor)) % 3 :: 3]:
        bomb = hk.intervene(site(name, 1 if hk.KINDS[name].per_layer else None), raising(KeyboardInterrupt()))
        for worlds in ([World(x), World(x, bomb)], [World(x, patch(site("resid_pre", 0), World(x, bomb)))]):
            with pytest.raises(KeyboardInterrupt):
                list(hk.run_worlds(model, worlds, [site("logits", pos=-1)], executor=executor))
            state.assert_kept()


@each_family
def test_after_an_exception_in_the_body_of_apply(family):
    model = wrapped(family)
    x = example(model)
    state = State(model.module)
    plan = everywhere(model, World(example(model, seed=2)))
    for error in (RuntimeError, KeyboardInterrupt, GeneratorExit):
        with pytest.raises(error), model.apply(plan):
            raise error
        state.assert_kept()
        with pytest.raises(error), model.apply(plan):  # noqa: PT012
            call(model, x)
            raise error
        state.assert_kept()
    with pytest.raises(hk.errors.UnfiredError), model.apply(plan):
        pass
    state.assert_kept()


@each_family
def test_after_an_exception_in_the_users_model(family, monkeypatch):
    """Raised between hooks, where values wait from one hook to the next."""
    model = wrapped(family)
    x = example(model)
    plan = everywhere(model, World(example(model, seed=2)))
    expected = model.run(x, plan).logits
    state = State(model.module)
    block = model.architecture.blocks[-1]
    parts = [block.of_attention.pre, block.attention.out, model.architecture.norm]
    parts += [block.of_mlp.pre, block.mlp.down] if block.mlp is not None else []
    for part in parts:
        with monkeypatch.context() as patched:
            patched.setattr(type(part), "forward", lambda *args, **kwargs: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model.run(x, plan)
            with pytest.raises(ZeroDivisionError), model.apply(plan):
                call(model, x)
        state.assert_kept()
        assert torch.equal(model.run(x, plan).logits, expected)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "neox", "gemma2", "small_ln_learned", "small_attn_only"])
def test_after_an_exception_while_hooks_are_placed(family, monkeypatch):
    """Whichever of the hooks is the one that cannot be placed."""
    model = wrapped(family)
    x = example(model)
    tape = model.run(example(model, seed=2), capture=every_site(model)).tape
    plan = hk.Plan(tuple(patch(place.at(pos=1), tape) for place in every_site(model)))
    state = State(model.module)
    placed = 0

    def counting(register: Callable[..., Any], limit: int) -> Callable[..., Any]:
        def place(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            nonlocal placed
            placed += 1
            if placed == limit:
                raise MemoryError
            return register(self, *args, **kwargs)

        return place

    names = ("register_forward_hook", "register_forward_pre_hook")
    originals = {name: getattr(nn.Module, name) for name in names}

    def hold() -> None:
        with torch.no_grad(), model.apply(plan):
            call(model, x)

    for use in (hold, lambda: model.run(x, plan)):
        for limit in range(1, 1000):
            placed = 0
            with monkeypatch.context() as patched:
                for name in names:
                    patched.setattr(nn.Module, name, counting(originals[name], limit))
                try:
                    use()
                except MemoryError:
                    state.assert_kept()
                else:
                    break
        assert limit > 20
        state.assert_kept()


@pytest.mark.parametrize("family", ["gpt2", "llama", "small_ln_learned"])
def test_after_an_exception_while_attention_is_exposed(family, monkeypatch):
    """In the second of two layers, when the first already shows its inside."""
    model = fresh(family)
    x = example(model)
    state = State(model.module)
    swap, calls = model.architecture.swap_attention, []

    def once(attention: nn.Module, function: Callable[..., Any]) -> Any:
        calls.append(attention)
        if len(calls) == 2:
            raise MemoryError
        return swap(attention, function)

    object.__setattr__(model.architecture, "swap_attention", once)
    assert model.architecture.swap_attention is once
    plan = hk.zero(site("pattern", 0, pos=1)) + hk.zero(site("pattern", 1, pos=1))
    for run in (lambda: model.run(x, plan), lambda: under(model, plan, x)):
        calls.clear()
        with pytest.raises(MemoryError):
            run()
        state.assert_kept()


def under(model: Model, plan: hk.Plan, x: Inputs) -> None:
    with model.apply(plan):
        call(model, x)


# Runs that do not end


@pytest.mark.parametrize(("family", "executor", "end"), pairs(zoo.FAMILIES, EXECUTORS, ["close", "throw", "delete"]))
def test_after_a_generator_that_is_left_half_way(family, executor, end):
    model = wrapped(family)
    x = example(model)
    state = State(model.module)
    plan = everywhere(model, World(example(model, seed=2)))
    worlds = [World(x, plan), World(x, hk.zero(site("z", 1))), World(x)]
    outcomes = hk.run_worlds(model, worlds, [site("logits", pos=-1)], executor=executor, budget=1)
    next(outcomes)
    # Nothing of ours stands on the model while its user has the word.
    state.assert_kept()
    next(outcomes)
    if end == "close":
        outcomes.close()
    elif end == "throw":
        with pytest.raises(KeyboardInterrupt):
            outcomes.throw(KeyboardInterrupt())
    else:
        del outcomes
    state.assert_kept()


@each_family
def test_after_a_context_that_is_never_entered(family):
    model = wrapped(family)
    state = State(model.module)
    held = model.apply(everywhere(model, World(example(model))))
    state.assert_kept()
    del held
    state.assert_kept()


# Plans inside plans


@each_family
def test_after_nested_plans(family):
    model = wrapped(family)
    x = example(model)
    tape = model.run(example(model, seed=2), capture=every_site(model)).tape
    plan = hk.Plan(tuple(patch(place.at(pos=1), tape) for place in every_site(model)))
    state = State(model.module)
    with torch.no_grad():
        expected = model.run(x, plan).logits
        with model.apply(plan):
            for _ in range(2):
                with pytest.raises(KeyError, match="inner"), model.apply(plan):  # noqa: PT012
                    call(model, x)
                    raise KeyError("inner")
                with pytest.raises(hk.errors.SiteError):
                    model.run(x, hk.zero(site("z", 0, pos=40)))
                with model.apply(hk.zero(site("pattern", 0, pos=1)) + hk.zero(site("q", 0, pos=1))):
                    call(model, x)
                # The outer plan is what it was before the inner ones.
                torch.testing.assert_close(call(model, x)[x.mask], expected[x.mask], rtol=0, atol=1e-10)
    state.assert_kept()


# What the user had on the model


@pytest.mark.parametrize("family", ["gpt2", "llama", "small_rms_rotary_gqa"])
def test_the_users_own_hooks_stay_where_they_were(family):
    model = fresh(family)
    x = example(model)
    seen: list[str] = []
    block = model.architecture.blocks[0]
    for name, part in {
        "block": block.module,
        "norm": block.of_attention.pre,
        "out": block.attention.out,
        "model": model.module,
    }.items():
        part.register_forward_hook(lambda m, a, o, name=name: seen.append(name))
        part.register_forward_pre_hook(lambda m, a, name=name: seen.append(name))
    state = State(model.module)
    call(model, x)
    expected = list(seen)
    seen.clear()
    plan = everywhere(model, World(example(model, seed=2)))
    model.run(x, plan)
    state.assert_kept()
    with pytest.raises(RuntimeError), model.apply(plan):
        raise RuntimeError
    state.assert_kept()
    seen.clear()
    call(model, x)
    assert seen == expected


def test_an_attention_function_of_the_users_own_stays():
    """Set on one layer of a small transformer, which is where the engine puts its own."""
    model = fresh("small_ln_learned")
    x = example(model)
    attention = model.architecture.blocks[0].attention.module
    attention.attend = type(attention).attend
    state = State(model.module)
    model.run(x, hk.zero(site("pattern", 0, pos=1)))
    state.assert_kept()
    with pytest.raises(KeyError), model.apply(hk.zero(site("scores", 0, pos=1))):
        raise KeyError
    state.assert_kept()


def test_a_config_of_one_layers_own_stays():
    model = fresh("llama")
    x = example(model)
    attention = model.architecture.blocks[0].attention.module
    attention.config = copy.copy(attention.config)
    state = State(model.module)
    model.run(x, hk.zero(site("pattern", 0, pos=1)) + hk.zero(site("pattern", 1, pos=1)))
    state.assert_kept()


@each_family
def test_the_state_would_show_a_change(family):
    """The check itself can fail."""
    model = fresh(family)
    block = model.architecture.blocks[0]
    changes: list[Callable[[], Any]] = [
        lambda: block.of_attention.pre.register_forward_hook(lambda m, a, o: None),
        lambda: block.module.register_forward_pre_hook(lambda m, a: None),
        lambda: block.module.train(),
        lambda: setattr(block.attention.module, "config", SimpleNamespace()),
        lambda: setattr(block.attention.module, "attend", None),
        lambda: next(model.module.parameters()).data.add_(1e-9),
        lambda: next(model.module.parameters()).requires_grad_(False),
        lambda: torch.rand(1),
    ]
    for change in changes:
        state = State(model.module)
        change()
        with pytest.raises(AssertionError):
            state.assert_kept()
