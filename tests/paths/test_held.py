"""Paths measured while a plan is held: they are those of the network that has the plan in its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import pytest
import torch

import interp as ip
from hooks import Model
from hooks.plan.saving import fingerprint
from interp import paths
from interp.paths.streams import streams
from tests.baking import COMPUTED, WRITTEN, baked, held
from tests.paths.cases import CLOSE, DIRECTIONS, MEASURE, METRIC, case, stop_after
from tests.turns import pairs

FAMILIES = ("gpt2", "llama")
Measured = Callable[[Model], np.ndarray]


def as_baked(family: str, scales, measure: Measured) -> None:
    """What is measured under the plan is what is measured of the network with the plan in its weights."""
    model = case(family).model
    expected, plain = measure(baked(model, scales)), measure(model)
    with model.apply(held(scales)) as audit:
        found = measure(model)
        assert model.holds
    assert not model.holds
    np.testing.assert_allclose(found, expected, **CLOSE)
    assert np.nanmax(np.abs(expected - plain)) > 1e-3 and np.nanmax(np.abs(expected)) > 1e-3
    assert all(entry.calls for entry in audit)


def whole(result: ip.Result) -> np.ndarray:
    """All numbers of a result."""
    effect = result.effect.reshape(-1, len(result.rows))
    return np.concatenate([effect, result.base[None], *([] if result.source is None else [result.source[None]])])


@pytest.mark.parametrize(("family", "direction", "executor"), pairs(FAMILIES, DIRECTIONS, ["auto", "batched"]))
def test_sweeps_of_edges(family, direction, executor):
    pair = case(family).pair("left")
    options = {"metric": METRIC, "direction": direction, "executor": executor, "progress": False}
    as_baked(family, COMPUTED, lambda model: whole(paths.edge_sweep(model, *pair, **options)))


@pytest.mark.parametrize(("family", "values"), [("gpt2", "zero"), ("llama", "mean"), ("gpt2", "resample")])
def test_edges_that_are_ablated(family, values):
    given = case(family)
    reference = None if values == "zero" else case(family, (6, 6, 6)).inputs("reference")
    reference = reference if values != "resample" else given.model.inputs([[3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4]])
    options = {"metric": METRIC, "values": values, "reference": reference, "progress": False}
    as_baked(family, COMPUTED, lambda model: whole(paths.edge_sweep(model, given.inputs("clean"), None, **options)))


def test_query_heads_that_share_keys():
    pair = case("llama").pair()

    def measure(model: Model) -> np.ndarray:
        graph = paths.Graph.of(model, query_heads=True)
        edges = [e for e in graph.edges if "a1.h" in e.split("->")[1]]
        return whole(paths.edge_sweep(model, *pair, metric=METRIC, graph=graph, edges=edges, progress=False))

    as_baked("llama", COMPUTED, measure)


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_of_blocks_and_of_positions(family):
    pair = case(family).pair()
    for told in ({"granularity": "blocks"}, {"positions": {"first": 0, "last": -1}}):

        def measure(model: Model, told=told) -> np.ndarray:
            graph = paths.Graph.of(model, **told)
            return whole(paths.edge_sweep(model, *pair, metric=METRIC, graph=graph, progress=False))

        as_baked(family, COMPUTED, measure)


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_norms(family):
    pair = case(family).pair()
    options = {"metric": METRIC, "norms": "frozen", "progress": False}
    scales = {key: by for key, by in WRITTEN.items() if key[0] == "z"}
    as_baked(family, scales, lambda model: whole(paths.edge_sweep(model, *pair, **options)))
    model = case(family).model
    for plan in (held(WRITTEN), held(COMPUTED), ip.scale(ip.site("ln_final"), 2.0)):
        with model.apply(plan), pytest.raises(ip.InterpError, match="norms='recompute'"):
            paths.edge_sweep(model, *pair, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_sets_and_frozen_paths(family):
    pair = case(family).pair()
    some = ["input->a0.h1<v>", "a0.h1->a1.h0<q>", "a0.h0->a1.h1<k>", "m0->logits"]
    walks = ["input->a0.h0<v>->a1.h0<q>->logits", "a0.h1->m0->a1.h1<v>->m1->logits", "input->a1.h0<k>->logits"]

    def measure(model: Model) -> np.ndarray:
        given = {"metric": METRIC}
        found = [paths.path_patch(model, *pair, some, semantics="set", **given)]
        found += [paths.path_patch(model, *pair, walk, semantics="frozen", **given) for walk in walks]
        found.append(paths.path_patch(model, *pair, some[1], semantics="edge", **given))
        return np.concatenate([whole(each) for each in found])

    as_baked(family, COMPUTED, measure)


@pytest.mark.parametrize(
    ("family", "method"),
    [(family, m) for family in FAMILIES for m in ("eap", "eap-ig", "receiver-exact")]
    + [pytest.param("gpt2", method, marks=pytest.mark.full) for method in ("exact", "adaptive")],
)
def test_scores(family, method):
    pair = case(family).pair("left")
    alone = method in ("receiver-exact", "adaptive")
    scales = {key: by for key, by in WRITTEN.items() if key[0] == "z"} if alone else COMPUTED
    extra = {"top": 5, "sample": 5} if method == "adaptive" else {}
    for direction, budget in zip(DIRECTIONS, (None, 1) if family == "gpt2" else (1, None), strict=True):
        options = {"metric": METRIC, "method": method, "direction": direction, "progress": False, **extra}
        as_baked(
            family, scales, lambda model, o=options, b=budget: whole(paths.edge_scores(model, *pair, budget=b, **o))
        )


@pytest.mark.parametrize("scales", [WRITTEN, COMPUTED])
def test_exact_receivers_that_the_plan_edits(scales):
    given = case("gpt2")
    with given.model.apply(held(scales)), pytest.raises(ip.InterpError, match="'eap', 'eap-ig' or 'exact'"):
        paths.edge_scores(given.model, *given.pair(), metric=METRIC, method="receiver-exact")


@pytest.mark.parametrize("family", FAMILIES)
def test_first_order_scores_of_what_single_heads_read(family):
    """No weights have this plan in them: edges into the head are scored by the slope of their exact effects."""
    given = case(family)
    model, (clean, corrupt) = given.model, given.pair()
    head = ip.site("q_input", 1, head=0)
    draw = torch.Generator().manual_seed(0)
    plan = ip.steer(head, torch.randn(model.architecture.width, generator=draw, dtype=torch.float64))
    names = [e for e in paths.Graph.of(model).edges if e.endswith("->a1.h0<q>")]
    with model.apply(plan):
        scores = paths.edge_scores(model, clean, corrupt, metric=METRIC)
        exact = paths.edge_sweep(model, clean, corrupt, metric=METRIC, edges=names)
    other, base = (streams(model, x) for x in (clean, corrupt))
    writers = {w.name: w for w in paths.Graph.of(model).writers}
    for name in names:
        change = other.writer(writers[name.split("->")[0]]) - base.writer(writers[name.split("->")[0]])
        change = torch.where(corrupt.mask[..., None], change, 0)

        def moved(by: float, change=change) -> np.ndarray:
            stepped = ip.intervene(head, _plus(by * change, corrupt))
            return ip.evaluate(model, ip.World(corrupt, ip.Plan((plan, stepped))), METRIC).numpy()

        mine = exact.axes[0].values.index(name)
        np.testing.assert_allclose(exact.effect[mine], moved(1.0) - moved(0.0), **CLOSE)
        slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
        np.testing.assert_allclose(scores.effect[scores.axes[0].values.index(name)], slope, rtol=0, atol=1e-7)
    assert np.abs(exact.effect).max() > 1e-3


def _plus(change: torch.Tensor, inputs: ip.Inputs) -> Callable:
    cols = inputs.order
    ordered = change.gather(1, cols[..., None].expand(*cols.shape, change.shape[-1]))

    def plus(x: torch.Tensor, ctx: ip.Context) -> torch.Tensor:
        return x + ordered[ctx.window, : x.shape[1], None]

    return plus


@pytest.mark.parametrize("family", ["gpt2"])
def test_circuits_and_what_is_made_of_them(family):
    pair = case(family).pair()
    edges = paths.Graph.of(case(family).model).edges
    draw = np.random.default_rng(0)
    mask = draw.random((2, len(edges))) < 0.5
    scores = draw.standard_normal(len(edges))

    def measure(model: Model) -> np.ndarray:
        graph, given = paths.Graph.of(model), {"metric": METRIC}
        circuit = paths.Circuit(graph, mask[0], np.full(len(graph), np.nan))
        curve = paths.faithfulness(model, *pair, scores, graph, sizes=(0.2, 0.6), **given)
        complete = paths.completeness(model, circuit, *pair, subsets=3, **given)
        minimal = paths.minimality(model, circuit, *pair, **given)
        parts = [paths.circuit_metric(model, mask, *pair, **given).ravel(), curve.faithfulness]
        return np.concatenate([*parts, complete["circuit"], complete["model"], list(minimal.values())])

    as_baked(family, COMPUTED, measure)


@pytest.mark.full
@pytest.mark.parametrize("family", ["gpt2"])
def test_searches(family):
    pair = case(family).pair()

    def searched(model: Model) -> np.ndarray:
        return paths.acdc(model, *pair, tau=0.02, progress=False).scores

    def explained(model: Model) -> np.ndarray:
        result = paths.edge_sweep(model, *pair, metric=METRIC, progress=False)
        return paths.causal_graph(result, paths.Graph.of(model), q=1.0, share=0.1).members.astype(float)

    as_baked(family, COMPUTED, searched)
    as_baked(family, COMPUTED, explained)


@pytest.mark.parametrize("family", FAMILIES)
def test_repairs(family):
    given = case(family)
    edges = ["input->a0.h1<k>", "a0.h1->a1.h0<q>", "m0->logits"]
    measured = {"clean": (given.inputs("clean"), METRIC), "corrupt": (given.inputs("corrupt"), METRIC)}
    reference = given.inputs("reference")

    def measure(model: Model) -> np.ndarray:
        found = [paths.repair(model, edges, measured, values="zero")]
        found.append(paths.repair(model, edges, measured, reference=reference))
        return np.array([[*one.before.values(), *one.after.values()] for one in found])

    as_baked(family, COMPUTED, measure)


def test_a_repair_under_a_plan_of_single_rows():
    """The plan fits all of the prompts, and no part of them."""
    given = case("gpt2")
    inputs = given.inputs("clean")
    rows = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    plan = ip.zero(ip.site("z", 0, head=1)).strength(rows)
    measured = {"clean": (inputs, METRIC)}
    with given.model.apply(plan):
        found = paths.repair(given.model, ["m0->logits"], measured, values="zero")
    expected = ip.evaluate(given.model, ip.World(inputs, ip.Plan((plan,))), METRIC)
    assert found.before["clean"] == pytest.approx(expected.mean().item(), abs=1e-10)
    assert abs(found.after["clean"] - found.before["clean"]) > 1e-3


def test_a_plan_that_reads_other_runs():
    """Rows are run a few at a time, and each sees what its own row of the other run has."""
    given = case("gpt2")
    model, (clean, corrupt) = given.model, given.pair()
    plan = ip.patch(ip.site("z", 0, head=1), ip.World(clean)).strength(torch.tensor([0.2, 1.0, 0.7]).double())
    with model.apply(plan):
        small, large = (
            paths.edge_scores(model, corrupt, None, metric=METRIC, values="zero", budget=budget) for budget in (1, None)
        )
    np.testing.assert_allclose(small.effect, large.effect, **CLOSE)
    expected = ip.evaluate(model, ip.World(corrupt, ip.Plan((plan,))), METRIC)
    np.testing.assert_allclose(small.base, expected, **CLOSE)
    assert np.abs(small.effect).max() > 1e-3


def test_noise_that_is_held_is_one_draw():
    """The runs that a sweep compares have the noise of the sweep's own seed."""
    given = case("gpt2")
    model, pair = given.model, given.pair()
    plan = ip.Plan((ip.noise(ip.site("z", 0), 0.5),))
    graph = paths.Graph.of(model)
    with model.apply(plan):
        everything = paths.path_patch(model, *pair, graph.edges, semantics="set", metric=METRIC, seed=3)
        other = paths.path_patch(model, *pair, graph.edges, semantics="set", metric=METRIC, seed=4)
    np.testing.assert_allclose(everything.base + everything.effect, everything.source, **CLOSE)
    for inputs, measured in zip(pair, (everything.source, everything.base), strict=True):
        logits = model.run(ip.World(inputs, plan), seed=3).logits
        np.testing.assert_allclose(measured, MEASURE(logits, inputs.mask), **CLOSE)
    assert np.abs(everything.base - other.base).max() > 1e-3


def test_a_plan_of_the_stream_itself_is_refused():
    given = case("gpt2")
    for site in (ip.site("resid_mid", 0), ip.site("attn_in", 1), ip.site("resid_post", 1)):
        with given.model.apply(ip.scale(site, 0.5)), pytest.raises(ip.InterpError, match="under the plan that is held"):
            paths.edge_sweep(given.model, *given.pair(), metric=METRIC)


def test_a_plan_that_mixes_rows_is_refused_where_gradients_are_taken():
    given = case("gpt2")
    plan = ip.intervene(ip.site("z", 0), lambda x, ctx: x.flip(0), mixes=("row",))
    with given.model.apply(plan), pytest.raises(ip.InterpError, match="mixes rows"):
        paths.edge_scores(given.model, *given.pair(), metric=METRIC)


def repairs() -> list[Callable]:
    """Two that differ in nothing but the prompts whose means they put in."""
    given, edges = case("gpt2"), ["a0.h1->a1.h0<q>"]
    references = (given.inputs("reference"), given.inputs("clean"))
    return [paths.repair_plan(given.model, edges, reference=rows, pooled=True) for rows in references]


@pytest.mark.parametrize(
    ("one", "two"),
    [(held(COMPUTED), held(WRITTEN)), (held(COMPUTED), None), (None, held(WRITTEN))],
    ids=["another", "none any more", "none before"],
)
def test_a_sweep_does_not_go_on_under_another_plan(tmp_path, monkeypatch, one, two):
    given = case("gpt2")

    def sweep(plan, path=tmp_path / "edges") -> ip.Result:
        with contextlib.nullcontext() if plan is None else given.model.apply(plan):
            return paths.edge_sweep(
                given.model, *given.pair(), metric=METRIC, edges=given.edges[:6], path=path, executor="sequential"
            )

    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            sweep(one)
    with pytest.raises(ip.InterpError, match="differs in held"):
        sweep(two)
    np.testing.assert_allclose(sweep(one).effect, sweep(one, path=None).effect, **CLOSE)


def test_repairs_of_other_means_are_other_plans():
    inputs = case("gpt2").inputs("corrupt")
    one, two = (fingerprint(plan(inputs)) for plan in repairs())
    assert one != two and one == fingerprint(repairs()[0](inputs))


@pytest.mark.parametrize("budget", [0, -1, float("nan"), True, "1 GB"])
def test_budgets_that_are_no_number_of_bytes(budget):
    given = case("gpt2")
    model, (clean, corrupt) = given.model, given.pair()
    graph = paths.Graph.of(model)
    circuit = paths.Circuit.all(graph)
    told = {"metric": METRIC, "budget": budget}
    for run in (
        lambda: paths.edge_sweep(model, clean, corrupt, **told),
        lambda: paths.path_patch(model, clean, corrupt, ["m0->logits"], semantics="set", **told),
        lambda: paths.edge_scores(model, clean, corrupt, **told),
        lambda: paths.circuit_metric(model, circuit, clean, corrupt, **told),
        lambda: paths.faithfulness(model, clean, corrupt, np.ones(len(graph)), graph, **told),
        lambda: paths.acdc(model, clean, corrupt, tau=0.1, budget=budget),
        lambda: paths.repair(model, ["m0->logits"], {"x": (clean, METRIC)}, values="zero", budget=budget),
        lambda: paths.repair_plan(model, ["m0->logits"], reference=given.inputs("reference"), budget=budget),
    ):
        with pytest.raises(ip.InterpError, match="a memory budget is a positive number of bytes"):
            run()
