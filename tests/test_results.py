"""`Result`: statistics by hand, selection, tables, and files that survive what happens to files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import fields, replace

import numpy as np
import pytest

from hooks.errors import InterpError, ResultError
from interp import stats
from interp.axes import Axis
from interp.results import Result

ODD = {"a$b": [1, 2.5, None, True, {"deep": ["é", "\ud800", "\n"]}], "big": 10**30, "selected": "mine", "": {}}


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def make(several: bool = False, source: bool = True, rows: int = 6, missing: bool = True, **changes) -> Result:
    """A result of 3 layers and 4 positions, the last of which no row has and the third only the first two rows."""
    rng = np.random.default_rng(0)
    metric = (2,) if several else ()
    effect = rng.normal(size=(*metric, 3, 4, rows))
    if missing:
        effect[..., 3, :] = np.nan
        effect[..., 2, 2:] = np.nan
    status = np.zeros((3, 4), dtype=np.int8)
    status[0, 1], status[2] = 1, 2
    values = {
        "effect": effect,
        "axes": (Axis("layer", (0, 5, 11)), Axis("pos", (0, 1, (2, 3), -1), (" Mary", "\n", "a$b$c", "末"))),
        "metrics": ("logit_diff", "kl") if several else ("logit_diff",),
        "several": several,
        "base": rng.normal(-3, 1, size=(*metric, rows)),
        "source": rng.normal(3, 1, size=(*metric, rows)) if source else None,
        "status": status,
        "noise_floor": np.array([0.25, 0.5]) if several else 0.25,
        "rows": tuple(f"pair {i}" for i in range(rows)),
        "config": {"direction": "denoising", "seed": 0},
    }
    return Result(**{**values, **changes})


def same(a: Result, b: Result) -> None:
    for field in fields(Result):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype and x.shape == y.shape
            np.testing.assert_array_equal(x, y)
        else:
            assert x == y


# Shape and meaning


def test_fields_are_those_that_sweeps_construct():
    names = ["effect", "axes", "metrics", "several", "base", "source", "status", "noise_floor", "rows", "config"]
    assert [field.name for field in fields(Result)] == names
    assert [field.name for field in fields(Axis)] == ["name", "values", "labels"]


def test_axis_labels_default_to_values_and_numbers_are_pythons():
    axis = Axis("layer", np.arange(3))
    assert axis.values == (0, 1, 2) and axis.labels == ("0", "1", "2") and len(axis) == 3
    assert all(type(value) is int for value in axis.values)
    assert Axis("layer", [[0, 1], (2,)]).values == ((0, 1), (2,))


@pytest.mark.parametrize(
    "bad", [("metric", (0,)), ("row", (0,)), (3, (0,)), ("pos", (0, 1), ("a",)), ("pos", (0,), (0,))]
)
def test_axis_refuses(bad):
    with pytest.raises(ResultError):
        Axis(*bad)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"effect": np.zeros((3, 4, 5))}, r"effect has shape \(3, 4, 5\).*\(3, 4, 6\)"),
        ({"base": np.zeros(5)}, "base"),
        ({"source": np.zeros((1, 6))}, "source"),
        ({"status": np.zeros((4, 3))}, "status"),
        ({"status": np.full((3, 4), 300)}, "status is 0, 1 or 2"),
        ({"noise_floor": np.zeros(1)}, "noise_floor"),
        ({"several": True}, "effect"),
        ({"metrics": ("a", "b")}, "one metric"),
        ({"metrics": "logit_diff"}, "metrics is a tuple of str"),
        ({"rows": "abcdef"}, "rows"),
        ({"rows": (1, 2, 3, 4, 5, 6)}, "rows"),
        ({"config": None}, "config"),
        ({"axes": (Axis("layer", (0, 5, 11)), Axis("layer", (0, 1, 2, 3)))}, "different names"),
    ],
)
def test_result_refuses_what_does_not_fit(changes, said):
    with pytest.raises(ResultError, match=said) as caught:
        replace(make(), **changes)
    assert isinstance(caught.value, InterpError) and isinstance(caught.value, ValueError)


def test_arrays_are_float64_whatever_they_were():
    result = make(effect=np.ones((3, 4, 6), dtype=np.float32), base=[0] * 6, noise_floor=0.5)
    assert result.effect.dtype == result.base.dtype == result.noise_floor.dtype == np.float64
    assert result.status.dtype == np.int8 and result.noise_floor.shape == ()


# Statistics


@pytest.mark.parametrize("several", [False, True])
def test_mean_by_hand(several):
    result = make(several)
    mean = result.mean()
    assert mean.shape == ((2, 3, 4) if several else (3, 4))
    np.testing.assert_allclose(mean[..., :2], result.effect[..., :2, :].mean(-1))
    np.testing.assert_allclose(mean[..., 2], result.effect[..., 2, :2].mean(-1))
    assert np.isnan(mean[..., 3]).all()


@pytest.mark.parametrize("several", [False, True])
def test_normalized_by_hand(several):
    result = make(several)
    difference = (result.source - result.base)[..., None, None, :]
    normalized = result.normalized()
    expected = result.effect.mean(-1) / difference.mean(-1)
    np.testing.assert_allclose(normalized[..., :2], expected[..., :2])
    # The third position is over the two rows that have it, in the denominator too.
    np.testing.assert_allclose(normalized[..., 2], result.effect[..., 2, :2].mean(-1) / difference[..., 0, :2].mean(-1))
    assert np.isnan(normalized[..., 3]).all()


def test_reaching_the_source_is_one_even_where_rows_are_missing():
    result = make()
    whole = make(effect=np.where(np.isnan(result.effect), np.nan, result.source - result.base))
    np.testing.assert_allclose(whole.normalized()[:, :3], 1.0)
    np.testing.assert_allclose(np.stack(whole.ci(normalized=True))[..., :3], 1.0)
    np.testing.assert_allclose(whole.normalized(per_row=True)[:, :2], 1.0)


def test_normalized_per_row_masks_small_denominators():
    difference = np.array([10.0, -10.0, 0.4, 10.0, 10.0, 0.0])
    result = make(missing=False, base=np.zeros(6), noise_floor=0.1)
    result = replace(result, source=difference)
    shares = result.normalized(per_row=True)
    assert shares.shape == (3, 4, 6)
    np.testing.assert_allclose(shares[..., [0, 1, 3, 4]], result.effect[..., [0, 1, 3, 4]] / difference[[0, 1, 3, 4]])
    assert np.isnan(shares[..., [2, 5]]).all()
    loose = result.normalized(per_row=True, tol=0.0)
    np.testing.assert_allclose(loose[..., 2], result.effect[..., 2] / 0.4)
    assert np.isnan(loose[..., 5]).all()


@pytest.mark.parametrize("per_row", [False, True])
def test_normalized_needs_a_source_that_differs(per_row):
    with pytest.raises(ResultError, match="ablation"):
        make(source=False).normalized(per_row)
    result = make(base=np.linspace(1, 2, 6))
    for gap in (0.0, 1e-12, 0.2):  # 0.2 is within the noise floor of 0.25
        with pytest.raises(ResultError, match="logit_diff"):
            replace(result, source=result.base + gap).normalized(per_row)
    replace(result, source=result.base + 0.3).normalized(per_row)
    unmeasured = replace(result, noise_floor=0.0)
    with pytest.raises(ResultError, match="within the noise"):
        replace(unmeasured, source=result.base + 1e-12).normalized(per_row)
    replace(unmeasured, source=result.base + 1e-6).normalized(per_row)


def test_normalized_refuses_a_mean_difference_of_zero_and_names_the_metric():
    result = make(several=True)
    source = result.source.copy()
    source[1] = result.base[1] + [5, -5, 5, -5, 5, -5]
    result = replace(result, source=source)
    with pytest.raises(ResultError, match="'kl'"):
        result.sel(metric="kl").normalized()
    # Among several metrics it leaves the others alone.
    assert np.isnan(result.normalized()[1]).all()
    np.testing.assert_array_equal(result.normalized()[0], make(several=True).normalized()[0])
    assert np.isfinite(result.normalized(per_row=True)[1, 0, 0]).all()  # each row differs


def test_normalized_is_nan_where_the_rows_of_a_cell_do_not_differ():
    result = make()
    difference = np.array([5.0, -5.0, 5.0, 5.0, 5.0, 5.0])  # the third position has the first two rows only
    result = replace(result, source=result.base + difference)
    assert np.isnan(result.normalized()[:, 2]).all() and np.isfinite(result.normalized()[:, :2]).all()
    low, high = result.ci(normalized=True)
    assert np.isnan(low[:, 2]).all() and np.isnan(high[:, 2]).all() and np.isfinite(low[:, :2]).all()


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
def test_ci_is_the_bootstrap_of_each_metric(several, normalized):
    result = make(several)
    low, high = result.ci(level=0.8, n_boot=200, seed=3, normalized=normalized)
    point = result.normalized() if normalized else result.mean()
    assert low.shape == high.shape == point.shape
    known = np.isfinite(point)
    assert known.sum() == 9 * (1 + several)
    assert ((low <= point) & (point <= high))[known].mean() > 0.9 and (low < high)[known].all()
    for i, metric in enumerate(result.metrics):
        one = result.sel(metric=metric)
        difference = one.source - one.base if normalized else None
        expected = stats.bootstrap_ci(one.effect, difference, level=0.8, n_boot=200, seed=3)
        np.testing.assert_array_equal([low[i], high[i]] if several else [low, high], expected)


def test_one_row_has_no_interval():
    result = make(rows=1, missing=False)
    assert np.isnan(result.ci()).all() and np.isnan(result.ci(normalized=True)).all()
    assert (result.p_values() == 1).all() and not result.significant().any()
    assert np.isnan(result.top(1)[0]["low"])
    repr(result), result._repr_html_()


def test_significant_is_benjamini_hochberg_of_the_sign_flips():
    rng = np.random.default_rng(1)
    effect = rng.normal(size=(3, 4, 12))
    effect[1, 1:3] += 4
    effect[:, 3] = np.nan
    result = make(rows=12, effect=effect)
    p = result.p_values()
    np.testing.assert_array_equal(p, stats.sign_flip_p(effect))
    found = result.significant()
    assert found[1, 1] and found[1, 2] and not found[0].any() and not found[:, 3].any()
    np.testing.assert_array_equal(result.significant(0.3), stats.benjamini_hochberg(p, 0.3))
    np.testing.assert_array_equal(result.p_values(100, seed=1), stats.sign_flip_p(effect, n_perm=100, seed=1))


def test_all_metrics_are_one_family_of_hypotheses():
    """The correction counts the cells of every metric: what one metric alone would find among its own, two may not."""
    rng = np.random.default_rng(2)
    effect = rng.normal(size=(2, 3, 4, 12))
    effect[0, 0, 0] = effect[0, 0, 1] = np.arange(1, 13)
    effect[0, 0, 0, 4] *= -1  # p = 20 / 4096: below 0.05 x 2 / 12, and not below 0.05 x 2 / 24
    result = make(several=True, rows=12, effect=effect)
    p = result.p_values()
    assert p[0, 0, 0] == 20 / 4096
    np.testing.assert_array_equal(result.significant(), stats.benjamini_hochberg(p.ravel()).reshape(p.shape))
    alone = np.stack([result.sel(metric=name).significant() for name in result.metrics])
    assert alone.sum() > result.significant().sum() > 0


def test_above_noise_compares_each_metric_with_its_own_floor():
    result = make(several=True, effect=np.full((2, 3, 4, 6), -1.0), noise_floor=[0.9, 1.0])
    assert result.above_noise()[0].all() and not result.above_noise()[1].any()
    assert not make().above_noise()[:, 3].any()  # nan


# Views


def test_top_is_sorted_by_size_and_skips_what_is_missing():
    result = make()
    top = result.top(100)
    assert len(top) == 9
    # Position (2, 3), which two of six rows have, comes after what most rows have, however large its mean.
    assert [cell["rows"] for cell in top] == [6] * 6 + [2] * 3
    for some in (top[:6], top[6:]):
        sizes = [abs(cell["effect"]) for cell in some]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    assert abs(top[6]["effect"]) > abs(top[0]["effect"])
    assert f"layer={top[0]['layer']}, pos={top[0]['pos']} {top[0]['pos_label']!r}" in repr(result)
    low, high = result.ci()
    for cell in top:
        at = result.axes[0].values.index(cell["layer"]), result.axes[1].values.index(cell["pos"])
        assert list(cell) == ["layer", "pos", "pos_label", "effect", "low", "high", "rows"]
        assert cell["pos_label"] == result.axes[1].labels[at[1]]
        assert [cell["effect"], cell["low"], cell["high"]] == pytest.approx([result.mean()[at], low[at], high[at]])
        assert type(cell["layer"]) is int and type(cell["effect"]) is float
    assert result.top(2) == top[:2] and result.top(0) == []
    for k in (-1, 2.0, True, "all"):
        with pytest.raises(ResultError, match="number of cells"):
            result.top(k)


def test_top_of_several_metrics_says_which():
    result = make(several=True)
    assert result.top(1)[0]["metric"] == "logit_diff"
    best = result.top(1, metric="kl")[0]
    assert best["metric"] == "kl" and best["effect"] == pytest.approx(result.sel(metric="kl").top(1)[0]["effect"])
    with pytest.raises(ResultError, match="did you mean 'kl'"):
        result.top(metric="lk")


def test_sel_one_value_drops_the_axis_and_is_noted():
    result = make(several=True)
    one = result.sel(layer=5)
    np.testing.assert_array_equal(one.effect, result.effect[:, 1])
    np.testing.assert_array_equal(one.status, result.status[1])
    assert one.axes == result.axes[1:] and one.config["selected"] == {"layer": 5}
    assert "selected" not in result.config
    cell = one.sel(pos=(2, 3), metric="kl")
    np.testing.assert_array_equal(cell.effect, result.effect[1, 1, 2])
    assert cell.axes == () and not cell.several and cell.metrics == ("kl",) and cell.status.shape == ()
    assert cell.config["selected"] == {"layer": 5, "pos": (2, 3)}
    np.testing.assert_array_equal(cell.base, result.base[1])
    np.testing.assert_array_equal(cell.source, result.source[1])
    assert cell.mean() == pytest.approx(result.mean()[1, 1, 2])
    assert cell.noise_floor == result.noise_floor[1] and cell.top()[0]["effect"] == pytest.approx(float(cell.mean()))
    repr(cell), cell._repr_html_(), cell.to_frame()


@pytest.mark.parametrize("wanted", [[11, 0], np.array([11, 0]), (11, 0), range(11, -1, -11)])
def test_sel_several_values_keeps_the_axis_and_their_order(wanted):
    result = make()
    some = result.sel(layer=wanted, pos=[-1, 0])
    np.testing.assert_array_equal(some.effect, result.effect[[2, 0]][:, [3, 0]])
    np.testing.assert_array_equal(some.status, result.status[[2, 0]][:, [3, 0]])
    assert some.axes == (Axis("layer", (11, 0)), Axis("pos", (-1, 0), ("末", " Mary"))) and some.config == result.config


def test_sel_metrics():
    result = make(several=True, source=False)
    both = result.sel(metric=["kl", "logit_diff"])
    assert both.several and both.metrics == ("kl", "logit_diff") and both.source is None
    np.testing.assert_array_equal(both.effect, result.effect[::-1])
    single = make()
    same(single.sel(metric="logit_diff"), single)
    same(single.sel(), single)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"layr": 0}, "no axis 'layr', did you mean 'layer'"),
        ({"row": 0}, "no axis 'row'"),
        ({"layer": 1}, "axis 'layer' has no 1.*0, 5, 11"),
        ({"layer": [0, 7]}, "no 7"),
        ({"layer": "5"}, "no '5'"),
        ({"layer": []}, "empty"),
        ({"layer": [False, True, False]}, "no False"),
        ({"layer": np.array([True, False, True])}, "no True"),
        ({"pos": (2, 4)}, "no 2"),
        ({"metric": "logit_dif"}, "did you mean 'logit_diff'"),
    ],
)
def test_sel_refuses_and_names_the_nearest(wanted, said):
    with pytest.raises(ResultError, match=said):
        make().sel(**wanted)


def test_sel_refuses_an_ambiguous_value():
    twice = make(axes=(Axis("layer", (0, 5, 5)), Axis("pos", (0, 1, 2, 3))))
    assert twice.sel(layer=0).mean().shape == (4,)
    with pytest.raises(ResultError, match="2 times"):
        twice.sel(layer=5)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("source", [False, True])
def test_frame_has_every_number_in_its_place(several, source):
    result = make(several, source)
    frame = result.to_frame()
    assert list(frame) == ["metric", "layer", "pos", "row", "effect", "base", "source", "status", "pos_label"]
    assert len(frame) == result.effect.size
    stacked = result.effect if several else result.effect[None]
    for i in np.random.default_rng(2).choice(len(frame), 40, replace=False):
        line = frame.iloc[i]
        m = result.metrics.index(line["metric"])
        at = [axis.values.index(line[axis.name]) for axis in result.axes]
        r = result.rows.index(line["row"])
        np.testing.assert_equal(line["effect"], stacked[(m, *at, r)])
        np.testing.assert_equal(line["base"], np.atleast_2d(result.base)[m, r])
        np.testing.assert_equal(line["source"], np.atleast_2d(result.source)[m, r] if source else np.nan)
        assert line["status"] == ("fired", "inert", "pruned")[result.status[tuple(at)]]
    assert frame["layer"].dtype.kind == "i" and set(frame["status"]) == {"fired", "inert", "pruned"}
    means = frame.groupby(["metric", "layer"])["effect"].mean()
    assert means["logit_diff"][5] == pytest.approx(np.nanmean(stacked[0, 1]))


def test_repr_is_one_short_line():
    text = repr(make(several=True))
    assert "\n" not in text and len(text) < 160
    for part in ("layer 3 × pos 4", "6 rows", "logit_diff, kl", "7 fired, 1 inert, 4 pruned", "on logit_diff"):
        assert part in text
    assert "largest" not in repr(make(effect=np.full((3, 4, 6), np.nan)))


def test_html_shows_the_largest_and_escapes():
    config = {"model": "<script>", "direction": ["anything"], "selected": 3}
    result = make(effect=np.arange(72.0).reshape(3, 4, 6), metrics=("a<b",), config=config)
    text = result._repr_html_()
    assert "<script>" not in text and "&lt;script&gt;" in text and "a&lt;b" in text and "a<b" not in text
    assert "+68.5" in text and text.count("<tr>") == 6 and "(2, 3) a$b$c" in text
    assert "0 ·Mary" in make(effect=-np.arange(72.0)[::-1].reshape(3, 4, 6))._repr_html_()


# Files


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("source", [False, True])
def test_saved_and_loaded_is_the_same(tmp_path, several, source):
    result = make(several, source, config=ODD)
    written = result.save(tmp_path / "run.v1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.v1.json", "run.v1.safetensors"]
    assert written == tmp_path / "run.v1.json"
    same(Result.load(tmp_path / "run.v1"), result)


@pytest.mark.parametrize("name", ["run", "run.json", "run.safetensors", "new/folder/run.json"])
def test_suffix_is_stripped_and_folders_are_made(tmp_path, name):
    result = make()
    result.save(str(tmp_path / name))
    stem = name.removesuffix(".json").removesuffix(".safetensors")
    assert (tmp_path / f"{stem}.json").exists() and (tmp_path / f"{stem}.safetensors").exists()
    for spelled in (stem, f"{stem}.json", f"{stem}.safetensors"):
        same(Result.load(tmp_path / spelled), result)


def test_views_and_odd_layouts_are_saved_as_they_read(tmp_path):
    result = make(missing=False)
    turned = make(effect=np.asfortranarray(result.effect), status=result.status.T.copy().T)
    turned.save(tmp_path / "turned")
    same(Result.load(tmp_path / "turned"), turned)
    cell = result.sel(layer=5, pos=0)
    cell.save(tmp_path / "cell")
    same(Result.load(tmp_path / "cell"), cell)
    empty = make(rows=0)
    empty.save(tmp_path / "empty")
    same(Result.load(tmp_path / "empty"), empty)


def test_the_json_is_plain_json_without_arrays(tmp_path):
    def refuse(token):
        raise AssertionError(token)

    make().save(tmp_path / "run")
    record = json.loads((tmp_path / "run.json").read_text(encoding="ascii"), parse_constant=refuse)
    assert record["schema"] == "interp.result" and record["version"] == 1
    assert record["axes"][1] == {"name": "pos", "values": [0, 1, [2, 3], -1], "labels": [" Mary", "\n", "a$b$c", "末"]}
    assert "effect" not in record


class Version(str):
    """As torch.__version__ is one."""


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"a": {"b": [0, np.int64(3)]}}, r"config\['a'\]\['b'\]\[1\].*int64"),
        ({"a": object()}, "object"),
        ({1: "a"}, "key 1 is a int"),
        ({"a": float("nan")}, "nan"),
        ({"a": {1, 2}}, "set"),
    ],
)
def test_config_that_is_not_json_is_refused_and_nothing_is_written(tmp_path, config, said):
    make().save(tmp_path / "run")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ResultError, match=said):
        make(config=config).save(tmp_path / "run")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_axis_values_that_are_not_json_are_refused(tmp_path):
    odd = make(axes=(Axis("layer", (0, 5, 1j)), Axis("pos", (0, 1, 2, 3))))
    with pytest.raises(ResultError, match=r"axes\[0\]\['values'\]\[2\].*complex"):
        odd.save(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_string_of_another_class_and_numpy_floats_are_json(tmp_path):
    make(config={"torch": Version("2.13"), "cost": np.float64(0.1), "t": (1, 2)}).save(tmp_path / "run")
    assert Result.load(tmp_path / "run").config == {"torch": "2.13", "cost": 0.1, "t": [1, 2]}


@pytest.mark.parametrize("fail_at", [1, 2])
def test_a_save_that_fails_leaves_no_wrong_pair(tmp_path, monkeypatch, fail_at):
    old, new = make(), make(config={"new": True}, base=np.zeros(6))
    old.save(tmp_path / "run")
    calls, real = [], os.replace

    def broken(*args):
        calls.append(args)
        if len(calls) == fail_at:
            raise OSError("disk gone")
        real(*args)

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk gone"):
        new.save(tmp_path / "run")
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "run.safetensors"]
    if fail_at == 1:
        same(Result.load(tmp_path / "run"), old)
    else:  # the new arrays beside the old JSON
        with pytest.raises(ResultError, match="does not belong"):
            Result.load(tmp_path / "run")


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    old = make()
    old.save(tmp_path / "run")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        make(base=np.zeros(6)).save(tmp_path / "run")
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 2
    same(Result.load(tmp_path / "run"), old)


def edit(path, **changes):
    record = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            del record[key]
        else:
            record[key] = value
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema": "interp.plan"}, "not a saved result"),
        ({"schema": ...}, "not a saved result"),
        ({"version": 2}, "version 2"),
        ({"rows": ...}, "rows"),
        ({"extra": 1}, "extra"),
        ({"rows": ["a"]}, "rows make it"),
        ({"rows": None}, "not a saved result"),
        ({"axes": [{"name": "layer"}]}, "not a saved result"),
        ({"axes": ["layer"]}, "not a saved result"),
        ({"metrics": "logit_diff"}, "metrics"),
        ({"config": [1]}, "config"),
        ({"arrays_sha256": "0"}, "does not belong"),
    ],
)
def test_load_refuses_what_is_not_a_result(tmp_path, changes, said):
    make().save(tmp_path / "run")
    edit(tmp_path / "run.json", **changes)
    with pytest.raises(ResultError, match=said):
        Result.load(tmp_path / "run")


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, "\xff"])
def test_load_refuses_other_files(tmp_path, text):
    make().save(tmp_path / "run")
    (tmp_path / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ResultError, match=r"run\.json"):
        Result.load(tmp_path / "run")


def test_load_says_which_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run\.json"):
        Result.load(tmp_path / "run")
    make().save(tmp_path / "run")
    (tmp_path / "run.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"run\.safetensors"):
        Result.load(tmp_path / "run")


def test_load_refuses_arrays_of_another_result(tmp_path):
    make().save(tmp_path / "a")
    make(several=True).save(tmp_path / "b")
    os.replace(tmp_path / "b.safetensors", tmp_path / "a.safetensors")
    with pytest.raises(ResultError, match="does not belong"):
        Result.load(tmp_path / "a")


def test_nothing_heavy_is_imported_before_it_is_used():
    code = (
        "import sys, interp.results, interp.plots\n"
        "print([name for name in ('matplotlib', 'pandas', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
