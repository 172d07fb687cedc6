"""The statistics against enumeration, plain loops and scipy."""

from __future__ import annotations

import itertools
import tracemalloc
import warnings

import numpy as np
import pytest

from hooks.errors import ResultError
from interp.stats import benjamini_hochberg, bootstrap_ci, row_mean, sign_flip_p

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def ragged(seed: int, shape: tuple[int, ...], missing: float = 0.3) -> np.ndarray:
    """Values with nans, the first cell whole, the second without any row."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0.5, 1.0, size=shape)
    values[rng.random(shape) < missing] = np.nan
    flat = values.reshape(-1, shape[-1])
    flat[0] = rng.normal(size=shape[-1])
    flat[1] = np.nan
    return values


# row_mean


def test_row_mean_leaves_out_nan_and_keeps_empty_cells_nan():
    values = ragged(0, (3, 4, 7))
    expected = [[x[~np.isnan(x)].mean() if (~np.isnan(x)).any() else np.nan for x in row] for row in values]
    np.testing.assert_allclose(row_mean(values), expected, rtol=1e-14)
    assert np.isnan(row_mean(values)[0, 1])


def test_row_mean_of_given_entries():
    values = np.array([[1.0, 2.0, 10.0], [1.0, 2.0, 10.0]])
    np.testing.assert_array_equal(
        row_mean(values, np.array([[True, True, False], [False, False, False]])), [1.5, np.nan]
    )


def test_row_mean_shows_infinities():
    np.testing.assert_array_equal(row_mean(np.array([[1, np.inf], [np.inf, -np.inf]])), [np.inf, np.nan])


# bootstrap_ci


def looped_interval(values, denominator, level, n_boot, seed):
    """The definition: one draw at a time, one cell at a time."""
    rows = values.shape[-1]
    drawn = np.random.default_rng(seed).integers(0, rows, size=(n_boot, rows))
    bounds = []
    for x in values:
        means = []
        for draw in drawn:
            pairs = [(x[r], 1.0 if denominator is None else denominator[r]) for r in draw if not np.isnan(x[r])]
            if pairs:
                means.append(sum(a for a, _ in pairs) / sum(b for _, b in pairs))
        few = (~np.isnan(x)).sum() < 2
        bounds.append([np.nan] * 2 if few else np.quantile(means, [(1 - level) / 2, (1 + level) / 2]))
    return np.array(bounds).T


@pytest.mark.parametrize("with_denominator", [False, True])
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_bootstrap_matches_the_loop(with_denominator, level):
    values = ragged(1, (6, 5), missing=0.5)
    values[2] = [3.0, np.nan, np.nan, np.nan, np.nan]  # one row: no interval
    values[3] = [3.0, 1.0, np.nan, np.nan, np.nan]  # two rows: some draws hold neither
    denominator = np.random.default_rng(2).uniform(1, 2, size=5) if with_denominator else None
    low, high = bootstrap_ci(values, denominator, level=level, n_boot=300, seed=3)
    expected = looped_interval(values, denominator, level, 300, 3)
    np.testing.assert_allclose([low, high], expected, rtol=1e-12)
    assert np.isnan(low[[1, 2]]).all() and np.isfinite(low[[0, 3]]).all() and (low[[0, 3]] < high[[0, 3]]).all()


def test_bootstrap_matches_every_resample():
    values = np.array([[0.0, 1.0, 2.5, 7.0, 3.0]])
    means = [values[0, list(draw)].mean() for draw in itertools.product(range(5), repeat=5)]
    low, high = bootstrap_ci(values, n_boot=40_000, level=0.9)
    np.testing.assert_allclose([low[0], high[0]], np.quantile(means, [0.05, 0.95]), atol=0.15)


def test_bootstrap_matches_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(4)
    x, d = rng.normal(1, 2, size=60), rng.normal(4, 1, size=60)
    for args, statistic in [((x,), np.mean), ((x, d), lambda a, b, axis: a.mean(axis) / b.mean(axis))]:
        ours = bootstrap_ci(x[None], *args[1:], n_boot=20_000)
        theirs = stats.bootstrap(
            args, statistic, paired=True, n_resamples=20_000, method="percentile", rng=np.random.default_rng(5)
        ).confidence_interval
        width = theirs.high - theirs.low
        np.testing.assert_allclose([ours[0][0], ours[1][0]], [theirs.low, theirs.high], atol=0.03 * width)


def test_bootstrap_covers_at_its_level():
    rng = np.random.default_rng(6)
    low, high = bootstrap_ci(rng.normal(1.0, 2.0, size=(2000, 50)), level=0.9, n_boot=500)
    assert 0.86 < ((low < 1.0) & (high > 1.0)).mean() < 0.92


def test_bootstrap_draws_rows_jointly():
    x = np.random.default_rng(7).normal(size=20)
    low, high = bootstrap_ci(np.stack([x, 3 * x + 1, -x]), n_boot=400)
    np.testing.assert_allclose([low[1], high[1]], [3 * low[0] + 1, 3 * high[0] + 1], rtol=1e-12)
    np.testing.assert_allclose([low[2], high[2]], [-high[0], -low[0]], rtol=1e-12)
    ratio = bootstrap_ci((2 * x + 10)[None], x + 5, n_boot=400)  # numerator and denominator drawn together: no spread
    np.testing.assert_allclose(ratio, np.full((2, 1), 2.0), rtol=1e-12)


def test_ratio_uses_the_rows_of_the_cell():
    d = np.array([1.0, 2.0, 30.0, 4.0])
    low, high = bootstrap_ci(np.where([True, True, False, True], d, np.nan)[None], d, n_boot=100)
    np.testing.assert_allclose([low[0], high[0]], 1.0, rtol=1e-12)


def test_seed_decides():
    x = np.random.default_rng(8).normal(size=(3, 15))
    np.testing.assert_array_equal(bootstrap_ci(x, seed=1, n_boot=99), bootstrap_ci(x, seed=1, n_boot=99))
    assert (bootstrap_ci(x, seed=1, n_boot=99)[0] != bootstrap_ci(x, seed=2, n_boot=99)[0]).all()


def test_infinite_cell_has_no_interval_and_spoils_no_other():
    x = np.random.default_rng(9).normal(size=(3, 8))
    clean = np.array(bootstrap_ci(x, n_boot=50))
    x[1, 2] = np.inf
    low, high = bootstrap_ci(x, n_boot=50)
    assert np.isnan(low[1]) and np.isnan(high[1])
    np.testing.assert_allclose(np.array([low, high])[:, [0, 2]], clean[:, [0, 2]], rtol=1e-12)


@pytest.mark.parametrize("bad", [{"level": 0}, {"level": 1}, {"level": 95}, {"level": float("nan")}, {"n_boot": 0}])
def test_bootstrap_refuses(bad):
    with pytest.raises(ResultError, match=next(iter(bad))):
        bootstrap_ci(np.ones((1, 3)), **bad)


# sign_flip_p


def enumerated_p(x: np.ndarray) -> float:
    x = x[~np.isnan(x)]
    if not x.size:
        return np.nan
    sums = [abs(np.dot(signs, x)) for signs in itertools.product([1, -1], repeat=x.size)]
    return np.mean([s >= abs(x.sum()) - 1e-9 for s in sums])


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_exact_p_matches_enumeration(rows):
    values = ragged(10 + rows, (3, 4, rows))
    p = sign_flip_p(values, n_perm=2**rows)
    np.testing.assert_allclose(p, [[enumerated_p(x) for x in row] for row in values], rtol=1e-12)
    assert np.isnan(p[0, 1]) and (np.nanmin(p) < 1 or rows == 1)


def test_p_matches_scipy():
    stats = pytest.importorskip("scipy.stats")
    x = np.random.default_rng(11).normal(0.4, 1, size=(4, 10))
    exact = [
        stats.permutation_test((row,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue for row in x
    ]
    np.testing.assert_allclose(sign_flip_p(x), exact, rtol=1e-12)
    np.testing.assert_allclose(sign_flip_p(x, n_perm=1023), exact, atol=0.06)  # one too few to enumerate
    assert (sign_flip_p(x, n_perm=1023) != exact).any()


def test_ties_count_although_rounding_differs():
    x = np.array([[0.1, 0.2, 0.3, -0.6 + 0.1 + 0.2 + 0.3]]) * 3
    assert sign_flip_p(np.array([[0.1, 0.2, -0.3]]))[0] == 1.0  # 0.1 + 0.2 - 0.3 is not 0 in floats
    assert sign_flip_p(x)[0] == 4 / 16


def test_zero_effect_has_p_one():
    np.testing.assert_array_equal(sign_flip_p(np.zeros((2, 30)), n_perm=50), [1.0, 1.0])
    np.testing.assert_array_equal(sign_flip_p(np.zeros((2, 3))), [1.0, 1.0])


def test_monte_carlo_has_the_plus_one_correction():
    assert sign_flip_p(np.ones((1, 40)), n_perm=999)[0] == 1 / 1000


def test_enumeration_begins_at_two_to_the_rows():
    x = np.random.default_rng(18).normal(0.4, 1, size=(1, 6))
    assert len({sign_flip_p(x, n_perm=64, seed=s)[0] for s in range(10)}) == 1
    assert len({sign_flip_p(x, n_perm=63, seed=s)[0] for s in range(10)}) > 1


@pytest.mark.parametrize("rows", [8, 30])
def test_p_is_uniform_under_the_null(rows):
    x = np.random.default_rng(12).normal(size=(3000, rows))
    p = sign_flip_p(x, n_perm=1000)
    for level in (0.05, 0.2, 0.5):
        assert abs((p <= level).mean() - level) < 0.03


def test_p_is_invariant_to_sign_scale_and_missing_rows():
    x = np.random.default_rng(13).normal(0.7, 1, size=(4, 7))
    p = sign_flip_p(x)
    np.testing.assert_array_equal(sign_flip_p(-1e6 * x), p)
    padded = np.concatenate([x, np.full((4, 4), np.nan)], axis=1)
    np.testing.assert_allclose(sign_flip_p(padded), p, rtol=1e-12)


def test_infinite_cell_has_no_p():
    p = sign_flip_p(np.array([[1.0, np.inf, 2.0], [1.0, 2.0, 3.0], [np.inf, -np.inf, 1.0]]))
    np.testing.assert_array_equal(p, [np.nan, 0.25, np.nan])


def test_n_perm_refused():
    with pytest.raises(ResultError, match="n_perm"):
        sign_flip_p(np.ones((1, 3)), n_perm=0)


# blocks


@pytest.mark.parametrize("memory", [1, 1000, 5000])
def test_blocks_do_not_change_the_answer(memory):
    values = ragged(14, (5, 3, 7))
    d = np.random.default_rng(15).uniform(1, 2, size=7)
    for call in (
        lambda **kw: bootstrap_ci(values, n_boot=61, **kw),
        lambda **kw: bootstrap_ci(values, d, n_boot=61, **kw),
        lambda **kw: sign_flip_p(values, **kw),
        lambda **kw: sign_flip_p(values, n_perm=101, **kw),
    ):
        np.testing.assert_allclose(call(memory=memory), call(), rtol=1e-12)


def test_memory_is_bounded():
    values = np.random.default_rng(16).normal(size=(4000, 40))
    for call in (lambda m: bootstrap_ci(values, n_boot=2000, memory=m), lambda m: sign_flip_p(values, memory=m)):
        tracemalloc.start()
        call(2**22)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**23  # all at once would take 64 MB and 320 MB


@pytest.mark.parametrize("shape", [(3, 0), (0, 4), (5,), (2, 1)])
def test_odd_shapes(shape):
    values = np.ones(shape)
    low, high = bootstrap_ci(values, n_boot=10)
    p = sign_flip_p(values)
    assert low.shape == high.shape == p.shape == row_mean(values).shape == shape[:-1]
    if shape == (3, 0):
        assert np.isnan(low).all() and np.isnan(p).all() and np.isnan(row_mean(values)).all()
    if shape == (2, 1):
        assert np.isnan(low).all() and (p == 1).all()


# benjamini_hochberg


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.sampled_from([0.01, 0.05, 0.2, 1.0]))
def test_benjamini_hochberg_is_the_step_up_rule(p, q):
    p = np.round(p, 3)  # ties
    last = max((i for i, x in enumerate(sorted(p), 1) if x <= q * i / p.size), default=0)
    expected = p <= sorted(p)[last - 1] if last else np.zeros(p.size, dtype=bool)
    np.testing.assert_array_equal(benjamini_hochberg(p, q), expected)


def test_benjamini_hochberg_matches_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(17)
    for q in (0.05, 0.2):
        p = np.concatenate([rng.uniform(size=80), rng.uniform(high=0.02, size=20)]).reshape(10, 10)
        ours = benjamini_hochberg(p, q)
        np.testing.assert_array_equal(ours, stats.false_discovery_control(p.ravel()).reshape(p.shape) <= q)
        assert 0 < ours.sum() < p.size


def test_benjamini_hochberg_steps_up_and_leaves_nan_out():
    assert benjamini_hochberg(np.array([0.04, 0.045]), 0.05).all()  # 0.04 alone fails 0.025
    np.testing.assert_array_equal(benjamini_hochberg(np.array([0.04, np.nan, np.nan]), 0.05), [True, False, False])
    assert not benjamini_hochberg(np.array([np.nan, np.nan])).any()
    assert benjamini_hochberg(np.zeros((0,))).shape == (0,)


@pytest.mark.parametrize(("p", "q"), [([0.1, 1.2], 0.05), ([-0.1], 0.05), ([0.1], 0.0), ([0.1], 5)])
def test_benjamini_hochberg_refuses(p, q):
    with pytest.raises(ResultError):
        benjamini_hochberg(np.array(p), q)
