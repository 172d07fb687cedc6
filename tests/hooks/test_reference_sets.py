"""Means over sets of reference prompts, and values of single ones."""

from __future__ import annotations

import pytest
import torch

import hooks
from hooks import Plan, Span, World, site
from hooks.errors import InterpError
from hooks.plan.plan import as_plan
from tests.hooks.formulas import kept, normals, places, reference, some_families, spread_mean
from tests.hooks.test_oracle_sites import (
    LOGITS,
    close,
    compare,
    replaced,
    setting,
)


@some_families
@pytest.mark.parametrize(
    ("lengths", "side"), [([7] * 5, "right"), ([7, 3, 5, 6], "left"), ([3, 7], "right")], ids=["even", "left", "right"]
)
def test_means_over_a_reference_set(family, lengths, side):
    """With its own number of rows and its own padding: a position is averaged over the rows that have it."""
    s = setting(family, "left")
    inputs, values, mask = reference(s, lengths, side)
    tape = s.model.run(inputs, capture=[p.whole for p in places(s)]).tape
    cases = []
    for n, place in enumerate(places(s)):
        source = tape if n % 2 else World(inputs)
        mean = spread_mean(s, place, values, mask, pooled=False)
        cases.append((as_plan(hooks.mean(place, source)), replaced(s, place, mean)))
        if place.name == "pattern":
            continue
        part = place.at(pos=(2, 1), **({"head": 1} if "head" in place.axes else {}))
        cases.append((as_plan(hooks.mean(part, source)), replaced(s, part, mean)))
        pooled = spread_mean(s, place, values, mask, pooled=True)
        cases.append((as_plan(hooks.mean(place, source, pooled=True)), replaced(s, place, pooled)))
    compare(s, cases, LOGITS)


def test_a_mean_of_part_of_a_pattern():
    """Over the rows that have both the query and the key."""
    s = setting("small_ln_learned", "left")
    inputs, values, mask = reference(s, [7, 5, 4], "right")
    whole = spread_mean(s, site("pattern", 1), values, mask, pooled=False)
    for restriction in (
        {"pos": 3},
        {"pos": 3, "key_pos": (0, 2)},
        {"key_pos": Span(None, 2)},
        {"head": 1, "pos": (1, 2)},
    ):
        place = site("pattern", 1, **restriction)
        compare(s, [(as_plan(hooks.mean(place, World(inputs))), replaced(s, place, whole))], LOGITS)


def test_a_reference_set_of_longer_prompts():
    """Each position has its mean and its donors, or the set is refused; in no case does torch complain."""
    s = setting("gpt2", "left")
    inputs, values, mask = reference(s, [9, 8, 9], "right")
    place = site("resid_pre", 1)
    for pooled in (False, True):
        mean = spread_mean(s, place, values, mask, pooled)
        try:
            found = kept(s, hooks.mean(place, World(inputs), pooled=pooled), place)
        except InterpError:
            continue
        close(found[s.mask], mean[s.mask])


def test_a_mean_at_the_last_position_is_over_the_last_positions():
    s = setting("gpt2", "left")
    inputs, values, mask = reference(s, [7, 3, 5], "right")
    place = site("resid_pre", 1, pos=-1)
    expected = values["resid_pre", 1][torch.arange(3), mask.sum(1) - 1].mean(0)
    compare(
        s, [(as_plan(hooks.mean(place, World(inputs))), replaced(s, place, expected.expand(*s.mask.shape, -1)))], LOGITS
    )


@pytest.mark.parametrize("pooled", [False, True])
def test_a_tensor_is_a_reference_set_of_the_whole_activation(pooled):
    s = setting("small_ln_learned", "none")
    source = normals(5, 6, 4, 8)
    for restriction in ({}, {"head": 2}, {"pos": -1}, {"pos": (4, 1), "dim": Span(2, 5)}):
        place = site("z", 1, **restriction)
        columns = [5] if place.pos == -1 else list(place.pos or range(6))
        mean = (source[:, columns].mean((0, 1)) if pooled else source.mean(0)).expand(len(s.mask), 6, -1, -1)
        compare(s, [(as_plan(hooks.mean(place, source, pooled=pooled)), replaced(s, place, mean))], LOGITS)
        drawn = kept(s, hooks.resample(place, source), place)[s.chosen(place)].reshape(2, -1)
        options = torch.stack([row[None][s.chosen(place)[:1]] for row in source])
        assert all(any(torch.equal(row, option) for option in options) for row in drawn)


def test_a_reference_set_without_the_site_s_positions_is_refused():
    """A set of one-token prompts has no mean at position 3, and that of position 0 must not stand in for it."""
    s = setting("gpt2", "left")
    for lengths in ([1, 1], [3, 2]):
        inputs, _, _ = reference(s, lengths, "right")
        with pytest.raises(InterpError):
            s.model.run(s.corrupt, hooks.mean(site("resid_pre", 1), World(inputs)))
        with pytest.raises(InterpError):
            s.model.run(s.corrupt, hooks.resample(site("resid_pre", 1), World(inputs)))


@some_families
@pytest.mark.parametrize("padding", ["none", "left"])
def test_resample_takes_whole_rows_of_the_reference_set(family, padding):
    """One donor for a row at every site of one seed, and every donor in turn; other seeds draw others."""
    s = setting(family, padding)
    inputs, values, _ = reference(s, [7 if padding == "left" else 6] * 4, "right")
    order = s.corrupt.order
    found: dict[int, list] = {}
    for seed in range(12):
        plan = Plan(tuple(hooks.resample(p, World(inputs), seed=seed) for p in places(s) if p.name != "pattern"))
        run = s.model.run(s.corrupt, plan, capture=[i.site for i in plan])
        donors = []
        for item in plan:
            mine, theirs = run.tape[item.site], values[item.site.name, item.site.layer]
            for row, length in enumerate(s.mask.sum(1).tolist()):
                part = mine[row, order[row, :length]]
                equal = [d for d in range(4) if torch.allclose(part, theirs[d, :length], rtol=0, atol=1e-10)]
                assert len(equal) == 1
                donors.append((row, equal[0]))
        assert len(set(donors)) == len(s.mask)  # the same at every site
        found[seed] = sorted(set(donors))
    assert {donor for pairs in found.values() for _, donor in pairs} == set(range(4))
    assert len({tuple(pairs) for pairs in found.values()}) > 6


def test_resampling_never_takes_padding():
    """From a ragged set, a row gets a value that some row of the set has at that position, or an error."""
    s = setting("gpt2", "left")
    inputs, values, mask = reference(s, [7, 4, 5, 7], "right")
    for seed in range(8):
        place = site("resid_pre", 1)
        try:
            found = kept(s, hooks.resample(place, World(inputs), seed=seed), place)
        except InterpError:
            continue
        for row in range(len(s.mask)):
            for position, column in enumerate(s.mask[row].nonzero().flatten()):
                options = values["resid_pre", 1][:, position][mask[:, position]]
                assert (options - found[row, column]).abs().amax(1).min() < 1e-10


@some_families
def test_a_pooled_mean_is_over_what_each_row_has_of_the_listed_positions(family):
    """Of rows of any lengths, in every executor; cells of one sweep may be of other rows of the set."""
    s = setting(family, "none")
    inputs, values, mask = reference(s, [2, 6, 4], "right")
    lengths, real = mask.sum(1), mask
    position = real.cumsum(1) - 1
    cases = []
    for name in ("resid_pre", "z"):
        value = values[name, 1]
        for pos in (3, (1, 3), (-1, -3), (0, 5), Span(-3), Span(1, 3), (1, -1)):
            if isinstance(pos, Span):
                counted = real
            else:
                each = [pos] if isinstance(pos, int) else pos
                counted = real & sum((position == (p if p >= 0 else lengths[:, None] + p)) for p in each).bool()
            place = site(name, 1, pos=pos)
            mean = value[counted].mean(0)
            full = mean.expand(*s.mask.shape, *mean.shape)
            cases.append((as_plan(hooks.mean(place, World(inputs), pooled=True)), replaced(s, place, full)))
    compare(s, cases, LOGITS)


def test_positions_of_the_set_that_a_mean_is_over_are_named():
    """Other ones than are edited; a mask of the run's columns means nothing in the set, so then they are all."""
    s = setting("gpt2", "left")
    inputs, values, mask = reference(s, [2, 6, 4, 3], "right")
    edited, source = site("resid_pre", 1, pos=-1), site("resid_pre", 1, pos=(0, 3))
    here = mask & torch.isin(mask.cumsum(1) - 1, torch.tensor([0, 3]))
    mean = values["resid_pre", 1][here].mean(0).expand(*s.mask.shape, -1)
    plan = as_plan(hooks.mean(edited, World(inputs), pooled=True, source_site=source))
    compare(s, [(plan, replaced(s, edited, mean))], LOGITS)
    with pytest.raises(hooks.PlanError, match="pooled=True"):
        hooks.mean(edited, World(inputs), source_site=source)
    with pytest.raises(InterpError, match="source_site"):
        s.model.run(
            s.corrupt, hooks.mean(edited.at(pos=torch.zeros(len(s.corrupt), dtype=int)), World(inputs), pooled=True)
        )
    with pytest.raises(InterpError, match="no row of the reference set has"):
        s.model.run(s.corrupt, hooks.mean(edited.at(pos=-1), World(inputs), pooled=True, source_site=source.at(pos=8)))


def test_a_mean_of_what_a_tape_kept_of_ragged_rows_is_over_no_filler():
    s = setting("gpt2", "left")
    inputs, values, mask = reference(s, [2, 6, 4], "right")
    place = site("resid_pre", 1, pos=Span(1, 4))
    tape = s.model.run(inputs, capture=[place]).tape
    position = mask.cumsum(1) - 1
    mean = values["resid_pre", 1][mask & (position >= 1) & (position < 4)].mean(0).expand(*s.mask.shape, -1)
    compare(s, [(as_plan(hooks.mean(place, tape, pooled=True)), replaced(s, place, mean))], LOGITS)
    with pytest.raises(InterpError, match="fewer"):
        s.model.run(s.corrupt, hooks.resample(place, tape))
