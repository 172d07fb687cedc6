"""What path interventions refuse, and that the message says what was given, what was expected and what is nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp as ip
from hooks.errors import InputsError, MetricError, ModelError, PathError, ResultError, UnfiredError
from interp import paths
from tests import zoo
from tests.paths.cases import ANSWER, CLOSE, FOIL, METRIC, RAGGED, case, stop_after

SEMANTICS = {"edge": "a0.h0->m1", "set": ["a0.h0->m1"], "frozen": "a0.h0->m1->logits"}


def sweep(family: str = "gpt2", **options):
    given = case(family)
    return paths.edge_sweep(given.model, *given.pair(), **({"metric": METRIC} | options))


def patch(what, semantics: str, family: str = "gpt2", **options):
    given = case(family)
    return paths.path_patch(given.model, *given.pair(), what, semantics=semantics, **({"metric": METRIC} | options))


# Edges that there are not. Each pattern is the reader or writer at fault, and the nearest name where one is near.
WRONG_EDGES = [
    ("gpt2", "m1->a0.h0<q>", r"m1.*a0\.h0<q>|a0\.h0<q>.*m1"),
    ("gpt2", "a1.h0->a1.h1<q>", r"a1\.h0.*a1\.h1<q>|a1\.h1<q>.*a1\.h0"),
    ("gpt2", "m0->m0", "m0"),
    ("gpt2", "logits->m0", "logits"),
    ("gpt2", "a0.h0->input", "input"),
    ("gpt2", "a0.h0->logit", "did you mean 'logits'"),
    ("gpt2", "inputs->logits", "did you mean 'input'"),
    ("gpt2", "a0.h0->a1.h0<u>", r"a1\.h0<u>.*did you mean 'a1\.h0<[qkv]>'"),
    ("gpt2", "a0.h0->a1.h0", r"a1\.h0.*did you mean 'a1\.h0<[qkv]>'"),
    ("gpt2", "a0.h4->logits", r"a0\.h4"),
    ("gpt2", "input->a0.h4<q>", r"a0\.h4<q>"),
    ("gpt2", "input->a2.h0<q>", r"a2\.h0<q>"),
    ("gpt2", "m2->logits", "m2"),
    ("small_attn_only", "input->m0", "m0"),
    ("llama", "input->a0.h3<k>", r"a0\.h3<k>"),  # two key/value heads for four query heads
    ("gpt2", "input->m0@3", "input->m0@3"),  # a position, in a graph without them
    ("gpt2", "m0", "m0"),
    ("gpt2", "", "''"),
]


@pytest.mark.parametrize(("family", "edge", "message"), WRONG_EDGES)
def test_edges_that_are_not_in_the_graph(family, edge, message):
    given = case(family)
    for refuse in (
        lambda: patch(edge, "edge", family),
        lambda: patch([edge], "set", family),
        lambda: sweep(family, edges=[edge]),
        lambda: paths.Graph.of(given.model).edge(edge),
    ):
        with pytest.raises(ip.InterpError, match=message):
            refuse()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("input->a0.h1<v>->m1", "logits"),  # ends before them
        ("input->m0->a1.h0<v>", "logits"),
        ("input->a0.h1->logits", r"a0\.h1"),  # entered by which input?
        ("input->m1->a1.h0<v>->logits", r"m1.*a1\.h0<v>|a1\.h0<v>.*m1"),  # backwards
        ("input->logits->m1->logits", "logits"),
        ("input->a0.h1<u>->logits", r"a0\.h1<u>.*did you mean 'a0\.h1<[qkv]>'"),
        ("inputs->m0->logits", "did you mean 'input'"),
        ("input->a0.h7<v>->logits", r"a0\.h7"),
        ("logits", "logits"),
        ("", "''"),
    ],
)
def test_paths_that_there_are_not(path, message):
    with pytest.raises(ip.InterpError, match=message):
        patch(path, "frozen")


@pytest.mark.parametrize("options", [{"writers": ["a0.h9"]}, {"readers": ["a0.h9<q>"]}])
def test_nodes_that_there_are_not(options):
    (names,) = options.values()
    with pytest.raises(ip.InterpError, match=names[0].replace(".", r"\.")):
        sweep(**options)


@pytest.mark.parametrize("empty", [{"edges": []}, {"writers": []}, {"readers": []}])
def test_a_sweep_over_nothing(empty):
    with pytest.raises(ip.InterpError, match=r"(?i)no edge|empty|at least one"):
        sweep(**empty)


@pytest.mark.parametrize("what", [[], (), ("a0.h0", [])])
def test_an_empty_set_of_edges(what):
    with pytest.raises(ip.InterpError, match=r"(?i)no edge|empty|at least one|no receiver"):
        patch(what, "set")


def test_writers_that_reach_none_of_the_readers():
    with pytest.raises(ip.InterpError, match=r"(?i)no edge|empty|at least one"):
        sweep(writers=["m1"], readers=["a0.h0<q>"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": "pach"}, "'pach'.*did you mean 'patch'"),
        ({"values": "zeros"}, "'zeros'.*did you mean 'zero'"),
        ({"direction": "denoise"}, "'denoise'.*did you mean 'denoising'"),
        ({"norms": "freeze"}, "'freeze'.*did you mean 'frozen'"),
        ({"norms": "recomputed"}, "'recomputed'.*did you mean 'recompute'"),
    ],
)
def test_options_that_there_are_not(options, message):
    with pytest.raises(ip.InterpError, match=message):
        sweep(**options)
    for semantics, what in SEMANTICS.items():
        with pytest.raises(ip.InterpError, match=message):
            patch(what, semantics, **options)


def test_semantics_methods_and_granularities_that_there_are_not():
    given = case("gpt2")
    with pytest.raises(ip.InterpError, match=r"'sets'.*did you mean 'set'"):
        patch(["a0.h0->m1"], "sets")
    with pytest.raises(ip.InterpError, match=r"'freeze'.*did you mean 'frozen'"):
        patch("a0.h0->m1->logits", "freeze")
    with pytest.raises(ip.InterpError, match=r"'eap_ig'.*did you mean 'eap-ig'"):
        paths.edge_scores(given.model, *given.pair(), metric=METRIC, method="eap_ig")
    with pytest.raises(ip.InterpError, match=r"'head'.*did you mean 'heads'"):
        paths.Graph.of(given.model, granularity="head")


@pytest.mark.parametrize("values", ["mean", "resample"])
def test_values_that_need_a_reference(values):
    with pytest.raises(ip.InterpError, match="reference"):
        sweep(values=values)
    for semantics, what in SEMANTICS.items():
        with pytest.raises(ip.InterpError, match="reference"):
            patch(what, semantics, values=values)


def test_a_patch_without_the_other_prompts():
    given = case("gpt2")
    with pytest.raises(ip.InterpError, match="corrupt"):
        paths.edge_sweep(given.model, given.inputs("clean"), None, metric=METRIC)


def test_prompts_of_unequal_lengths():
    model = case("gpt2").model
    clean, corrupt = model.inputs([[1, 2, 3], [4, 5, 6]]), model.inputs([[1, 2, 3], [4, 5]])
    with pytest.raises(InputsError, match="pair 1 has 3 clean tokens and 2 corrupt ones"):
        paths.edge_sweep(model, clean, corrupt, metric=METRIC)
    for semantics, what in SEMANTICS.items():
        with pytest.raises(InputsError, match="pair 1 has 3 clean tokens and 2 corrupt ones"):
            paths.path_patch(model, clean, corrupt, what, semantics=semantics, metric=METRIC)
    with pytest.raises(InputsError, match="2 clean prompts and 1 corrupt"):
        paths.edge_sweep(model, clean, model.inputs([[1, 2, 3]]), metric=METRIC)


def test_a_metric_that_gives_one_number_for_many_rows():
    pooled = ip.metric(lambda logits: logits.mean(), ip.site("logits", pos=-1), name="pooled")
    with pytest.raises(MetricError, match=r"'pooled'.*one number a row"):
        sweep(metric=pooled)
    for semantics, what in SEMANTICS.items():
        with pytest.raises(MetricError, match=r"'pooled'.*one number a row"):
            patch(what, semantics, metric=pooled)


@pytest.mark.parametrize("span", [9, -8, [1, 9]])
def test_a_span_that_no_prompt_has(span):
    graph = paths.Graph.of(case("gpt2").model, positions={"far": span})
    with pytest.raises(ip.InterpError, match="far"):
        sweep(graph=graph)


def test_a_model_in_training_mode():
    model = ip.wrap(zoo.make("gpt2"))
    inputs = [model.inputs(case("gpt2").tokens[name]) for name in ("clean", "corrupt")]
    model.module.train()
    with pytest.raises(ModelError, match="training mode"):
        paths.edge_sweep(model, *inputs, metric=METRIC)
    for semantics, what in SEMANTICS.items():
        with pytest.raises(ModelError, match="training mode"):
            paths.path_patch(model, *inputs, what, semantics=semantics, metric=METRIC)


def test_a_graph_of_another_model():
    """A graph names the heads of the model that it was made of; one with other heads is refused."""
    graph = paths.Graph.of(case("llama").model)
    with pytest.raises(ip.InterpError, match="graph"):
        sweep("gpt2", graph=graph)


def test_masks_that_do_not_fit_the_graph():
    given = case("gpt2")
    with pytest.raises(ip.InterpError, match=str(len(given.edges))):
        paths.circuit_metric(given.model, torch.ones(2, 7, dtype=torch.bool), *given.pair(), metric=METRIC)


# Graphs


def test_what_is_no_model_and_no_graph():
    given = case("gpt2")
    for refuse in (
        lambda: paths.Graph.of(given.module),
        lambda: paths.edge_sweep(given.module, *given.pair(), metric=METRIC),
        lambda: paths.check_additive(given.module, given.inputs("clean")),
        lambda: paths.repair_plan(given.module, "input->m0", values="zero"),
    ):
        with pytest.raises(ModelError, match="GPT2LMHeadModel"):
            refuse()
    for semantics, what in SEMANTICS.items():
        with pytest.raises(PathError, match=r"Graph\.of\(model, \.\.\.\), not 'heads'"):
            patch(what, semantics, graph="heads")
    with pytest.raises(PathError, match="not 'heads'"):
        paths.edge_scores(given.model, *given.pair(), metric=METRIC, graph="heads")
    with pytest.raises(PathError, match="not 'heads'"):
        paths.acdc(given.model, *given.pair(), tau=0.1, graph="heads")


def test_a_graph_without_positions_and_a_name_that_asks_for_one():
    graph = paths.Graph.of(case("gpt2").model)
    with pytest.raises(PathError, match=r"'input->m0@'.*no positions"):
        graph.edge("input->m0@")
    assert graph.mask("input->m0").sum() == graph.mask(graph.edge("input->m0")).sum() == 1


@pytest.mark.parametrize("options", [{"edges": 3}, {"writers": 3}, {"readers": 3}])
def test_names_that_are_none(options):
    with pytest.raises(PathError, match="not 3"):
        sweep(**options)


# Sets and paths


def test_spans_that_share_tokens():
    """One by one their edges are measured; together, an edge would be replaced twice at a token that both have."""
    given = case("gpt2")
    graph = paths.Graph.of(given.model, positions={"start": [0, 1], "second": 1})
    assert sweep(graph=graph, edges=["m0->logits@start", "m0->m1@second"]).effect.shape == (2, 3)
    both = ["input->m0@start", "input->m0@second"]
    for refuse in (
        lambda: patch(both, "set", graph=graph),
        lambda: paths.circuit_metric(given.model, paths.Circuit.of(graph, []), *given.pair(), metric=METRIC),
    ):
        with pytest.raises(PathError, match="'start' and 'second' share tokens"):
            refuse()
    apart = ["input->m0@start", "m0->m1@second"]
    assert np.abs(patch(apart, "set", graph=graph).effect).max() > 1e-3


def test_a_path_has_no_positions():
    graph = paths.Graph.of(case("gpt2").model, positions=[0, 1])
    with pytest.raises(PathError, match="all positions"):
        patch("input->m0->logits", "frozen", graph=graph)


def test_receivers_that_share_a_key_value_head():
    """Named as nodes they have a reader in common, which is edited once."""
    heads = patch(("a0.h1", ["a1.h0", "a1.h1"]), "set", "llama")
    assert heads.config["what"] == [f"a0.h1->a1.{r}" for r in ("h0<q>", "h0<k>", "h0<v>", "h1<q>")]
    edges = patch(heads.config["what"], "set", "llama")
    np.testing.assert_allclose(heads.effect, edges.effect, **CLOSE)
    assert np.abs(edges.effect).max() > 1e-3


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_two_runs_that_are_the_same(semantics):
    given = case("gpt2")
    clean = given.inputs("clean")
    with pytest.raises(UnfiredError, match="between the two runs"):
        paths.path_patch(given.model, clean, clean, SEMANTICS[semantics], semantics=semantics, metric=METRIC)


@pytest.mark.parametrize(
    ("circuits", "message"),
    [("all", "not 'all'"), (None, "not None"), (["input->m0"], "not 'input->m0'"), (np.ones(110, int), "int64")],
)
def test_what_is_no_circuit(circuits, message):
    given = case("gpt2")
    with pytest.raises(PathError, match=message):
        paths.circuit_metric(given.model, circuits, *given.pair(), metric=METRIC)


# Values and metrics


@pytest.mark.parametrize("values", ["patch", "zero", "resample"])
def test_only_a_mean_is_pooled(values):
    reference = case("gpt2").inputs("reference") if values == "resample" else None
    with pytest.raises(InputsError, match="pooled=True"):
        sweep(values=values, reference=reference, pooled=True)


def test_values_that_are_no_counterparts_are_no_source():
    """A metric that compares with the source has none to compare with, in circuits as in sweeps."""
    given = case("gpt2")
    clean, long = given.inputs("clean"), given.model.inputs([[1, 2, 3, 4, 5, 6]] * 2)
    options = {"values": "resample", "reference": long, "metric": ip.kl()}
    half = paths.Circuit.of(paths.Graph.of(given.model), ["input->m0", "m0->logits"])
    for refuse in (
        lambda: paths.edge_sweep(given.model, clean, None, **options),
        lambda: paths.path_patch(given.model, clean, None, ["input->m0"], semantics="set", **options),
        lambda: paths.edge_scores(given.model, clean, None, **options),
        lambda: paths.circuit_metric(given.model, half, clean, None, **options),
        lambda: paths.minimality(given.model, half, clean, None, **options),
    ):
        with pytest.raises(MetricError, match="patches from nothing"):
            refuse()


def test_a_metric_that_reads_nothing():
    nothing = ip.Metric("nothing", lambda model, inputs: ip.metrics.Bound((), lambda rows: torch.zeros(3)))
    with pytest.raises(MetricError, match="'nothing' reads no site"):
        sweep(metric=nothing)


@pytest.mark.parametrize("method", ["eap", "eap-ig", "receiver-exact", "exact"])
def test_a_metric_that_is_nan(method):
    """A nan in a result says that the row lacks the cell, so a metric may not give one."""
    given = case("gpt2")
    scale = torch.tensor([1.0, float("nan"), 1.0])
    broken = ip.metric(lambda x: x[:, 0, 0] * scale[: len(x)], ip.site("logits", pos=-1), name="broken")
    with pytest.raises(MetricError, match=r"'broken' is nan on rows \[1\]"):
        paths.edge_scores(given.model, *given.pair(), metric=broken, method=method)


def test_a_gradient_that_is_nan():
    given = case("gpt2")
    flat = ip.metric(lambda x: (0 * x[:, 0, 0]).sqrt(), ip.site("logits", pos=-1), name="flat")
    with pytest.raises(MetricError, match=r"gradient of metric 'flat' is nan on rows \[0, 1, 2\]"):
        paths.edge_scores(given.model, *given.pair(), metric=flat)


CHANGED = {
    "norms": {"norms": "frozen"},
    "values": {"values": "zero"},
    "reference": {"values": "mean"},
    "pooled": {"values": "mean", "pooled": True},
    "another reference": {"values": "mean", "reference": "clean"},
    "direction": {"direction": "noising"},
    "seed": {"seed": 1},
    "executor": {"executor": "batched"},
    "metric": {"metric": ip.logit_diff(ANSWER, FOIL, pos=1)},
    "edges": {"edges": ["input->m0", "a0.h0->m1", "m0->m1"]},
    "graph": {"granularity": "blocks"},
    "clean": {"tokens": "reference"},
}


@pytest.mark.parametrize("changed", CHANGED)
def test_a_sweep_goes_on_where_nothing_has_changed_and_nowhere_else(tmp_path, changed, monkeypatch):
    """As it was left it goes on, and gives what it would have given; with any option changed it is refused."""
    given, path = case("gpt2"), tmp_path / "edges"

    def run(granularity="heads", tokens="corrupt", **options) -> ip.Result:
        names = ["input->m0", "a0.h0->m1", "m0->logits"] if granularity == "heads" else ["input->m0", "m0->logits"]
        told = {"metric": METRIC, "edges": names, "executor": "sequential", "path": path} | options
        if isinstance(told.get("reference"), str) or told.get("values") == "mean":
            told["reference"] = given.model.inputs([[3, 4, 5, 6, 7, 8], [9] * (6 + (told.get("reference") == "clean"))])
        graph = paths.Graph.of(given.model, granularity)
        corrupt = given.inputs("corrupt") if tokens == "corrupt" else given.model.inputs([[3] * n for n in RAGGED])
        return paths.edge_sweep(given.model, given.inputs("clean"), corrupt, graph=graph, **told)

    start = {"values": "mean"} if changed in ("pooled", "another reference") else {}
    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            run(**start)
    with pytest.raises(ResultError, match="belongs to another sweep"):
        run(**CHANGED[changed])
    found, whole = run(**start), run(**start, path=None)
    np.testing.assert_allclose(found.effect, whole.effect, **CLOSE)
    assert np.abs(whole.effect).max() > 1e-3


def test_a_sweep_does_not_go_on_from_one_that_compared_with_another_run(tmp_path):
    given, calls = case("gpt2"), []
    worlds = [ip.World(given.inputs(name)) for name in ("clean", "corrupt")]

    def stopped(reference: ip.World) -> ip.Metric:
        inner = ip.kl(reference)

        def bind(model, inputs):
            bound = inner.bind(model, inputs)

            def fn(rows, *values):
                calls.append(rows)
                if len(calls) == 20:
                    raise KeyboardInterrupt
                return bound.fn(rows, *values)

            return ip.metrics.Bound(bound.reads, fn)

        return ip.Metric("kl", bind, reference, inner.stated)

    with pytest.raises(KeyboardInterrupt):
        sweep(metric=stopped(worlds[0]), path=tmp_path / "edges", executor="sequential")
    with pytest.raises(ResultError, match="differs in metrics"):
        sweep(metric=stopped(worlds[1]), path=tmp_path / "edges", executor="sequential")
    again = sweep(metric=stopped(worlds[0]), path=tmp_path / "edges", executor="sequential")
    np.testing.assert_allclose(again.effect, sweep(metric=ip.kl(worlds[0])).effect, **CLOSE)
