"""Cells that are alike run as one step: what goes between host and device does not grow with them."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import interp as ip
from hooks.backends.packed import shared
from tests.zoo import random_inputs, wrapped


@contextmanager
def crossings(monkeypatch):
    """Count what brings tensors to a device, and the model's numbers to Python.

    Indices are made on the CPU, where looking at one costs nothing; they have no part in the second.
    """
    found: Counter[str] = Counter()

    def counts(name, tensor, args, kwargs):
        if name == "to":
            return any(isinstance(a, (torch.device, str)) for a in (*args, *kwargs.values()))
        return tensor.is_floating_point()

    with monkeypatch.context() as patch:
        for name in ("to", "cpu", "cuda", "item", "tolist", "numpy", "__float__", "__bool__"):
            own = getattr(torch.Tensor, name)

            def counted(self, *args, _name=name, _own=own, **kwargs):
                found[_name] += counts(_name, self, args, kwargs)
                return _own(self, *args, **kwargs)

            patch.setattr(torch.Tensor, name, counted)
        yield found


def swept(model, rows, layers, positions, monkeypatch):
    ids, _ = random_inputs(model.architecture.vocabulary, [8] * rows)
    other, _ = random_inputs(model.architecture.vocabulary, [8] * rows, seed=1)
    clean, corrupt = model.inputs(ids), model.inputs(other)
    grid = ip.grid("resid_pre", layer=list(range(layers)), pos=list(range(positions)))
    with crossings(monkeypatch) as found:
        result = ip.sweep(model, clean, corrupt, grid, metric=ip.logit_diff(5, 9), progress=False)
    assert float(abs(result.effect).max()) > 1e-3
    return found


@pytest.mark.parametrize("family", ["gpt2", "small_rms_rotary_gqa"])
def test_a_sweep_crosses_no_more_with_more_cells_rows_and_layers(family, monkeypatch):
    model = wrapped(family)
    swept(model, 2, 2, 3, monkeypatch)  # what is made once for a model
    few = swept(model, 2, 1, 3, monkeypatch)
    assert sum(few.values()) > 0
    assert swept(model, 2, 1, 8, monkeypatch) == few, "more cells"
    assert swept(model, 4, 1, 3, monkeypatch) == few, "more rows"
    assert swept(model, 2, model.n_layers, 3, monkeypatch) == few, "more layers"


@pytest.mark.parametrize(("intervention", "most"), [(None, 330), (ip.zero, 270)])
def test_a_cell_costs_few_calls(intervention, most, monkeypatch):
    """What cells have in common is found out once, so Python calls little for one more of a kind."""
    monkeypatch.setitem(shared.ENOUGH, "cpu", 1 << 30)  # one chunk
    config = GPT2Config(n_layer=2, n_embd=32, n_head=16, vocab_size=50, n_positions=16, bos_token_id=1, eos_token_id=1)
    model = ip.wrap(GPT2LMHeadModel(config).eval())
    clean, corrupt = (model.inputs(random_inputs(model.architecture.vocabulary, [12], seed=s)[0]) for s in (0, 1))
    told = {} if intervention is None else {"intervention": intervention, "direction": "noising"}

    def calls(heads):
        count = 0

        def counted(_frame, event, _arg):
            nonlocal count
            count += event in ("call", "c_call")

        grid = ip.grid("z", layer=[0], head=list(range(heads)), pos="all")
        sys.setprofile(counted)
        try:
            ip.sweep(model, clean, corrupt, grid, metric=ip.logit_diff(5, 9), progress=False, **told)
        finally:
            sys.setprofile(None)
        return count

    calls(8)  # what is made once for a model
    assert 0 < (calls(16) - calls(8)) / (8 * 12) < most


def test_a_held_step_crosses_no_more_with_more_rows_and_interventions(monkeypatch):
    model = wrapped("gpt2")

    def stepped(rows, layers):
        ids, _ = random_inputs(model.architecture.vocabulary, [8] * rows)
        vector = torch.ones(model.architecture.width, dtype=model.dtype)
        plan = ip.Plan(tuple(ip.steer(ip.site("resid_post", layer=at), vector) for at in range(layers)))
        with model.apply(plan) as audit:
            model.module(input_ids=ids, use_cache=False)
            with crossings(monkeypatch) as found:
                model.module(input_ids=ids, use_cache=False)
        assert all(entry.calls == 2 for entry in audit)
        return sum(found.values())

    assert stepped(2, 1) == stepped(6, 1) == stepped(2, 2)
