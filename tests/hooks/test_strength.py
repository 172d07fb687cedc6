"""Interventions in part: at a strength, on masks, and at places within their site."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hooks
from hooks import Plan, World, here, run_worlds, site
from hooks.errors import PlanError, ShapeError
from hooks.plan.plan import as_plan
from tests import zoo
from tests.hooks.formulas import edit, normals, places, reference, some_families, span, spread_mean
from tests.hooks.test_oracle_sites import (
    EXECUTORS,
    LOGITS,
    compare,
    replaced,
    setting,
)

# Strength, where, at


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [float, lambda s: torch.tensor(s), lambda s: torch.tensor([s, s])])
def test_strength_is_exact_at_both_ends(dtype, form):
    model = hooks.wrap(zoo.make("small_ln_learned", dtype=dtype))
    inputs, other = model.inputs([[1, 2, 3, 4], [5, 6, 7, 8]]), model.inputs([[9, 8, 7, 6], [5, 4, 3, 2]])
    sites = [site("resid_pre", 1), site("scores", 0), site("pattern", 1), site("z", 0, head=1), site("mlp_post", 0)]
    for place in sites:
        # Kept alone: with other sites kept besides, other kernels may compute this one.
        base, tape = (model.run(i, capture=place.whole).tape for i in (inputs, other))
        for item in (hooks.patch(place, tape), hooks.clamp(place, 0.3), hooks.zero(place), hooks.scale(place, -3.0)):
            whole = place.whole
            full = model.run(inputs, item, capture=whole).tape[whole]
            assert not torch.equal(full, base[whole])
            assert torch.equal(model.run(inputs, item.strength(form(0.0)), capture=whole).tape[whole], base[whole])
            assert torch.equal(model.run(inputs, item.strength(form(1.0)), capture=whole).tape[whole], full)


def turn(family: str) -> int:
    """Which half of the cases a family begins with."""
    return zoo.FAMILIES.index(family) // 2


@some_families
def test_strength_is_linear_in_between(family):
    s = setting(family, "left")
    rows = torch.tensor([0.25, 1.0, -0.5], dtype=torch.float64)
    cases = []
    for n, place in enumerate(places(s), start=turn(family)):
        y, one = s.clean_values[place.name, place.layer], s.chosen(place.at(pos=1))
        item = hooks.patch(place, s.tape)
        each = rows.reshape([-1] + [1] * (y.ndim - 1))
        eight = float(torch.tensor(0.8))  # rounded to float32 on the way
        listed = [
            (as_plan(item.strength(0.3)), edit(s, place, lambda x, y=y: x + 0.3 * (y - x))),
            (as_plan(item.strength(1.7)), edit(s, place, lambda x, y=y: x + 1.7 * (y - x))),
            (as_plan(item.strength(torch.tensor(0.8))), edit(s, place, lambda x, y=y, e=eight: x + e * (y - x))),
            (as_plan(item.strength(rows)), edit(s, place, lambda x, y=y, e=each: x + e * (y - x))),
            (as_plan(item.strength(0.5).strength(rows)), edit(s, place, lambda x, y=y, e=each: x + 0.5 * e * (y - x))),
            (
                Plan((item, hooks.zero(place.at(pos=1)))).strength(0.25),
                edit(s, place, lambda x, y=y, one=one: (x + (y - x) / 4) * torch.where(one, 0.75, 1)),
            ),
        ]
        cases += listed[n % 2 :: 2]
    compare(s, cases, LOGITS)


@some_families
def test_strength_on_scores(family):
    """Between -inf and -inf there is nothing to interpolate, and between -inf and a number nothing is let through."""
    s = setting(family, "left")
    place = site("scores", 1)
    y = s.clean_values["scores", 1]
    both = y.isinf()
    cases = [
        (
            as_plan(hooks.patch(place, s.tape).strength(0.3)),
            {("scores", 1): lambda x: torch.where(both, x, 0.7 * x + 0.3 * y)},
        ),
        (as_plan(hooks.zero(place).strength(0.3)), {("scores", 1): lambda x: 0.7 * x}),
        (as_plan(hooks.clamp(place, 1.0).strength(torch.tensor([0.5, 0.0, 1.0]))), {}),
    ]
    weight = torch.tensor([0.5, 0.0, 1.0]).double()[:, None, None, None]
    cases[2][1]["scores", 1] = lambda x: torch.where(both, x, x + weight * (1.0 - x))
    # A source in which an edge is cut: whole at 0, and cut at every other strength.
    cut = site("scores", 1, head=1, key_pos=0)
    source = World(s.corrupt, hooks.knockout(cut))
    missing = s.chosen(cut) & (weight > 0)
    item = hooks.patch(place, source).strength(torch.tensor([0.5, 0.0, 1.0]))
    cases.append((as_plan(item), {("scores", 1): lambda x: torch.where(missing, -torch.inf, x)}))
    compare(s, cases, LOGITS)
    compare(s, cases, [place, site("pattern", 1)])


def test_strengths_that_are_refused():
    s = setting("gpt2", "left")
    cut = hooks.knockout(site("scores", 0, pos=-1))
    for strength in (0.5, 1.0, torch.tensor(0.5)):
        with pytest.raises(PlanError, match="-inf"):
            cut.strength(strength)
        with pytest.raises(PlanError, match="-inf"):
            (hooks.zero(site("z", 0)) + cut).strength(strength)
    with pytest.raises(ShapeError, match=r"\[3, 7\]"):
        hooks.zero(site("z", 0)).strength(torch.ones(3, 7))
    for executor in EXECUTORS:
        with pytest.raises(ShapeError, match="2 rows"):
            list(
                run_worlds(
                    s.model,
                    [World(s.corrupt, hooks.zero(site("z", 0)).strength(torch.ones(2)))],
                    LOGITS,
                    executor=executor,
                )
            )


@some_families
def test_where_and_at(family):
    """Every builder on rows and on tokens; what it reads stays with the tokens that it is for.

    At each site a half of them, in two of the families the one and in the others the other.
    """
    s = setting(family, "left")
    rows = torch.tensor([True, False, True])
    tokens = s.mask & (torch.tensor([[True], [False], [False]]) | (s.corrupt.positions % 2 == 1))
    inputs, values, mask = reference(s, [7, 6, 7, 5], "right")
    cases = []
    for n, place in enumerate(p for p in places(s) if p.name != "pattern"):
        only = tokens if n % 2 else rows
        y, u = s.clean_values[place.name, place.layer], normals(s.clean_values[place.name, place.layer].shape[-1])
        mean = spread_mean(s, place, values, mask, pooled=False)
        listed = [
            (as_plan(hooks.interchange(place, u, World(s.clean)).where(only)),
             edit(s, place, lambda x, y=y, u=u: x + (y - x) @ span(u), only)),
            (as_plan(hooks.steer(place, u).where(only)), edit(s, place, lambda x, u=u: x + u, only)),
            (as_plan(hooks.mean(place, World(inputs)).where(only)), replaced(s, place, mean, only)),
            (as_plan(hooks.patch(place, s.tape).where(only).strength(0.5)),
             edit(s, place, lambda x, y=y: 0.5 * (x + y), only)),
            (as_plan(hooks.zero(place).where(rows).where(tokens)), replaced(s, place, 0.0, tokens & rows[:, None])),
            (as_plan(hooks.zero(place).where(only).at(pos=1)), replaced(s, place.at(pos=1), 0.0, only)),
            (Plan((hooks.zero(place),)).at(pos=(1, 3)).where(tokens), replaced(s, place.at(pos=(1, 3)), 0.0, tokens)),
            (as_plan(hooks.patch(place, s.tape).at(pos=(3, 1)).where(tokens)),
             replaced(s, place.at(pos=(3, 1)), y, tokens)),
        ]  # fmt: skip
        cases += listed[(n // 2 + turn(family)) % 2 :: 2]
    compare(s, cases, LOGITS, changes=0.9)


def test_what_is_read_here_stays_with_its_token():
    """A function restricted to some tokens of a row gets what it reads at those tokens."""
    s = setting("small_ln_learned", "left")
    tokens = s.mask & (torch.tensor([[True], [False], [False]]) | (s.corrupt.positions % 2 == 1))
    held = {}

    def first(x: Tensor) -> Tensor:
        held["x"] = x
        return x

    into, out = site("resid_pre", 1), site("attn_out", 1)
    item = hooks.intervene(out, lambda x, r, ctx: x + r.tanh(), here(into)).where(tokens)
    edits = {("resid_pre", 1): first, **edit(s, out, lambda x: x + held["x"].tanh(), tokens)}
    compare(s, [(as_plan(item), edits)], LOGITS)


@pytest.mark.parametrize(
    "mask", [torch.ones(3), torch.ones(3, 7, 1, dtype=torch.bool), torch.ones((), dtype=torch.bool)]
)
def test_where_refuses_what_is_no_mask(mask):
    with pytest.raises(ShapeError, match="bool mask"):
        hooks.zero(site("z", 0)).where(mask)
