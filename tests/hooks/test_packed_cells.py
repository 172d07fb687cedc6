"""Worlds of the shared executor that are computed together although they differ, each as it is alone."""

from __future__ import annotations

import pytest
import torch

import hooks as hk
from hooks import World, patch, site
from tests import zoo
from tests.hooks.executing import Ran, agree

READS = [site("logits", pos=-1), site("resid_post", 1, pos=-1)]


def inputs(model, lengths, side, seed=1):
    return model.inputs(*zoo.random_inputs(zoo.VOCAB, lengths, side, seed))


def alike(model, worlds):
    """Whatever the executor, and each world with an effect of its own."""
    one, two = (Ran(model, worlds, READS, executor) for executor in ("sequential", "shared"))
    agree(one, two, worlds, READS)
    for number, values in enumerate(one.values):
        for other in one.values[:number]:
            assert float((values[0] - other[0]).abs().max()) > 1e-6


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_values_that_differ_from_world_to_world(family):
    model = zoo.wrapped(family)
    x = inputs(model, [7, 5], "left")
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(3, 2, 1, model.architecture.width, generator=draw, dtype=torch.float64)
    alike(model, [World(x), *(World(x, patch(site("resid_post", 0, pos=2), one)) for one in values)])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mistral"])
def test_few_queries_among_many_keys(family, side):
    """A world's own keys take the place of the base's, and do not stand beside them."""
    model = zoo.wrapped(family)
    x = inputs(model, [20, 17], side)
    plans = [hk.scale(site("resid_pre", 0, pos=-1), 3.0), hk.scale(site("v", 1, pos=(-1, -3)), 4.0)]
    plans += [hk.scale(site("k", 1, pos=-2), 3.0), hk.knockout(site("scores", 1, pos=-1, key_pos=-2))]
    alike(model, [World(x), *(World(x, plan) for plan in plans)])
