"""Results of batches and shards joined, and as xarray's datasets: one sweep in parts is the sweep."""

from __future__ import annotations

import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

import interp as ip
from tests import zoo

CLEAN = [[1, 2, 3, 4], [5, 6, 9], [8, 2, 3, 9], [7, 5]]
CORRUPT = [[4, 3, 2, 1], [7, 3, 1], [9, 3, 2, 8], [3, 5]]


@pytest.fixture(scope="module")
def model():
    return ip.wrap(zoo.make("llama", dtype=torch.float64))


def swept(model, grid, rows=slice(0, 4), metric=None):
    clean, corrupt = (model.inputs(x[rows]) for x in (CLEAN, CORRUPT))
    metric = [ip.logit_diff(3, 4), ip.prob(3)] if metric is None else metric
    return ip.sweep(model, clean, corrupt, grid, metric=metric, progress=False)


def equal(a: ip.Result, b: ip.Result, config: bool = True) -> None:
    for field in fields(ip.Result):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray):
            np.testing.assert_allclose(x, y, atol=1e-12)
        elif field.name != "config" or config:
            assert x == y, field.name


def test_batches_of_rows(model, tmp_path):
    grid = ip.grid("resid_pre", layer="all", pos=[0, 1, 2])
    whole = swept(model, grid)
    parts = [swept(model, grid, slice(0, 2)), swept(model, grid, slice(2, 4))]
    joined = ip.Result.concat(parts)
    equal(replace(whole, noise_floor=joined.noise_floor), joined, config=False)
    assert np.nanmax(np.abs(joined.effect)) > 1e-3 and np.isnan(joined.effect).any()
    assert joined.sel(metric="prob").counts()[0].tolist() == [4, 4, 3]
    assert joined.config["direction"] == "denoising" and len(joined.config["parts"]) == 2
    equal(ip.Result.load(joined.save(tmp_path / "joined")), joined)
    equal(ip.Result.concat([whole]), whole, config=False)


def test_shards_of_a_grid(model):
    whole = swept(model, ip.grid("z", layer="all", head="all"))
    parts = [swept(model, ip.grid("z", layer=[layer], head="all")) for layer in range(model.n_layers)]
    equal(whole, ip.Result.concat(parts, "layer"), config=False)
    with pytest.raises(ip.ResultError, match="in two of the results"):
        ip.Result.concat([parts[0], parts[0]], "layer")
    with pytest.raises(ip.ResultError, match="the same rows"):
        ip.Result.concat([parts[0], swept(model, ip.grid("z", layer=[1], head="all"), slice(0, 2))], "layer")
    with pytest.raises(ip.ResultError, match="metric of the base differs"):
        ip.Result.concat([parts[0], replace(parts[1], base=parts[1].base + 1)], "layer")


def test_what_is_not_one_sweep_is_not_joined(model):
    grid = ip.grid("z", layer="all", head="all")
    one = swept(model, grid, slice(0, 2))
    for other, said in (
        (swept(model, grid, metric=ip.prob(3)), "metrics"),
        (swept(model, ip.grid("z", layer="all")), "axes"),
        (swept(model, ip.grid("z", layer=[0], head="all")), "same cells"),
        (replace(one, config={**one.config, "direction": "noising"}), "direction"),
        (replace(one, source=None), "a source"),
    ):
        with pytest.raises(ip.ResultError, match=said):
            ip.Result.concat([one, other])
    with pytest.raises(ip.ResultError, match="did you mean 'head'"):
        ip.Result.concat([one, one], "heads")
    for nothing in ([], [one, "two"]):
        with pytest.raises(ip.ResultError):
            ip.Result.concat(nothing)


def test_names_of_positions_survive(model, tmp_path):
    grid = ip.grid("resid_pre", layer="all", pos={"name end": 1, "last": -1, "both": (0, 1)})
    result = swept(model, grid, metric=ip.logit_diff(3, 4))
    kept = ip.Result.load(result.save(tmp_path / "x"))
    for one in (result, kept):
        assert one.sel(pos="name end").effect.tolist() == one.sel(pos=1).effect.tolist()
        assert {cell["pos_label"] for cell in one.top(100)} == {"name end", "last", "both"}
        best = one.top(1)[0]
        assert f"{best['pos_label']!r}" in repr(one)
        frame = one.to_frame()
        assert set(frame["pos_label"]) == {"name end", "last", "both"}
        same = frame[frame["pos_label"] == "both"]["effect"].to_numpy()
        np.testing.assert_array_equal(same, one.sel(pos="both").effect.ravel())
    with pytest.raises(ip.ResultError, match="did you mean 'name end'"):
        result.sel(pos="name edn")
    with pytest.raises(ip.SiteError, match="two groups of one name"):
        ip.grid("resid_pre", pos={1: 0, "1": 1})


def test_tokens_of_ragged_rows(monkeypatch):
    """A table says of each row what stands at a position there; a label of all rows says that there are others."""
    model = ip.load("ioi-mini")
    prompts = ["Mary gave a book to John", "Tom gave it to Anna"]
    inputs = model.inputs(prompts)
    grid = ip.grid("mlp_out", layer=[0], pos=[0, 1, 5])
    result = ip.sweep(model, inputs, None, grid, metric=ip.logit("Mary"), intervention=ip.zero, progress=False)
    rows = [inputs.labels(0), inputs.labels(1)]
    assert result.axes[1].labels == (rows[0][0], f"{rows[0][1]}…", f"{rows[0][5]}…")
    frame = result.to_frame()
    for line in frame.itertuples():
        row = result.rows.index(line.row)
        has = line.pos < len(rows[row])
        assert line.pos_label == (rows[row][line.pos] if has else "") and has != np.isnan(line.effect)
    half = ip.Result.concat([result, result])
    assert half.to_frame()["pos_label"].tolist().count(rows[1][1]) == 2


def test_a_dataset_and_back(model):
    xr = pytest.importorskip("xarray")
    grid = ip.grid("resid_pre", layer=[2, 0], pos={"first": 0, "rest": (1, 2)})
    result = swept(model, grid)
    dataset = result.to_xarray()
    assert isinstance(dataset, xr.Dataset)
    equal(ip.Result.from_xarray(dataset), result)
    assert dataset["effect"].dims == ("metric", "layer", "pos", "row")
    np.testing.assert_allclose(dataset["effect"].mean("row").sel(metric="prob"), result.sel(metric="prob").mean())
    part = dataset.sel(layer=[0], metric=["prob"]).isel(row=[3, 1], pos=[1])
    back = ip.Result.from_xarray(part)
    expected = result.sel(layer=[0], metric=["prob"], pos=[(1, 2)]).effect[..., [3, 1]]
    np.testing.assert_array_equal(back.effect, expected)
    assert back.axes[1].values == ((1, 2),) and back.rows == (result.rows[3], result.rows[1])
    single = swept(model, grid, metric=ip.prob(3))
    equal(ip.Result.from_xarray(single.to_xarray().transpose()), single)
    for nothing in (dataset.drop_attrs(), dataset.drop_vars("status"), dataset.isel(row=0), "text"):
        with pytest.raises(ip.ResultError):
            ip.Result.from_xarray(nothing)


def test_importing_interp_imports_no_xarray():
    import subprocess

    code = "import sys, interp; sys.exit('xarray' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
