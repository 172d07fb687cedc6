"""Positions of one thing in two runs of other lengths, against patches written out row by row."""

from __future__ import annotations

import pytest
import torch

import interp as ip
from hooks.errors import InterpError, ShapeError, SiteError
from tests import zoo

CLEAN = ([5, 6, 7, 8, 9], [3, 4, 5, 6, 7, 8, 9], [9, 8, 7, 6])
CORRUPT = ([5, 6, 11, 9], [3, 4, 12, 13, 14, 15, 8, 9], [9, 7, 6])
AT = ([2, 3], [2, 3, 4], [1, 2])
THERE = ([2], [2, 3, 4, 5], [1])
METRIC = ip.logit_diff(7, 9)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request) -> ip.Model:
    return ip.wrap(zoo.make(request.param))


@pytest.fixture(scope="module", params=["right", "left"])
def pair(request, model):
    return model.inputs(CLEAN, padding=request.param), model.inputs(CORRUPT, padding=request.param)


def by_hand(model, how: str, name: str = "resid_pre") -> torch.Tensor:
    """The metric of the corrupt run with the clean thing in it, [layer, row]: each row alone, with plain tensors."""
    found = []
    for layer in range(model.n_layers):
        row = []
        for one, two, at, there in zip(CLEAN, CORRUPT, AT, THERE, strict=True):
            clean, corrupt = model.inputs([one]), model.inputs([two])
            site = ip.site(name, layer)
            value = model.run(clean, capture=[site]).tape[site][:, at]
            if how == "mean":
                value = value.mean(1, keepdim=True).expand(-1, len(there), *value.shape[2:])
            else:
                pick = -1 if how == "last" else 0
                value, there = value[:, [pick]], [there[pick]]
            plan = ip.clamp(site.at(pos=there), value.contiguous())
            row.append(ip.evaluate(model, ip.World(corrupt, ip.Plan((plan,))), METRIC)[0])
        found.append(torch.stack(row))
    return torch.stack(found)


@pytest.mark.parametrize("how", ["last", "first", "mean"])
def test_what_corresponds_is_said(model, pair, how):
    cells = ip.grid("resid_pre", layer="all", pos={"name": ip.paired(AT, THERE, how=how)})
    expected = by_hand(model, how)
    for executor in ("sequential", "shared"):
        result = ip.sweep(model, *pair, cells, metric=METRIC, executor=executor)
        found = torch.tensor(result.effect[:, 0] + result.base)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        assert abs(result.effect).max() > 1e-2
    assert result.axes[1].values == ("name",)


def test_heads_and_the_other_direction(model, pair):
    """Noising edits the clean run; a head's part is read at the positions that correspond."""
    cells = ip.grid("z", layer="all", head="all", pos={"name": ip.paired(AT, THERE, how="mean"), "last": -1})
    result = ip.sweep(model, *pair, cells, metric=METRIC, direction="noising")
    clean, corrupt = pair
    site = ip.site("z", 1)
    value = model.run(corrupt, capture=[site]).tape[site]
    columns = corrupt.order.gather(1, torch.tensor([[2, 0, 0, 0], [2, 3, 4, 5], [1, 0, 0, 0]]))
    mean = torch.stack([value[b, columns[b, : len(there)], 2].mean(0) for b, there in enumerate(THERE)])
    for row, at in enumerate(AT):
        one = clean.rows(slice(row, row + 1))
        plan = ip.clamp(site.at(head=2, pos=at), mean[row].expand(1, len(at), -1)[:, :, None].contiguous())
        edited = ip.evaluate(model, ip.World(one, ip.Plan((plan,))), METRIC)
        assert float(edited[0]) == pytest.approx(result.effect[1, 2, 0, row] + result.base[row], abs=1e-10)
    assert abs(result.effect[:, :, 1]).max() > 1e-3  # the last token is each run's own


def test_token_by_token_and_rows_without(model):
    """As many tokens in each row are patched one by one; a row that names none lacks the cell."""
    clean, corrupt = model.inputs(CLEAN), model.inputs(CORRUPT)
    here, there = ([3, 4], [4, 5, 6], []), ([2, 3], [5, 6, 7], [])
    cells = ip.grid("resid_pre", layer=[1], pos={"end": ip.paired(here, there)})
    result = ip.sweep(model, clean, corrupt, cells, metric=METRIC)
    assert result.counts().tolist() == [[2]]
    site = ip.site("resid_pre", 1)
    value = model.run(clean, capture=[site]).tape[site]
    for row in (0, 1):
        one = corrupt.rows(slice(row, row + 1))
        plan = ip.clamp(site.at(pos=there[row]), value[[row]][:, here[row]].contiguous())
        edited = ip.evaluate(model, ip.World(one, ip.Plan((plan,))), METRIC)
        assert float(edited[0]) == pytest.approx(result.effect[0, 0, row] + result.base[row], abs=1e-10)
    estimate = ip.attribution(model, clean, corrupt, cells, metric=METRIC)
    assert abs(estimate.effect[0, 0, :2]).max() > 1e-3


def test_what_does_not_correspond_is_refused(model, pair):
    def swept(where, **more):
        return ip.sweep(model, *pair, ip.grid("resid_pre", layer="all", pos={"name": where}), metric=METRIC, **more)

    with pytest.raises(SiteError, match=r"row 0 it is 1 tokens where it is edited .* and 2 in the source"):
        swept(ip.paired(AT, THERE))
    with pytest.raises(SiteError, match="row 2 has it in the edited run alone"):
        swept(ip.paired(([2], [2], []), ([2], [2], [1])))
    with pytest.raises(SiteError, match="row 0 has 5 tokens"):
        swept(ip.paired(([9], [2], [1]), THERE, how="last"))
    with pytest.raises(SiteError, match="how is"):
        ip.paired(AT, THERE, how="lasst")
    one = ip.grid("resid_pre", layer="all", pos={"name": ip.paired(AT, THERE)})
    with pytest.raises(SiteError, match="clean and corrupt"):
        ip.sweep(model, pair[0], None, one, metric=METRIC, intervention=ip.zero)
    with pytest.raises(SiteError, match="leave out intervention"):
        swept(ip.paired(AT, THERE, how="last"), intervention=lambda site: ip.patch(site, ip.World(pair[0])))
    with pytest.raises(InterpError):
        swept({"name": [0]})
    # An ablation reads nothing there, so nothing has to correspond.
    zeroed = swept(ip.paired(AT, THERE), intervention=ip.zero, direction="noising")
    plan = ip.zero(ip.site("resid_pre", 1, pos=torch.tensor([[2], [2], [1]]))) + ip.zero(
        ip.site("resid_pre", 1, pos=torch.tensor([[3], [3], [2]]))
    )
    expected = ip.evaluate(model, ip.World(pair[0], plan), METRIC)
    assert [float(expected[i]) for i in (0, 2)] == pytest.approx((zeroed.effect[1, 0] + zeroed.base)[[0, 2]].tolist())
    with pytest.raises(InterpError, match="do not correspond"):
        ip.sweep(model, *pair, ip.grid("resid_pre", layer="all", pos=[1]), metric=METRIC)


def test_masks_of_other_counts_in_a_row_are_not_read_as_each_other(model):
    """As many positions in the widest row is not as many in each: what would fill up a row is padding."""
    inputs, others = model.inputs([[5, 6, 7, 8], [9, 8, 7, 6]]), model.inputs([[5, 6, 1, 2], [9, 8, 3, 4]])
    here, there = torch.zeros(2, 4, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool)
    here[0, :2], here[1, :3], there[0, :3], there[1, :2] = True, True, True, True
    site = ip.site("resid_pre", 1)
    with pytest.raises(ShapeError, match="in row 0 3 positions are read, the site has 2"):
        model.run(inputs, ip.patch(site.at(pos=here), ip.World(others), source_site=site.at(pos=there)))
