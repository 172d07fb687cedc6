"""Values and sources that fit a site, and those that are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hooks
from hooks import Context, Inputs, Site, Span, World, run_worlds, site
from hooks.errors import InterpError, PlanError, ShapeError, SiteError
from hooks.layout import Layout
from hooks.plan.context import fit
from hooks.plan.operation import Op
from hooks.plan.operations.values import Noise
from hooks.plan.plan import as_plan
from hooks.plan.region import resolve
from tests import oracle
from tests.hooks.formulas import normals
from tests.hooks.test_oracle_sites import (
    EXECUTORS,
    LOGITS,
    close,
    compare,
    replaced,
    setting,
)

# What fits, and what is refused


def sizes_of(place: Site) -> dict[str, int]:
    return {axis: size for axis, size in (("head", 4), ("dim", 5)) if axis in place.axes}


def at_z(**restrictions) -> tuple[Tensor, Context]:
    """A part of z [B=2, T=3, H=4, D=5], and its context."""
    place = site("z", 0, **restrictions)
    inputs = Inputs.of(torch.ones(2, 3, dtype=torch.long))
    region = resolve(place, inputs.columns, sizes_of(place))
    return region.get(normals(2, 3, 4, 5)), Layout.of(inputs).context(region, 0, slice(0, 2), torch.device("cpu"))


@pytest.mark.parametrize(
    ("restriction", "shape", "where"),
    [
        ({}, (5,), (1, 1, 1, 5)),
        ({}, (4, 5), (1, 1, 4, 5)),
        ({}, (3, 4, 5), (1, 3, 4, 5)),
        ({}, (2, 3, 4, 5), (2, 3, 4, 5)),
        ({"head": 1}, (5,), (1, 1, 1, 5)),
        ({"head": 1}, (3, 5), (1, 3, 1, 5)),
        ({"head": 1}, (2, 3, 5), (2, 3, 1, 5)),
        ({"head": 1}, (2, 3, 1, 5), (2, 3, 1, 5)),
        ({"head": 1}, (1, 5), (1, 1, 1, 5)),
        ({"head": (1,)}, (1, 5), (1, 1, 1, 5)),
        ({"head": (1, 2)}, (2, 5), (1, 1, 2, 5)),
        ({"pos": -1}, (4, 5), (1, 1, 4, 5)),
        ({"pos": -1}, (2, 4, 5), (2, 1, 4, 5)),
        ({"pos": -1, "head": 0}, (2, 5), (2, 1, 1, 5)),
        ({"pos": -1, "head": 0, "dim": 3}, (2,), (2, 1, 1, 1)),
        ({"pos": -1, "head": 0, "dim": 3}, (2, 1, 1, 1), (2, 1, 1, 1)),
        ({"dim": 3}, (3, 4), (1, 3, 4, 1)),
        ({"dim": 3}, (4,), (1, 1, 4, 1)),
        ({"pos": (0, 2), "dim": (1, 2)}, (2, 4, 2), (1, 2, 4, 2)),
    ],
    ids=str,
)
def test_values_fit_the_last_axes(restriction, shape, where):
    x, ctx = at_z(**restriction)
    value = normals(*shape)
    fitted = fit(value, x, ctx)
    assert tuple(fitted.shape) == where and torch.equal(fitted.reshape(-1), value.reshape(-1))
    assert torch.equal((fitted + torch.zeros_like(x)), torch.broadcast_to(value.reshape(where), x.shape))
    assert fit(0.5, x, ctx) == 0.5 and fit(torch.tensor(0.5), x, ctx) == 0.5


@pytest.mark.parametrize(
    ("restriction", "shape"),
    [
        ({}, (1,)),
        ({}, (1, 5)),
        ({}, (4, 1)),
        ({}, (1, 1, 5)),
        ({}, (3, 1, 5)),
        ({}, (1, 4, 5)),
        ({}, (1, 3, 4, 5)),
        ({}, (2, 3, 1, 5)),
        ({}, (2, 1, 4, 5)),
        ({}, (1, 1, 1, 1)),
        ({}, (5, 4)),
        ({}, (4,)),
        ({}, (3,)),
        ({}, (2,)),
        ({}, (6,)),
        ({}, (3, 5)),
        ({}, (2, 5)),
        ({}, (4, 3, 5)),
        ({}, (3, 3, 4, 5)),
        ({}, (1, 2, 3, 4, 5)),
        ({}, (0, 5)),
        ({"head": 1}, (4, 5)),
        ({"head": (1,)}, (3, 5)),
        ({"head": (1,)}, (4, 5)),
        ({"pos": -1}, (3, 4, 5)),
        ({"pos": (1,)}, (2, 4, 5)),
        ({"pos": -1, "head": 0}, (4,)),
        ({"dim": (1,)}, (4,)),
        ({"dim": (1,)}, (5,)),
    ],
    ids=str,
)
def test_values_that_would_broadcast_by_accident_are_refused(restriction, shape):
    x, ctx = at_z(**restriction)
    with pytest.raises(ShapeError, match="does not fit") as caught:
        fit(torch.ones(shape, dtype=torch.float64), x, ctx)
    assert str(list(shape)) in str(caught.value) and "z.0" in str(caught.value)


def test_values_of_another_dtype_or_device_are_refused():
    x, ctx = at_z()
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex128):
        with pytest.raises(ShapeError, match="convert it"):
            fit(torch.ones(5, dtype=dtype), x, ctx)
    with pytest.raises(ShapeError, match="meta"):
        fit(torch.ones(5, dtype=torch.float64, device="meta"), x, ctx)
    for shape in ((5,), (4, 5), (3, 4, 5), (1, 3, 4, 5)):
        with pytest.raises(ShapeError, match="every axis"):
            fit(normals(*shape), x, ctx, whole=True)
    assert torch.equal(fit(x, x, ctx, whole=True), x)


def test_a_value_for_all_rows_is_cut_to_those_that_run():
    place = site("resid_pre", 0)
    inputs = Inputs.of(torch.ones(5, 3, dtype=torch.long))
    region = resolve(place, inputs.columns, {"dim": 4}).rows(slice(2, 4))
    ctx = Layout.of(inputs).context(region, 0, slice(2, 4), torch.device("cpu"))
    value, x = normals(5, 3, 4), normals(2, 3, 4)
    assert torch.equal(fit(value, x, ctx), value[2:4])
    with pytest.raises(ShapeError):
        fit(normals(2, 3, 4), x, ctx)


@pytest.mark.parametrize(
    "item",
    [
        hooks.steer(site("resid_pre", 0), torch.ones(31, dtype=torch.float64)),
        hooks.steer(site("resid_pre", 0), torch.ones(32)),
        hooks.steer(site("resid_pre", 0), torch.ones(1, dtype=torch.float64)),
        hooks.steer(site("resid_pre", 0), torch.ones(1, 32, dtype=torch.float64)),
        hooks.steer(
            site("resid_pre", 0), torch.ones(32, dtype=torch.float64), scale=torch.ones(3, dtype=torch.float64)
        ),
        hooks.scale(site("z", 0), torch.ones(4, dtype=torch.float64)),
        hooks.scale(site("z", 0), torch.ones(8, 4, dtype=torch.float64)),
        hooks.clamp(site("resid_pre", 0, pos=-1), torch.ones(1, 32, dtype=torch.float64).expand(2, 32)),
        hooks.clamp(site("pattern", 0), torch.ones(7, dtype=torch.bool)),
        hooks.noise(site("resid_pre", 0), torch.ones(3, 1, 32, dtype=torch.float64)),
        hooks.project_out(site("z", 0), torch.ones(32, dtype=torch.float64)),
        hooks.patch(site("z", 0), torch.ones(3, 7, 1, 8, dtype=torch.float64)),
        hooks.patch(site("z", 0), torch.ones(4, 8, dtype=torch.float64)),
        hooks.patch(site("z", 0), torch.ones(1, 7, 4, 8, dtype=torch.float64)),
        hooks.patch(site("z", 0), torch.ones(3, 7, 4, 8)),
        hooks.patch(site("z", 0, head=2), torch.ones(3, 7, 8, 1, dtype=torch.float64)),
        hooks.mean(site("z", 0), torch.ones(3, 1, 4, 8, dtype=torch.float64)),
        hooks.mean(site("z", 0), torch.ones(3, 7, 8, 4, dtype=torch.float64)),
        hooks.mean(site("z", 0), torch.ones(3, 7, 4, 8)),
        hooks.resample(site("z", 0), torch.ones(3, 1, 4, 8, dtype=torch.float64)),
        hooks.resample(site("z", 0), torch.ones(3, 7, 4, 8)),
    ],
    ids=str,
)
def test_values_that_do_not_fit_are_refused_in_a_run(item):
    s = setting("gpt2", "left")
    with pytest.raises(ShapeError):
        s.model.run(s.corrupt, item)
    assert no_hooks(s.model)


def no_hooks(model: hooks.Model) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


@pytest.mark.parametrize(
    "function",
    [
        lambda x, ctx: x[:, :-1],
        lambda x, ctx: x[:1],
        lambda x, ctx: x.mean(1, keepdim=True),
        lambda x, ctx: x.sum(),
        lambda x, ctx: x[..., None],
        lambda x, ctx: x.float(),
        lambda x, ctx: x.long(),
        lambda x, ctx: x > 0,
        lambda x, ctx: x.to("meta"),
        lambda x, ctx: None,
        lambda x, ctx: (x,),
        lambda x, ctx: x.numpy(),
        lambda x, ctx: 0.0,
    ],
    ids=["shorter", "one row", "broadcastable", "a number", "longer", "float32", "int", "bool", "device", "None",
         "tuple", "numpy", "float"],
)  # fmt: skip
def test_a_function_that_returns_something_else_is_refused(function):
    s = setting("gpt2", "left")
    for place in (site("resid_pre", 1), site("scores", 0), site("z", 0, pos=Span(1, None))):
        item = hooks.intervene(place, function)
        with pytest.raises(ShapeError, match="the function returned"):
            s.model.run(s.corrupt, item)
        for executor in EXECUTORS:
            with pytest.raises(ShapeError, match="the function returned"):
                list(run_worlds(s.model, [World(s.corrupt, item)], LOGITS, executor=executor))
    assert no_hooks(s.model)
    close(s.model.run(s.corrupt).logits[s.mask], s.corrupt_values["logits", None][s.mask])


def test_sources_that_are_refused():
    s = setting("gpt2", "left")
    place = site("resid_pre", 1)
    longer = s.model.inputs([[1] * 9, [1] * 4, [1] * 5])
    fewer = s.model.inputs([[1] * 7, [1] * 4])
    swapped = s.model.inputs([[1] * 4, [1] * 7, [1] * 5])
    for inputs in (longer, fewer, swapped):
        for source in (World(inputs), s.model.run(inputs, capture=place).tape):
            for executor in EXECUTORS:
                with pytest.raises(ShapeError):
                    list(run_worlds(s.model, [World(s.corrupt, hooks.patch(place, source))], LOGITS, executor=executor))
    with pytest.raises(ShapeError, match="convert"):
        s.model.run(s.corrupt, hooks.patch(place, s.tape.to(dtype=torch.float32)))
    with pytest.raises(SiteError, match="not kept"):
        s.model.run(s.corrupt, hooks.patch(place, s.model.run(s.clean, capture=site("z", 0)).tape))
    for build in (
        hooks.patch,
        hooks.mean,
        hooks.resample,
        lambda p, source: hooks.interchange(p, torch.ones(32), source),
    ):
        with pytest.raises(PlanError, match="source"):
            build(place, None)
    with pytest.raises(ShapeError, match="tensor"):
        hooks.steer(place, 1.0)
    with pytest.raises(PlanError, match="mixes"):
        hooks.intervene(place, lambda x, ctx: x, mixes=("head",))


@pytest.mark.parametrize("pos", [Span(2, None), Span(1, 5), Span(-3, None)], ids=str)
def test_a_source_without_some_of_the_positions_is_refused(pos):
    """Row 1 has seven tokens here and four in the source: its padding is nobody's value."""
    s = setting("gpt2", "left")
    here_, there = s.model.inputs([[1] * 5, [2] * 7]), s.model.inputs([[3] * 7, [4] * 2])
    with pytest.raises(InterpError):
        s.model.run(here_, hooks.patch(site("resid_pre", 1, pos=pos), World(there)))


def test_a_head_is_not_patched_into_all_heads():
    """Sizes that would broadcast are refused between sites too."""
    s = setting("gpt2", "left")
    for where, source in (
        (site("z", 1), site("z", 1, head=2)),
        (site("z", 1, head=(0, 1)), site("z", 1, head=(2,))),
        (site("resid_pre", 1), site("resid_pre", 1, dim=3)),
        (site("z", 1, head=2), site("z", 1, head=(0, 1))),
        (site("z", 1), site("resid_pre", 1)),
        (site("resid_pre", 1), site("z", 1)),
        (site("scores", 1, key_pos=(0, 1)), site("scores", 1, key_pos=0)),
    ):
        for kept_ in (s.tape, World(s.clean)):
            with pytest.raises(InterpError):
                s.model.run(s.corrupt, hooks.patch(where, kept_, source_site=source))
    s.model.run(s.corrupt, hooks.patch(site("z", 1, head=2), s.tape, source_site=site("z", 1, head=3)))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_positions_correspond_between_paddings(executor):
    """A source padded on the other side: position p goes to position p, also where a mask says which."""
    s, other = setting("small_ln_learned", "left"), setting("small_ln_learned", "right")
    assert torch.equal(s.clean.ids[s.mask], other.clean.ids[other.mask])
    pos = torch.zeros_like(s.mask)
    pos[0, 1:4], pos[1, -1], pos[2, -2:] = True, True, True
    restrictions = [
        {},
        {"pos": -1},
        {"pos": Span(1, None)},
        {"pos": (0, 2)},
        {"pos": torch.tensor([1, 3, 0])},
        {"pos": pos},
    ]
    for restriction in restrictions:
        for name in ("resid_pre", "z", "pattern"):
            place = site(name, 1, **restriction)
            for source in (World(other.clean), other.tape):
                world = World(s.corrupt, hooks.patch(place, source))
                expected, _ = oracle.forward(
                    s.module, s.corrupt.ids, s.mask, replaced(s, place, s.clean_values[name, 1])
                )
                try:
                    (outcome,) = run_worlds(s.model, [world], LOGITS, executor=executor)
                except InterpError:
                    # A mask is of columns: on inputs laid out in another way it may be refused.
                    assert isinstance(place.pos, Tensor) and place.pos.dtype == torch.bool
                    continue
                close(outcome.values[0][s.mask], expected[s.mask], place)


def test_a_part_that_was_kept_is_a_source_for_that_part():
    s = setting("mistral", "left")
    place = site("z", 1, head=2, pos=-1)
    tape = s.model.run(s.clean, capture=place).tape
    compare(s, [(as_plan(hooks.patch(place, tape)), replaced(s, place, s.clean_values["z", 1]))], LOGITS)
    with pytest.raises(SiteError, match="not kept"):
        s.model.run(s.corrupt, hooks.patch(site("z", 1, head=2), tape))


def test_interventions_print_and_compare():
    place = site("z", 8, head=6)
    vector = normals(4)
    assert hooks.steer(place, vector) == hooks.steer(place, vector.clone()) != hooks.steer(place, vector + 1)
    assert hooks.steer(place, vector, 2.0) != hooks.steer(place, vector)
    assert hooks.zero(place) != hooks.clamp(place, 0.0)
    assert hooks.zero(place).strength(0.5) != hooks.zero(place)
    assert hooks.zero(place).where(torch.tensor([True])) != hooks.zero(place)
    assert hash(hooks.steer(place, vector)) == hash(hooks.steer(place, vector.clone()))
    assert hooks.noise(place, 1.0, seed=1) != hooks.noise(place, 1.0, seed=2)
    assert isinstance(hooks.noise(place, 1.0).op, Noise) and isinstance(hooks.zero(place).op, Op)
    text = str(hooks.steer(place, vector).strength(0.5) + hooks.zero("blocks.2.hook_attn_out"))
    assert "steer(vector=float64[4], scale=1.0) at z.8[head=6], strength 0.5" in text and "zero at attn_out.2" in text
