"""Clean and corrupt prompts of other lengths: positions that are counted from the end correspond, others do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp as ip
from tests import oracle, zoo

CLEAN, CORRUPT = [[1, 2, 3, 4, 9], [5, 6, 9]], [[4, 3, 1], [7, 3, 1, 8]]
METRIC = ip.logit_diff(3, 4)


@pytest.fixture(scope="module")
def model():
    return ip.wrap(zoo.make("gpt2"))


@pytest.mark.parametrize("padding", ["left", "right"])
def test_positions_from_the_end_correspond(model, padding):
    """Against the oracle, row by row."""
    clean, corrupt = (model.inputs(x, padding=padding) for x in (CLEAN, CORRUPT))
    grid = ip.grid("resid_post", layer=[0, 1], pos=[-1, -2])
    module = model.module

    def run(row, edits=None):
        with torch.no_grad():
            return oracle.forward(module, torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool), edits)

    expected = np.zeros((2, 2, 2))
    for r, (there, here) in enumerate(zip(CLEAN, CORRUPT, strict=True)):
        kept, plain = run(there)[1], run(here)[0]
        for layer in (0, 1):
            for i, pos in enumerate((-1, -2)):

                def edit(x, value=kept["resid_post", layer][:, pos], pos=pos):
                    return torch.stack([value if p == pos % x.shape[1] else x[:, p] for p in range(x.shape[1])], 1)

                edited = run(here, {("resid_post", layer): edit})[0]
                change = (edited - plain)[0, -1]
                expected[layer, i, r] = float(change[3] - change[4])
    assert np.abs(expected).max() > 1e-2
    for executor in ("sequential", "batched", "shared", "auto"):
        result = ip.sweep(model, clean, corrupt, grid, metric=METRIC, executor=executor, progress=False)
        np.testing.assert_allclose(result.effect, expected, atol=1e-8)
    named = ip.grid("resid_post", layer=[0, 1], pos={"last": -1, "both": (-2, -1)})
    result = ip.sweep(model, clean, corrupt, named, metric=METRIC, progress=False)
    np.testing.assert_allclose(result.sel(pos="last").effect, expected[:, 0], atol=1e-8)
    noised = ip.sweep(model, clean, corrupt, grid, metric=METRIC, direction="noising", progress=False)
    assert np.abs(noised.effect).max() > 1e-2 and noised.base == pytest.approx(result.source)


@pytest.mark.parametrize("pos", [{"pos": "all"}, {"pos": [0, -1]}, {"pos": slice(0, 2)}, {}, {"pos": {"a": (0, 1)}}])
def test_other_positions_do_not(model, pos):
    clean, corrupt = model.inputs(CLEAN), model.inputs(CORRUPT)
    with pytest.raises(ip.InputsError, match="positions do not correspond"):
        ip.sweep(model, clean, corrupt, ip.grid("resid_post", layer=[0], **pos), metric=METRIC, progress=False)
    with pytest.raises(ip.InputsError, match="positions do not correspond"):
        ip.sweep(model, clean, corrupt, ip.grid("pattern", layer=[0], pos=[-1]), metric=METRIC, progress=False)


def test_a_position_that_the_other_run_lacks_is_named(model):
    clean, corrupt = model.inputs(CLEAN), model.inputs(CORRUPT)
    for direction in ("denoising", "noising"):
        grid = ip.grid("z", layer=[0], pos=[-4])
        with pytest.raises(ip.SiteError, match="every row has each"):
            ip.sweep(model, clean, corrupt, grid, metric=METRIC, direction=direction, progress=False)
    longer = model.inputs([[1, 2, 3, 4, 5], [5, 6, 7, 8, 9]])
    with pytest.raises(ip.SiteError, match="row 0, which has 3 tokens"):
        ip.sweep(model, corrupt, longer, ip.grid("z", layer=[0], pos=[-4]), metric=METRIC, progress=False)
