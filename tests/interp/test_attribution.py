"""Attribution patching: exact where the metric is linear, the gradient formula everywhere, first order in between."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

import interp as ip
from hooks.errors import InputsError, InterpError, MetricError, ModelError, PlanError
from tests import oracle, zoo
from tests.turns import in_turn

ANSWER, FOIL = 7, 9
METRIC = ip.logit_diff(ANSWER, FOIL)
CLOSE = {"rtol": 0, "atol": 1e-10}
RAGGED = (5, 3, 6)
POS = {"scores": 2, "pattern": 2}
HEAD = {"scores": 1, "pattern": 1}


def prompts(lengths, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, zoo.VOCAB, (n,), generator=generator).tolist() for n in lengths]


class Pair:
    def __init__(self, family: str, lengths=(5, 5, 5), padding: str = "right") -> None:
        self.module = zoo.make(family)
        self.model = ip.wrap(self.module)
        self.rows = [prompts(lengths, seed) for seed in (0, 1)]
        self.values: dict[tuple[int, ...], dict] = {}
        self.clean, self.corrupt = (self.model.inputs(rows, padding=padding) for rows in self.rows)

    def both(self, grid: ip.Grid, **options) -> tuple[ip.Result, ip.Result]:
        """What is estimated, and what is exact."""
        said = {"direction": "denoising"} if "intervention" in options else {}
        options = {"metric": METRIC, **said, **options}
        corrupt = options.pop("corrupt", self.corrupt)
        exact = functools.partial(ip.sweep, executor="sequential")
        return tuple(f(self.model, self.clean, corrupt, grid, **options) for f in (ip.attribution, exact))

    def forward(self, row: list[int], edits: dict | None = None) -> tuple[Tensor, dict]:
        return oracle.forward(self.module, torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool), edits)

    def products(self, name: str, layer: int | None, noising: bool = False) -> list[Tensor]:
        """For each row alone: gradient of the logit difference at a site, times what patching it changes."""
        source, base = self.rows if not noising else self.rows[::-1]
        found = []
        for there, here in zip(source, base, strict=True):
            leaf = self.plain(here)[name, layer].clone().requires_grad_()
            logits, _ = self.forward(here, {(name, layer): lambda x, leaf=leaf: leaf})
            (gradient,) = torch.autograd.grad(logits[0, -1, ANSWER] - logits[0, -1, FOIL], leaf)
            other = self.plain(there)[name, layer]
            found.append(torch.where(gradient == 0, 0, gradient * (other - leaf.detach())))
        return found

    def plain(self, row: list[int]) -> dict:
        """All that the oracle computes of a row without an edit, once."""
        if tuple(row) not in self.values:
            with torch.no_grad():
                self.values[tuple(row)] = self.forward(row)[1]
        return self.values[tuple(row)]


def last_residual(layer: int, weights: Tensor) -> ip.Metric:
    """A metric that is linear in the last layer's residual."""
    return ip.metric(lambda x: x[:, 0] @ weights, ip.site("resid_post", layer=layer, pos=-1), name="projection")


# Exact where nothing bends


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_exact_after_the_last_norm(family):
    pair = Pair(family, RAGGED, "left")
    for site in ("ln_final", "logits") if pair.model.architecture.cap is None else ("logits",):
        for direction in ("denoising", "noising"):
            estimate, exact = pair.both(ip.grid(site, pos=[-1, 0]), direction=direction)
            np.testing.assert_allclose(estimate.effect, exact.effect, **CLOSE)
            assert np.abs(exact.effect[0]).min() > 1e-2 and np.abs(estimate.effect[1]).max() == 0
            np.testing.assert_allclose(estimate.base, exact.base, **CLOSE)
            np.testing.assert_allclose(estimate.source, exact.source, **CLOSE)


@pytest.mark.parametrize(("family", "padding"), in_turn(zoo.FAMILIES, ["right", "left"]))
def test_exact_in_the_last_layer_for_a_linear_readout(family, padding):
    """To the residual after it, the last layer is linear in its heads' z and results, in what it looks at and in v."""
    pair = Pair(family, RAGGED, padding)
    last = pair.model.n_layers - 1
    block = pair.model.architecture.blocks[last]
    attention_only = block.mlp is None
    metric = last_residual(last, torch.randn(pair.model.architecture.width, dtype=torch.float64))
    grids = [
        ip.grid(["resid_post"] if attention_only else ["mlp_out", "resid_post"], layer=[last], pos="all"),
        ip.grid("resid_post", layer=[last]),
    ]
    if attention_only or block.parallel:  # elsewhere the MLP bends what attention writes
        grids += [
            ip.grid(["z", "result"], layer=[last], head="all"),
            ip.grid("z", layer=last, head="all", pos="all"),
            ip.grid("attn_out", layer=[last], pos=[-1, 1]),
            ip.grid("v", layer=last, head="all", pos="all"),
            ip.grid("pattern", layer=last, head="all", key_pos="all"),
        ]
    if not attention_only and block.of_mlp.post is None:
        grids += [ip.grid("mlp_post", layer=[last], dim=list(range(0, 40, 7)))]
    for grid in grids:
        estimate, exact = pair.both(grid, metric=metric)
        np.testing.assert_allclose(estimate.effect, exact.effect, **CLOSE)
        assert np.nanmax(np.abs(exact.effect)) > 1e-2
        assert estimate.axes == exact.axes and estimate.rows == exact.rows


def test_exact_for_ablations_where_nothing_bends():
    pair = Pair("small_attn_only", RAGGED, "left")
    vector = torch.randn(8, dtype=torch.float64)
    reference = ip.World(pair.model.inputs(prompts((6, 6, 6, 6), 5)))
    metric = last_residual(1, torch.randn(32, dtype=torch.float64))
    for corrupt, intervention in itertools.product(
        (None, pair.corrupt),
        (
            ip.zero,
            lambda s: ip.steer(s, vector, 2.0),
            lambda s: ip.scale(s, 0.5),
            lambda s: ip.zero(s).strength(0.3),
            functools.partial(ip.mean, source=reference),
            lambda s: ip.noise(s, 0.3),
        ),
    ):
        estimate, exact = pair.both(
            ip.grid("z", layer=1, head="all", pos=[-1, 1]), metric=metric, corrupt=corrupt, intervention=intervention
        )
        np.testing.assert_allclose(estimate.effect, exact.effect, **CLOSE)
        assert np.abs(exact.effect).max() > 1e-2
        assert (estimate.source is None) == (corrupt is None)


# The gradient times the change


@pytest.mark.parametrize(
    ("family", "padding"),
    in_turn(["gpt2", "llama", "mistral", "neox", "gemma2", "small_qk_norm", "small_attn_only"], ["left", "right"]),
)
def test_the_gradient_times_the_change(family, padding):
    pair = Pair(family, RAGGED, padding)
    run = functools.partial(ip.attribution, pair.model, pair.clean, pair.corrupt, metric=METRIC)
    sites = ["resid_pre", "attn_in", "q", "k", "v", "z", "result", "attn_out", "scores", "pattern"]
    if family != "small_attn_only":
        sites += ["mlp_in", "mlp_pre", "mlp_post", "mlp_out"]
    if family not in ("neox", "small_attn_only"):
        sites += ["resid_mid"]
    if pair.model.architecture.blocks[0].attention.rotary is not None:
        sites += ["rot_q", "rot_k"]
    result = run(grid=ip.grid(sites, layer=[0, 1], pos="all"))
    expected = np.full((len(sites), 2, 6, 3), np.nan)
    for i, name in enumerate(sites):
        for layer in range(2):
            for row, product in enumerate(pair.products(name, layer)):
                dim = POS.get(name, 1)
                summed = product.sum([d for d in range(product.ndim) if d != dim])
                expected[i, layer, : len(summed), row] = summed
    assert np.nanmax(np.abs(expected)) > 0.1
    np.testing.assert_allclose(result.effect, expected, **CLOSE)
    for name in ("z", "pattern", "q"):
        result = run(grid=ip.grid(name, head="all", layer=1), direction="noising")
        by_head = [
            p.sum([d for d in range(p.ndim) if d != HEAD.get(name, 2)]) for p in pair.products(name, 1, noising=True)
        ]
        np.testing.assert_allclose(result.effect, torch.stack(by_head, 1), **CLOSE)


def test_edges_and_several_sites_of_a_cell():
    pair = Pair("gpt2", (4, 4))
    result = ip.attribution(
        pair.model,
        pair.clean,
        pair.corrupt,
        ip.grid("pattern", layer=0, head="all", pos="all", key_pos="all"),
        metric=METRIC,
    )
    expected = torch.stack([p[0] for p in pair.products("pattern", 0)], -1)
    np.testing.assert_allclose(result.effect, expected, **CLOSE)
    assert np.abs(result.effect).max() > 1e-2
    # All layers at once, and groups: first-order effects add up.
    whole = ip.attribution(pair.model, pair.clean, pair.corrupt, ip.grid("mlp_out"), metric=METRIC)
    each = [torch.stack([p.sum() for p in pair.products("mlp_out", layer)]) for layer in range(2)]
    np.testing.assert_allclose(whole.effect, sum(each), **CLOSE)
    groups = ip.attribution(
        pair.model, pair.clean, pair.corrupt, ip.grid("z", layer=1, head=[(0, 1), (2, 3), (0, 3)]), metric=METRIC
    )
    heads = torch.stack([p.sum((0, 1, 3)) for p in pair.products("z", 1)], -1)
    np.testing.assert_allclose(
        groups.effect, torch.stack([heads[[0, 1]], heads[[2, 3]], heads[[0, 3]]]).sum(1), **CLOSE
    )


@pytest.mark.parametrize(
    "metric",
    [ip.log_prob(ANSWER), ip.prob(ANSWER), ip.kl(), ip.kl(pos=(0, -1)), ip.cross_entropy(), ip.logit(ANSWER, pos=1)],
    ids=["log_prob", "prob", "kl", "kl of two", "cross_entropy", "logit"],
)
def test_every_metric_with_a_gradient(metric):
    """Against differences: an edit that is a small step of the patch has that share of the estimated effect."""
    pair = Pair("gpt2", RAGGED, "left")
    grid = ip.grid(["attn_out", "resid_pre"], layer="all", pos=[0, 1, -1])
    estimate = ip.attribution(pair.model, pair.clean, pair.corrupt, grid, metric=metric)
    steps = [
        ip.sweep(
            pair.model, pair.clean, pair.corrupt, grid, metric=metric,
            intervention=lambda s, h=h: ip.patch(s, ip.World(pair.clean)).strength(h),
        ).effect
        for h in (1e-4, -1e-4)
    ]  # fmt: skip
    difference = (steps[0] - steps[1]) / 2e-4
    assert np.abs(difference).max() > 1e-4
    np.testing.assert_allclose(estimate.effect, difference, rtol=1e-5, atol=1e-5 * np.abs(difference).max())


@pytest.mark.parametrize("family", ["gpt2", "llama", "small_rms_rotary_gqa"])
def test_the_error_is_of_second_order(family):
    pair = Pair(family)
    grid = ip.grid(["resid_pre", "z", "pattern"], layer="all")
    errors = []
    for step in (4e-3, 2e-3, 1e-3):
        partly = lambda s, step=step: ip.patch(s, ip.World(pair.clean)).strength(step)  # noqa: E731
        estimate, exact = pair.both(grid, intervention=partly)
        errors.append(np.abs(estimate.effect - exact.effect).max(-1))
    large = errors[0] > 1e-7
    assert large.mean() > 0.8
    for wide, narrow in itertools.pairwise(errors):
        ratio = wide[large] / narrow[large]
        assert (ratio > 3).all() and (ratio < 5).all() and abs(np.median(ratio) - 4) < 0.1


def test_it_ranks_cells_as_the_exact_sweep_does():
    """Prompts that differ a little in one embedding: estimate and truth nearly agree."""
    pair = Pair("llama")
    near = lambda s: ip.patch(s, ip.World(pair.clean)).strength(0.05)  # noqa: E731
    estimate, exact = pair.both(ip.grid("resid_pre", layer="all", pos="all"), intervention=near)
    assert np.corrcoef(estimate.effect.ravel(), exact.effect.ravel())[0, 1] > 0.99


# The result


def test_a_result_like_a_sweeps(tmp_path):
    pair = Pair("llama", RAGGED)
    grid = ip.grid("resid_pre", layer="all", pos="all")
    estimate, exact = pair.both(grid)
    assert estimate.axes == exact.axes and estimate.rows == exact.rows and estimate.metrics == exact.metrics
    np.testing.assert_array_equal(np.isnan(estimate.effect), np.isnan(exact.effect))
    assert np.isnan(estimate.effect).sum() == 3 * (1 + 3)
    assert "first order" in estimate.config["executor"]
    assert estimate.normalized().shape == (3, 6)
    estimate.save(tmp_path / "a")
    np.testing.assert_array_equal(ip.Result.load(tmp_path / "a").effect, estimate.effect)
    same = ip.attribution(
        pair.model, pair.clean, pair.corrupt, ip.grid("resid_pre", layer=[0], pos=[0, 1]), metric=METRIC
    )
    shared_first = [a[0] == b[0] for a, b in zip(*pair.rows, strict=True)]
    assert (same.status[0, 0] == 1) == all(shared_first)


def test_unchanged_cells_are_inert():
    pair = Pair("gpt2")
    rows = [[3, *row[1:]] for row in pair.rows[0]], [[3, *row[1:]] for row in pair.rows[1]]
    clean, corrupt = (pair.model.inputs(r) for r in rows)
    result = ip.attribution(pair.model, clean, corrupt, ip.grid("resid_pre", layer="all", pos="all"), metric=METRIC)
    assert (result.status[:, 0] == 1).all() and (result.effect[:, 0] == 0).all()
    assert (result.status[:, 1:] == 0).all()


@pytest.mark.parametrize(
    "metric", [METRIC, ip.kl(), ip.cross_entropy(), ip.kl(pos=None)], ids=["diff", "kl", "ce", "kl all"]
)
def test_chunks_of_rows_change_nothing(metric):
    pair = Pair("llama", RAGGED, "left")
    grid = ip.grid("z", layer="all", head="all", pos=[0, -1])
    whole = ip.attribution(pair.model, pair.clean, pair.corrupt, grid, metric=metric)
    for budget in (1, 50_000):
        chunked = ip.attribution(pair.model, pair.clean, pair.corrupt, grid, metric=metric, budget=budget)
        np.testing.assert_allclose(chunked.effect, whole.effect, **CLOSE)
        np.testing.assert_allclose(chunked.source, whole.source, **CLOSE)


def test_the_model_is_left_as_it_was():
    pair = Pair("mistral")
    pair.module.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in pair.module.state_dict().items()}
    for no_grad in (False, True):  # callers often stand in a no_grad block
        with torch.set_grad_enabled(not no_grad):
            result = ip.attribution(
                pair.model, pair.clean, pair.corrupt, ip.grid("pattern", layer="all"), metric=METRIC
            )
        assert np.abs(result.effect).max() > 1e-2
    assert all(p.grad is None for p in pair.module.parameters())
    assert all(torch.equal(p, before[name]) for name, p in pair.module.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pair.module.modules())
    pair.module.requires_grad_(False)  # a frozen model has gradients at its activations all the same
    frozen = ip.attribution(pair.model, pair.clean, pair.corrupt, ip.grid("pattern", layer="all"), metric=METRIC)
    np.testing.assert_array_equal(frozen.effect, result.effect)


# Refusals


def test_metrics_without_a_gradient_are_refused():
    pair = Pair("gpt2")
    for metric in (ip.rank(ANSWER), ip.accuracy(ANSWER)):
        with pytest.raises(MetricError, match=rf"'{metric.name}' has no gradient.*sweep\(\)"):
            ip.attribution(pair.model, pair.clean, pair.corrupt, ip.grid("z", layer="all"), metric=metric)


def test_what_has_no_first_order():
    """A score that becomes -inf is no small change: refused, rather than infinite or nan."""
    pair = Pair("gpt2")
    with pytest.raises(InterpError):
        ip.attribution(
            pair.model, pair.clean, None, ip.grid("scores", layer="all"), metric=METRIC, intervention=ip.knockout
        )


@pytest.mark.parametrize("budget", [0, -5, True, "much", float("inf")])
def test_a_budget_is_a_number_of_bytes(budget):
    pair = Pair("small_ln_learned")
    with pytest.raises(ModelError, match="positive number of bytes"):
        pair.both(ip.grid("z", layer="all"), budget=budget)


def test_interventions_without_an_estimate_of_their_own():
    pair = Pair("small_ln_learned")
    grid = ip.grid("mlp_out", layer=[1])
    for why, made in (
        ("mixes rows", lambda at: ip.intervene(at, lambda x, ctx: x.flip(0), mixes=("row",))),
        ("own values", lambda at: ip.intervene(at, lambda x, y, ctx: x + y, ip.here(ip.site("mlp_in", 1)))),
    ):
        with pytest.raises(PlanError, match=why):
            ip.attribution(pair.model, pair.clean, None, grid, metric=METRIC, intervention=made)


@pytest.mark.parametrize("family", ["gpt2", "llama", "small_rms_rotary_gqa"])
def test_while_a_plan_is_held(family):
    """Held inside attention too: the estimates are those of the model under the plan, exact where nothing bends."""
    pair = Pair(family, RAGGED, "left")
    last = pair.model.n_layers - 1
    metric = last_residual(last, torch.randn(pair.model.architecture.width, dtype=torch.float64))
    held = ip.zero(ip.site("pattern", last, head=0)) + ip.scale(ip.site("mlp_out", last, pos=-1), 0.5)
    held += ip.freeze(ip.site("attn_out", 0, pos=-1))
    grid = ip.grid("mlp_out", layer=[last], pos=[-1])
    plain = pair.both(grid, metric=metric)[0]
    with pair.model.apply(held) as audit:
        estimated, exact = pair.both(grid, metric=metric)
        assert pair.model.holds
    np.testing.assert_allclose(estimated.effect, exact.effect, **CLOSE)
    np.testing.assert_allclose(estimated.base, exact.base, **CLOSE)
    assert np.abs(estimated.base - plain.base).max() > 1e-3 and np.abs(estimated.effect).max() > 1e-3
    assert all(entry.calls for entry in audit)


def test_what_attribution_refuses():
    pair = Pair("gpt2")
    run = functools.partial(ip.attribution, pair.model, pair.clean)
    grid = ip.grid("z", layer="all")
    with pytest.raises(InputsError, match="'noising'"):
        run(pair.corrupt, grid, metric=METRIC, direction="noise")
    with pytest.raises(InputsError, match="intervention="):
        run(None, grid, metric=METRIC)
    with pytest.raises(InputsError, match="pair 0 has 5 clean tokens and 4"):
        run(pair.model.inputs(prompts((4, 5, 5), 1)), grid, metric=METRIC)
    with pytest.raises(MetricError, match="patches from nothing"):
        run(None, grid, metric=ip.kl(), intervention=ip.zero)
    for metric in ([METRIC], lambda x: x, "kl", None):
        with pytest.raises(MetricError):
            run(pair.corrupt, grid, metric=metric)
    pair.module.train()
    with pytest.raises(ModelError, match="training mode"):
        run(pair.corrupt, grid, metric=METRIC)
