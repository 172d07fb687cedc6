"""Decoding with one graph for every step gives what `generate` gives under the same plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import hooks as hk
from hooks import Inputs, Model, Plan, new, site
from tests import zoo
from tests.hooks.decoding import OPTIONS, assert_equal, prompts
from tests.zoo import fresh, wrapped

pytestmark = [pytest.mark.filterwarnings("ignore")]
FAMILIES = ["gpt2", "llama", "neox"]


def edits(model: Model) -> Plan:
    """Of prompt tokens, of new ones, of all, of one row, and from one step on."""
    vector = 2.0 * torch.arange(model.architecture.width, device=model.device).to(model.dtype).cos()
    plan = hk.steer(site("resid_post", 0, pos="new"), vector) + hk.scale(site("v", 1, pos=-1), -1.5)
    plan = plan + hk.knockout(site("scores", 1, head=1, key_pos=0)).at(pos=slice(1, None))
    plan = plan + hk.scale(site("mlp_out", 1), 1.3) + hk.zero(site("z", 1, head=2, pos=new(1, 3)))
    return plan + hk.scale(site("mlp_post", 1, pos="new"), 0.7).where(torch.tensor([True, False]))


def same(model: Model, x: Inputs, plan: Plan, got: hk.Generated, seed: int = 0, atol: float = 1e-9) -> None:
    count = got.tokens.shape[1]
    want = model.generate(x, plan, logits=True, seed=seed, **dict(OPTIONS, max_new_tokens=count))
    assert torch.equal(got.sequences, want.sequences)
    assert got.logits is not None and want.logits is not None
    assert_equal([got.logits.float()], [want.logits.float()], max(atol, 1e-5 * float(want.logits.abs().max())))
    assert [(e.rows, e.positions, e.status) for e in got.audit] == [(e.rows, e.positions, e.status) for e in want.audit]


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "lengths"),
    [
        # Making a graph takes seconds.
        pytest.param(family, lengths, marks=() if (family, lengths[1]) == ("llama", 4) else pytest.mark.full)
        for family in FAMILIES
        for lengths in ((6, 6), (6, 4))
    ],
)
def test_it_is_generation(family: str, lengths: tuple[int, int]) -> None:
    model = wrapped(family)
    x, plan = prompts(model, lengths=lengths), edits(wrapped(family))
    fast = model.compile(plan, backend="eager")
    got = fast.generate(x, max_new_tokens=6, eos_token_id=None)
    same(model, x, plan, got)
    plain = fast.generate(x, Plan(), max_new_tokens=6, eos_token_id=None)
    same(model, x, Plan(), plain)
    assert not torch.equal(plain.tokens, got.tokens)


@torch.no_grad()
def test_another_value_and_another_text_are_the_same_graph() -> None:
    model = fresh("llama")
    fast, x = model.compile(backend="eager"), prompts(model)
    vector = torch.arange(model.architecture.width).double()
    for number, value in enumerate((1.0, 2.0, -3.0)):
        plan = hk.steer(site("resid_post", 0, pos="new"), vector, value)
        same(model, x, Plan((plan,)), fast.generate(x, plan, max_new_tokens=5, eos_token_id=None))
        if not number:
            count = fast.graphs.count
    other = prompts(model, seed=7)
    same(model, other, Plan((plan,)), fast.generate(other, plan, max_new_tokens=5, eos_token_id=None))
    assert fast.graphs.count == count == 1


@pytest.mark.full
@torch.no_grad()
def test_draws_and_functions_of_the_users() -> None:
    """What depends on the position is told it anew at every step."""
    model = fresh("gpt2")
    fast, x = model.compile(backend="eager"), prompts(model)
    plan = hk.noise(site("resid_post", 0), 0.5) + hk.intervene(
        site("z", 1, pos="new"), lambda v, ctx: v * (1 + ctx.pos[:, :, None, None].to(v.dtype))
    )
    same(model, x, plan, fast.generate(x, plan, max_new_tokens=5, seed=3, eos_token_id=None), seed=3)


@torch.no_grad()
def test_the_model_stays_as_it_is() -> None:
    model = fresh("llama")
    x = prompts(model)
    module: Any = model.module
    before = module.generate(x.ids, attention_mask=x.mask.long(), **OPTIONS)
    plan = Plan((hk.scale(site("z", 1, pos="new"), -2.0),))
    fast = model.compile(plan, backend="eager")
    one = fast.generate(x, max_new_tokens=3, eos_token_id=None)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules()) and not model.holds
    assert torch.equal(module.generate(x.ids, attention_mask=x.mask.long(), **OPTIONS), before)
    # Trained meanwhile, it decodes with what it has become.
    module.lm_head.weight.data.neg_()
    two = fast.generate(x, max_new_tokens=3, eos_token_id=None)
    assert not torch.equal(one.tokens, two.tokens)
    same(model, x, plan, two)


@torch.no_grad()
def test_refused_by_name() -> None:
    model = wrapped("llama")
    x, fast = prompts(model), wrapped("llama").compile(backend="eager")
    new_scores = hk.knockout(site("scores", 1, key_pos=0)).at(pos="new")
    refused: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: fast.generate(x, new_scores, max_new_tokens=3), hk.PlanError, "under apply"),
        (lambda: fast.generate(x, hk.freeze(site("z", 1)), max_new_tokens=3), hk.PlanError, "unedited"),
        (lambda: fast.generate(x, max_new_tokens=3, num_beams=2), hk.InputsError, "no num_beams"),
        (lambda: fast.generate(x, max_new_tokens=0), hk.InputsError, "no 0 tokens"),
        (lambda: fast.generate(prompts(model, "right"), max_new_tokens=3), hk.InputsError, "padded on the right"),
        (lambda: fast.generate([[1, 2]], max_new_tokens=3), hk.InputsError, "takes Inputs"),  # type: ignore[arg-type]
        (
            lambda: fast.generate(x, hk.zero(site("z", 1, pos=new(7))), max_new_tokens=1),
            hk.UnfiredError,
            "never fired",
        ),
    ]
    for call, kind, why in refused:
        with pytest.raises(kind, match=why):
            call()
    for family in ("gemma2", "mistral"):
        other = wrapped(family)
        with pytest.raises(hk.ModelError, match="slide"):
            other.compile(backend="eager").generate(prompts(other), max_new_tokens=3)
    with model.apply(hk.scale(site("z", 1), 2.0)):
        model.module(input_ids=x.ids)
        with pytest.raises(hk.PlanError, match="held on the model"):
            fast.generate(x, max_new_tokens=3)


@pytest.mark.gpu
@torch.no_grad()
def test_replayed_as_a_cuda_graph() -> None:
    """The same in CUDA graphs, a step of which makes nobody wait."""
    model = hk.wrap(zoo.make("llama", dtype=torch.float32).cuda())
    x = prompts(model, lengths=(6, 6))
    vector = torch.arange(model.architecture.width, dtype=torch.float32, device="cuda")
    plan = Plan((hk.steer(site("resid_post", 0, pos="new"), vector, 0.5), hk.scale(site("v", 1, pos=-1), -1.5)))
    fast = model.compile(plan, mode="reduce-overhead")
    for _ in range(3):  # warm-up, recording, replay
        got = fast.generate(x, max_new_tokens=8, eos_token_id=None)
    same(model, x, plan, got, atol=1e-3)
