"""Members of an ensemble under plans: each as it trains alone under `apply`, whatever the others hold."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hooks as hk
from hooks import site
from hooks.errors import PlanError, ShapeError
from interp import training
from interp.training.ensemble import Ensemble, from_modules
from tests import zoo

RATE, STEPS = 1e-2, 3
IDS, MASK = zoo.random_inputs(zoo.VOCAB, [5, 5, 5])
TARGETS = torch.roll(IDS, -1, 1)


def loss(call: Callable[..., Any], given: dict[str, Tensor], step: Tensor | int) -> Tensor:
    out = call(IDS)
    logits = out if isinstance(out, Tensor) else out.logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), TARGETS.flatten())


def alone(module: nn.Module, plan: Any) -> tuple[list[float], nn.Module]:
    """Losses of a run of its own with torch's Adam, and the module that came of it."""
    module = copy.deepcopy(module)
    model, optimizer, found = hk.wrap(module), torch.optim.Adam(module.parameters(), RATE), []
    for step in range(STEPS):
        if plan is None:
            value = loss(module, {}, step)
        else:
            with model.apply(plan):
                value = loss(module, {}, step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found.append(value.item())
    return found, module


def each_as_alone(modules: Sequence[nn.Module], plans: Sequence[Any], groups: int) -> None:
    model = hk.wrap(modules[0])
    x = model.inputs(IDS)
    assert len(hk.Members(model, plans, x).groups) == groups
    run = Ensemble(lambda _: from_modules(modules, loss, plans=plans, inputs=x), range(len(plans)), rate=RATE)
    found = run.train(STEPS)
    for index, (module, plan) in enumerate(zip(modules, plans, strict=True)):
        losses, trained = alone(module, plan)
        torch.testing.assert_close(found[:, index].tolist(), losses, rtol=0, atol=1e-10)
        own = run.member(index)
        for name, value in trained.named_parameters():
            torch.testing.assert_close(own[name], value.detach(), rtol=0, atol=1e-8)
        if plan is not None:
            assert abs(losses[0] - loss(module, {}, 0).item()) > 1e-4


def held(n: int) -> hk.Plan:
    """A plan of one structure, whose vector, strength, position and head follow from `n`."""
    vector = torch.randn(32, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    steer = hk.steer(site("resid_post", 0, pos=(-1, 2, 0)[n]), vector, 1.0 + n)
    return steer + training.previous_token(1, n) + hk.scale(site("z", 0, head=n), 0.5).strength(0.3 + 0.2 * n)


def test_plans_that_differ_in_tensors_are_one_batch():
    each_as_alone([zoo.make("small_ln_learned", seed) for seed in range(3)], [held(n) for n in range(3)], groups=1)


def test_plans_of_other_structures_and_worlds_that_are_read():
    modules = [zoo.make("small_attn_only", seed) for seed in range(5)]
    x = hk.wrap(modules[0]).inputs(zoo.random_inputs(zoo.VOCAB, [5, 5, 5], seed=3)[0])
    other = hk.World(x, hk.zero(site("z", 0, head=1)) + hk.freeze(site("pattern", 1, head=0)))
    plans = [
        None,
        training.preserving("pattern", training.ablate_heads(0, 1), 1),
        hk.freeze(site("z", 1, head=1)) + hk.noise(site("resid_pre", 1), 0.1, seed=4) + hk.zero(site("attn_out", 0)),
        hk.patch(site("z", 1, head=2), other, stop_gradient=True) + hk.scale(site("scores", 0), 0.3),
        training.preserving("pattern", training.ablate_heads(0, 2), 1),
    ]
    each_as_alone(modules, plans, groups=4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_models_of_transformers(family):
    modules = [zoo.make(family, seed) for seed in range(2)]
    each_as_alone(
        modules, [hk.scale(site("z", 1, head=n), 0.3) + hk.zero(site("pattern", 0, head=n)) for n in (1, 2)], 1
    )


def test_what_members_cannot_hold_is_refused():
    modules = [zoo.make("small_attn_only", seed) for seed in range(2)]
    model = hk.wrap(modules[0])
    x, place = model.inputs(IDS), site("z", 0)
    for plans, given, error, words in (
        ([None], x, ShapeError, r"one plan a member \(2\)"),
        ([None, hk.zero(place)], None, PlanError, "give inputs="),
        ([lambda inputs: hk.zero(place), None], x, PlanError, "member 0 has a function"),
        ([None, hk.mean(place, hk.World(x))], x, PlanError, "reference set as a tape"),
        ([None, hk.patch(place, hk.World(model.inputs([[1, 2]])))], x, PlanError, "rows and positions are others"),
        ([None, hk.zero(site("z", 7))], x, hk.SiteError, "layers 0"),
    ):
        with pytest.raises(error, match=words):
            from_modules(modules, loss, plans=plans, inputs=given)
    values = [hk.clamp(site("z", 0, head=1), torch.ones(8, dtype=torch.float64)[:n]) for n in (8, 8)]
    short = from_modules(modules, lambda call, given, step: call(IDS[:2]).sum(), plans=values, inputs=x)
    with pytest.raises(ShapeError, match=r"for inputs \[3, 5\]"):
        Ensemble(lambda _: short, [0, 1]).train(1)
