"""Every function of a plan as a function of tensors: pure, in each dtype, under fake tensors, vmap, torch.compile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

import hooks
from hooks import Inputs, Site, Span, site
from hooks.layout import Layout
from hooks.plan.context import Context, Reference
from hooks.plan.operation import Op
from hooks.plan.operations.attention import Knockout
from hooks.plan.operations.custom import Custom
from hooks.plan.operations.patching import Freeze, Patch, PatchConstant
from hooks.plan.operations.references import Mean, Resample
from hooks.plan.operations.subspaces import Interchange, ProjectOut
from hooks.plan.operations.table import OPERATIONS
from hooks.plan.operations.values import Clamp, Noise, Recompute, Scale, Steer, Zero
from hooks.plan.region import resolve
from tests.turns import in_turn

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROWS, WIDTH, HEADS, DIM, MEMBERS = 2, 5, 4, 6, 3
PLACES = [
    site("resid_pre", 1),
    site("resid_post", 0, pos=Span(1, None)),
    site("z", 1, head=(2, 0), pos=-1),
    site("z", 0),
    site("scores", 0, head=1),
]
# Functions that apply at sites of one kind only: tests/hooks/test_patterns.py.
ELSEWHERE = {
    *("attend", "attend_back", "forbid_back", "copy_scores", "from_positions"),
    *("random_pattern", "uniform_pattern", "reversed_pattern", "shuffled_pattern"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A function at a site: its value, what it reads, and where it is."""

    op: Op
    x: Tensor
    reads: tuple[Tensor, ...]
    ctx: Context

    def __call__(self, x: Tensor, *reads: Tensor) -> Tensor:
        return self.op(x, *reads, ctx=self.ctx)


def cases(place: Site, dtype: torch.dtype) -> dict[str, Case]:
    """Every function at a place, with parameters in each form that it takes."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    inputs = Inputs.of(torch.ones_like(mask), mask, torch.tensor([7, 3]))
    sizes = {axis: size for axis, size in (("head", HEADS), ("dim", DIM)) if axis in place.axes}
    region = resolve(place, inputs.columns, sizes)
    whole = {"row": ROWS, "pos": WIDTH, "key_pos": WIDTH, **sizes}
    x = region.get(random(*(whole[axis] for axis in place.axes)))
    ctx = Layout.of(inputs).context(region, 11, slice(0, ROWS), torch.device("cpu"))
    last, tail = x.shape[-1], x.shape[2:]
    # A reference set has every position, but where the site lists some.
    loose = tuple(i for i, axis in enumerate(place.axes) if axis in ("pos", "key_pos") and place.pos != -1)
    reference = random(7, *[WIDTH if i in loose else n for i, n in enumerate(x.shape)][1:])
    flags = [n if place.axes[i] in ("pos", "key_pos") else 1 for i, n in enumerate(reference.shape)]
    real = torch.rand([7, *flags[1:]], generator=generator) < 0.7
    real[0] = True
    some = dataclasses.replace(ctx, references=(Reference(real, loose),))
    none = dataclasses.replace(ctx, references=(Reference(None, loose),))
    ctx = dataclasses.replace(ctx, references=(None,))
    found = {
        "patch": Case(Patch(), x, (random(*x.shape),), ctx),
        "patch_constant": Case(PatchConstant(), x, (random(*x.shape),), ctx),
        "freeze": Case(Freeze(), x, (random(*x.shape),), ctx),
        "clamp": Case(Clamp(0.3), x, (), ctx),
        "clamp a tensor": Case(Clamp(random(*tail)), x, (), ctx),
        "zero": Case(Zero(), x, (), ctx),
        "mean": Case(Mean(), x, (reference,), none),
        "mean of a ragged set": Case(Mean(), x, (reference,), some),
        "mean pooled": Case(Mean(pooled=True), x, (reference,), none),
        "mean pooled of a ragged set": Case(Mean(pooled=True), x, (reference,), some),
        "resample": Case(Resample(3), x, (reference,), none),
        "noise": Case(Noise(0.5, 2), x, (), ctx),
        "noise by entry": Case(Noise(random(last).abs(), 2), x, (), ctx),
        "steer": Case(Steer(random(last), 2.0), x, (), ctx),
        "steer, a tensor's scale": Case(Steer(random(*tail), random()), x, (), ctx),
        "scale": Case(Scale(-0.5), x, (), ctx),
        "scale a tensor": Case(Scale(random(*x.shape)), x, (), ctx),
        "project_out": Case(ProjectOut(random(last)), x, (), ctx),
        "project_out two": Case(ProjectOut(random(2, last)), x, (), ctx),
        "interchange": Case(Interchange(random(last)), x, (random(*x.shape),), ctx),
        "interchange two": Case(Interchange(random(2, last)), x, (random(*x.shape),), ctx),
        "knockout": Case(Knockout(), x, (), ctx),
        "recompute": Case(Recompute(), x, (), ctx),
        "intervene": Case(Custom(lambda x, y, ctx: torch.lerp(x, y, 0.25)), x, (random(*x.shape),), ctx),
    }
    assert {case.op.name for case in found.values()} == {*OPERATIONS, "intervene"} - ELSEWHERE
    return found


NAMES = list(cases(PLACES[0], torch.float64))
each_place = pytest.mark.parametrize("place", PLACES, ids=str)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    # Of numbers of size one, summed over a handful of entries; a batched kernel may add them in another order.
    return {"rtol": 0.0, "atol": {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2}.get(dtype, 8e-2)}


def same(a: Tensor, b: Tensor, name: str) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape and a.device == b.device, name
    torch.testing.assert_close(a, b, **tolerance(a.dtype), msg=lambda text: f"{name}\n{text}")


@each_place
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_function_keeps_shape_and_dtype_and_its_arguments(place, dtype):
    for name, case in cases(place, dtype).items():
        given = [case.x, *case.reads, *(v for v in case.op.parameters().values() if isinstance(v, Tensor))]
        given += [v for v in vars(case.ctx).values() if isinstance(v, Tensor)]
        before, versions = [t.clone() for t in given], [t._version for t in given]
        out = case(case.x, *case.reads)
        assert out.shape == case.x.shape and out.dtype == dtype, name
        assert all(torch.equal(t, b) and t._version == v for t, b, v in zip(given, before, versions, strict=True)), name
        assert out.isfinite().all() or name == "knockout", name
        assert not torch.equal(out, case.x) or name == "recompute", name
        assert torch.equal(out, case(case.x, *case.reads)), name  # a second call draws the same


@each_place
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_function_computes_alike_in_every_dtype(place, dtype):
    """Rounded arguments give the rounded outcome: no dtype takes another path."""
    wide, narrow = cases(place, torch.float64), cases(place, dtype)
    for name in NAMES:
        exact, out = wide[name], narrow[name]
        reference = exact(exact.x, *exact.reads)
        scale = float(torch.where(reference.isinf(), 0, reference).abs().max()) + 1
        found = out(out.x, *out.reads).double()
        assert torch.equal(found.isinf(), reference.isinf()), name
        difference = torch.where(reference.isinf(), 0, found - reference).abs().max()
        assert difference < 12 * scale * torch.finfo(dtype).eps, name


def faked(mode: FakeTensorMode, value):
    """A copy in which every tensor is one that has no data."""
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    if isinstance(value, tuple):
        return tuple(faked(mode, v) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: faked(mode, getattr(value, f.name)) for f in dataclasses.fields(value)}
        )
    return value


@pytest.mark.parametrize(("place", "dtype"), [*in_turn(PLACES, DTYPES), *in_turn(PLACES, DTYPES, start=2)], ids=str)
def test_a_function_reads_no_value_on_the_host(place, dtype):
    for name, case in cases(place, dtype).items():
        mode = FakeTensorMode()
        with mode:
            fake = faked(mode, case)
            out = fake(fake.x, *fake.reads)
        assert (out.shape, out.dtype, out.device) == (case.x.shape, dtype, case.x.device), name


def test_fake_tensors_would_catch_a_read_on_the_host():
    bad = [
        lambda x, ctx: x * float(x.max()),
        lambda x, ctx: x if bool((x > 0).all()) else -x,
        lambda x, ctx: x + x[x > 0].sum(),
        lambda x, ctx: x * x.mean().item(),
    ]
    for function in bad:
        case = dataclasses.replace(cases(PLACES[0], torch.float32)["zero"], op=Custom(function))
        mode = FakeTensorMode()
        with mode:
            fake = faked(mode, case)
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                fake(fake.x)


@each_place
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vmap_over_members(place, dtype):
    """Over x alone, and over x and all that is read; parameters are shared."""
    for name, case in cases(place, dtype).items():
        x = torch.stack([case.x * (1 + n) for n in range(MEMBERS)])
        one = torch.vmap(lambda x, case=case: case(x, *case.reads))(x)
        same(one, torch.stack([case(part, *case.reads) for part in x]), name)
        if case.reads:
            reads = [torch.stack([read - n for n in range(MEMBERS)]) for read in case.reads]
            both = torch.vmap(case)(x, *reads)
            expected = [case(x[n], *(read[n] for read in reads)) for n in range(MEMBERS)]
            same(both, torch.stack(expected), name)
            assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda v: Steer(v), (DIM,)),
        (lambda v: Steer(torch.ones(DIM).double(), v), ()),
        (lambda v: Clamp(v), (DIM,)),
        (lambda v: Scale(v), (DIM,)),
        (lambda v: ProjectOut(v), (DIM,)),
        (lambda v: Interchange(v), (2, DIM)),
    ],
    ids=["steer", "steer.scale", "clamp", "scale", "project_out", "interchange"],
)
def test_vmap_over_what_is_learned(make: Callable[[Tensor], Op], size: tuple[int, ...]):
    """An ensemble of directions: parameters along a members axis, with their gradients."""
    case = cases(PLACES[0], torch.float64)["patch"]
    values = torch.randn(MEMBERS, *size, dtype=torch.float64)

    def loss(v: Tensor) -> Tensor:
        return make(v)(case.x, *case.reads, ctx=case.ctx).square().sum()

    same(torch.vmap(loss)(values), torch.stack([loss(v) for v in values]), "value")
    gradients = torch.stack([torch.func.grad(loss)(v) for v in values])
    same(torch.vmap(torch.func.grad(loss))(values), gradients, "gradient")
    assert gradients.abs().max() > 1e-3


@pytest.fixture
def compiler():
    """Compiled code of one test is not that of the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def all_of(found: dict[str, Case]) -> Callable[..., list[Tensor]]:
    """Every function of a place as one, which is quicker to compile than each by itself."""

    def everything(x: Tensor, reads: dict[str, tuple[Tensor, ...]]) -> list[Tensor]:
        return [case(x, *reads[name]) for name, case in found.items()]

    return everything


@pytest.mark.parametrize(
    ("place", "dtype"), [(PLACES[1], torch.float32), (PLACES[2], torch.bfloat16), (PLACES[4], torch.float16)], ids=str
)
def test_compiled_whole(place, dtype, compiler):
    """One graph without a break, equal to the eager functions."""
    found = cases(place, dtype)
    reads, x = {name: case.reads for name, case in found.items()}, found["zero"].x
    compiled = torch.compile(all_of(found), fullgraph=True, backend="eager")
    for (name, case), out in zip(found.items(), compiled(x, reads), strict=True):
        same(out, case(x, *case.reads), name)


@pytest.mark.full
def test_compiled_through_autograd(compiler):
    """With gradients; AOTAutograd makes the graph functional, so it would refuse or copy an in-place write."""
    dtype = torch.float64
    found = cases(PLACES[3], dtype)
    reads = {name: case.reads for name, case in found.items()}
    x = found["zero"].x.clone().requires_grad_()
    everything = all_of(found)
    eager, traced = everything(x, reads), torch.compile(everything, fullgraph=True, backend="aot_eager")(x, reads)
    for name, a, b in zip(found, traced, eager, strict=True):
        same(a, b, name)
    # Not of the knock-out, whose infinities have no gradient.
    keep = [i for i, name in enumerate(found) if name != "knockout"]
    gradients = [torch.autograd.grad(sum(out[i].double().sum() for i in keep), x)[0] for out in (traced, eager)]
    torch.testing.assert_close(*gradients, rtol=0, atol=20 * tolerance(dtype)["atol"])
    assert gradients[0].abs().max() > 0.1


def test_a_plan_is_compiled_as_a_function_of_a_direction(compiler):
    """What a user writes, through the region that a site means: taken out, steered, put back."""
    place = site("z", 0, head=1, pos=Span(1, None))
    inputs = Inputs.of(torch.ones(ROWS, WIDTH, dtype=torch.int64))
    region = resolve(place, inputs.columns, {"head": HEADS, "dim": DIM})
    ctx = Layout.of(inputs).context(region, 0, slice(0, ROWS), torch.device("cpu"))

    def step(x: Tensor, vector: Tensor) -> Tensor:
        return region.put(x, hooks.steer(place, vector).op(region.get(x), ctx=ctx))

    x, vector = torch.randn(ROWS, WIDTH, HEADS, DIM), torch.randn(DIM)
    expected = x.clone()
    expected[:, 1:, 1] += vector
    same(torch.compile(step, fullgraph=True, backend="eager")(x, vector), expected, "step")
    same(torch.vmap(step, in_dims=(None, 0))(x, torch.stack([vector, 0 * vector]))[0], expected, "members")
