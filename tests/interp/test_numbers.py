"""What is no number is an error that names the metric, the rows and the cell; what is infinite is said to be."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

import interp as ip
from hooks.errors import MetricError, ModelError
from tests import zoo

NAN, INF = float("nan"), float("inf")
GRID = ip.grid("z", layer="all", head="all")
LAST = ip.site("logits", pos=-1)


@pytest.fixture(scope="module")
def model() -> ip.Model:
    return ip.wrap(zoo.make("llama"))


@pytest.fixture(scope="module")
def pair(model) -> tuple[ip.Inputs, ip.Inputs]:
    generator = torch.Generator().manual_seed(0)
    return tuple(model.inputs(torch.randint(1, zoo.VOCAB, (3, 6), generator=generator)) for _ in range(2))  # type: ignore[return-value]


def only_row(row: int, value: float = NAN) -> ip.Metric:
    """A metric that is a number on every row but one, whatever rows it is given at a time."""

    def fn(logits: Tensor) -> Tensor:
        return torch.where(torch.isclose(logits[:, 0, 0], marks[row]), value, logits[:, 0, 5])

    marks: list[Tensor] = []

    def bound(model: ip.Model, inputs: ip.Inputs) -> ip.metrics.Bound:
        marks[:] = list(model.run(inputs).logits[:, -1, 0])
        return ip.metrics.Bound((LAST,), lambda rows, x: fn(x))

    return ip.Metric("broken", bound)


@pytest.mark.parametrize("executor", ["sequential", "batched", "shared"])
@pytest.mark.parametrize("budget", [None, 1], ids=["all rows", "row by row"])
def test_a_metric_that_is_nan_on_a_row_of_the_base(model, pair, executor, budget):
    with pytest.raises(MetricError, match=r"'broken' is nan on rows \[1\] of the unedited run"):
        ip.sweep(model, pair[0], None, GRID, metric=only_row(1), intervention=ip.zero, executor=executor, budget=budget)


def test_in_every_analysis(model, pair):
    clean, corrupt = pair
    broken = ip.metric(lambda x: x[:, 0, 5] * NAN, LAST, name="broken")
    for run in (
        lambda: ip.evaluate(model, clean, broken),
        lambda: ip.sweep(model, clean, corrupt, GRID, metric=[ip.logit(3), broken]),
        lambda: ip.attribution(model, clean, corrupt, GRID, metric=broken),
        lambda: ip.logit_lens(model, clean, broken),
        lambda: ip.paths.edge_sweep(model, clean, corrupt, metric=broken),
        lambda: ip.paths.path_patch(model, clean, corrupt, "input->logits", semantics="frozen", metric=broken),
        lambda: ip.paths.circuit_metric(
            model, ip.paths.Circuit.all(ip.paths.Graph.of(model)), clean, corrupt, metric=broken
        ),
    ):
        with pytest.raises(MetricError, match=r"'broken' is nan on rows \[0, 1, 2\]"):
            run()


def test_a_cell_of_a_sweep_is_named(model, pair):
    def steering(site: ip.Site) -> ip.Intervention:
        return ip.steer(site, torch.full((24,), NAN if site.layer == 1 else 1.0, dtype=torch.float64))

    grid = ip.grid("resid_pre", layer="all", pos=[2, -1])
    with pytest.raises(MetricError, match=r"'logit' is nan on rows \[0, 1, 2\] in the cell layer=1, pos=2"):
        ip.sweep(model, pair[0], None, grid, metric=ip.logit(5), intervention=steering)
    with pytest.raises(MetricError, match=r"'logit' in the cell layer=1, pos=2 is nan on rows \[0, 1, 2\]"):
        ip.attribution(model, pair[0], None, grid, metric=ip.logit(5), intervention=steering)


def test_a_cell_that_some_rows_lack_is_still_such_a_cell(model):
    inputs = model.inputs([[1, 2, 3, 4], [5, 6]])
    result = ip.sweep(
        model, inputs, None, ip.grid("resid_pre", layer=0, pos="all"), metric=ip.logit(5), intervention=ip.zero
    )
    assert np.isnan(result.effect[2:, 1]).all() and np.isfinite(result.effect[:, 0]).all()
    assert result.counts().tolist() == [2, 2, 1, 1]
    with pytest.raises(MetricError, match=r"rows \[0\] in the cell layer=0, pos=3"):
        ip.sweep(
            model,
            inputs,
            None,
            ip.grid("resid_pre", layer=[0], pos=[3]),
            metric=ip.logit(5),
            intervention=partial(ip.clamp, value=NAN),
        )


@pytest.mark.parametrize("where", ["source", "reference"])
def test_the_source_and_what_is_compared_with(model, pair, where):
    clean, corrupt = pair
    if where == "reference":
        world = ip.World(clean, ip.steer(ip.site("resid_post", 0), torch.full((24,), NAN, dtype=torch.float64)))
        for run in (
            lambda: ip.evaluate(model, corrupt, ip.kl(world)),
            lambda: ip.sweep(model, clean, corrupt, GRID, metric=ip.kl(world)),
            lambda: ip.paths.edge_sweep(model, clean, corrupt, metric=ip.kl(world)),
        ):
            with pytest.raises(MetricError, match=r"'kl': the reference.* is nan on rows \[0, 1, 2\]"):
                run()
        return
    mark = ip.evaluate(model, clean, ip.logit(0))[1]
    broken = ip.metric(lambda x: torch.where(torch.isclose(x[:, 0, 0], mark), NAN, x[:, 0, 7]), LAST, name="broken")
    with pytest.raises(MetricError, match=r"'broken' is nan on rows \[1\] of the source"):
        ip.sweep(model, clean, corrupt, GRID, metric=broken)


def test_ranks_and_hits_of_what_is_no_number(model, pair):
    """A comparison with nan is False, which would read as rank 0."""
    world = ip.World(pair[0], ip.steer(ip.site("resid_post", 1), torch.full((24,), NAN, dtype=torch.float64)))
    for metric in (ip.rank(5), ip.accuracy(5), ip.cross_entropy(), ip.prob(5), ip.logit_diff(5, 6)):
        with pytest.raises(MetricError, match=f"'{metric.name}' is nan"):
            ip.evaluate(model, world, metric)


def test_parts_of_a_logit(pair):
    model = ip.wrap(zoo.make("gpt2"))
    with torch.no_grad():
        model.module.transformer.h[1].mlp.c_proj.bias[0] = NAN
    with pytest.raises(MetricError, match="nan"):
        ip.direct_logit_attribution(model, pair[0], 5, 9)


# What is infinite


def masked(layer: int = 1) -> ip.Intervention:
    """Make one token impossible."""
    return ip.intervene(ip.site("logits", pos=-1), lambda x, ctx: x.index_fill(-1, torch.tensor([5]), -INF))


def test_an_infinite_value_is_a_value(model, pair):
    found = ip.evaluate(model, ip.World(pair[0], masked()), ip.log_prob(5))
    assert found.tolist() == [-INF] * 3
    assert ip.evaluate(model, ip.World(pair[0], masked()), ip.prob(5)).tolist() == [0.0] * 3


def test_an_effect_on_something_finite_may_be_infinite(model, pair):
    result = ip.sweep(
        model, pair[0], None, ip.grid("logits", pos=[-1]), metric=ip.log_prob(5), intervention=lambda site: masked()
    )
    assert result.effect.tolist() == [[-INF] * 3] and result.mean().tolist() == [-INF]
    assert np.isnan(result.ci()).all() and result.counts().tolist() == [3]


def test_there_is_no_effect_on_something_infinite(model, pair):
    with model.apply(masked()):
        for run in (
            lambda: ip.sweep(model, *pair, GRID, metric=ip.log_prob(5)),
            lambda: ip.attribution(model, *pair, GRID, metric=ip.log_prob(5)),
        ):
            with pytest.raises(MetricError, match=r"'log_prob' is -inf on rows \[0, 1, 2\] of the unedited run"):
                run()
    endless = ip.metric(lambda x: x[:, 0, 5] * 0 + INF, LAST, name="endless")
    for run in (
        lambda: ip.paths.edge_sweep(model, *pair, metric=endless),
        lambda: ip.paths.edge_scores(model, *pair, metric=endless),
        lambda: ip.paths.path_patch(model, *pair, "input->logits", semantics="frozen", metric=endless),
    ):
        with pytest.raises(MetricError):
            run()


def test_an_infinite_source_is_nothing_to_normalize_by(model, pair):
    clean, corrupt = pair
    threshold = float(ip.evaluate(model, clean, ip.logit(7)).sub(ip.evaluate(model, corrupt, ip.logit(7))).abs().max())
    marks = ip.evaluate(model, clean, ip.logit(0))
    assert threshold > 1e-3
    endless = ip.metric(
        lambda x: torch.where(torch.isclose(x[:, :1, 0], marks).any(1), INF, x[:, 0, 7]), LAST, name="endless"
    )
    result = ip.sweep(model, clean, corrupt, GRID, metric=endless, executor="sequential")
    assert np.isinf(result.source).all() and np.isfinite(result.effect).all()
    with pytest.raises(ip.InterpError, match="nothing to normalize by"):
        result.normalized()


# A model in training mode


def test_a_model_in_training_mode_is_measured_by_nothing(pair):
    model = ip.wrap(zoo.make("gpt2"))
    clean, corrupt = pair
    model.module.train()
    world = ip.World(clean, ip.zero(ip.site("z", 0)))
    for run in (
        lambda: ip.evaluate(model, clean, ip.logit(5)),
        lambda: ip.evaluate(model, world, ip.logit(5)),
        lambda: ip.sweep(model, clean, corrupt, GRID, metric=ip.logit(5)),
        lambda: ip.attribution(model, clean, corrupt, GRID, metric=ip.logit(5)),
        lambda: ip.logit_lens(model, clean),
        lambda: ip.logit_lens(model, clean, ip.logit(5)),
        lambda: ip.direct_logit_attribution(model, clean, 5),
        lambda: ip.paths.edge_sweep(model, clean, corrupt, metric=ip.logit(5)),
        lambda: ip.paths.edge_scores(model, clean, corrupt, metric=ip.logit(5)),
    ):
        with pytest.raises(ModelError, match="training mode"):
            run()
    model.run(clean)  # which says nothing of the model but what it does
    with model.apply(ip.zero(ip.site("z", 0))):
        model.module(clean.ids)
    model.module.eval()
    model.module.transformer.drop.train()  # one module of many
    with pytest.raises(ModelError, match="training mode"):
        ip.evaluate(model, clean, ip.logit(5))


def test_what_is_measured_in_training_is_measured_without_dropout(pair):
    """By themselves as in a probe; the model is left in the mode in which it was."""
    model, tr = ip.wrap(zoo.make("gpt2")), ip.training
    twice = tr.repeated_tokens(model, 2, 4)
    for run in (
        lambda: tr.attention(model, pair[0], 0, 3, 1),
        lambda: tr.induction_strength(model, pair[0], 0, 3, 1, 2),
        lambda: tr.previous_token_strength(model, pair[0]),
        lambda: tr.prefix_matching(model, twice),
        lambda: tr.copying(model, twice),
        lambda: tr.heads_alone(model, pair[0], 0, ip.logit(5)),
        lambda: torch.tensor(tr.under(model, pair[0], ip.logit(5), ip.Plan())),
    ):
        expected = run()
        assert expected.abs().max() > 1e-3
        model.module.train()
        model.module.lm_head.eval()
        torch.testing.assert_close(run(), expected, rtol=0, atol=0)
        assert model.module.training and not model.module.lm_head.training
        model.module.eval()
