"""A circuit of the model that ships: found on some pairs, measured on others, against chance and against gradients."""

from __future__ import annotations

import numpy as np
import pytest

import interp as ip
from interp import paths
from interp.models import english


def task(model: ip.Model, seed: int, split: str) -> tuple[ip.Inputs, ip.Inputs, ip.Metric]:
    drawn = english.indirect_object(24, seed, split, template=english.INDIRECT_OBJECT[0], order="ABBA")
    metric = ip.logit_diff([e.answer for e in drawn], [e.foil for e in drawn])
    return model.inputs([e.clean for e in drawn]), model.inputs([e.corrupt for e in drawn]), metric


@pytest.fixture(scope="module")
def model() -> ip.Model:
    return ip.load("ioi-mini")


@pytest.fixture(scope="module")
def scores(model) -> dict[str, ip.Result]:
    clean, corrupt, metric = task(model, 0, "train")
    return {
        method: paths.edge_scores(
            model, clean, corrupt, metric=metric, method=method, direction="noising", progress=False
        )
        for method in ("exact", "eap")
    }


def test_a_circuit_of_five_percent_keeps_the_behaviour_on_pairs_it_has_not_seen(model, scores):
    graph = paths.Graph.of(model)
    clean, corrupt, metric = task(model, 1, "names")
    size = round(0.05 * len(graph))
    circuit = paths.greedy(scores["exact"], graph, size)
    draw = np.random.default_rng(0)
    chance = []
    for _ in range(10):
        members = np.zeros(len(graph), bool)
        members[draw.choice(len(graph), size, replace=False)] = True
        chance.append(paths.Circuit(graph, members, np.full(len(graph), np.nan)))
    nothing, everything = paths.Circuit.all(graph).without(graph.edges), paths.Circuit.all(graph)
    found = paths.circuit_metric(model, [nothing, everything, circuit, *chance], clean, corrupt, metric=metric).mean(1)
    share = (found[2:] - found[0]) / (found[1] - found[0])
    assert 0.9 <= share[0] <= 1.1
    assert share[1:].max() < 0.5


def test_exact_effects_make_circuits_as_faithful_as_gradients_do(model, scores):
    graph = paths.Graph.of(model)
    clean, corrupt, metric = task(model, 1, "names")
    curves = {
        method: paths.faithfulness(
            model, clean, corrupt, found, graph, metric=metric, sizes=(0.005, 0.01, 0.02, 0.05, 0.1, 1.0)
        )
        for method, found in scores.items()
    }
    # One route carries nearly everything here, which gradients find as well: the curves all but agree.
    assert curves["exact"].cmd <= curves["eap"].cmd + 0.01
    assert curves["exact"].cpr >= curves["eap"].cpr - 0.01


def test_the_causal_graph_is_small_and_has_the_known_route(model, scores):
    graph = paths.Graph.of(model)
    circuit = paths.causal_graph(scores["exact"], graph, share=0.01)
    assert {"input->a0.h1<v>", "a0.h1->m0", "m0->logits"} <= set(circuit.edges)
    assert len(circuit) < 0.1 * len(graph)
