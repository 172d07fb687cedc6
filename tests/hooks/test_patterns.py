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


@each_case
def test_compiled_whole_and_over_members(name):
    op, place, reads = CASES[name]
    x, values, ctx = case(op, place, torch.float32, *reads)
    expected = op(x, *values, ctx=ctx)
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
