"""Circuits as values: what they come to when they run, what they hold, and their files."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

import interp as ip
from interp import paths
from tests.paths import checks
from tests.paths.cases import CLOSE, MEASURE, METRIC, case
from tests.paths.oracle import edge_set, replaced

GROUP = {"gpt2": 1, "neox": 1, "small_attn_only": 1, "llama": 2, "gemma2": 2}


def graph_of(family: str, **options) -> paths.Graph:
    return paths.Graph.of(case(family).model, **options)


def drawn(graph: paths.Graph, share: float, seed: int = 0) -> paths.Circuit:
    """A circuit of random edges with random scores, some of them missing."""
    draw = np.random.default_rng(seed)
    scores = draw.standard_normal(len(graph))
    scores[draw.random(len(graph)) < 0.1] = np.nan
    return paths.Circuit(graph, draw.random(len(graph)) < share, scores, {"found by": "chance", "seed": seed})


# What they come to


@pytest.mark.parametrize("family", GROUP)
def test_a_circuit_is_the_clean_run_with_all_else_replaced(family):
    checks.circuits_run_as_written(case(family), graph_of(family))


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_circuit_between_blocks(family):
    checks.circuits_run_as_written(case(family), graph_of(family, granularity="blocks"))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_circuit_by_position(family):
    spans = {"first": 0, "some": [1, -1]}
    checks.circuits_run_as_written(case(family), graph_of(family, positions=spans), spans)


@pytest.mark.parametrize("values", ["zero", "mean"])
def test_a_circuit_with_other_values(values):
    given, circuit = case("gpt2"), drawn(graph_of("gpt2"), 0.5)
    reference = given.inputs("reference") if values == "mean" else None
    outside = [edge for edge in circuit.graph.edges if edge not in circuit]
    run = given.prompts("clean")
    for pooled in (False, True) if values == "mean" else (False,):
        found = paths.circuit_metric(
            given.model, circuit, given.inputs("clean"), None, metric=METRIC, values=values, reference=reference,
            pooled=pooled,
        )  # fmt: skip
        with torch.no_grad():
            copied = replaced(given.module, run, values, given.prompts("reference"), pooled=pooled)
            expected = MEASURE(edge_set(given.module, run, copied, outside), run.mask).numpy()
        np.testing.assert_allclose(found, expected, **CLOSE)
        assert np.abs(expected - given.measured("clean")).min() > 1e-3


def test_one_mask_is_one_circuit():
    given, circuit = case("gpt2"), drawn(graph_of("gpt2"), 0.5)
    found = paths.circuit_metric(given.model, circuit, *given.pair(), metric=METRIC)
    assert found.shape == (3,)
    for mask in (circuit.members, torch.tensor(circuit.members)):
        np.testing.assert_array_equal(paths.circuit_metric(given.model, mask, *given.pair(), metric=METRIC), found)
    several = paths.circuit_metric(given.model, circuit.members[None], *given.pair(), metric=METRIC)
    np.testing.assert_array_equal(several, found[None])


def test_circuits_of_another_model_are_refused():
    given = case("gpt2")
    with pytest.raises(ip.InterpError, match="another model"):
        paths.circuit_metric(given.model, drawn(graph_of("llama"), 0.5), *given.pair(), metric=METRIC)
    grouped = case("llama")
    circuit = drawn(graph_of("llama", query_heads=True), 0.5)
    with pytest.raises(ip.InterpError, match="query_heads=False"):
        paths.circuit_metric(grouped.model, circuit, *grouped.pair(), metric=METRIC)


# What they hold


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox"])
@pytest.mark.parametrize("share", [0.03, 0.1, 0.3])
def test_pruning(family, share):
    graph = graph_of(family)
    for seed in range(3):
        size = int(share * len(graph))
        edges = [*random.Random(seed).sample(graph.edges, size), "a2.h0->logits" if family == "llama" else "m1->logits"]
        checks.pruning_leaves_the_ways_through(graph, sorted(set(edges)), GROUP[family])


def test_pruning_keeps_members_scores_and_what_is_whole():
    graph = graph_of("llama")
    circuit = drawn(graph, 0.2)
    pruned = circuit.pruned()
    assert 0 < len(pruned) < len(circuit) and set(pruned.edges) < set(circuit.edges)
    np.testing.assert_array_equal(pruned.scores, circuit.scores)
    assert pruned.pruned() == pruned and pruned.config == circuit.config
    assert paths.Circuit.all(graph).pruned() == paths.Circuit.all(graph)
    assert len(paths.Circuit.of(graph, ["input->m0", "m0->a1.h0<q>"]).pruned()) == 0


def test_pruning_changes_nothing_that_the_circuit_does():
    given = case("llama")
    circuit = drawn(graph_of("llama"), 0.3)
    found = paths.circuit_metric(given.model, [circuit, circuit.pruned()], *given.pair(), metric=METRIC)
    # A dangling end is read by nobody; a node without inputs writes what it does in the other run.
    np.testing.assert_allclose(found[0], found[1], **CLOSE)
    assert len(circuit.pruned()) < len(circuit)
    assert np.abs(found[0] - given.measured("corrupt")).max() > 1e-3


def test_nodes_are_those_that_edges_touch_in_order():
    circuit = paths.Circuit.of(graph_of("gpt2"), ["m0->logits", "a0.h3->m0", "input->a0.h3<v>", "a0.h1->a1.h0<k>"])
    assert circuit.nodes == ("input", "a0.h1", "a0.h3", "m0", "a1.h0", "logits")
    assert paths.Circuit.of(graph_of("gpt2"), []).nodes == ()


def test_a_shared_key_belongs_to_the_heads_that_read_it():
    """Two query heads to a key/value head: keys of head 1 are read by query heads 2 and 3, and by no head 1."""
    graph = graph_of("llama")
    edge = "input->a0.h1<k>"
    assert paths.Circuit.of(graph, [edge]).nodes == ("input", "a0.h2", "a0.h3")
    assert paths.Circuit.of(graph, [edge, "a0.h3->logits"]).nodes == ("input", "a0.h3", "logits")
    assert paths.Circuit.of(graph, [edge, "input->a0.h1<q>"]).nodes == ("input", "a0.h1", "a0.h2", "a0.h3")
    assert {r.name for r in graph.readers_of("a0.h3")} == {"a0.h3<q>", "a0.h1<k>", "a0.h1<v>"}
    assert {r.name for r in graph.readers_of("a0.h1")} == {"a0.h1<q>", "a0.h0<k>", "a0.h0<v>"}
    whole = paths.Circuit.all(graph)
    left = whole.without(node="a0.h1")
    assert edge in left and "input->a0.h0<k>" in left  # others read those
    assert "input->a0.h1<q>" not in left and not any(e.startswith("a0.h1->") for e in left.edges)


def test_taking_out_a_query_head_leaves_its_neighbours():
    """The model without a query head's own edges is the one in which nothing reads what it writes."""
    given, graph = case("llama"), graph_of("llama")
    whole = paths.Circuit.all(graph)
    unread = whole.without(edges=[edge for edge in graph.edges if edge.startswith("a0.h1->")])
    found = paths.circuit_metric(given.model, [whole.without(node="a0.h1"), unread], *given.pair(), metric=METRIC)
    np.testing.assert_allclose(found[0], found[1], **CLOSE)
    assert np.abs(found[0] - given.measured("clean")).max() > 1e-3


def test_without():
    circuit = paths.Circuit.all(graph_of("gpt2"))
    less = circuit.without(["input->m0", "a0.h1->logits"])
    assert set(circuit.edges) - set(less.edges) == {"input->m0", "a0.h1->logits"}
    lone = circuit.without(node="a1.h2")
    gone = set(circuit.edges) - set(lone.edges)
    assert gone == {e for e in circuit.edges if e.split("->")[0] == "a1.h2" or "->a1.h2<" in e} and len(gone) == 20
    assert "m1" not in circuit.without(node="m1").nodes and "logits" not in circuit.without(node="logits").nodes
    for refused in ({"node": "a1.h9"}, {"node": "logit"}, {"edges": ["m1->m0"]}):
        with pytest.raises(ip.InterpError):
            circuit.without(**refused)


def test_compare():
    graph = graph_of("gpt2")
    one, two = (paths.Circuit.of(graph, edges) for edges in (["input->m0", "m0->logits"], ["input->m0", "m0->m1"]))
    assert one.compare(two) == {
        "common": ("input->m0",), "only_first": ("m0->logits",), "only_second": ("m0->m1",), "jaccard": 1 / 3,
    }  # fmt: skip
    nothing = paths.Circuit.of(graph, [])
    assert nothing.compare(nothing)["jaccard"] == 1.0 and nothing.compare(one)["jaccard"] == 0.0
    with pytest.raises(ip.InterpError, match="different graphs"):
        one.compare(drawn(graph_of("llama"), 0.1))


def test_circuits_are_values():
    graph = graph_of("gpt2")
    members, scores, config = np.zeros(len(graph), bool), np.zeros(len(graph)), {"k": 1}
    circuit = paths.Circuit(graph, members, scores, config)
    members[0], scores[0], config["k"] = True, 5.0, 2
    assert len(circuit) == 0 and circuit.scores[0] == 0.0 and circuit.config == {"k": 1}
    for array in (circuit.members, circuit.scores):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(AttributeError):
        circuit.members = members
    same, other = paths.Circuit.of(graph_of("gpt2"), []), paths.Circuit.of(graph, ["input->m0"])
    assert circuit == same and hash(circuit) == hash(same) and circuit != other and circuit != "circuit"
    assert len({circuit, same, other}) == 2
    assert "input->m0" in other and "m0->m1" not in other and len(other) == 1
    assert repr(other) == "Circuit(1 of 110 edges, 2 nodes)"
    with pytest.raises(ip.InterpError, match="a9"):
        _ = "a9.h0->m1" in other


@pytest.mark.parametrize(
    ("members", "scores"),
    [(np.zeros(7, bool), np.zeros(110)), (np.zeros(110, bool), np.zeros(7)), (np.zeros(110), np.zeros(110))],
)
def test_arrays_of_another_size_or_kind_are_refused(members, scores):
    with pytest.raises(ip.InterpError, match="110"):
        paths.Circuit(graph_of("gpt2"), members, scores)


def test_scores_of_other_edges_are_refused():
    given, graph = case("gpt2"), graph_of("gpt2")
    some = paths.edge_sweep(given.model, *given.pair(), metric=METRIC, edges=["input->m0", "m0->logits"])
    with pytest.raises(ip.InterpError, match="2 edges, the graph has 110"):
        paths.Circuit.of(graph, ["input->m0"], some)
    with pytest.raises(ip.InterpError, match="110"):
        paths.auroc(np.zeros(7), paths.Circuit.of(graph, ["input->m0"]))
    with pytest.raises(ip.InterpError, match="one axis"):
        paths.Circuit.of(graph, ["input->m0"], some.sel(edge="input->m0"))


def test_scores_in_another_order_are_put_in_the_graphs():
    given, graph = case("gpt2"), graph_of("gpt2")
    order = random.Random(0).sample(graph.edges, len(graph))
    shuffled = paths.edge_sweep(given.model, *given.pair(), metric=METRIC, edges=order)
    straight = paths.edge_sweep(given.model, *given.pair(), metric=METRIC)
    assert shuffled.axes[0].values == tuple(order)
    found = paths.Circuit.of(graph, ["input->m0"], shuffled)
    np.testing.assert_allclose(found.scores, straight.mean(), **CLOSE)


# Files

SPANS = {"one": 3, "several": [0, -1], "from": ip.Span(2, None), "slice": slice(None, -1)}


@pytest.mark.parametrize("options", [{}, {"granularity": "blocks"}, {"query_heads": True}, {"positions": SPANS}])
@pytest.mark.parametrize("name", ["circuit", "circuit.json", "tau0.05"])
def test_a_saved_circuit_comes_back(tmp_path, options, name):
    circuit = drawn(graph_of("llama", **options), 0.3)
    assert np.isnan(circuit.scores).any()
    written = circuit.save(tmp_path / "new" / name)
    assert written.name == name.removesuffix(".json") + ".json"
    found = paths.Circuit.load(tmp_path / "new" / name)
    assert found == circuit and found.graph == circuit.graph and found.config == circuit.config
    np.testing.assert_array_equal(found.scores, circuit.scores)
    assert [file.name for file in written.parent.iterdir()] == [written.name]


def test_a_circuit_with_positions_runs_after_it_came_back(tmp_path):
    given = case("gpt2")
    apart = {"one": 0, "several": [1], "slice": slice(2, 3), "from": ip.Span(3, None)}
    circuit = drawn(graph_of("gpt2", positions=apart), 0.5)
    again = paths.Circuit.load(circuit.save(tmp_path / "circuit"))
    found = paths.circuit_metric(given.model, [circuit, again], *given.pair(), metric=METRIC)
    np.testing.assert_array_equal(found[0], found[1])


def test_what_cannot_be_saved_leaves_the_file_as_it_was(tmp_path):
    graph = graph_of("gpt2")
    target = paths.Circuit.of(graph, ["input->m0"]).save(tmp_path / "circuit")
    before = target.read_text()
    rows = graph_of("gpt2", positions={"here": torch.tensor([1, 2, 0])})
    for circuit, message in (
        (paths.Circuit.all(rows), "'here'"),
        (paths.Circuit.of(graph, [], config={"k": np.int64(3)}), "JSON"),
        (paths.Circuit.of(graph, [], np.full(len(graph), np.inf)), "JSON"),
    ):
        with pytest.raises(ip.InterpError, match=message):
            circuit.save(target)
    assert target.read_text() == before and len(list(tmp_path.iterdir())) == 1


def damage(data: dict, *keys, value) -> dict:
    """The data with one entry replaced, or left out where the value is ...."""
    copy = json.loads(json.dumps(data))
    place = copy
    for key in keys[:-1]:
        place = place[key]
    if value is ...:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    return copy


DAMAGES = [
    (("format",), "interp circuit 9"), (("graph",), ...), (("graph",), [1]), (("graph", "heads"), "ab"),
    (("graph", "heads"), [4, 4, 4]), (("graph", "heads"), [4, "4"]), (("graph", "groups"), [1, 0]),
    (("graph", "mlps"), [True]), (("graph", "granularity"), "neurons"), (("graph", "parallel"), "no"),
    (("graph", "query_heads"), 0), (("graph", "spans"), [["a", 1]]), (("graph", "spans"), 3),
    (("graph", "width"), None), (("edges",), {}), (("edges", 0, "name"), "input->m9"), (("edges", 0), "input->m0"),
    (("edges", 0), ...), (("edges", 3, "in"), 1), (("edges", 3, "in"), ...), (("edges", 3, "score"), "much"),
    (("edges", 3, "score"), True), (("config",), [1]), (("config",), ...),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "value"), DAMAGES)
def test_a_damaged_file_is_refused(tmp_path, keys, value):
    target = drawn(graph_of("gpt2"), 0.3).save(tmp_path / "circuit")
    target.write_text(json.dumps(damage(json.loads(target.read_text()), *keys, value=value)))
    with pytest.raises(ip.InterpError, match="circuit"):
        paths.Circuit.load(target)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"format": "interp circuit 1"}'])
def test_what_is_no_circuit_is_refused(tmp_path, text):
    target = tmp_path / "circuit.json"
    target.write_text(text)
    for read in (paths.Circuit.load, paths.from_eap_ig):
        with pytest.raises(ip.InterpError, match=r"circuit\.json"):
            read(target)


def test_a_file_that_is_not_there():
    with pytest.raises(FileNotFoundError):
        paths.Circuit.load("nowhere")


# The form of the EAP-IG code


@pytest.mark.parametrize(("family", "options"), [("gpt2", {}), ("neox", {}), ("llama", {"query_heads": True})])
def test_the_form_of_the_eap_ig_code(tmp_path, family, options):
    circuit = drawn(graph_of(family, **options), 0.3).pruned()
    target = paths.to_eap_ig(circuit, tmp_path / "graph.json")
    data = json.loads(target.read_text())
    assert set(data) == {"cfg", "nodes", "edges"}
    graph = circuit.graph
    assert data["cfg"] == {
        "n_layers": graph.layers, "n_heads": 4, "parallel_attn_mlp": family == "neox", "d_model": graph.width
    }  # fmt: skip
    assert {name for name, node in data["nodes"].items() if node["in_graph"]} == set(circuit.nodes)
    assert list(data["nodes"]) == [*(w.name for w in graph.writers), "logits"]
    assert all(type(edge["score"]) is float and type(edge["in_graph"]) is bool for edge in data["edges"].values())
    found = paths.from_eap_ig(target)
    assert found.edges == circuit.edges and found.graph.edges == graph.edges
    np.testing.assert_array_equal(found.scores, np.nan_to_num(circuit.scores))


def handwritten() -> dict:
    """One layer of two heads, with a circuit by its second head."""
    inside = {"input->a0.h1<v>": 0.5, "a0.h1->m0": -0.25, "m0->logits": 2}
    outside = [f"input->a0.h{h}<{c}>" for h in (0, 1) for c in "qkv" if (h, c) != (1, "v")]
    outside += ["input->m0", "a0.h0->m0", "input->logits", "a0.h0->logits", "a0.h1->logits"]
    return {
        "cfg": {"n_layers": 1, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8},
        "nodes": {name: {"in_graph": name != "a0.h0"} for name in ("input", "a0.h0", "a0.h1", "m0", "logits")},
        "edges": {name: {"score": score, "in_graph": True} for name, score in inside.items()}
        | {name: {"score": 0.125, "in_graph": False} for name in outside},
    }


def test_a_file_in_the_form_of_the_eap_ig_code(tmp_path):
    target = tmp_path / "graph.json"
    target.write_text(json.dumps(handwritten()))
    found = paths.from_eap_ig(target)
    assert found.edges == ("input->a0.h1<v>", "a0.h1->m0", "m0->logits")
    assert found.nodes == ("input", "a0.h1", "m0", "logits")
    score = dict(zip(found.graph.edges, found.scores, strict=True))
    assert [score[edge] for edge in found.edges] == [0.5, -0.25, 2.0] and score["input->m0"] == 0.125
    assert (found.graph.heads, found.graph.width, found.graph.parallel) == ((2,), 8, False)
    again = json.loads(paths.to_eap_ig(found, tmp_path / "again.json").read_text())
    assert again == handwritten()


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("cfg",), ...), (("cfg", "n_layers"), "1"), (("cfg", "parallel_attn_mlp"), ...), (("cfg", "n_heads"), 1),
        (("edges", "m0->logits"), 3), (("edges", "m0->logits", "score"), "high"), (("edges", "m0->a0.h0<q>"), {}),
        (("edges", "m0->logits", "in_graph"), "yes"), (("edges",), [1]),
    ],
)  # fmt: skip
def test_damage_in_the_form_of_the_eap_ig_code(tmp_path, keys, value):
    target = tmp_path / "graph.json"
    target.write_text(json.dumps(damage(handwritten(), *keys, value=value)))
    with pytest.raises(ip.InterpError, match=r"graph\.json"):
        paths.from_eap_ig(target)


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("small_attn_only", {}), ("gpt2", {"granularity": "blocks"}), ("gpt2", {"positions": [0, 1]})],
)
def test_graphs_that_the_eap_ig_form_cannot_hold(tmp_path, family, options):
    with pytest.raises(ip.InterpError, match="EAP-IG form"):
        paths.to_eap_ig(paths.Circuit.all(graph_of(family, **options)), tmp_path / "graph.json")
    assert not list(tmp_path.iterdir())
