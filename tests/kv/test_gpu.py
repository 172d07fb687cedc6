"""The cache on another device gives the CPU's numbers."""

from __future__ import annotations

import pytest
import torch

import interp as ip
from interp.kv import policies
from tests import zoo
from tests.devices import device, model_on, near  # noqa: F401
from tests.kv.test_effects import texts
from tests.kv.test_eviction import LENGTH, ids


def effects(model: ip.Model, **options) -> torch.Tensor:
    (context,), (suffix,) = texts(1)
    return torch.from_numpy(ip.kv.kv_effects(model, context, suffix, **options).effect)


@pytest.mark.parametrize(
    "options",
    [
        {"metric": ("nll", "kl", "margin"), "per_query": True},
        {"estimand": "streaming", "chunk": 4},
        {"estimand": "streaming", "chunk": 4, "unit": ("layer", "head")},
        {"unit": [(0, 3), (2, 7)]},
        {"how": "rescaled", "estimand": "streaming", "chunk": 4},
        {"how": "integrated", "estimand": "streaming", "chunk": 4},
        {"how": "gauss_newton", "metric": "kl", "steps": 2},
    ],
    ids=str,
)
def test_effects(device, options):  # noqa: F811
    found = effects(model_on(device, "gemma2"), **options)
    assert found.abs().max() > 1e-3
    near(found, effects(zoo.wrapped("gemma2"), **options))


def test_sets_and_oracles(device):  # noqa: F811
    (context,), (suffix,) = texts(2)
    found = []
    for model in (model_on(device, "llama"), zoo.wrapped("llama")):
        cached = ip.kv.Cached.of(model, context, suffix)
        shares = ip.kv.shapley(cached, [(0, 3), (4, 7)], permutations=2).values
        values = ip.kv.greedy(cached, drop=0.3, floor=0.4).values
        estimated = ip.kv.greedy(cached, drop=0.3, floor=0.4, how="rescaled").values
        found.append(torch.tensor([*shares, *values, *estimated]))
    near(*found)


@pytest.mark.parametrize("positions", ["absolute", "slot"])
def test_eviction(device, positions):  # noqa: F811
    tokens, outcomes = ids(2), []
    contexts = [tokens[0, :12].tolist(), tokens[1, :8].tolist()]
    for model in (model_on(device, "llama"), zoo.wrapped("llama")):
        heads = ip.kv.RetainingHeads.for_model(model, 16)
        every = [
            policies.streaming_llm(2), policies.h2o(), policies.snapkv(3, 3), policies.tova(), policies.key_norm(),
            policies.keydiff(), policies.expected_attention(8), policies.random(), heads.policy(),
        ]  # fmt: skip
        settings = {"chunk": 4, "stabilizers": 1, "sinks": 1, "positions": positions, "decoding": True}
        logits = []
        for policy in every:
            cache = ip.kv.prefill(model, model.inputs(contexts, padding="left"), policy, 5, **settings)
            logits += [ip.kv.follow(model, cache, tokens[:, 15:])[:, -1], cache.logits]
            cache.reorder_cache(torch.tensor([1, 0]))
            cache.crop(0)
            assert len(cache.kept()) == model.n_layers
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
        whole = model.inputs([row + tokens[0, 15:].tolist() for row in contexts], padding="left")
        cache = ip.kv.prefill(model, model.inputs(contexts, padding="left"), policies.h2o(), 5, chunk=4, across="layer")
        outcomes.append((torch.stack([x.cpu() for x in logits]), ip.kv.generate(model, cache, whole, **options).cpu()))
    (mine, said), (expected, other) = outcomes
    near(mine, expected, 1e-4)
    assert torch.equal(said, other) and said.shape[1] == 12 + LENGTH - 15 + 3


def test_heads_and_judging(device):  # noqa: F811
    contexts, suffixes = texts(3, rows=2)
    found = []
    for model in (model_on(device, "llama"), zoo.wrapped("llama")):
        heads = ip.kv.RetainingHeads.for_model(model, 16)
        some = ip.kv.examples(model, contexts, suffixes, "both")
        losses = ip.kv.train_heads(heads, some, steps=3, batch=2)
        given = [heads.policy(), policies.value_gradient, policies.h2o()]
        judged = ip.kv.judge(model, contexts, suffixes, given, budgets=(0.4,), controls=False, drop=0.3)
        found.append(torch.cat([torch.tensor(losses), torch.from_numpy(judged.nll).flatten()]))
    near(*found, 1e-4)
