"""Functions of queries and keys in every dtype, under what plans go through in training."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import hooks as hk
from hooks import Inputs, Intervention, site
from hooks.errors import ShapeError, SiteError
from hooks.layout import Layout
from hooks.plan.context import Context
from hooks.plan.operation import Op
from hooks.plan.operations.attention import Attend, AttendBack, ForbidBack
from hooks.plan.operations.counterfactual import RandomPattern, ReversedPattern, ShuffledPattern, UniformPattern
from hooks.plan.operations.moving import CopyScores, FromPositions
from hooks.plan.region import resolve
from tests import zoo

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = {"head": 3, "dim": 6}


def case(op: Op, place: hk.Site, dtype: torch.dtype, *reads: tuple[int, ...]) -> tuple[Tensor, list[Tensor], Context]:
    """A random value at a place of left-padded rows, and random reads of given shapes."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    inputs = Inputs.of(torch.ones_like(mask), mask)
    sizes = {axis: SIZES[axis] for axis in ("head", "dim") if axis in place.axes}
    whole = {"row": 2, "pos": 5, "key_pos": 5, **sizes}
    region = resolve(place, inputs.columns, sizes)
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(s, generator=generator) for s in ([whole[a] for a in place.axes], *reads)]
    ctx = Layout.of(inputs).context(region, 0, slice(0, 2), torch.device("cpu"))
    return region.get(draw[0].to(dtype)), [r.to(dtype) for r in draw[1:]], ctx


CASES: dict[str, tuple[Op, hk.Site, tuple[tuple[int, ...], ...]]] = {
    "attend": (Attend(torch.eye(5).double()), site("pattern", 0), ()),
    "attend, row by row": (Attend(torch.eye(3).expand(2, 3, 3)), site("pattern", 0, head=1, pos=slice(1, None)), ()),
    "attend_back": (AttendBack(1), site("pattern", 0, head=(0, 2)), ()),
    "forbid_back": (ForbidBack(1), site("scores", 0), ()),
    "random_pattern": (RandomPattern(3), site("pattern", 0, head=1), ()),
    "uniform_pattern": (UniformPattern(), site("pattern", 0, key_pos=(0, 2)), ()),
    "reversed_pattern": (ReversedPattern(), site("pattern", 0), ()),
    "shuffled_pattern": (ShuffledPattern(3), site("pattern", 0, head=(0, 2)), ()),
    "copy_scores": (CopyScores(torch.tensor([[[2, 4]], [[0, 1]]])), site("logits", pos=-1), ((2, 1, 1, 2),)),
    "from_positions": (FromPositions(torch.tensor([0, 0, 1])), site("q_input", 1, pos=(0, 1, 2)), ((2, 3, 6),)),
}
each_case = pytest.mark.parametrize("name", list(CASES))


@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_every_dtype(name, dtype):
    op, place, reads = CASES[name]
    x, values, ctx = case(op, place, dtype, *reads)
    before = [t.clone() for t in (x, *values)]
    out = op(x, *values, ctx=ctx)
    assert out.shape == x.shape and out.dtype == dtype and not torch.equal(out, x)
    assert all(torch.equal(a, b) for a, b in zip((x, *values), before, strict=True))
    wide, more, _ = case(op, place, torch.float64, *reads)
    exact = op(wide, *more, ctx=ctx).to(dtype)
    real = exact.isfinite() & (exact.abs() < 1e4)
    torch.testing.assert_close(out[real], exact[real], rtol=0.02, atol=0.02)


@each_case
def test_no_value_is_read_on_the_host(name):
    op, place, reads = CASES[name]
    x, values, ctx = case(op, place, torch.float32, *reads)
    mode = FakeTensorMode()

    def fake(value):
        return mode.from_tensor(value) if isinstance(value, Tensor) else value

    with mode:
        faked = dataclasses.replace(ctx, **{f.name: fake(getattr(ctx, f.name)) for f in dataclasses.fields(ctx)})
        mine = dataclasses.replace(op, **{n: fake(v) for n, v in op.parameters().items()})
        out = mine(fake(x), *map(fake, values), ctx=faked)
    assert out.shape == x.shape


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", ["attend_back", "forbid_back", "attend", "attend, row by row"])
def test_queries_and_keys_by_hand(name, padding):
    """Entry by entry, in the positions of real tokens, whatever the padding."""
    model = zoo.wrapped("small_ln_learned")
    x = model.inputs([[3, 1, 4, 1, 5, 9], [2, 6, 5], [8, 9, 7, 9]], padding=padding)
    given = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [0.5, 0.25, 0.25, 0], [0, 0.125, 0.5, 0.375]]).double()
    each = torch.stack([given, given.roll(1, 0).tril(), given.flip(0).tril()])
    ops = {"attend_back": AttendBack(2), "forbid_back": ForbidBack(1), "attend": Attend(given)}
    place = site("scores" if name == "forbid_back" else "pattern", 0)
    base = model.run(x, capture=place).tape[place]
    changed = 0
    for first in (0, 1):
        item = Intervention(place.at(pos=slice(first, None)), ops.get(name, Attend(each)))
        found = model.run(x, item, capture=place).tape[place]
        for row, length in enumerate(x.lengths.tolist()):
            cols = x.order[row, :length]
            before, after = (value[row][:, cols][:, :, cols] for value in (base, found))
            for query in range(length):
                wanted = before[:, query].clone()
                pattern = (each[row] if name != "attend" else given)[min(query, 3)]
                if name == "attend_back" and query >= first:
                    wanted[:] = 0
                    wanted[:, query - 2 if query >= 2 else query] = 1
                elif name == "forbid_back" and query >= max(first, 1):
                    wanted[:, query - 1] = -torch.inf
                elif name in ("attend", "attend, row by row") and first <= query < 4 and bool(pattern.any()):
                    wanted[:] = 0
                    wanted[:, :4] = pattern[: wanted.shape[1]]
                said = f"row {row}, query {query} of those from {first} on"
                torch.testing.assert_close(after[:, query], wanted, rtol=0, atol=1e-12, msg=said)
                changed += int(not torch.equal(wanted, before[:, query]))
    assert changed >= 9


@pytest.mark.parametrize("padding", ["left", "right"])
def test_values_of_other_positions_and_sites_by_hand(padding):
    model = zoo.wrapped("small_ln_learned")
    x = model.inputs([[3, 1, 4, 1, 5, 9], [2, 6, 5], [8, 9, 7, 9]], padding=padding)
    early, late = site("resid_pre", 0, pos=(0, 1, 2)), site("resid_post", 0, pos=(0, 1, 2))
    moved = Intervention(late, FromPositions(torch.tensor([2, 0, 0])), (hk.here(early),))
    tape = model.run(x, moved, capture=[early, late]).tape
    torch.testing.assert_close(tape[late], tape[early][:, [2, 0, 0]], rtol=0, atol=0)

    last, scores = site("logits", pos=-1), site("scores", 1, head=1, pos=-1, key_pos=(0, -1))
    tokens = torch.tensor([[[4, 7]], [[1, 2]], [[9, 0]]])
    tape = model.run(x, Intervention(last, CopyScores(tokens), (hk.here(scores),)), capture=[last, scores]).tape
    for row, (one, two) in enumerate(tokens[:, 0].tolist()):
        wanted = torch.full((zoo.VOCAB,), -1e9, dtype=torch.float64)
        wanted[one], wanted[two] = tape[scores][row, 0, 0]
        assert torch.equal(tape[last][row, 0], wanted)


@each_case
def test_compiled_whole_and_over_members(name):
    op, place, reads = CASES[name]
    x, values, ctx = case(op, place, torch.float32, *reads)
    expected = op(x, *values, ctx=ctx)
    torch.compiler.reset()  # every case is the same line, and a line has only so many graphs
    compiled = torch.compile(lambda x, *v: op(x, *v, ctx=ctx), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, *values), expected)
    many = torch.vmap(lambda x, *v: op(x, *v, ctx=ctx))(torch.stack([x, x]), *(torch.stack([v, v]) for v in values))
    assert torch.equal(many[0], expected)


@pytest.mark.parametrize(
    ("item", "error", "words"),
    [
        (Intervention(site("z", 0), AttendBack(1)), SiteError, "scores or pattern"),
        (Intervention(site("pattern", 0), Attend(torch.ones(3, 2, 2))), ShapeError, "3 rows"),
        (
            Intervention(site("logits", pos=-1), CopyScores(torch.tensor([[1, 2]])), (hk.here(site("scores", 0)),)),
            ShapeError,
            "one head",
        ),
    ],
)
def test_what_does_not_fit(item, error, words):
    model = hk.wrap(zoo.make("gpt2"))
    with pytest.raises(error, match=words):
        model.run(model.inputs([[1, 2, 3], [4, 5, 6]]), item)
