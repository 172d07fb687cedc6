"""Regions against a loop over rows: what a restricted site takes out, what it puts back, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hooks import Inputs, Site, site
from hooks.errors import ShapeError, SiteError
from hooks.plan.region import entire, resolve
from hooks.plan.sites import Span

hypothesis = pytest.importorskip("hypothesis")
assume, given, settings, st = hypothesis.assume, hypothesis.given, hypothesis.settings, hypothesis.strategies

HEADS, DIM = 3, 5


def entries(site: Site, row: int, mask: Tensor, shape: torch.Size | tuple[int, ...]) -> list[list[int]]:
    """What a site means in one row of an activation of `shape`: for each axis but the first, the indices in order."""
    real = mask[row].nonzero().flatten().tolist()
    found = []
    for axis, size in zip(site.axes[1:], shape[1:], strict=True):
        index = getattr(site, axis)
        if axis in ("pos", "key_pos"):
            if isinstance(index, Tensor) and index.dtype == torch.bool:
                found.append([column for column in real if index[row, column]])
                continue
            available = real
        else:
            available = list(range(size))
        if index is None:
            found.append(available)
        elif isinstance(index, Span):
            found.append(available[index.start : index.stop])
        else:
            listed = index[row].reshape(-1).tolist() if isinstance(index, Tensor) else index
            found.append([available[i] for i in (listed if isinstance(listed, list | tuple) else [listed])])
    return found


def chosen(site: Site, mask: Tensor, shape: torch.Size | tuple[int, ...], only: Tensor | None = None) -> Tensor:
    """bool of `shape`, True at the entries that a site means, and `only` [B] or [B,T] leaves.

    Every test of edits takes this to be what a restriction says; nothing of `hooks.region` is used for it.
    """
    found = torch.zeros(shape, dtype=torch.bool)
    for row in range(shape[0]):
        found[row][outer(entries(site, row, mask, shape))] = True
    if only is not None:
        where = only if only.ndim == 2 else only[:, None].expand(mask.shape)
        found &= where.reshape([n if axis in ("row", "pos") else 1 for axis, n in zip(site.axes, shape, strict=True)])
    return found


def outer(index: list[list[int]]) -> tuple[Tensor, ...]:
    """Lists of indices, one for each axis, as what takes every combination of them out of a tensor."""
    return torch.meshgrid(*(torch.tensor(one, dtype=torch.long) for one in index), indexing="ij")


def shape_of(site: Site, mask: Tensor) -> tuple[int, ...]:
    """The shape of a whole activation of the tests of this file."""
    rows, width = mask.shape
    return tuple({"row": rows, "pos": width, "key_pos": width, "head": HEADS, "dim": DIM}[axis] for axis in site.axes)


def sizes(site: Site) -> dict[str, int]:
    return {axis: size for axis, size in (("head", HEADS), ("dim", DIM)) if axis in site.axes}


def inputs_of(mask: Tensor) -> Inputs:
    return Inputs.of(torch.ones_like(mask, dtype=torch.long), mask)


def padded(lengths: list[int], side: str = "right") -> Tensor:
    column, length = torch.arange(max(lengths)), torch.tensor(lengths)[:, None]
    return column < length if side == "right" else column >= max(lengths) - length


# Round trips


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """Padding on either side, or anywhere."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    side = draw(st.sampled_from(["left", "right", "holes"]))
    if side != "holes":
        lengths = draw(st.lists(st.integers(1, width), min_size=rows, max_size=rows))
        return padded(lengths, side)
    bits = draw(st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=rows, max_size=rows))
    mask = torch.tensor(bits)
    mask[:, draw(st.integers(0, width - 1))] = True
    return mask


@st.composite
def positions(draw: st.DrawFn, mask: Tensor):
    """One of the forms in which positions are given."""
    rows, shortest = len(mask), int(mask.sum(1).min())
    bound = st.one_of(st.none(), st.integers(-7, 7))
    one = st.integers(-shortest, shortest - 1)
    form = draw(st.sampled_from(["all", "int", "ints", "span", "mask", "rows", "ragged"]))
    if form == "all":
        return None
    if form == "int":
        return draw(one)
    if form == "span":
        return Span(draw(bound), draw(bound))
    if form == "mask":
        bits = draw(st.lists(st.booleans(), min_size=mask.numel(), max_size=mask.numel()))
        return torch.tensor(bits).reshape(mask.shape) & mask
    # Distinct positions, each from either end.
    count = draw(st.integers(1, shortest))
    distinct = st.lists(st.integers(0, shortest - 1), min_size=count, max_size=count, unique=True)
    if form == "ints":
        return tuple(p - shortest if (p % 2 and bool((mask.sum(1) == shortest).all())) else p for p in draw(distinct))
    listed = [draw(distinct) for _ in range(rows)]
    lengths = mask.sum(1)
    table = torch.tensor(listed)
    table = torch.where(torch.tensor(draw(st.booleans())), table - lengths[:, None], table)
    table = torch.where(table < -lengths[:, None], table + 1, table)
    return table[:, 0] if form == "rows" else table


@st.composite
def regions(draw: st.DrawFn) -> tuple[Site, Tensor, Tensor | None]:
    """A restricted site, a mask of real tokens, and perhaps a mask of rows or tokens."""
    mask = draw(masks())
    name = draw(st.sampled_from(["resid_pre", "z", "pattern", "logits"]))
    axes = Site(name, None if name == "logits" else 0).axes
    restrictions: dict = {"pos": draw(positions(mask))}
    if "key_pos" in axes:
        restrictions["key_pos"] = draw(positions(mask))
    if "head" in axes:
        heads = st.lists(st.integers(0, HEADS - 1), min_size=1, unique=True).map(tuple)
        restrictions["head"] = draw(st.one_of(st.none(), st.integers(-HEADS, HEADS - 1), heads))
    if "dim" in axes:
        dims = st.lists(st.integers(0, DIM - 1), min_size=1, unique=True).map(tuple)
        spans = st.sampled_from([Span(1, None), Span(None, -2), Span(-3, -1)])
        a_row = st.lists(st.integers(0, DIM - 1), min_size=2, max_size=2, unique=True)
        table = st.lists(a_row, min_size=len(mask), max_size=len(mask)).map(torch.tensor)
        restrictions["dim"] = draw(st.one_of(st.none(), st.integers(-DIM, DIM - 1), dims, spans, table))
    only = None
    if draw(st.booleans()):
        only = torch.tensor(draw(st.lists(st.booleans(), min_size=mask.numel(), max_size=mask.numel())))
        only = only.reshape(mask.shape) if draw(st.booleans()) else only[: len(mask)]
    return Site(name, None if name == "logits" else 0, **restrictions), mask, only


@settings(max_examples=100)
@given(regions(), st.integers(0, 1000))
def test_get_and_put_against_a_loop(case, seed):
    place, mask, only = case
    shape = shape_of(place, mask)
    expected = chosen(place, mask, shape, only)
    assume(bool(expected.any()))
    region = resolve(place, inputs_of(mask).columns, sizes(place), only)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
    before = x.detach().clone()

    part = region.get(x)
    valid = region.full_valid()
    assert tuple(part.shape) == tuple(region.shape[axis] for axis in place.axes)
    assert valid.shape == part.shape and int(valid.sum()) == int(expected.sum())
    for row in range(len(mask)):  # in the order in which the entries were named, row after row
        index = outer(entries(place, row, mask, shape))
        assert torch.equal(part[row][valid[row]], x[row][index][expected[row][index]])

    assert torch.equal(region.put(x, part), x)
    new = torch.randn(part.shape, dtype=torch.float64, generator=generator, requires_grad=True)
    out = region.put(x, new)
    assert torch.equal(out != x, expected)
    assert torch.equal(region.get(out)[valid], new[valid])
    assert torch.equal(x, before)

    to_x, to_new = torch.autograd.grad(out.sum(), (x, new), materialize_grads=True)
    assert torch.equal(to_x, (~expected).double())
    assert torch.equal(to_new, valid.double())


@given(regions(), st.data())
def test_a_range_of_the_rows_is_resolved_as_the_whole_batch_is(case, data):
    place, mask, only = case
    shape = shape_of(place, mask)
    assume(bool(chosen(place, mask, shape, only).any()))
    start = data.draw(st.integers(0, len(mask) - 1))
    window = slice(start, data.draw(st.integers(start + 1, len(mask))))
    region = resolve(place, inputs_of(mask).columns, sizes(place), only)
    cut = region.rows(window)
    assert torch.equal(cut.cols, region.cols[window])
    x = torch.randn(shape)
    assert torch.equal(cut.get(x[window]), region.get(x)[window])
    assert torch.equal(cut.full_valid(), region.full_valid()[window])
    part = torch.randn_like(region.get(x))
    assert torch.equal(cut.put(x[window], part[window]), region.put(x, part)[window])


@pytest.mark.parametrize("axis", ["pos", "key_pos"])
@pytest.mark.parametrize("start", [None, -7, -4, -2, 0, 1, 3])
def test_a_span_takes_of_each_row_what_a_slice_takes(axis, start):
    mask = padded([6, 3, 4], "left")
    for stop in (None, -5, -1, 1, 2, 5, 9):
        place = site("scores", 0, **{axis: slice(start, stop)})
        expected = chosen(place, mask, shape_of(place, mask))
        if not expected.any():
            assert "no token" in refused(place, mask)
            continue
        region = resolve(place, inputs_of(mask).columns, sizes(place))
        x = torch.zeros(shape_of(place, mask))
        assert torch.equal(region.put(x, torch.ones_like(region.get(x))).bool(), expected)


def test_entire_is_every_column():
    mask = padded([2, 4], "left")
    for place in (site("resid_pre", 0), site("z", 0), site("scores", 0), site("logits")):
        x = torch.randn(shape_of(place, mask))
        region = entire(place, inputs_of(mask).columns, sizes(place))
        assert torch.equal(region.get(x), x)
        assert torch.equal(region.put(x, x + 1), x + 1)
        assert [region.shape[axis] for axis in place.axes] == list(x.shape)


def test_a_bool_mask_leaves_the_columns_of_other_rows_alone():
    """A row with fewer chosen tokens than the widest one is filled up, and the filling is never written."""
    mask = padded([4, 2, 3], "right")
    pos = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    place = site("z", 0, pos=pos, head=(2, 0))
    x = torch.zeros(shape_of(place, mask))
    region = resolve(place, inputs_of(mask).columns, sizes(place))
    out = region.put(x, torch.ones_like(region.get(x)))
    assert torch.equal(out.bool()[..., 0], pos[:, :, None] & torch.tensor([True, False, True]))


# Refusals


def refused(place: Site, mask: Tensor, only: Tensor | None = None) -> str:
    with pytest.raises((SiteError, ShapeError)) as caught:
        resolve(place, inputs_of(mask).columns, sizes(place), only)
    return str(caught.value)


@pytest.mark.parametrize("axis", ["pos", "key_pos"])
@pytest.mark.parametrize(
    "index",
    [4, -5, (0, 4), torch.tensor([0, 4]), torch.tensor([[0, 1], [-5, 1]])],
    ids=["int", "negative", "ints", "a row", "several a row"],
)
def test_a_position_outside_a_row_names_the_row_and_its_length(axis, index):
    text = refused(site("pattern", 0, **{axis: index}), padded([6, 4]))
    assert "row 1" in text and "4 tokens" in text and axis in text


@pytest.mark.parametrize("axis", ["pos", "key_pos"])
@pytest.mark.parametrize("index", [(0, -4), torch.tensor([[1, 2], [3, -1]]), torch.tensor([[1, 1], [0, 3]])])
def test_a_position_named_twice_is_refused(axis, index):
    """As 3 and -1 in a row of four; no test of numbers alone finds it."""
    assert "twice" in refused(site("scores", 0, **{axis: index}), padded([4, 4]))
    assert "twice" in refused(site("scores", 0, **{axis: index}), padded([4, 4, 6])[:2])


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (site("z", 0, head=3), ["head 3", "0 .. 2"]),
        (site("z", 0, head=(0, -4)), ["0 .. 2"]),
        (site("z", 0, head=Span(3, 9)), ["selects nothing"]),
        (site("resid_pre", 0, dim=5), ["dimension 5", "0 .. 4"]),
        (site("resid_pre", 0, dim=(1, -6)), ["0 .. 4"]),
        (site("resid_pre", 0, dim=Span(5, None)), ["selects nothing"]),
        (site("logits", dim=torch.tensor([[0, 1], [5, 1]])), ["5", "0 .. 4"]),
        (site("logits", dim=torch.tensor([[0, 1], [-1, 1]])), ["-1", "0 .. 4"]),
        (site("logits", dim=torch.tensor([[0, 1]])), ["1 rows", "have 2"]),
        (site("resid_pre", 0, pos=torch.tensor([0, 1, 2])), ["3 rows", "have 2"]),
        (site("resid_pre", 0, pos=torch.ones(3, 6, dtype=torch.bool)), ["3 rows", "have 2"]),
        (site("resid_pre", 0, pos=torch.ones(2, 5, dtype=torch.bool)), ["[2, 5]", "[2, 6]"]),
        (site("resid_pre", 0, pos=torch.ones(2, 6, dtype=torch.bool)), ["padding"]),
        (site("scores", 0, key_pos=torch.ones(2, 6, dtype=torch.bool)), ["padding"]),
        (site("resid_pre", 0, pos=torch.zeros(2, 6, dtype=torch.bool)), ["no token"]),
        (site("resid_pre", 0, pos=Span(6, None)), ["no token"]),
        (site("scores", 0, key_pos=Span(2, 2)), ["no token"]),
    ],
    ids=str,
)
def test_what_is_not_there_is_refused(place, words):
    text = refused(place, padded([6, 4]))
    assert str(place) in text
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    "place", [site("z", 0, head=(2, -1)), site("resid_pre", 0, dim=(0, 1, -5)), site("pattern", 0, head=(-3, 1, 0))]
)
def test_a_head_or_dimension_named_twice_is_refused(place):
    """Writing one entry twice has no defined outcome."""
    assert "twice" in refused(place, padded([4, 4]))


@pytest.mark.parametrize("only", [torch.ones(3, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool), torch.ones(2)])
def test_where_takes_a_mask_of_rows_or_tokens(only):
    assert "where" in refused(site("resid_pre", 0), padded([6, 4]), only)
