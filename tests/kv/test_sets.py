"""Sets of units, Shapley values and the greedy oracle, against their definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import interp as ip
from tests import zoo
from tests.kv.test_effects import CONTEXT, deleted, texts


@pytest.fixture(scope="module")
def cached() -> ip.kv.Cached:
    (context,), (suffix,) = texts(1)
    return ip.kv.Cached.of(zoo.wrapped("llama"), context, suffix)


def nll(model, context, suffix, tokens, layers=range(3), heads=range(2)) -> float:
    gone = {layer: {head: list(tokens) for head in heads} for layer in layers} if tokens else {}
    logits = deleted(model.module, context, suffix, gone)
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(suffix[1:]), reduction="sum"))


def test_sets_equal_their_deletion(cached):
    (context,), (suffix,) = texts(1)
    sets = [(), (0,), (3, 5), tuple(range(CONTEXT))]
    base = nll(cached.model, context, suffix, ())
    expected = [nll(cached.model, context, suffix, tokens) - base for tokens in sets]
    assert abs(expected[2]) > 1e-3
    np.testing.assert_allclose(ip.kv.set_effects(cached, sets), expected, rtol=0, atol=1e-10)
    single = ip.kv.kv_effects(cached.model, context, suffix, unit="token")
    np.testing.assert_allclose(
        ip.kv.set_effects(cached, [[i] for i in range(CONTEXT)]), single.effect[:, 0], rtol=0, atol=1e-11
    )


def test_shapley_values_are_those_of_all_orders(cached):
    spans = [(0, 2), (2, 5), (5, CONTEXT)]
    subsets = [s for n in range(4) for s in itertools.combinations(range(3), n)]
    effects = ip.kv.set_effects(cached, [[t for p in s for t in range(*spans[p])] for s in subsets])
    worth = dict(zip(subsets, effects, strict=True))
    expected = []
    for player in range(3):
        value = 0.0
        for subset in subsets:
            if player not in subset:
                weight = math.factorial(len(subset)) * math.factorial(2 - len(subset)) / 6
                value += weight * (worth[tuple(sorted((*subset, player)))] - worth[subset])
        expected.append(value)
    found = ip.kv.shapley(cached, spans, permutations=200)
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(found.values, expected, atol=4 * found.error.max() + 1e-12)
    assert found.error.max() < 0.3 * np.abs(expected).max()
    assert found.total == pytest.approx(worth[(0, 1, 2)], abs=1e-9)


def test_the_greedy_oracle_takes_the_least(cached):
    found = ip.kv.greedy(cached, drop=1 / CONTEXT, floor=0.3)
    (context,), (suffix,) = texts(1)
    single = ip.kv.kv_effects(cached.model, context, suffix).effect[..., 0]
    first = found.order == found.order.min()
    assert (first.sum(-1) == 1).all()
    np.testing.assert_array_equal(first.argmax(-1), single.argmin(-1))
    # The second round is measured under what is gone after the first.
    gone = torch.from_numpy(first)
    under = np.full(gone.shape, np.inf)
    base = cached.without(gone[None])[0]
    for at in zip(*np.nonzero(~first), strict=True):
        world = gone.clone()
        world[at] = True
        under[at] = cached.without(world[None])[0] - base
    second = found.order == np.unique(found.order)[1]
    np.testing.assert_array_equal(second.argmax(-1), under.argmin(-1))
    assert found.values[0] == cached.full and found.values[1] == pytest.approx(base, abs=1e-9)
    assert len(found.kept) == len(found.values) and 0.3 <= found.kept[-1] < 0.3 + 1 / CONTEXT
    pooled = ip.kv.greedy(cached, drop=0.1, floor=0.5, per_head=False, how="rescaled")
    assert pooled.kept[-1] >= 0.5 and len(np.unique((pooled.order == pooled.order.min()).sum(-1))) > 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: ip.kv.set_effects(c, [[99]]), "not in a context"),
        (lambda c: ip.kv.set_effects(c, torch.zeros(1, 3, 2, CONTEXT)), "bool"),
        (lambda c: ip.kv.shapley(c, [(0, 3), (2, 4)]), "overlap"),
        (lambda c: ip.kv.shapley(c, permutations=0), "positive"),
        (lambda c: ip.kv.greedy(c, drop=1.0), "share"),
        (lambda c: ip.kv.Cached.of(c.model, [[1, 2], [3, 4]], [[5, 6], [7, 8]]), "one context"),
    ],
)
def test_bad_input(cached, call, message):
    with pytest.raises(ip.InputsError, match=message):
        call(cached)


def test_a_held_plan_is_refused():
    model = zoo.fresh("llama")
    (context,), (suffix,) = texts()
    with model.apply(ip.zero(ip.site("mlp_out", layer=0))):
        with pytest.raises(ip.ModelError, match="held"):
            ip.kv.Cached.of(model, context, suffix)
        ip.evaluate(model, model.inputs([context]), ip.logit(1))
