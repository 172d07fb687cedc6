"""A pair is stated once, handed to every function, run once, and never silently of a model that has changed."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

import hooks
import interp as ip
from hooks.errors import InputsError, ModelError, PathError
from interp import paths
from tests import zoo
from tests.baking import COMPUTED, held
from tests.paths.cases import CLOSE, METRIC, case
from tests.turns import in_turn

GRAPH = paths.Graph.of(case("gpt2").model)
SOME = ["input->a0.h1<v>", "a0.h1->a1.h0<q>", "m0->logits"]
SCORES = np.random.default_rng(0).standard_normal(len(GRAPH))
CIRCUIT = paths.Circuit(GRAPH, np.random.default_rng(1).random(len(GRAPH)) < 0.6, SCORES)

# Each with what comes before the prompts, what comes after them, and options by name.
FUNCTIONS = {
    "edge_sweep": (paths.edge_sweep, (), (), {"metric": METRIC, "edges": SOME}),
    "frozen norms": (paths.edge_sweep, (), (), {"metric": METRIC, "edges": SOME, "norms": "frozen"}),
    "edge": (paths.path_patch, (), ("m0->logits",), {"metric": METRIC, "semantics": "edge"}),
    "set": (paths.path_patch, (), (SOME,), {"metric": METRIC, "semantics": "set"}),
    "frozen": (paths.path_patch, (), ("input->a0.h1<v>->m1->logits",), {"metric": METRIC, "semantics": "frozen"}),
    "eap": (paths.edge_scores, (), (), {"metric": METRIC}),
    "eap-ig": (paths.edge_scores, (), (), {"metric": METRIC, "method": "eap-ig", "steps": 2}),
    "receiver-exact": (paths.edge_scores, (), (), {"metric": METRIC, "method": "receiver-exact"}),
    "adaptive": (paths.edge_scores, (), (), {"metric": METRIC, "method": "adaptive", "top": 3, "sample": 3}),
    "divergence": (paths.edge_sweep, (), (), {"metric": ip.kl(), "edges": SOME}),
    "circuit_metric": (paths.circuit_metric, (CIRCUIT,), (), {"metric": METRIC}),
    "faithfulness": (paths.faithfulness, (), (SCORES, GRAPH), {"metric": METRIC, "sizes": (0.1, 0.5)}),
    "completeness": (paths.completeness, (CIRCUIT,), (), {"metric": METRIC, "subsets": 3}),
    "minimality": (paths.minimality, (CIRCUIT,), (), {"metric": METRIC}),
    "acdc": (paths.acdc, (), (), {"tau": 0.05, "graph": paths.Graph.of(case("gpt2").model, "blocks")}),
}
UNDIRECTED = ("circuit_metric", "faithfulness", "completeness", "minimality", "acdc")


def numbers(found) -> np.ndarray:
    """All numbers of what a function gives."""
    if isinstance(found, ip.Result):
        parts = [found.effect, found.base, *([] if found.source is None else [found.source])]
        return np.concatenate([np.ravel(part) for part in parts])
    if isinstance(found, paths.Circuit):
        return found.scores
    if isinstance(found, paths.Curve):
        return np.array([*found.faithfulness, found.cpr, found.cmd])
    if isinstance(found, dict):
        return np.concatenate([np.ravel(v) for name, v in found.items() if name != "subsets"])
    return np.ravel(found)


def of_pair(name: str, pair: paths.Pair) -> np.ndarray:
    fn, before, after, options = FUNCTIONS[name]
    return numbers(fn(pair, *before, *after, **options))


def spelled(name: str, model: ip.Model, *prompts, **more) -> np.ndarray:
    fn, before, after, options = FUNCTIONS[name]
    return numbers(fn(model, *before, *prompts, *after, **options, **more))


def pair_of(model: ip.Model, **options) -> paths.Pair:
    given = case("gpt2")
    clean, corrupt = (model.inputs(given.tokens[name]) for name in ("clean", "corrupt"))
    return paths.Pair.of(model, clean, corrupt, **options)


# One value in place of many arguments


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("direction", ["denoising", pytest.param("noising", marks=pytest.mark.full)])
def test_a_pair_stands_for_a_model_and_prompts(name, direction):
    """What takes a direction takes the pair's; circuits edit the clean run whatever that is."""
    model = case("gpt2").model
    pair = pair_of(model, direction=direction)
    told = {} if name in UNDIRECTED else {"direction": direction}
    expected = spelled(name, model, pair.clean, pair.corrupt, **told)
    np.testing.assert_allclose(of_pair(name, pair), expected, **CLOSE)
    np.testing.assert_allclose(of_pair(name, pair), expected, **CLOSE)  # and again, of what was kept
    assert np.nanmax(np.abs(expected)) > 1e-3


@pytest.mark.parametrize("values", ["zero", "mean", "resample"])
def test_a_pair_of_an_ablation(values):
    model = case("gpt2").model
    reference = None if values == "zero" else model.inputs([[3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4]])
    options = {"values": values, "reference": reference, "seed": 3}
    clean = case("gpt2").inputs("clean")
    pair = paths.Pair.of(model, clean, **options)
    for name in ("edge_sweep", "set", "eap", "circuit_metric", "faithfulness", "minimality"):
        expected = spelled(name, model, clean, None, **options)
        np.testing.assert_allclose(of_pair(name, pair), expected, **CLOSE)
        assert np.nanmax(np.abs(expected)) > 1e-3
    assert paths.edge_sweep(pair, metric=METRIC, edges=SOME).config["direction"] == "ablation"


def test_a_repair_by_a_pair_keeps_its_means(monkeypatch):
    given = case("gpt2")
    clean, reference = given.inputs("clean"), given.inputs("reference")
    measured = {"clean": (clean, METRIC)}
    pair = paths.Pair.of(given.model, clean, values="mean", reference=reference)
    expected = paths.repair(given.model, SOME, measured, reference=reference)
    with counted(monkeypatch) as runs:
        found = [paths.repair(pair, SOME, measured) for _ in range(2)]
        paths.edge_sweep(pair, metric=METRIC, edges=SOME)
    assert [run for run in runs if run is reference] == [reference]
    assert found[0].after == found[1].after == pytest.approx(expected.after, abs=1e-10)
    assert abs(expected.after["clean"] - expected.before["clean"]) > 1e-3
    for refuse in (paths.repair, paths.repair_plan):
        rest = (measured,) if refuse is paths.repair else ()
        with pytest.raises(InputsError, match="'mean' or 'zero', not 'patch'"):
            refuse(pair_of(given.model), SOME, *rest)
        with pytest.raises(PathError, match="values='zero', where the pair has 'mean'"):
            refuse(pair, SOME, *rest, values="zero")


def test_a_pair_is_frozen_and_another_is_made_of_it():
    pair = pair_of(case("gpt2").model)
    with pytest.raises(dataclasses.FrozenInstanceError):
        pair.direction = "noising"
    other = dataclasses.replace(pair, direction="noising")
    assert (other.direction, other.clean) == ("noising", pair.clean) and "denoising" in repr(pair)
    assert np.abs(of_pair("edge_sweep", other) - of_pair("edge_sweep", pair)).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"direction": "denoise"}, InputsError, "did you mean 'denoising'"),
        ({"values": "zeros"}, PathError, "did you mean 'zero'"),
        ({"values": "mean"}, InputsError, "reference="),
        ({"pooled": True}, InputsError, "pooled=True"),
        ({"corrupt": None}, InputsError, "corrupt"),
        ({"clean": [[1, 2]]}, InputsError, "clean is list"),
        ({"model": "gpt2"}, ModelError, "wrap"),
    ],
)
def test_pairs_that_there_are_not(options, error, message):
    given = case("gpt2")
    named = {"model": given.model, "clean": given.inputs("clean"), "corrupt": given.inputs("corrupt")} | options
    with pytest.raises(error, match=message):
        paths.Pair.of(named.pop("model"), named.pop("clean"), named.pop("corrupt"), **named)


def test_arguments_that_contradict_a_pair_are_named():
    given = case("gpt2")
    pair = pair_of(given.model, seed=2)
    clean = given.inputs("clean")
    for told, names in (
        ({"direction": "noising"}, ["direction='noising', where the pair has 'denoising'"]),
        ({"seed": 3, "values": "zero"}, ["seed=3", "values='zero'"]),
        ({"executor": "sequential", "budget": 10}, ["executor='sequential'", "budget=10"]),
        ({"clean": clean}, ["clean="]),
    ):
        with pytest.raises(PathError) as error:
            paths.edge_sweep(pair, metric=METRIC, edges=SOME, **told)
        assert all(name in str(error.value) for name in names)
    with pytest.raises(PathError, match=r"clean=.*corrupt="):
        paths.faithfulness(pair, clean, given.inputs("corrupt"), SCORES, GRAPH, metric=METRIC)
    with pytest.raises(PathError, match="corrupt=None"):
        paths.circuit_metric(pair, CIRCUIT, pair.clean, None, metric=METRIC)
    # What says the same as the pair contradicts nothing.
    same = {"direction": "denoising", "seed": 2, "budget": None}
    found = paths.edge_sweep(pair, pair.clean, pair.corrupt, metric=METRIC, edges=SOME, **same)
    named = paths.edge_sweep(pair=pair, metric=METRIC, edges=SOME)
    np.testing.assert_allclose(found.effect, named.effect, **CLOSE)
    with pytest.raises(TypeError):
        paths.faithfulness(pair, SCORES, GRAPH, metric=METRIC, direction="noising")


# Run once


class counted:
    """The inputs of all runs in which the residual stream is taken apart."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch, self.runs = monkeypatch, []

    def __enter__(self) -> list[ip.Inputs]:
        from interp.paths import streams as module

        real = module.streams

        def streams(model, world, *args, **kwargs):
            self.runs.append(getattr(world, "inputs", world))
            return real(model, world, *args, **kwargs)

        self.monkeypatch.setattr(module, "streams", streams)
        return self.runs

    def __exit__(self, *_) -> None:
        self.monkeypatch.undo()


def forwards(monkeypatch: pytest.MonkeyPatch, model: ip.Model, run: Callable[[], object]) -> int:
    """How many times the model itself is called; by its class, since a hook would be one of the user's."""
    kind, calls = type(model.module), [0]
    real = kind.forward

    @functools.wraps(real)
    def forward(self, *args, **kwargs):
        calls[0] += self is model.module
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(kind, "forward", forward)
        run()
    return calls[0]


THREE = ("eap", "edge_sweep", "faithfulness")


def test_scores_effects_and_faithfulness_run_the_prompts_once(monkeypatch):
    """The two runs, the additivity check, and the metric of the other run are of the pair, not of each analysis."""
    model = case("gpt2").model
    pair = pair_of(model, executor="batched")
    with counted(monkeypatch) as runs:
        first = {name: of_pair(name, pair) for name in THREE}
    assert sorted(map(id, runs)) == sorted(map(id, (pair.clean, pair.corrupt)))
    with counted(monkeypatch) as runs:
        again = {name: of_pair(name, pair) for name in THREE}
    assert runs == []
    for name in THREE:
        np.testing.assert_array_equal(first[name], again[name])

    def apart() -> None:
        for name in THREE:
            spelled(name, model, pair.clean, pair.corrupt, executor="batched")

    def together() -> None:
        one = dataclasses.replace(pair)
        for name in THREE:
            of_pair(name, one)

    # Of three analyses, two run both prompts again, and the second result measures the source again.
    assert forwards(monkeypatch, model, apart) - forwards(monkeypatch, model, together) == 5
    # The gradient is one call and the plain world none: nothing is left to run but the scores themselves.
    assert forwards(monkeypatch, model, lambda: of_pair("eap", pair)) == 1


def test_what_is_kept_of_a_metric_goes_with_it():
    """A metric made anew for every call leaves nothing behind, and the divergence that a search makes for itself."""
    pair = pair_of(case("gpt2").model)
    for _ in range(2):
        paths.edge_sweep(pair, metric=ip.kl(), edges=SOME[-1:])
        of_pair("acdc", pair)
    gc.collect()
    assert len(pair._kept.measured) == 0
    of_pair("edge_sweep", pair)
    assert list(pair._kept.measured) == [METRIC]


def test_prompts_that_are_padded_apart_are_laid_alike():
    given = case("gpt2")
    clean, corrupt = given.inputs("clean", "left"), given.inputs("corrupt", "right")
    pair, plain = (paths.Pair.of(given.model, *prompts) for prompts in ((clean, corrupt), given.pair()))
    for name in ("edge_sweep", "faithfulness", "eap"):
        np.testing.assert_allclose(of_pair(name, pair), of_pair(name, plain), **CLOSE)


# Never of another model


def louder(model: ip.Model) -> None:
    with torch.no_grad():
        model.module.transformer.h[0].mlp.c_proj.weight.mul_(1.5)


def louder_unseen(model: ip.Model) -> None:
    """A write that no version counter sees."""
    model.module.transformer.h[0].mlp.c_proj.weight.data.mul_(1.5)


def louder_by_numpy(model: ip.Model) -> None:
    model.module.transformer.h[0].mlp.c_proj.weight.detach().numpy()[:] *= 1.5


def loaded(model: ip.Model) -> None:
    state = model.module.state_dict()
    model.module.load_state_dict({name: value * (1.2 if "c_fc" in name else 1) for name, value in state.items()})


def replaced(model: ip.Model) -> None:
    layer = model.module.transformer.h[1].mlp
    layer.act = torch.nn.ReLU().eval()


def softer(model: ip.Model) -> None:
    model.module.transformer.ln_f.eps = 10.0


CHANGES = [louder, louder_unseen, louder_by_numpy, loaded, replaced, softer]


@pytest.mark.parametrize(("change", "name"), in_turn(CHANGES, ["edge_sweep", "eap", "minimality"]))
def test_a_model_that_changed_is_run_anew(change, name):
    model = ip.wrap(copy.deepcopy(zoo.make("gpt2")))
    pair = pair_of(model)
    before = of_pair(name, pair)
    change(model)
    found, expected = of_pair(name, pair), spelled(name, model, pair.clean, pair.corrupt)
    np.testing.assert_allclose(found, expected, **CLOSE)
    assert np.abs(found - before).max() > 1e-4


def test_a_plan_that_is_held_is_seen_and_then_forgotten():
    given = case("gpt2")
    pair = pair_of(given.model)
    for name in ("edge_sweep", "eap", "faithfulness"):
        plain = of_pair(name, pair)
        for scale in (None, 0.5):
            plan = held(COMPUTED) if scale is None else ip.Plan((ip.scale(ip.site("z", 0, head=1), scale),))
            with given.model.apply(plan):
                found, expected = of_pair(name, pair), spelled(name, given.model, pair.clean, pair.corrupt)
            np.testing.assert_allclose(found, expected, **CLOSE)
            assert np.abs(found - plain).max() > 1e-4
        np.testing.assert_allclose(of_pair(name, pair), plain, **CLOSE)


def test_hooks_of_the_users_own_are_seen():
    model = ip.wrap(copy.deepcopy(zoo.make("gpt2")))
    pair, by = pair_of(model), [1.0]
    plain = of_pair("edge_sweep", pair)
    handle = model.module.transformer.h[0].mlp.register_forward_hook(lambda module, args, out: out * by[0])
    for by[0] in (0.5, 2.0):
        found, expected = of_pair("edge_sweep", pair), spelled("edge_sweep", model, pair.clean, pair.corrupt)
        np.testing.assert_allclose(found, expected, **CLOSE)
        assert np.abs(found - plain).max() > 1e-4
    handle.remove()
    np.testing.assert_allclose(of_pair("edge_sweep", pair), plain, **CLOSE)


def test_a_model_that_is_trained_meanwhile_is_refused():
    model = ip.wrap(copy.deepcopy(zoo.make("gpt2")))
    pair = pair_of(model)
    of_pair("edge_sweep", pair)
    model.module.train()
    for name in ("edge_sweep", "eap", "faithfulness"):
        with pytest.raises(ModelError, match="training mode"):
            of_pair(name, pair)


def test_a_model_that_did_not_change_is_not_run_anew(monkeypatch):
    """Running it, moving its attributes about, and holding a plan for a while are no changes."""
    model = ip.wrap(copy.deepcopy(zoo.make("gpt2")))
    pair = pair_of(model)
    of_pair("edge_sweep", pair)
    model.run(pair.clean)
    ip.sweep(model, pair.clean, pair.corrupt, ip.grid("z", layer="all"), metric=METRIC)
    with model.apply(ip.zero("blocks.0.hook_mlp_out")):
        model.module(pair.clean.ids)
    with counted(monkeypatch) as runs:
        of_pair("edge_sweep", pair)
    assert runs == []


# One executor for every run


@pytest.fixture
def executors(monkeypatch) -> list[str]:
    """The executor that every call of `run_worlds` and `run_chunks` is asked for, wherever it stands."""
    asked: list[str] = []

    def noting(real):
        def run(*args, **kwargs):
            asked.append(kwargs.get("executor", "auto"))
            return real(*args, **kwargs)

        return run

    kinds = ("run_worlds", "run_chunks")
    reals = [getattr(hooks, kind) for kind in kinds]
    for name, module in list(sys.modules.items()):
        for kind in kinds if name.partition(".")[0] == "interp" else ():
            if getattr(module, kind, None) in reals:
                monkeypatch.setattr(module, kind, noting(getattr(module, kind)))
    return asked


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("executor", ["sequential", pytest.param("shared", marks=pytest.mark.full)])
def test_every_run_is_by_the_executor_that_is_asked_for(executors, name, executor):
    pair = pair_of(case("gpt2").model, executor=executor)
    found = of_pair(name, pair)
    assert set(executors) == {executor} and len(executors) >= 2
    np.testing.assert_allclose(found, of_pair(name, pair_of(case("gpt2").model)), **CLOSE)


def test_runs_of_references_and_of_query_heads_are_too(executors):
    given = case("llama")
    graph, told = paths.Graph.of(given.model, query_heads=True), {"metric": METRIC, "executor": "sequential"}
    paths.edge_sweep(given.model, *given.pair(), graph=graph, edges=["a0.h1->a1.h1<k>"], **told)
    reference = given.inputs("reference")
    ablated = {"values": "mean", "reference": reference}
    paths.edge_sweep(given.model, given.inputs("clean"), None, edges=SOME[2:], **ablated, **told)
    measured = {"divergence": (given.inputs("clean"), ip.kl(ip.World(given.inputs("corrupt"))))}
    paths.repair(given.model, SOME[2:], measured, reference=reference, executor="sequential")
    paths.check_additive(given.model, reference, executor="sequential")
    assert set(executors) == {"sequential"} and len(executors) > 8


def test_a_circuit_is_a_plan_on_the_clean_prompts():
    """Whatever the pair's direction, and of the model as it is now."""
    model = ip.wrap(copy.deepcopy(zoo.make("gpt2")))
    clean = pair_of(model).clean
    for direction in ("denoising", "noising"):
        pair = pair_of(model, direction=direction)
        for _ in range(2):
            expected = paths.circuit_metric(model, CIRCUIT, pair.clean, pair.corrupt, metric=METRIC)
            found = ip.evaluate(model, ip.World(pair.clean, CIRCUIT.plan(pair)), METRIC)
            np.testing.assert_allclose(found, expected, **CLOSE)
            assert np.abs(expected - ip.evaluate(model, clean, METRIC).numpy()).max() > 1e-3
            louder_unseen(model)
