"""Layouts: where tokens are, whatever stands between them; programs on a part of a text with the rest in the past."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hooks as hk
from hooks import Inputs, World, site
from hooks.layout import Layout
from hooks.plan.columns import Columns
from hooks.program import State, visit
from hooks.resolving import resolve

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

HEADS, DIM = 3, 4
SIZES = {
    ("resid_pre", 0, None): {"dim": DIM},
    ("z", 0, None): {"head": HEADS, "dim": DIM},
    ("scores", 0, None): {"head": HEADS},
    ("pattern", 0, None): {"head": HEADS},
}


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """bool [B, T], each row with a real token, padded anywhere."""
    rows, width = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    listed = st.lists(st.booleans(), min_size=width, max_size=width).filter(any)
    return torch.tensor([draw(listed) for _ in range(rows)])


@given(masks())
@settings(max_examples=60, deadline=None)
def test_tokens_are_found_by_their_number(mask):
    columns = Inputs.of(torch.ones_like(mask).long(), mask).columns
    for row, real in enumerate(mask.tolist()):
        where = [c for c, r in enumerate(real) if r]
        asked = torch.arange(-1, mask.shape[1] + 1).expand(len(mask), -1)
        found, there = columns.find(asked)
        for number, col, here in zip(asked[row].tolist(), found[row].tolist(), there[row].tolist(), strict=True):
            assert here == (0 <= number < len(where))
            assert not here or col == where[number]


def test_an_evicted_token_leaves_and_no_number_moves():
    """Tokens 1 and 3 of five are gone, and the others lie where a cache put them."""
    columns = Columns(torch.tensor([[4, 0, 2]]), torch.ones(1, 3, dtype=torch.bool), torch.tensor([5]))
    found, there = columns.find(torch.tensor([[0, 1, 2, 3, 4]]))
    assert there.tolist() == [[True, False, True, False, True]]
    assert [int(found[0, p]) for p in (0, 2, 4)] == [1, 2, 0]
    assert torch.equal(columns.turned, columns.index)
    moved = Columns(columns.index, columns.real, columns.lengths, rotary=torch.tensor([[[2, 0, 1]]] * 3))
    assert moved.turned.shape == (3, 1, 3) and moved.rows(slice(0, 1)).turned.shape == (3, 1, 3)
    assert moved.cut(2).turned.tolist() == [[[2, 0]]] * 3


def with_a_past(inputs: Inputs, past: int) -> Layout:
    """The layout of the columns from `past` on, which see all: as a second chunk with a cache would be."""
    whole = inputs.columns
    queries = Columns(whole.index[:, past:], whole.real[:, past:], whole.lengths)
    return Layout(inputs.row_ids, queries, whole)


OPS = {
    "zero": hk.zero,
    "scale": lambda s: hk.scale(s, 0.3),
    "noise": lambda s: hk.noise(s, 0.7, seed=5),
    "clamp": lambda s: hk.clamp(s, 2.5),
}


@given(
    padding=st.sampled_from(["left", "right", "none"]),
    past=st.integers(0, 3),
    op=st.sampled_from(sorted(OPS)),
    name=st.sampled_from(["resid_pre", "z", "pattern", "scores"]),
    start=st.integers(0, 6),
    length=st.integers(1, 4),
    head=st.sampled_from([None, 1, (0, 2)]),
    key=st.sampled_from([None, 0, slice(1, 3)]),
    rows=st.sampled_from([None, (True, False)]),
)
@settings(max_examples=150, deadline=None)
def test_a_program_on_the_last_columns_is_that_on_all(padding, past, op, name, start, length, head, key, rows):
    """What a plan does at a token does not depend on which others are fed with it: edits and draws alike."""
    lengths = {"left": [7, 5], "right": [7, 5], "none": [7, 7]}[padding]
    side = "left" if padding == "left" else "right"
    mask = torch.stack([torch.arange(7) >= 7 - n if side == "left" else torch.arange(7) < n for n in lengths])
    inputs = Inputs.of(torch.ones(2, 7).long(), mask, row_ids=torch.tensor([11, 4]))
    place = site(name, layer=0, pos=slice(start, start + length))
    if head is not None and name != "resid_pre":
        place = place.at(head=head)
    if key is not None and name in ("pattern", "scores"):
        place = place.at(key_pos=key)
    item = OPS[op](place)
    if rows is not None:
        item = item.where(torch.tensor(rows))
    generator = torch.Generator().manual_seed(1)
    shape = {"resid_pre": (2, 7, DIM), "z": (2, 7, HEADS, DIM)}.get(name, (2, HEADS, 7, 7))
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    axis = 1 if name in ("resid_pre", "z") else 2
    cut = x.narrow(axis, past, 7 - past)
    world = World(inputs, item)

    def edited(layout: Layout, value: Tensor) -> Tensor | None:
        try:
            program = resolve(world, SIZES, {}, device=torch.device("cpu"), seed=3, layout=layout)
        except hk.errors.SiteError:  # nothing of it is among these tokens
            return None
        return visit(program, State(), place.key, value)[1]

    full, part = edited(Layout.of(inputs), x), edited(with_a_past(inputs, past), cut)
    expected = cut if full is None else full.narrow(axis, past, 7 - past)
    got = cut if part is None else part
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_the_offset_of_queries_among_keys():
    inputs = Inputs.of(torch.ones(2, 7).long())
    layout = with_a_past(inputs, 3)
    assert (layout.offset, len(layout)) == (3, 2)
    assert layout.window(slice(1, 2)).queries.index.tolist() == [[3, 4, 5, 6]]
    region = layout.resolve(site("pattern", layer=0, pos=-1, key_pos=0), {"head": HEADS})
    assert region.cols.tolist() == [[3], [3]] and region.key_cols.tolist() == [[0], [0]]
    whole = layout.entire(site("pattern", layer=0), {"head": HEADS})
    assert whole.shape == {"row": 2, "head": HEADS, "pos": 4, "key_pos": 7}
    assert len(Layout.of(inputs)) == 2 and Layout.of(inputs).offset == 0
    with pytest.raises(hk.errors.SiteError, match="not in row 0"):
        layout.resolve(site("resid_pre", layer=0, pos=1), {"dim": DIM})
