"""Grids: which cells there are, in which order, what each edits, and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import interp as ip
from hooks import Span
from hooks.errors import InterpError, SiteError
from tests import zoo


@pytest.fixture(scope="module")
def model() -> ip.Model:
    return ip.wrap(zoo.make("llama"))  # 3 layers, 4 query heads, 2 key/value heads


@pytest.fixture(scope="module")
def inputs(model) -> ip.Inputs:
    return model.inputs([[1, 2, 3, 4], [5, 6, 3, 7], [8, 2, 3, 9]])


@pytest.fixture(scope="module")
def ragged(model) -> ip.Inputs:
    return model.inputs([[1, 2, 3, 4], [5, 6], [8, 2, 3]], padding="left")


def listed(grid: ip.Grid, model, inputs) -> list[tuple]:
    """Every cell as the sites that it edits."""
    return [cell.sites for cell in grid.cells(model, inputs)[1]]


def test_every_cell_in_the_order_of_the_axes_as_named(model, inputs):
    for order in itertools.permutations(["layer", "head", "pos"]):
        axes, cells = ip.grid("z", **dict.fromkeys(order, "all")).cells(model, inputs)
        assert [axis.name for axis in axes] == list(order)
        sizes = {"layer": 3, "head": 4, "pos": 4}
        assert [axis.values for axis in axes] == [tuple(range(sizes[name])) for name in order]
        expected = list(itertools.product(*(range(sizes[name]) for name in order)))
        assert [cell.index for cell in cells] == expected
        for cell, values in zip(cells, expected, strict=True):
            where = dict(zip(order, values, strict=True))
            assert cell.sites == (ip.site("z", **where),)
            assert cell.present is None


def test_what_is_not_named_is_edited_whole(model, inputs):
    assert listed(ip.grid("z", head="all"), model, inputs) == [
        tuple(ip.site("z", layer=layer, head=h) for layer in range(3)) for h in range(4)
    ]
    assert listed(ip.grid("mlp_out"), model, inputs) == [tuple(ip.site("mlp_out", layer=i) for i in range(3))]
    assert listed(ip.grid("ln_final"), model, inputs) == [(ip.site("ln_final"),)]
    assert listed(ip.grid("embed", pos="all"), model, inputs) == [(ip.site("embed", pos=p),) for p in range(4)]


def test_all_is_what_the_site_has(model, inputs):
    for name, axis, size in [("v", "head", 2), ("z", "head", 4), ("pattern", "head", 4), ("pattern", "key_pos", 4)]:
        axes, cells = ip.grid(name, layer=0, **{axis: "all"}).cells(model, inputs)
        assert axes[0].values == tuple(range(size)) and len(cells) == size
    axes, _ = ip.grid("z", layer=1, head=3, dim="all").cells(model, inputs)
    assert axes[0].values == tuple(range(8))
    with pytest.raises(SiteError, match=r"head.*\[2, 4\]"):
        ip.grid(["z", "v"], head="all").cells(model, inputs)
    assert len(ip.grid(["z", "v"], head=(0, 1)).cells(model, inputs)[1]) == 4


def test_several_kinds_make_a_first_axis(model, inputs):
    axes, cells = ip.grid(["resid_pre", "attn_out"], layer="all", pos=(1, 2)).cells(model, inputs)
    assert [(a.name, a.values) for a in axes] == [
        ("site", ("resid_pre", "attn_out")),
        ("layer", (0, 1, 2)),
        ("pos", (1, 2)),
    ]
    assert [c.sites[0] for c in cells] == [
        ip.site(name, layer=layer, pos=p) for name in ("resid_pre", "attn_out") for layer in range(3) for p in (1, 2)
    ]
    axes, cells = ip.grid(["mlp_out"], layer="all").cells(model, inputs)  # a list of one is still an axis
    assert [a.name for a in axes] == ["site", "layer"]
    axes, cells = ip.grid(["resid_pre", "ln_final"], pos=-1).cells(model, inputs)
    assert [len(c.sites) for c in cells] == [3, 1]


def test_groups(model, inputs):
    axes, cells = ip.grid("z", layer=[(0, 2), 1], head=[(0, 1), (2, 3)]).cells(model, inputs)
    assert axes[0].values == ((0, 2), 1) and axes[1].values == ((0, 1), (2, 3))
    assert [c.sites for c in cells] == [
        tuple(ip.site("z", layer=layer, head=heads) for layer in layers)
        for layers in ((0, 2), (1,))
        for heads in ((0, 1), (2, 3))
    ]
    axes, cells = ip.grid("resid_pre", layer=0, pos={"subject": (1, 2), "rest": range(3), "last": -1}).cells(
        model, inputs
    )
    assert axes[0].labels == ("subject", "rest", "last")
    assert axes[0].values == ((1, 2), (0, 1, 2), -1)
    assert [c.sites[0].pos for c in cells] == [(1, 2), (0, 1, 2), -1]


def test_one_value_makes_no_axis(model, inputs):
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[:, 1:] = True
    for pos, site_pos in [(-1, -1), (2, 2), (slice(1, None), Span(1)), (Span(0, 2), Span(0, 2)), (mask, mask)]:
        axes, cells = ip.grid("z", layer=-1, head="all", pos=pos).cells(model, inputs)
        assert [a.name for a in axes] == ["head"]
        assert [c.sites for c in cells] == [(ip.site("z", layer=2, head=h, pos=site_pos),) for h in range(4)]
    assert listed(ip.grid("z", layer=[-1, 0], head=1), model, inputs) == [
        (ip.site("z", layer=2, head=1),),
        (ip.site("z", layer=0, head=1),),
    ]


def test_spans_as_entries_of_an_axis(model, inputs, tmp_path):
    """Spans beside one another are as good as groups: the result can be looked at, selected from and saved."""
    other = model.inputs([[4, 3, 2, 1], [7, 3, 6, 5], [9, 3, 2, 8]])
    metric = ip.logit_diff(3, 4)
    groups = ip.sweep(model, inputs, other, ip.grid("z", layer=0, pos=[(0, 1), (2, 3)]), metric=metric)
    for spans in ([slice(0, 2), slice(2, None)], {"start": slice(0, 2), "end": slice(2, None)}):
        result = ip.sweep(model, inputs, other, ip.grid("z", layer=0, pos=spans), metric=metric)
        np.testing.assert_allclose(result.effect, groups.effect, rtol=0, atol=1e-12)
        result.save(tmp_path / "spans")
        np.testing.assert_array_equal(ip.Result.load(tmp_path / "spans").effect, result.effect)


@pytest.mark.parametrize(
    "array", [np.array, torch.tensor, lambda x: [np.int64(i) for i in x]], ids=["np", "torch", "int64"]
)
def test_arrays_are_as_good_as_lists(model, inputs, array):
    other = model.inputs([[4, 3, 2, 1], [7, 3, 6, 5], [9, 3, 2, 8]])
    expected = ip.sweep(
        model, inputs, other, ip.grid("z", layer=[0, 2], head=[1, 3], pos=[0, 3]), metric=ip.logit_diff(3, 4)
    )
    grid = ip.grid("z", layer=array([0, 2]), head=array([1, 3]), pos=list(array([0, 3])))
    found = ip.sweep(model, inputs, other, grid, metric=ip.logit_diff(3, 4))
    assert [(a.name, a.values, a.labels) for a in found.axes] == [(a.name, a.values, a.labels) for a in expected.axes]
    assert all(type(v) is int for a in found.axes for v in a.values)
    np.testing.assert_array_equal(found.effect, expected.effect)


def test_rows_that_lack_a_position(model, ragged):
    """Cells know which rows have them; the others are left alone there, wherever the padding is."""
    axes, cells = ip.grid("resid_pre", layer=0, pos="all").cells(model, ragged)
    assert axes[0].values == (0, 1, 2, 3)  # those of the longest row
    assert [None if c.present is None else c.present.tolist() for c in cells] == [
        None,
        None,
        [True, False, True],
        [True, False, False],
    ]
    _, cells = ip.grid("resid_pre", layer=0, pos=[-1, -3, (0, 1), (1, 3)]).cells(model, ragged)
    assert [None if c.present is None else c.present.tolist() for c in cells] == [
        None,
        [True, False, True],
        None,
        [True, False, False],  # a row has a group where it has all of it
    ]
    _, cells = ip.grid("pattern", layer=0, pos=[2, 3], key_pos=[0, 2]).cells(model, ragged)
    assert [c.present.tolist() for c in cells] == [[True, False, True]] * 2 + [[True, False, False]] * 2
    for pos in (4, [-5], [(0, 4)], {"a": 9}):
        with pytest.raises(SiteError, match="4 tokens"):
            ip.grid("resid_pre", layer=0, pos=pos).cells(model, ragged)


def test_labels_are_the_tokens_that_all_rows_share(stories):
    model = ip.load(stories)
    inputs = model.inputs(["the cat sat", "the dog sat"])
    shared = [set(column) for column in zip(*inputs.tokens, strict=True)]
    (axis,), _ = ip.grid("embed", pos="all").cells(model, inputs)
    first = inputs.tokens[0]
    assert axis.labels == tuple(t if len(s) == 1 else f"{t}…" for t, s in zip(first, shared, strict=True))
    assert " the" in axis.labels and any(label.endswith("…") for label in axis.labels)
    (axis,), _ = ip.grid("embed", pos=[-1, (0, 1)]).cells(model, inputs)
    assert axis.labels[1] == "(0, 1)"


def test_labels_of_words_that_need_no_tokenizer(model):
    words = (("the", " cat", " sat"), ("the", " dog", " sat"), ("the", " cat", " ran"))
    inputs = ip.Inputs.of(torch.tensor([[1, 2, 3], [1, 4, 3], [1, 2, 5]]), tokens=words)
    (axis,), _ = ip.grid("embed", pos="all").cells(model, inputs)
    assert axis.labels == ("the", " cat…", " sat…")
    (axis,), _ = ip.grid("embed", pos=[-3, (0, 1)]).cells(model, inputs)
    assert axis.labels == ("the", "(0, 1)")


def test_a_grid_says_what_it_is():
    assert repr(ip.grid("z", layer="all", head="all")) == "Grid(z over layer, head)"
    assert repr(ip.grid(["resid_pre", "mlp_out"])) == "Grid(resid_pre + mlp_out over everything at once)"
    assert ip.grid("z", layer=[0, 1]) == ip.grid("z", layer=(0, 1)) != ip.grid("z", layer=(1, 0))


@pytest.mark.parametrize(
    ("names", "axes", "match"),
    [
        ("resid_prre", {}, "'resid_pre'"),
        ([], {}, "one or more"),
        (["z", "z"], {}, "different"),
        ("z", {"heads": "all"}, "'head'"),
        ("resid_pre", {"head": "all"}, "no axis 'head'"),
        ("z", {"key_pos": "all"}, "no axis 'key_pos'"),
        ("ln_final", {"layer": "all"}, "no axis 'layer'"),
        ("z", {"layer": "al"}, "'all'"),
    ],
)
def test_what_cannot_be_stated(names, axes, match):
    with pytest.raises(SiteError, match=match):
        ip.grid(names, **axes)


@pytest.mark.parametrize(
    ("grid", "match"),
    [
        (lambda: ip.grid("z", layer=3), "layers 0 .. 2"),
        (lambda: ip.grid("z", layer=[-4]), "layers 0 .. 2"),
        (lambda: ip.grid("z", layer=[0, (1, 7)]), "layers 0 .. 2"),
        (lambda: ip.grid("z", layer=0, head=[0, 4]), "no head 4"),
        (lambda: ip.grid("k", layer=0, head=[3]), "key/value head"),
        (lambda: ip.grid("z", layer=[]), "empty"),
        (lambda: ip.grid("z", layer=[0, ()]), None),
        (lambda: ip.grid("z", layer=0, head=[()]), None),
        (lambda: ip.grid("z", layer=0, pos=[(1, 1)]), "twice"),
        (lambda: ip.grid("z", layer=0, pos=4), "4"),
        (lambda: ip.grid("pos_embed", pos="all"), "no site 'pos_embed'"),
        (lambda: ip.grid("z", layer=["one"]), None),
        (lambda: ip.grid("z", layer=0, pos=[1.5]), None),
        (lambda: ip.grid("z", layer=1.5), None),
        (lambda: ip.grid("z", layer=None), None),
        (lambda: ip.grid("z", layer=[0, None]), None),
    ],
)
def test_what_a_model_lacks(model, inputs, grid, match):
    other = model.inputs([[4, 3, 2, 1], [7, 3, 6, 5], [9, 3, 2, 8]])
    with pytest.raises(InterpError, match=match):
        ip.sweep(model, inputs, other, grid(), metric=ip.logit_diff(3, 4))


# Positions that differ between rows


def by_site(model, clean, corrupt, site: ip.Site, metric: ip.Metric) -> np.ndarray:
    """The effect of one patch at a site, stated without a grid."""
    edited = ip.World(corrupt, ip.patch(site, source=ip.World(clean)))
    return (ip.evaluate(model, edited, metric) - ip.evaluate(model, corrupt, metric)).numpy()


MASK = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 1, 1]]).bool()


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(
    ("given", "as_site"),
    [
        (torch.tensor([2, 1, 0]), torch.tensor([2, 1, 0])),
        (torch.tensor([-1, -2, -3]), torch.tensor([-1, -2, -3])),
        (np.array([2, 1, 0]), torch.tensor([2, 1, 0])),
        (torch.tensor([2, 1, 0], dtype=torch.int32), torch.tensor([2, 1, 0])),
        (torch.tensor([[2], [1], [0]]), torch.tensor([[2], [1], [0]])),
        (torch.tensor([[0, 2], [1, 0], [2, 1]]), torch.tensor([[0, 2], [1, 0], [2, 1]])),
        ([[0, 2], [1, 0], [2, 1]], torch.tensor([[0, 2], [1, 0], [2, 1]])),
        ([[2], [1], [0]], torch.tensor([2, 1, 0])),
        (((2,), (1,), (0,)), torch.tensor([2, 1, 0])),
        ("mask", "mask"),
    ],
    ids=["ints", "from the end", "numpy", "int32", "column", "several", "lists", "lists of one", "tuples", "mask"],
)
def test_named_positions_of_each_row_are_those_of_a_site(model, given, as_site, padding):
    """As a site's own `pos`, whatever else the grid has and wherever the padding is."""
    clean = model.inputs([[1, 2, 3, 4], [5, 6, 9], [8, 2, 3, 9]], padding=padding)
    corrupt = model.inputs([[4, 3, 2, 1], [7, 3, 1], [9, 3, 2, 8]], padding=padding)
    mask = torch.zeros_like(clean.mask).scatter(1, clean.order, MASK & (torch.arange(4) < clean.lengths[:, None]))
    given, as_site = (mask if isinstance(x, str) else x for x in (given, as_site))
    metric = ip.logit_diff(3, 4)
    grid = ip.grid("resid_pre", layer=[0, 1], pos={"subject": given, "last": -1, "both": (0, 1)})
    result = ip.sweep(model, clean, corrupt, grid, metric=metric)
    for layer in (0, 1):
        for at, pos in enumerate((as_site, -1, (0, 1))):
            site = ip.site("resid_pre", layer=layer, pos=pos)
            expected = by_site(model, clean, corrupt, site, metric)
            np.testing.assert_allclose(result.effect[layer, at], expected, rtol=0, atol=1e-10)
    assert np.abs(result.effect).min() > 1e-6
    assert result.axes[1].labels == ("subject", "last", "both") and result.axes[1].values == ("subject", -1, (0, 1))
    assert result.sel(pos="subject").effect.shape == (2, 3)


def test_key_positions_of_each_row(model, inputs):
    at = torch.tensor([0, 1, 2])
    grid = ip.grid("scores", layer=1, pos=[-1], key_pos={"name": at})
    _, (cell,) = grid.cells(model, inputs)
    assert cell.sites == (ip.site("scores", layer=1, pos=-1, key_pos=at),)


def test_results_with_named_positions_are_saved(model, inputs, tmp_path):
    other = model.inputs([[4, 3, 2, 1], [7, 3, 6, 5], [9, 3, 2, 8]])
    grid = ip.grid("z", layer=0, pos={"subject": torch.tensor([0, 1, 2])})
    result = ip.sweep(model, inputs, other, grid, metric=ip.logit_diff(3, 4), path=tmp_path / "z")
    np.testing.assert_array_equal(ip.Result.load(tmp_path / "z").effect, result.effect)
    moved = ip.grid("z", layer=0, pos={"subject": torch.tensor([0, 1, 3])})
    with pytest.raises(InterpError, match="differs in"):
        ip.sweep(model, inputs, other, moved, metric=ip.logit_diff(3, 4), path=tmp_path / "z")


def test_rows_of_which_a_mask_takes_nothing_lack_the_cell(model, inputs):
    other = model.inputs([[4, 3, 2, 1], [7, 3, 6, 5], [9, 3, 2, 8]])
    mask = MASK.clone()
    mask[1] = False
    for pos in (mask, {"here": mask}):
        result = ip.sweep(model, inputs, other, ip.grid("resid_pre", layer=[0], pos=pos), metric=ip.logit_diff(3, 4))
        effect = result.effect.reshape(3)
        assert np.isnan(effect).tolist() == [False, True, False] and result.counts().tolist() in ([2], [[2]])
        expected = by_site(model, inputs, other, ip.site("resid_pre", 0, pos=mask), ip.logit_diff(3, 4))
        np.testing.assert_allclose(effect[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-10)
        assert "2 of 3 rows" in repr(result)
    with pytest.raises(SiteError, match="no token of any row"):
        ip.grid("resid_pre", layer=[0], pos={"here": mask & False}).cells(model, inputs)


@pytest.mark.parametrize(
    ("pos", "match"),
    [
        (torch.tensor([0, 1, 2]), "one a row"),  # as many as rows
        (np.array([0, 1, 2]), "one a row"),
        ([torch.tensor([0, 1])], "one position a row"),
        ([np.array([0, 1]), np.array([2, 3])], "one position a row"),
        ({"name": torch.tensor([0, 1])}, "2 rows, the inputs have 3"),
        ({"name": torch.tensor([[0, 1]])}, "1 rows, the inputs have 3"),
        ({"name": [[0], [1]]}, "2 rows, the inputs have 3"),
        ({"name": [[0], [1], [2, 3]]}, "give a mask"),
        ({"name": [[0], 1, [2]]}, "group of ints"),
        ({"name": torch.tensor([0.0, 1.0, 2.0])}, "float"),
        ({"name": torch.tensor([True, False, True])}, "bool"),
        ({"name": torch.tensor([0, 1, 4])}, "not in row 2"),
        ({"name": torch.ones(3, 5, dtype=torch.bool)}, "the mask is"),
        ({"name": torch.tensor([[0, 0], [0, 1], [1, 2]])}, "twice"),
    ],
)
def test_positions_that_could_be_read_two_ways_or_none(model, inputs, pos, match):
    other = model.inputs([[4, 3, 2, 1], [7, 3, 6, 5], [9, 3, 2, 8]])
    with pytest.raises(InterpError, match=match):
        ip.sweep(model, inputs, other, ip.grid("z", layer=0, pos=pos), metric=ip.logit_diff(3, 4))


def test_grids_of_tensors_compare():
    one, two = (ip.grid("z", layer=0, pos={"a": torch.tensor([0, n])}) for n in (1, 2))
    assert one == ip.grid("z", layer=0, pos={"a": torch.tensor([0, 1])}) != two
    assert hash(one) == hash(two) and one != "a grid"
    assert ip.grid("z", pos=np.array([0, 1])) == ip.grid("z", pos=torch.tensor([0, 1]))
