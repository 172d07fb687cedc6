"""The graph of a model: nodes in the order of time, edges, their known counts, and models that it does not describe."""

from __future__ import annotations

import pytest
import torch

import interp as ip
from hooks.errors import PathError
from interp import paths
from tests import zoo
from tests.paths.cases import METRIC, case

each_family = pytest.mark.parametrize("family", zoo.FAMILIES)


def time(name: str) -> float:
    """When a node writes or reads: attention layers before the MLP after them."""
    node = name.split("<")[0].split(".")[0]
    if node in ("input", "logits"):
        return -1.0 if node == "input" else float("inf")
    return 2 * int(node[1:]) + (node[0] == "m")


@each_family
def test_the_edges_of_the_graph(family):
    given = case(family)
    graph = paths.Graph.of(given.model)
    assert sorted(graph.edges) == sorted(given.edges) and len(graph) == len(given.edges)
    readers, writers = [node.name for node in graph.readers], [node.name for node in graph.writers]
    assert readers == sorted(readers, key=time) and writers == sorted(writers, key=time)
    senders = {reader: [e.split("->")[0] for e in graph.edges if e.endswith(f"->{reader}")] for reader in readers}
    assert list(graph.edges) == [f"{u}->{v}" for v in readers for u in senders[v]]  # readers by time, then writers
    assert all(names == [w for w in writers if w in names] for names in senders.values())
    paths.check_additive(given.model, given.inputs("clean", "left"))


def test_the_count_of_a_gpt2_small_shaped_model():
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(
        vocab_size=20, n_positions=8, n_embd=24, n_layer=12, n_head=12, n_inner=8, bos_token_id=None, eos_token_id=None
    )
    graph = paths.Graph.of(ip.wrap(GPT2LMHeadModel(shape).eval()))
    assert (len(graph.writers), len(graph), len(graph.edges)) == (157, 32_491, 32_491)
    received = dict.fromkeys([*range(12), "logits"], 0)
    for edge in graph.edges:
        reader = edge.split("->")[1]
        received["logits" if reader == "logits" else int(reader[1:].split(".")[0])] += 1
    assert received == {layer: 49 + 481 * layer for layer in range(12)} | {"logits": 157}
    assert graph.edges[0].startswith("input->a0.h0<") and graph.edges[-1] == "m11->logits"


def test_a_model_that_the_graph_does_not_describe():
    """A block that does more than add to the residual is found out by the sum of its writers."""
    module = zoo.make("llama")
    model = ip.wrap(module)
    inputs = [model.inputs(case("llama").tokens[name]) for name in ("clean", "corrupt")]
    paths.check_additive(model, inputs[0])
    handle = module.model.layers[1].register_forward_hook(lambda module, args, out: 1.5 * out)
    with pytest.raises(ip.InterpError, match=r"(?i)sum|add"):
        paths.check_additive(model, inputs[0])
    with pytest.raises(ip.InterpError):
        paths.edge_sweep(model, *inputs, metric=METRIC)
    handle.remove()
    paths.check_additive(model, inputs[0])


# Positions


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (3, "not 3"), ("end", "'end'"), ([], "at least one"), ({}, "at least one"), ({"": 0}, "at least one"),
        ({"a@b": 0}, "'@'"), ([0, 0], "names of their own, got 0, 0"), ({1: 0, "1": 2}, "names of their own, got 1, 1"),
        ([True], "ints, not True"), ([0.5], "0.5"), ({"a": []}, "'a'"), ({"a": slice(0, 4, 2)}, "'a'"),
    ],
)  # fmt: skip
def test_positions_that_there_are_not(positions, message):
    with pytest.raises(PathError, match=message):
        paths.Graph.of(case("gpt2").model, positions=positions)


def test_positions_as_a_tensor_are_named_by_their_number():
    graph = paths.Graph.of(case("gpt2").model, positions=torch.tensor([0, 2]))
    assert graph.spans == (("0", 0), ("2", 2)) and graph.edge("input->m0@2").span == "2"
