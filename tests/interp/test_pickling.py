"""What crosses to another process: metrics, grids, results, plans, edges, and what is made of them."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

import interp as ip
from tests import zoo

LAST = ip.site("logits", pos=-1)


@pytest.fixture(scope="module")
def model() -> ip.Model:
    return ip.wrap(zoo.make("gpt2"))


def prompts(model: ip.Model, seed: int) -> ip.Inputs:
    return model.inputs(torch.randint(1, zoo.VOCAB, (3, 6), generator=torch.Generator().manual_seed(seed)))


def fifth(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, 0, 5]


METRICS = {
    "logit_diff": lambda m: ip.logit_diff(5, [6, 7, 8]),
    "logit": lambda m: ip.logit([1, 2, 3], pos=slice(-3, None)),
    "log_prob": lambda m: ip.log_prob(5),
    "alternatives": lambda m: ip.log_prob([[1, 1, 2]] * 3),
    "spelled": lambda m: ip.prob([[1, 2]] * 3, pos=(-3, -2)),
    "prob": lambda m: ip.prob(torch.tensor([1, 2, 3])),
    "rank": lambda m: ip.rank(5, pos=None),
    "accuracy": lambda m: ip.accuracy(5),
    "kl": lambda m: ip.kl(ip.World(prompts(m, 3), ip.zero(ip.site("z", 0)))),
    "cross_entropy": lambda m: ip.cross_entropy(),
    "own": lambda m: ip.metric(fifth, LAST),
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics(model, name):
    inputs, metric = prompts(model, 0), METRICS[name](model)
    expected = ip.evaluate(model, inputs, metric)
    for there in (pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric)):
        assert there.name == metric.name
        torch.testing.assert_close(ip.evaluate(model, inputs, there), expected, rtol=0, atol=0)
    bound = metric.bind(model, inputs)
    there = pickle.loads(pickle.dumps(bound))
    assert there.reads == bound.reads
    if metric.reference is None:
        values = [torch.cat([o.values[i] for o in ip.run_worlds(model, [ip.World(inputs)], bound.reads)]) for i in [0]]
        torch.testing.assert_close(there.fn(slice(0, 3), *values), expected, rtol=0, atol=0)


def test_a_metric_of_the_source(model):
    there = pickle.loads(pickle.dumps(ip.kl()))
    clean, corrupt, grid = prompts(model, 0), prompts(model, 1), ip.grid("z", layer="all")
    found, expected = (ip.sweep(model, clean, corrupt, grid, metric=m) for m in (there, ip.kl()))
    np.testing.assert_array_equal(found.effect, expected.effect)
    assert np.abs(found.effect).max() > 1e-3


def test_a_function_that_does_not_cross_is_not_hidden():
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(ip.metric(lambda x: x[:, 0, 5], LAST))


@pytest.mark.parametrize(
    "axes",
    [{"head": "all"}, {"pos": {"a": (1, 2), "b": slice(0, 2)}}, {"pos": torch.ones(3, 6, dtype=torch.bool)}],
    ids=["heads", "named", "mask"],
)
def test_grids_and_results(model, axes):
    clean, corrupt, grid = prompts(model, 0), prompts(model, 1), ip.grid("z", layer="all", **axes)
    there = pickle.loads(pickle.dumps(grid))
    found, expected = (ip.sweep(model, clean, corrupt, g, metric=ip.logit(5)) for g in (there, grid))
    for result in (found, pickle.loads(pickle.dumps(expected))):
        np.testing.assert_array_equal(result.effect, expected.effect)
        assert result.axes == expected.axes and repr(result) == repr(expected)
    assert np.abs(expected.effect).max() > 1e-3


def test_plans(model):
    other = prompts(model, 1)
    plan = (
        ip.patch(ip.site("z", 0, head=1), source=other)
        + ip.steer(ip.site("resid_post", 0), torch.ones(32, dtype=torch.float64), scale=2.0)
        + ip.knockout(ip.site("scores", 1, pos=-1, key_pos=0))
        + ip.mean(ip.site("mlp_out", 1), source=other)
        + ip.freeze(ip.site("attn_out", 1))
    )
    there = pickle.loads(pickle.dumps(plan))
    assert there == plan
    inputs = prompts(model, 0)
    torch.testing.assert_close(model.run(inputs, there).logits, model.run(inputs, plan).logits, rtol=0, atol=0)


def test_edges_graphs_circuits_and_repairs(model):
    graph, clean, corrupt = ip.paths.Graph.of(model), prompts(model, 0), prompts(model, 1)
    edge = graph.edge("m0->logits")
    assert pickle.loads(pickle.dumps(edge)) == edge and pickle.loads(pickle.dumps(graph)) == graph
    circuit = ip.paths.Circuit.of(graph, ["m0->logits", "input->m0"])
    there = pickle.loads(pickle.dumps(circuit))
    assert there == circuit and there.edges == circuit.edges
    found = [ip.paths.edge_sweep(model, clean, corrupt, metric=ip.logit(5), edges=[e]) for e in (edge, "m0->logits")]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(found[0])).effect, found[1].effect)
    for options in ({"values": "zero"}, {"values": "mean", "reference": corrupt}):
        repair = ip.paths.repair_plan(model, [edge], **options)
        plans = [r(clean) for r in (repair, pickle.loads(pickle.dumps(repair)))]
        logits = [model.run(clean, plan).logits for plan in plans]
        torch.testing.assert_close(*logits, rtol=0, atol=0)
        assert (logits[0] - model.run(clean).logits).abs().max() > 1e-3
