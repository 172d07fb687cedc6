"""Every edge, set and path of tiny models in float64 against an interpreter that runs them node by node."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
import torch

import interp as ip
from interp import paths
from tests import zoo
from tests.paths import networks, oracle
from tests.paths.cases import CLOSE, DIRECTIONS, MEASURE, METRIC, REFERENCE, agrees, case, kl
from tests.turns import in_turn, pairs

each_family = pytest.mark.parametrize("family", zoo.FAMILIES)
each_direction = pytest.mark.parametrize("direction", DIRECTIONS)
GROUPED = ["llama", "qwen3", "small_rms_rotary_gqa"]


def some(family: str, count: int = 12, seed: int = 0) -> list[str]:
    """A few edges of a family, one into the logits always among them."""
    edges = case(family).edges
    return [*random.Random(seed).sample(edges, count), "a0.h1->logits"]


@functools.cache
def every_edge(family: str, direction: str, lengths=(5, 3, 6), shared: int = 0) -> np.ndarray:
    """What the oracle says of every edge, [edge, row]."""
    given = case(family, lengths, shared)
    return given.edge_effects(given.edges, direction=direction)


# Edges


@pytest.mark.parametrize(("family", "direction", "padding"), pairs(zoo.FAMILIES, DIRECTIONS, ["left", "right"]))
def test_every_edge(family, direction, padding):
    given = case(family)
    clean, corrupt = given.pair(padding)
    result = paths.edge_sweep(given.model, clean, corrupt, metric=METRIC, direction=direction)
    expected = every_edge(family, direction)
    agrees(result, given.edges, expected)
    assert (np.abs(expected).max(1) > 1e-9).all()
    edited, other = ("corrupt", "clean") if direction == "denoising" else ("clean", "corrupt")
    np.testing.assert_allclose(result.base, given.measured(edited), **CLOSE)
    np.testing.assert_allclose(result.source, given.measured(other), **CLOSE)
    assert {"semantics", "values", "direction", "forward_equivalents"} <= set(result.config)
    assert (result.config["direction"], result.config["values"]) == (direction, "patch")


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "small_attn_only"])
@each_direction
def test_divergence_from_the_other_run(family, direction):
    """A metric that is not linear, reads every column of the logits, and compares with the other run."""
    given = case(family)
    other = given.prompts("clean" if direction == "denoising" else "corrupt")
    with torch.no_grad():
        measure = kl(oracle.forward(given.module, other).logits, other.mask)
    expected = given.edge_effects(given.edges, direction=direction, measure=measure)
    result = paths.edge_sweep(given.model, *given.pair(), metric=ip.kl(), direction=direction)
    agrees(result, given.edges, expected)


@pytest.mark.parametrize("family", ["gpt2", "mistral", "small_qk_norm"])
def test_a_metric_at_an_earlier_position(family):
    """Edges reach the positions that the metric reads and no other."""
    given = case(family, (6, 5, 6), 1)

    def measure(logits, mask):
        return logits[:, 2, 7] - logits[:, 2, 9]

    expected = given.edge_effects(given.edges, measure=measure)
    result = paths.edge_sweep(given.model, *given.pair(), metric=ip.logit_diff(7, 9, pos=2))
    agrees(result, given.edges, expected)


@pytest.mark.parametrize("family", ["gpt2", "mistral", "qwen3", "small_attn_only"])
@pytest.mark.parametrize(("shared", "direction"), [(2, "denoising"), (5, "noising")])
def test_prompts_that_start_alike(family, shared, direction):
    """Rows that differ from the same or from another position on, the last alone included."""
    lengths = (6, 7, 6)
    given = case(family, lengths, shared)
    padding = ("left", "right")[(zoo.FAMILIES.index(family) + shared) % 2]
    result = paths.edge_sweep(given.model, *given.pair(padding), metric=METRIC, direction=direction)
    agrees(result, given.edges, every_edge(family, direction, lengths, shared))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@each_direction
def test_ragged_prompts_that_differ_in_their_last_token_alone(family, direction):
    """Padded on the left they differ in one column, which is another position of each row."""
    given = case(family)
    clean = given.tokens["clean"]
    corrupt = [[*row[:-1], 1 + row[-1] % (zoo.VOCAB - 1)] for row in clean]
    left, right = (
        paths.edge_sweep(
            given.model,
            *(given.model.inputs(rows, padding=padding) for rows in (clean, corrupt)),
            metric=METRIC,
            direction=direction,
        )
        for padding in ("left", "right")
    )
    np.testing.assert_allclose(left.effect, right.effect, **CLOSE)
    assert (np.abs(left.effect).max(0) > 1e-3).all()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_clean_and_corrupt_padded_on_different_sides(family):
    """Position p is the p-th real token of its row, in both."""
    given = case(family)
    clean, corrupt = given.inputs("clean", "left"), given.inputs("corrupt", "right")
    result = paths.edge_sweep(given.model, clean, corrupt, metric=METRIC)
    agrees(result, given.edges, every_edge(family, "denoising"))


@pytest.mark.parametrize("family", ["gpt2", "llama", "small_qk_norm"])
def test_some_edges_are_those_of_all(family):
    given = case(family)
    every, clean_corrupt = every_edge(family, "denoising"), given.pair()
    chosen = some(family)
    into, out_of = ["a1.h0<q>", "a1.h1<k>", "logits"], ["input", "a0.h2"]
    for options, names in (
        ({"edges": chosen}, chosen),
        ({"readers": into}, [e for e in given.edges if e.split("->")[1] in into]),
        ({"writers": out_of}, [e for e in given.edges if e.split("->")[0] in out_of]),
        (
            {"writers": out_of, "readers": into},
            [e for e in given.edges if e.split("->")[0] in out_of and e.split("->")[1] in into],
        ),
    ):
        result = paths.edge_sweep(given.model, *clean_corrupt, metric=METRIC, **options)
        agrees(result, names, every[[given.edges.index(name) for name in names]])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("budget", [1, 40_000])
def test_memory_does_not_change_the_answer(family, budget):
    given = case(family)
    chosen = some(family)
    result = paths.edge_sweep(given.model, *given.pair("left"), metric=METRIC, edges=chosen, budget=budget)
    agrees(result, chosen, every_edge(family, "denoising")[[given.edges.index(name) for name in chosen]])


@pytest.mark.parametrize("family", GROUPED)
def test_keys_and_values_by_query_head(family):
    given = case(family)
    graph = paths.Graph.of(given.model, query_heads=True)
    names = oracle.edges(given.module, query_heads=True)
    assert sorted(graph.edges) == sorted(names) and len(names) > len(given.edges)
    result = paths.edge_sweep(given.model, *given.pair("left"), metric=METRIC, graph=graph)
    agrees(result, names, given.edge_effects(names, query_heads=True))


@pytest.mark.parametrize("family", ["gpt2", "llama", "small_attn_only"])
def test_edges_between_blocks(family):
    """A whole attention layer reads and writes as one node: all of its heads' edges at once."""
    given = case(family)
    graph = paths.Graph.of(given.model, granularity="blocks")
    layers, mlp = len(given.model.architecture.blocks), family != "small_attn_only"
    kinds = [f"{kind}{layer}" for layer in range(layers) for kind in (("a", "m") if mlp else ("a",))]
    assert [node.name for node in graph.writers] == ["input", *kinds]
    assert [node.name for node in graph.readers] == [*kinds, "logits"]
    names = [f"{u}->{v}" for i, v in enumerate([*kinds, "logits"]) for u in ["input", *kinds][: i + 1]]
    assert list(graph.edges) == names
    expected = np.stack([given.set_effect(oracle.block_edge(name, given.module)) for name in names])
    agrees(paths.edge_sweep(given.model, *given.pair("left"), metric=METRIC, graph=graph), names, expected)


# Positions


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@each_direction
def test_edges_at_every_position(family, direction):
    given = case(family, (5, 3, 4), 1)
    graph = paths.Graph.of(given.model, positions=range(5))
    chosen = [e for e in given.edges if e.split("->")[1] in ("a1.h0<q>", "a1.h1<k>", "a1.h0<v>", "m1", "logits")]
    names = [f"{name}@{p}" for name in chosen for p in range(5)]
    readers = sorted({e.split("->")[1] for e in chosen})
    result = paths.edge_sweep(
        given.model, *given.pair("left"), metric=METRIC, graph=graph, readers=readers, direction=direction
    )
    expected = given.edge_effects(names, direction=direction)
    assert np.isnan(expected[:, 1]).any() and not np.isnan(expected[:, 0]).any()
    agrees(result, names, expected)


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_edges_at_named_spans(family):
    given = case(family)
    spans = {"subject": 1, "rest": [0, 2], "end": -1}
    graph = paths.Graph.of(given.model, positions=spans)
    names = [f"{name}@{span}" for name in given.edges for span in spans]
    assert sorted(graph.edges) == sorted(names) and len(graph) == len(names)
    names = random.Random(0).sample(names, 60)
    result = paths.edge_sweep(given.model, *given.pair("left"), metric=METRIC, graph=graph, edges=names)
    agrees(result, names, given.edge_effects(names, spans=spans))


# What is written instead


@pytest.mark.parametrize("family", ["gpt2", "llama", "small_qk_norm"])
def test_edges_cut_to_zero(family):
    given = case(family)
    result = paths.edge_sweep(given.model, given.inputs("clean", "left"), None, metric=METRIC, values="zero")
    agrees(result, given.edges, given.edge_effects(given.edges, values="zero"))
    assert result.config["values"] == "zero"


@pytest.mark.parametrize(("family", "pooled", "padding"), pairs(["gpt2", "llama"], [False, True], ["left", "right"]))
def test_edges_at_their_mean(family, pooled, padding):
    given = case(family)
    result = paths.edge_sweep(
        given.model,
        given.inputs("clean"),
        None,
        metric=METRIC,
        values="mean",
        reference=given.inputs("reference", padding),
        pooled=pooled,
    )
    agrees(result, given.edges, given.edge_effects(given.edges, values="mean", pooled=pooled))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_edges_from_random_rows(family):
    """One donor a row, the same for every edge of it, and another seed draws others."""
    given = case(family, (4, 3, 4), 0)
    chosen = some(family, 6)
    rows = len(given.tokens["clean"])
    by_donor = [given.edge_effects(chosen, values="resample", donors=[donor] * rows) for donor in range(len(REFERENCE))]
    draws = set()
    for seed in range(6):
        result = paths.edge_sweep(
            given.model,
            given.inputs("clean"),
            None,
            metric=METRIC,
            edges=chosen,
            values="resample",
            reference=given.inputs("reference"),
            seed=seed,
        )
        found = result.effect[[result.axes[0].values.index(name) for name in chosen]]
        fits = [[np.abs(found[:, r] - d[:, r]).max() < 1e-10 for d in by_donor] for r in range(rows)]
        assert [sum(fit) for fit in fits] == [1] * rows
        draws.add(tuple(fit.index(True) for fit in fits))
    assert len(draws) > 1


@pytest.mark.parametrize("seed", range(2))
def test_a_row_has_one_donor_in_whatever_batch_it_stands(seed):
    """Alone, beside others, in another order and a few at a time: the donor is drawn by the row's id."""
    given = case("gpt2", (4, 3, 4, 2), 0)
    reference = given.inputs("reference")
    ids = torch.tensor([40, 7, -3, 2**40])

    def effect(rows: list[int], **options) -> np.ndarray:
        tokens = [given.tokens["clean"][row] for row in rows]
        inputs = given.model.inputs(tokens, row_ids=ids[rows])
        told = {"metric": METRIC, "values": "resample", "reference": reference, "seed": seed, "edges": given.edges[::9]}
        return paths.edge_sweep(given.model, inputs, None, **(told | options)).effect

    whole = effect([0, 1, 2, 3])
    assert np.abs(whole).max() > 1e-3 and np.abs(whole - effect([0, 1, 2, 3], seed=seed + 10)).max() > 1e-3
    for rows in ([2], [3, 1], [1, 0, 3, 2]):
        np.testing.assert_allclose(effect(rows), whole[:, rows], **CLOSE)
    for options in ({"budget": 1}, {"executor": "sequential"}):
        np.testing.assert_allclose(effect([0, 1, 2, 3], **options), whole, **CLOSE)


# Norms


@pytest.mark.parametrize(("family", "direction"), in_turn(["gpt2", "llama", "qwen3", "small_qk_norm"], DIRECTIONS))
def test_norms_held(family, direction):
    """The reader's norm keeps the scale of the unedited run; norms inside a head, of queries and keys, do not."""
    given = case(family)
    result = paths.edge_sweep(given.model, *given.pair("left"), metric=METRIC, direction=direction, norms="frozen")
    expected = given.edge_effects(given.edges, direction=direction, norms="frozen")
    agrees(result, given.edges, expected)
    assert np.abs(expected - every_edge(family, direction)).max() > 1e-3


# One edge, a set, a path


def agrees_once(result: ip.Result, expected: np.ndarray) -> None:
    assert result.axes == ()
    np.testing.assert_allclose(result.effect, expected, **CLOSE)


@pytest.mark.parametrize(("family", "direction"), in_turn(zoo.FAMILIES, DIRECTIONS))
def test_one_edge(family, direction):
    given = case(family)
    for edge in some(family, 3):
        result = paths.path_patch(
            given.model, *given.pair("left"), edge, semantics="edge", metric=METRIC, direction=direction
        )
        agrees_once(result, every_edge(family, direction)[given.edges.index(edge)])


@pytest.mark.parametrize(("family", "direction"), in_turn(zoo.FAMILIES, DIRECTIONS, start=1))
def test_sets_of_edges(family, direction):
    given = case(family)
    for size in (2, 9, len(given.edges) // 2):
        chosen = random.Random(size).sample(given.edges, size)
        result = paths.path_patch(
            given.model, *given.pair("left"), chosen, semantics="set", metric=METRIC, direction=direction
        )
        expected = given.set_effect(chosen, direction=direction)
        agrees_once(result, expected)
        assert np.abs(expected).max() > 1e-6


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "neox", "small_attn_only"])
def test_a_sender_through_its_receivers(family):
    given = case(family)
    receivers = ["a1.h0<q>", "a1.h1<k>", "a1.h1<v>", "logits"]
    result = paths.path_patch(given.model, *given.pair(), ("a0.h2", receivers), semantics="set", metric=METRIC)
    agrees_once(result, given.set_effect([f"a0.h2->{v}" for v in receivers]))
    with pytest.raises(ip.InterpError, match="live norms"):
        paths.path_patch(
            given.model, *given.pair(), ("a0.h2", receivers), semantics="set", metric=METRIC, norms="frozen"
        )


@each_family
@pytest.mark.parametrize("norms", ["recompute", "frozen"])
def test_paths(family, norms):
    given = case(family)
    largest = 0.0
    for i, path in enumerate(given.random_paths(4, seed=norms == "frozen"), start=zoo.FAMILIES.index(family)):
        direction, padding = DIRECTIONS[i % 2], ("left", "right")[i // 2 % 2]
        result = paths.path_patch(
            given.model,
            *given.pair(padding),
            path,
            semantics="frozen",
            metric=METRIC,
            direction=direction,
            norms=norms,
        )
        expected = given.path_effect(path, direction=direction, norms=norms)
        agrees_once(result, expected)
        largest = max(largest, np.abs(expected).max())
    assert largest > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("values", ["zero", "mean"])
def test_sets_and_paths_with_other_values(family, values):
    given = case(family)
    reference = given.inputs("reference") if values == "mean" else None
    options = {"metric": METRIC, "values": values, "reference": reference}
    for path in given.random_paths(2, seed=1):
        result = paths.path_patch(given.model, given.inputs("clean"), None, path, semantics="frozen", **options)
        agrees_once(result, given.path_effect(path, values=values))
    chosen = some(family, 20)
    result = paths.path_patch(given.model, given.inputs("clean"), None, chosen, semantics="set", **options)
    agrees_once(result, given.set_effect(chosen, values=values))


# Identities


@each_family
def test_all_edges_make_the_other_run_and_none_makes_this_one(family):
    given = case(family)
    clean, corrupt = given.pair("left")
    graph = paths.Graph.of(given.model)
    result = paths.path_patch(given.model, clean, corrupt, graph.edges, semantics="set", metric=METRIC)
    agrees_once(result, given.measured("clean") - given.measured("corrupt"))
    whole = paths.circuit_metric(given.model, paths.Circuit.all(graph), clean, corrupt, metric=METRIC)
    np.testing.assert_allclose(np.asarray(whole).ravel(), given.measured("clean"), **CLOSE)
    masks = torch.stack([torch.ones(len(graph)), torch.zeros(len(graph))]).bool()
    both = paths.circuit_metric(given.model, masks, clean, corrupt, metric=METRIC)
    np.testing.assert_allclose(both, np.stack([given.measured("clean"), given.measured("corrupt")]), **CLOSE)
    assert np.abs(given.measured("clean") - given.measured("corrupt")).max() > 0.1


@pytest.mark.parametrize("family", ["gpt2", "llama", "small_attn_only"])
def test_a_circuit_is_the_clean_run_with_all_else_patched(family):
    given = case(family)
    edges = paths.Graph.of(given.model).edges
    masks = torch.rand(3, len(edges), generator=torch.Generator().manual_seed(0)) < torch.tensor([[0.1], [0.5], [0.9]])
    found = paths.circuit_metric(given.model, masks, *given.pair(), metric=METRIC)
    outside = [[edge for edge, kept in zip(edges, mask, strict=True) if not kept] for mask in masks.tolist()]
    expected = [given.measured("clean") + given.set_effect(out, direction="noising") for out in outside]
    np.testing.assert_allclose(found, np.stack(expected), **CLOSE)
    assert np.ptp(np.stack(expected), 0).min() > 1e-3


@pytest.mark.parametrize("metric", [ip.logit(0), ip.logit(1)])
def test_effects_into_the_logits_of_a_linear_model_add_up(metric):
    """Attention-only, without norms, one token: the logits are a sum over writers."""
    model = ip.wrap(zoo.prepare(networks.linear_blocks()))
    clean, corrupt = model.inputs([[networks.UP]]), model.inputs([[networks.DOWN]])
    for direction in DIRECTIONS:
        result = paths.edge_sweep(model, clean, corrupt, metric=metric, direction=direction)
        into = [i for i, name in enumerate(result.axes[0].values) if name.endswith("->logits")]
        assert len(into) == 5
        np.testing.assert_allclose(result.effect[into].sum(0), result.source - result.base, **CLOSE)
        assert np.abs(result.effect[into]).min() > 1e-6


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_model_is_left_as_it_was(family):
    given = case(family)
    prompts = given.prompts("clean")
    with torch.no_grad():
        before = given.module(prompts.ids, attention_mask=prompts.mask).logits
    paths.edge_sweep(given.model, *given.pair(), metric=METRIC, edges=some(family))
    with torch.no_grad():
        assert torch.equal(given.module(prompts.ids, attention_mask=prompts.mask).logits, before)
    assert all(parameter.grad is None for parameter in given.module.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in given.module.modules())


def test_one_row_and_one_token():
    """The smallest prompts there are: a head attends to its own position, so queries and keys change nothing."""
    given = case("gpt2", (1,))
    result = paths.edge_sweep(given.model, *given.pair(), metric=METRIC)
    agrees(result, given.edges, given.edge_effects(given.edges))
    scores = [i for i, name in enumerate(result.axes[0].values) if name.endswith(("<q>", "<k>"))]
    assert np.abs(result.effect[scores]).max() < 1e-12


def test_the_measure_is_the_metric():
    """What the oracle measures is what the engine's metric measures, or nothing above would mean anything."""
    for family in zoo.FAMILIES:
        given = case(family)
        found = ip.evaluate(given.model, given.inputs("clean", "left"), METRIC)
        np.testing.assert_allclose(found, given.measured("clean", MEASURE), **CLOSE)
