"""Rotary angles that depend on the longest position ("dynamic", "longrope"): of a batch, whatever is run of it."""

from __future__ import annotations

import pytest

import hooks as hk
from hooks import Model, World, patch, site
from hooks.record import choose
from tests import zoo
from tests.hooks.executing import Ran, agree
from tests.turns import pairs

LENGTH = 8
LONG = {"short_factor": [1.0] * 4, "long_factor": [4.0, 5.0, 6.0, 7.0], "original_max_position_embeddings": LENGTH}
KINDS = {"dynamic": {"factor": 4.0}, "longrope": {"factor": 4.0, **LONG}}


def make(kind: str) -> Model:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {**zoo.GROUPED, "hidden_size": 24, "head_dim": 8, "num_hidden_layers": 2, "max_position_embeddings": LENGTH}
    rope = {"rope_type": kind, "rope_theta": 100.0, **KINDS[kind]}
    return hk.wrap(zoo.prepare(LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope))))


def prompts(model: Model, lengths: list[int], side: str, seed: int) -> hk.Inputs:
    return model.inputs(*zoo.random_inputs(zoo.VOCAB, lengths, side, seed))


@pytest.mark.parametrize(
    ("lengths", "kind", "side"), pairs([[6, 6], [12, 12], [12, 5], [5, 12, 7]], KINDS, ["left", "right"])
)
def test_executors_and_budgets_agree(lengths, kind, side):
    model = make(kind)
    x, other = prompts(model, lengths, side, 1), prompts(model, lengths, side, 2)
    worlds = [
        World(x),
        *(World(x, patch(site("resid_pre", layer, pos=pos), World(other))) for layer in (0, 1) for pos in (1, 3)),
    ]
    worlds.append(World(x, hk.zero(site("k", 1, pos=2))))
    reads = [site("logits", pos=-1), site("rot_k", 1, pos=0)]
    assert choose(model, worlds).executor == "shared"
    oracle = Ran(model, worlds, reads, "sequential")
    for executor in ("sequential", "batched", "shared"):
        for budget in (None, 1):
            agree(oracle, Ran(model, worlds, reads, executor, budget=budget), worlds, reads)
    moved = sorted(float((oracle.values[i][0] - oracle.values[0][0]).abs().max()) for i in range(1, 6))
    assert moved[1] > 1e-4  # prompts may share a token


@pytest.mark.parametrize("kind", list(KINDS))
def test_angles_are_others_past_the_length(kind):
    """The check above compares something: the same tokens are turned otherwise in a longer text."""
    model = make(kind)
    long = prompts(model, [12], "right", 1)
    short = model.inputs(long.ids[:, :6])
    place = site("rot_k", 0, pos=3)
    one, two = (model.run(x, capture=[place]).tape[place] for x in (short, long))
    assert float((one - two).abs().max()) > 1e-3
    rotary = model.architecture.blocks[0].attention.rotary
    assert rotary.by_length and rotary.length == LENGTH
    assert not zoo.wrapped("llama").architecture.blocks[0].attention.rotary.by_length
