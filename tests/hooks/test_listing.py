"""What is held on a model, by whom."""

from __future__ import annotations

import threading

import pytest
import torch

import interp as ip
from tests import zoo

SITE = ip.site("mlp_out", layer=0)


@pytest.fixture
def model():
    return ip.wrap(zoo.make("gpt2", dtype=torch.float64))


def test_what_is_held_and_where_it_was_applied(model):
    assert model.held == ()
    outer, inner = ip.scale(SITE, 0.5), lambda inputs: ip.zero(SITE)
    with model.apply(outer):
        with model.apply(inner):
            first, second = model.held
            assert first.plan == ip.Plan((outer,)) and second.plan is inner
            assert __file__ in first.by and "test_what_is_held" in first.by and first.in_force
            assert "mlp_out" in str(first) and first.thread == threading.current_thread().name
            model.module(torch.tensor([[1, 2]]))
            assert len(first.audit) == 1 and str(first.audit) != ""
            with model.suspended():
                assert not any(one.in_force for one in model.held) and "suspended" in str(model.held[0])
            assert len(ip.wrap(model.module).held) == 2  # of the module, whoever wraps it
        assert len(model.held) == 1
    assert model.held == ()


def test_what_a_callback_holds_is_said_to_be_its(model):
    clamp = ip.training.Clamp(ip.scale(SITE, 0.5))
    monitor = ip.training.Monitor(model, [clamp])
    with monitor.step():
        (one,) = model.held
        assert "interp.training" in one.by
        model.module(torch.tensor([[1, 2]]))


def test_another_thread_is_named(model):
    with model.apply(ip.scale(SITE, 0.5)):
        seen = []
        thread = threading.Thread(target=lambda: seen.extend(model.held))
        thread.start(), thread.join()
        assert [one.thread for one in seen] == [threading.current_thread().name] and seen[0].in_force
        model.module(torch.tensor([[1, 2]]))
