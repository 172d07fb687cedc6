"""Draws that depend on row, position and seed alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import hooks
from hooks import KINDS, Inputs, Span, World, run_worlds, site
from hooks.plan.context import Context
from hooks.plan.kinds import LATER
from hooks.plan.sites import STACKS
from hooks.random import choice, normal, uniform
from tests import zoo
from tests.hooks.formulas import reference
from tests.hooks.test_oracle_sites import (
    EXECUTORS,
    LOGITS,
    close,
    setting,
)

# Randomness

RANDOM = [
    site("embed"),
    site("z", 1, head=(2, 0)),
    site("scores", 0),
    site("pattern", 1, pos=Span(1, None)),
    site("mlp_post", 0, pos=-1),
    site("logits", dim=Span(3, 9)),
]
PROMPTS = [[3, 1, 4, 1, 5, 9], [2, 6, 5, 3], [5, 8, 9, 7, 9]]
ROW_IDS = torch.tensor([11, 5, 1_000_000])


def change_of(model: hooks.Model, inputs: Inputs, row: int, item, seed: int = 0) -> Tensor:
    """What an intervention adds in one row, at the real tokens, in the order of their positions."""
    whole = item.site.whole
    base = model.run(inputs, capture=whole).tape[whole][row]
    new = model.run(inputs, item, capture=whole, seed=seed).tape[whole][row]
    change = torch.where(new == base, 0, new - base)
    real = inputs.mask[row].nonzero().flatten()
    if "key_pos" in whole.axes:
        return change[:, real][:, :, real]
    return change[real]


@pytest.mark.parametrize("place", RANDOM, ids=str)
def test_a_row_s_noise_is_the_same_wherever_it_stands(place):
    model = hooks.wrap(zoo.make("small_ln_learned"))
    item = hooks.noise(place, 0.5, seed=3)
    right = model.inputs(PROMPTS, row_ids=ROW_IDS)
    left = model.inputs(PROMPTS, padding="left", row_ids=ROW_IDS)
    other = model.inputs([PROMPTS[i] for i in (2, 0, 1)], row_ids=ROW_IDS[[2, 0, 1]])
    drawn = []
    for row in range(3):
        alone = change_of(model, model.inputs([PROMPTS[row]], row_ids=ROW_IDS[row : row + 1]), 0, item)
        assert alone.abs().max() > 0.1
        for inputs, at in ((right, row), (left, row), (other, (row + 1) % 3)):
            close(change_of(model, inputs, at, item), alone)
        drawn.append(alone.flatten()[alone.flatten() != 0][:4].tolist())
    assert drawn[0] != drawn[1] != drawn[2]


@pytest.mark.parametrize("place", RANDOM, ids=str)
def test_noise_differs_where_anything_differs(place):
    model = hooks.wrap(zoo.make("small_ln_learned"))
    inputs = model.inputs([PROMPTS[0]], row_ids=torch.tensor([4]))
    again = model.inputs([PROMPTS[0]], row_ids=torch.tensor([5]))
    base = change_of(model, inputs, 0, hooks.noise(place, 1.0))
    used = base != 0
    assert torch.equal(base, change_of(model, inputs, 0, hooks.noise(place, 1.0)))
    close(change_of(model, inputs, 0, hooks.noise(place, 0.25))[used] * 4, base[used])
    for other in (
        change_of(model, inputs, 0, hooks.noise(place, 1.0, seed=1)),
        change_of(model, inputs, 0, hooks.noise(place, 1.0), seed=1),
        change_of(model, again, 0, hooks.noise(place, 1.0)),
        *(
            [change_of(model, inputs, 0, hooks.noise(dataclasses.replace(place, layer=1 - place.layer), 1.0))]
            if place.layer is not None
            else []
        ),
    ):
        assert (base[used] - other[used]).abs().min() > 1e-9
    # Every entry has its own number: no axis shares one.
    numbers = base[used] if place.name != "pattern" else base[base.abs() > 1e-12]
    assert len(numbers.unique()) == numbers.numel() > 5


def test_noise_of_a_part_is_part_of_the_noise():
    """A head and a position keep their numbers, however they are spelled, and both names of a tensor draw alike."""
    model = hooks.wrap(zoo.make("small_ln_learned"))
    inputs = model.inputs(PROMPTS, row_ids=ROW_IDS)
    whole = model.run(inputs, hooks.noise(site("z", 1), 1.0), capture=site("z", 1)).tape
    for part in (
        site("z", 1, head=3),
        site("z", 1, head=-1),
        site("z", 1, head=Span(-2, None)),
        site("z", 1, head=Span(1, 3)),
        site("z", 1, head=(3, 0)),
        site("z", 1, pos=-1),
        site("z", 1, pos=(2, 0)),
        site("z", 1, dim=-3),
        site("z", 1, dim=(6, 1)),
        site("z", 1, head=1, dim=Span(2, 5), pos=Span(1, 3)),
    ):
        assert torch.equal(model.run(inputs, hooks.noise(part, 1.0), capture=part).tape[part], whole[part]), part
    scores = model.run(inputs, hooks.noise(site("scores", 0), 1.0), capture=site("scores", 0)).tape
    for part in (
        site("scores", 0, key_pos=1),
        site("scores", 0, pos=-1, key_pos=(-1, 0)),
        site("scores", 0, head=(2, 1)),
    ):
        assert torch.equal(model.run(inputs, hooks.noise(part, 1.0), capture=part).tape[part], scores[part]), part
    logits = model.run(inputs, hooks.noise(site("logits"), 1.0), capture=site("logits")).tape
    part = site("logits", dim=torch.tensor([[4, 40], [3, 2], [9, 8]]))
    assert torch.equal(model.run(inputs, hooks.noise(part, 1.0), capture=part).tape[part], logits[part])
    one, two = hooks.noise(site("resid_post", 0), 1.0), hooks.noise(site("resid_pre", 1), 1.0)
    assert one == two
    assert torch.equal(model.run(inputs, one).logits, model.run(inputs, two).logits)


def test_the_executors_draw_alike():
    s = setting("mistral", "left")
    inputs = dataclasses.replace(s.corrupt, row_ids=torch.tensor([8, 3, 77]))
    donors, _, _ = reference(s, [7, 7, 7, 7, 7], "right")
    plans = [hooks.noise(place, 0.3) for place in RANDOM]
    plans += [hooks.resample(site("z", 1), World(donors)), hooks.resample(site("resid_pre", 2, pos=-1), World(donors))]
    worlds = [World(inputs, plan) for plan in plans]
    expected = [s.model.run(inputs, plan, seed=5).logits for plan in plans]
    base = s.model.run(inputs).logits
    for executor in EXECUTORS:
        for budget in (None, 1):
            for outcome in run_worlds(s.model, worlds, LOGITS, executor=executor, budget=budget, seed=5):
                mask = s.mask[outcome.rows]
                close(
                    outcome.values[0][mask],
                    expected[outcome.index][outcome.rows][mask],
                    executor,
                    budget,
                    plans[outcome.index],
                )
                assert (outcome.values[0] - base[outcome.rows])[mask].abs().max() > 1e-4


@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_row_s_donor_is_the_same_wherever_it_stands(padding):
    model = hooks.wrap(zoo.make("small_ln_learned"))
    pool = World(model.inputs([[i, i + 1, i + 2, i + 3, i + 4, i + 5] for i in range(20)]))
    item = hooks.resample(site("resid_pre", 1), pool, seed=2)
    together = model.inputs(PROMPTS, padding=padding, row_ids=ROW_IDS)
    other = model.inputs([PROMPTS[i] for i in (1, 2, 0)], padding=padding, row_ids=ROW_IDS[[1, 2, 0]])
    for row in range(3):
        alone = model.run(model.inputs([PROMPTS[row]], row_ids=ROW_IDS[row : row + 1]), item).logits[0]
        close(model.run(together, item).logits[row][together.mask[row]], alone)
        close(model.run(other, item).logits[(row + 2) % 3][other.mask[(row + 2) % 3]], alone)


def test_donors_of_another_seed_are_others():
    """The intervention's own seed and the run's: with twenty donors, five rows hardly draw the same."""
    model = hooks.wrap(zoo.make("small_ln_learned"))
    pool = World(model.inputs([[i, i + 1, i + 2] for i in range(20)]))
    x = model.inputs([[3, 1, 4]] * 5)

    def drawn(seed: int, run: int) -> list[int]:
        place = site("embed", pos=0)
        taken = model.run(x, hooks.resample(place, pool, seed=seed), capture=place, seed=run).tape[place][:, 0]
        table = model.run(pool.inputs, capture=place).tape[place][:, 0]
        return (taken[:, None] == table).all(-1).long().argmax(1).tolist()

    draws = [drawn(seed, run) for seed, run in ((0, 0), (1, 0), (0, 1), (2, 0))]
    assert len(set(map(tuple, draws))) == 4 and drawn(0, 0) == draws[0]
    assert all(len(set(draw)) > 1 for draw in draws)


def test_the_moments_of_the_noise():
    model = hooks.wrap(zoo.make("small_ln_learned"))
    ids = torch.randint(1, zoo.VOCAB, (20, 64))
    inputs, place = model.inputs(ids), site("embed")
    draw = (
        model.run(inputs, hooks.noise(place, 2.0), capture=place).tape[place]
        - model.run(inputs, capture=place).tape[place]
    )
    draw = draw / 2.0
    n = draw.numel()
    assert abs(float(draw.mean())) < 4 / n**0.5
    assert abs(float(draw.var()) - 1) < 4 * (2 / n) ** 0.5
    assert abs(float((draw**3).mean())) < 4 * (15 / n) ** 0.5
    assert abs(float((draw**4).mean()) - 3) < 4 * (96 / n) ** 0.5
    assert len(draw.round(decimals=9).unique()) > 0.99 * n
    for axis in range(3):  # neighbours along every axis are independent
        a, b = draw.narrow(axis, 0, draw.shape[axis] - 1), draw.narrow(axis, 1, draw.shape[axis] - 1)
        assert abs(float((a * b).mean())) < 4 / a.numel() ** 0.5
    other = (
        model.run(inputs, hooks.noise(place, 1.0, seed=1), capture=place).tape[place]
        - model.run(inputs, capture=place).tape[place]
    )
    assert abs(float((draw * other).mean())) < 4 / n**0.5


def test_counters_to_numbers():
    grid = torch.arange(300)[:, None], torch.arange(200)[None]
    u = uniform(7, *grid)
    assert u.shape == (300, 200) and u.dtype == torch.float64 and u.min() > 0 and u.max() < 1
    assert len(u.unique()) == u.numel()
    histogram = torch.histc(u, 50, 0, 1)
    assert float(((histogram - u.numel() / 50) ** 2 / (u.numel() / 50)).sum()) < 49 + 4 * 98**0.5
    assert not torch.equal(uniform(1, 2), uniform(2, 1)) and not torch.equal(uniform(0), uniform(0, 0))
    picks = choice(7, grid[0], 3)
    assert picks.dtype == torch.int64 and set(picks.flatten().tolist()) == set(range(7))
    assert normal(torch.arange(10_000)).isfinite().all()


def test_stacks_draw_numbers_of_their_own():
    """The same site and layer of another stack is another place; that of the main stack keeps its numbers."""
    one = {"axes": ("row",), "single": (False,), "row": torch.arange(2), "pos": torch.zeros(2, 1, dtype=torch.int64),
           "key_pos": None, "head": None, "dim": None, "seed": 0, "window": slice(0, 2), "total": 2}  # fmt: skip
    salts = {stack: Context("z", 3, stack=stack, **one).salt for stack in (None, "text", "vision", "encoder", "cross")}
    assert salts[None] == salts["text"] and len(set(salts.values())) == 4
    kinds = [kind for kind in KINDS if kind not in LATER]
    assert salts[None] == kinds.index("z") + len(kinds) * 4 and len(kinds) == 25
    layers = {kind: 3 if KINDS[kind].per_layer else None for kind in KINDS}
    everywhere = {Context(kind, layers[kind], stack=stack, **one).salt for kind in KINDS for stack in STACKS}
    assert len(everywhere) == len(KINDS) * len(STACKS)
