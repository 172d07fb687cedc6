"""Generation under a plan is recomputation in every family that the engine knows, not only in those of other tests."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import hooks as hk
from experiments.families.models import FAMILIES
from hooks import Inputs, Model
from tests.hooks.decoding import OPTIONS, assert_equal, generated, prompts, recomputed
from tests.hooks.test_generation import MODES, one_of_each
from tests.hooks.test_generation_modes import mixed, repeating
from tests.zoo import prepare

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

DECODE = [name for name, family in FAMILIES.items() if family.head in ("ForCausalLM", "LMHeadModel")]
ROUNDED = {"BLOOM": 1e-5, "GPT-J": 1e-5}
"""Those whose attention computes in float32, whatever the model's dtype."""
FAILING = {("Falcon, ALiBi", "static")}
"""What transformers fails at by itself: biases of a prompt's length are added to masks of a static cache's."""
QUICK = {"BLOOM", "Falcon, ALiBi", "OPT", "GPT-OSS", "Cohere 2"}


@cache
def made(name: str) -> Model:
    return hk.wrap(prepare(FAMILIES[name].make()))


def cases(modes: list[str]) -> list[object]:
    return [
        pytest.param(name, mode, marks=() if name in QUICK and mode == modes[0] else pytest.mark.full)
        for name in DECODE
        for mode in modes
        if (name, mode) not in FAILING
    ]


@torch.no_grad()
@pytest.mark.parametrize(("name", "mode"), cases(["greedy", *(mode for mode in MODES if mode != "greedy")]))
def test_generation_is_recomputation(name, mode):
    model = made(name)
    # Where scores are float64 and their lowest number is added, a padded query is nan, with us and without.
    lengths = (5, 5) if name in ROUNDED else (6, 4)
    x = prompts(model, lengths=lengths)
    plan, atol = one_of_each(model, x), ROUNDED.get(name, 1e-10)
    got, audit = generated(model, x, plan, seed=5, **MODES[mode])
    want = recomputed(model, x, plan, seed=5, **MODES[mode])
    assert torch.equal(got.tokens, want.tokens) and {entry.status for entry in audit} == {"fired"}
    assert_equal(got.logits, want.logits, atol)
    plain = recomputed(model, x, None, **MODES[mode])
    assert float((got.logits[0] - plain.logits[0]).abs().max()) > 1e-3


@torch.no_grad()
@pytest.mark.full
@pytest.mark.parametrize("name", DECODE)
def test_prompt_lookup(name):
    model = made(name)
    module: Any = model.module
    x, plan = Inputs.of(repeating()), mixed(model)
    want = recomputed(model, x, plan, seed=4, max_new_tokens=6)
    with model.apply(plan, seed=4):
        got = module.generate(x.ids, prompt_lookup_num_tokens=3, **OPTIONS | {"max_new_tokens": 6})
    assert torch.equal(got, want.tokens)
