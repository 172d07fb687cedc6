"""A held plan is resolved once for calls that are alike, and anew as soon as anything that it depends on differs."""

from __future__ import annotations

import pytest
import torch

import hooks.resolved
import interp as ip
from tests.zoo import random_inputs, wrapped


@pytest.fixture
def resolutions(monkeypatch):
    """How often a plan was resolved."""
    made: list[int] = []
    own = hooks.resolved.resolve

    def counted(*args, **kwargs):
        made.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(hooks.resolved, "resolve", counted)
    return made


def same(model, plan, ids, mask=None, seed=0):
    """That a held call gives what a run of its own gives."""
    inputs = model.inputs(ids, mask)
    found = model.module(input_ids=ids, attention_mask=mask, use_cache=False).logits
    with model.suspended():
        expected = model.run(inputs, plan, seed=seed).logits
        plain = model.run(inputs).logits
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    assert float((expected - plain)[real].abs().max()) > 1e-3
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-10)


@pytest.fixture
def model():
    return wrapped("gpt2")


def batch(model, lengths, seed=0):
    return random_inputs(model.architecture.vocabulary, lengths, seed=seed)


def test_calls_that_are_alike_share_a_program(model, resolutions):
    vector = torch.ones(model.architecture.width, dtype=model.dtype)
    plan = ip.steer(ip.site("resid_post", layer=0, pos=-1), vector) + ip.zero(ip.site("z", layer=1, head=0))
    with model.apply(plan) as audit:
        for seed in range(3):
            same(model, plan, batch(model, [6, 6], seed)[0])
    assert len(resolutions) == 1
    assert [entry.calls for entry in audit] == [3, 3]


def test_another_length_padding_or_number_of_rows_is_resolved_anew(model, resolutions):
    plan = ip.zero(ip.site("resid_post", layer=0, pos=-1))
    with model.apply(plan):
        for lengths in ([6, 6], [6, 4], [4, 6], [5, 5], [6, 6, 6]):
            same(model, plan, *batch(model, lengths))
    assert len(resolutions) == 5


def test_values_are_read_when_the_program_runs(model, resolutions):
    """What a learning loop changes in place is what the next call sees."""
    vector = torch.ones(model.architecture.width, dtype=model.dtype)
    plan = ip.clamp(ip.site("resid_post", layer=0, pos=2), vector)
    ids, _ = batch(model, [6, 6])
    with model.apply(plan):
        same(model, plan, ids)
        vector.mul_(-3.0)
        same(model, plan, ids)
    assert len(resolutions) == 1


@pytest.mark.parametrize("what", ["positions", "source", "rows"])
def test_a_place_that_was_written_into_is_resolved_anew(model, what):
    ids, _ = batch(model, [6, 6])
    width = model.architecture.width
    if what == "positions":
        changed = torch.tensor([[0], [1]])
        plan = ip.zero(ip.site("resid_post", layer=0, pos=changed))
    elif what == "rows":
        changed = torch.tensor([True, False])
        plan = ip.zero(ip.site("resid_post", layer=0)).where(changed)
    else:
        changed = torch.randn(2, 6, width, dtype=model.dtype)
        plan = ip.patch(ip.site("resid_post", layer=0, pos=[1, 3]), source=changed)
    with model.apply(plan):
        same(model, plan, ids)
        changed.copy_(~changed if changed.dtype == torch.bool else changed + 1)
        same(model, plan, ids)


def test_a_function_of_the_call_and_reads_of_worlds_are_resolved_for_each(model, resolutions):
    source = model.inputs(batch(model, [6, 6], 5)[0])
    ids, _ = batch(model, [6, 6])
    with model.apply(lambda inputs: ip.zero(ip.site("resid_post", layer=0, pos=int(inputs.ids[0, 0]) % 4))):
        for seed in range(3):
            model.module(input_ids=batch(model, [6, 6], seed)[0], use_cache=False)
    assert len(resolutions) == 3
    plan = ip.patch(ip.site("resid_post", layer=0, pos=1), source=source)
    with model.apply(plan):
        same(model, plan, ids)
        with torch.no_grad():
            model.module.transformer.h[0].mlp.c_fc.weight.mul_(1.5)
        same(model, plan, ids)


def test_draws_are_those_of_the_hold_that_asks(model, resolutions):
    plan = ip.noise(ip.site("resid_post", layer=0), 1.0)
    ids, _ = batch(model, [6, 6])
    with model.apply(plan, seed=3):
        same(model, plan, ids, seed=3)
    with model.apply(plan, seed=4):
        same(model, plan, ids, seed=4)
