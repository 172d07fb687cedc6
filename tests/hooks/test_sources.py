"""What plans read, of other worlds and of their own, by every executor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hooks as hk
from hooks import Site, World, patch, site
from tests import zoo
from tests.hooks.executing import EXACT, EXECUTORS, SEVERAL, Ran, agree, each_executor, inputs, several_families
from tests.turns import in_turn
from tests.zoo import wrapped

# Sources


@several_families
def test_sources_of_every_kind(family):
    model, layout = wrapped(family), "left"
    x, other = inputs(model, layout, 1), inputs(model, layout, 2)
    third = inputs(model, layout, 3)
    at, last = site("resid_post", 0), model.n_layers - 1
    tape = model.run(other, capture=[at, site("z", last, head=1), site("k", last, pos=-1)]).tape
    moved = inputs(model, "right", 2)
    elsewhere = model.run(moved, capture=[at]).tape
    edited = World(other, hk.scale(site("resid_pre", 0, pos=1), 2.0))
    nested = World(third, patch(site("z", 0), edited) + hk.zero(site("attn_out", 1, pos=0)))
    deeper = World(x, patch(site("resid_pre", 1, pos=slice(0, 3)), nested) + hk.freeze(site("z", 1)))
    whole = tape[at]
    plans = [
        patch(at, tape),
        patch(at, elsewhere),
        patch(at.at(pos=(1, -1)), elsewhere),
        patch(site("z", last, head=1), tape),
        patch(site("k", last, pos=-1), tape),
        patch(at, whole),
        patch(at.at(pos=2), whole),
        patch(at.at(pos=2), tape[at.at(pos=2)]),
        patch(at, edited),
        patch(site("z", last, pos=(0, 2)), nested),
        patch(site("resid_post", last, pos=-1), deeper) + patch(site("z", 0, head=0), World(other)),
        patch(at.at(pos=1), deeper) + hk.mean(site("z", 1, pos=-1), nested),
        hk.interchange(at, torch.ones(model.architecture.width).double(), nested),
        hk.resample(site("v", 1, pos=(1, -1)), edited),
        hk.freeze(site("mlp_out" if family != "small_attn_only" else "attn_out", last)) + patch(at, nested),
        hk.freeze(at) + hk.zero(at) + hk.freeze(at).strength(0.5),
    ]
    worlds = [World(x, plan) for plan in plans]
    reads = [site("logits", pos=-1), site("logits", pos=2)]
    oracle = Ran(model, worlds, reads, "sequential")
    ways = [(executor, budget) for budget in (None, 1) for executor in EXECUTORS][1:]
    for executor, budget in ways[SEVERAL.index(family) % 2 :: 2]:
        agree(oracle, Ran(model, worlds, reads, executor, budget=budget), worlds, reads)
    torch.testing.assert_close(oracle.values[0], oracle.values[1], **EXACT)
    torch.testing.assert_close(oracle.values[0], oracle.values[5], **EXACT)
    torch.testing.assert_close(oracle.values[6], oracle.values[7], **EXACT)
    for index, world in enumerate(worlds):
        torch.testing.assert_close(model.run(world).logits[:, [-1]][x.mask[:, -1]][:, 0],
                                   oracle.values[index][0][x.mask[:, -1]][:, 0], **EXACT)  # fmt: skip


@each_executor
def test_strength_goes_from_the_value_to_the_functions_value(executor):
    """x + s (f(x) - x), for a number and for one number a row."""
    model = wrapped("small_ln_learned")
    x = inputs(model, "right", 1)
    place = site("attn_out", 0, pos=1)
    kept = model.run(x, capture=place).tape[place]
    strengths = torch.tensor([0.25, 0.75, 1.0]).double()
    plans = [hk.zero(place).strength(strengths), *(hk.zero(place).strength(s) for s in strengths.tolist())]
    expected = [patch(place, kept * (1 - s)) for s in (strengths[:, None, None], *strengths.tolist())]
    reads = [site("logits", pos=-1)]
    got, wanted = (Ran(model, [World(x, plan) for plan in some], reads, executor).values for some in (plans, expected))
    torch.testing.assert_close(got, wanted, **EXACT)


@each_executor
def test_strength_is_exact_at_its_ends_also_where_infinity_is_read(executor):
    """A forbidden edge's score, patched in at strength 0 and 1 in one batch."""
    model = wrapped("llama")
    x = inputs(model, "right", 1)
    early, late = site("scores", 1, pos=0), site("scores", 1, pos=2)
    full = patch(late, World(x), source_site=early)
    one, none = torch.tensor([1.0, 0.0, 1.0]).double(), torch.tensor([0.0, 0.0, 0.0]).double()
    worlds = [World(x, full), World(x, full.strength(one)), World(x, full.strength(none)), World(x)]
    values = [values[0] for values in Ran(model, worlds, [site("logits", pos=2)], executor).values]
    assert float((values[0] - values[3]).abs().max()) > 1e-6
    torch.testing.assert_close(values[1][[0, 2]], values[0][[0, 2]], **EXACT)
    torch.testing.assert_close(values[1][1], values[3][1], **EXACT)
    torch.testing.assert_close(values[2], values[3], **EXACT)


@several_families
def test_a_source_under_a_plan_is_what_a_run_of_it_keeps(family):
    model = wrapped(family)
    x, other = inputs(model, "left", 1), inputs(model, "left", 2)
    edited = World(other, hk.scale(site("resid_pre", 0, pos=1), 2.0) + hk.zero(site("z", 1, head=0)))
    place = site("resid_post", 1)
    tape = model.run(edited, capture=place).tape
    worlds = [World(x, patch(place, edited)), World(x, patch(place, tape)), World(x, patch(place, World(other)))]
    for executor in EXECUTORS:
        one, two, three = (values[0] for values in Ran(model, worlds, [site("logits", pos=-1)], executor).values)
        torch.testing.assert_close(one, two, **EXACT)
        assert float((one - three).abs().max()) > 1e-3


@each_executor
def test_inputs_are_short_for_a_world_without_edits(executor):
    model = wrapped("llama")
    x, other = inputs(model, "left", 1), inputs(model, "left", 2)
    for build in (patch, hk.mean, lambda place, source: hk.interchange(place, torch.ones(8).double(), source)):
        place = site("z", 1, head=0, pos=-1)
        worlds = [World(x, build(place, World(other))), World(x, build(place, other)), World(x)]
        one, two, base = (values[0] for values in Ran(model, worlds, [site("logits", pos=-1)], executor).values)
        torch.testing.assert_close(one, two, **EXACT)
        assert float((one - base).abs().max()) > 1e-3


@each_executor
@several_families
def test_one_world_is_a_source_and_a_reference_set(family, executor):
    """Read row by row at one site, and as a set of rows at another."""
    model = wrapped(family)
    x, other = inputs(model, "left", 1), inputs(model, "left", 2)
    one, two = World(other), World(other)
    plans = [
        (patch(site("embed"), a), hk.mean(site("z", 1), b), hk.resample(site("k", 0, pos=1), b))
        for a, b in ((one, two), (one, one))
    ]
    for places in (slice(0, 1), slice(1, 3), slice(0, 3)):
        worlds = [World(x, plan[places]) for plan in plans]
        values = [values[0] for values in Ran(model, worlds, [site("logits", pos=-1)], executor).values]
        torch.testing.assert_close(values[1], values[0], **EXACT)


@several_families
def test_a_token_mask_restricts_what_is_read_too(family):
    """where() with a mask of tokens takes from a source, or a reference set, what it has at those tokens."""
    model = wrapped(family)
    x, other = inputs(model, "right", 1), inputs(model, "right", 2)
    place, tokens = site("resid_pre", 1), x.mask & (x.positions >= 1) & (x.positions < 3)
    worlds = [
        World(x, patch(place.at(pos=(1, 2)), World(other))),
        World(x, patch(place, World(other)).where(tokens)),
        World(x, patch(place.at(pos=slice(0, 3)), World(other)).where(tokens)),
        World(x, patch(place.at(pos=tokens), World(other))),
        World(x, hk.mean(place.at(pos=(1, 2)), World(other))),
        World(x, hk.mean(place, World(other)).where(tokens)),
    ]
    for executor in EXECUTORS:
        values = [values[0] for values in Ran(model, worlds, [site("logits", pos=-1)], executor).values]
        for value in values[1:4]:
            torch.testing.assert_close(value, values[0], **EXACT)
        torch.testing.assert_close(values[5], values[4], **EXACT)


@pytest.mark.parametrize(("family", "executor"), in_turn(SEVERAL, EXECUTORS))
def test_reference_sets_with_rows_of_several_lengths(family, executor):
    """The mean of a ragged set is over the rows that have the position, whatever the padding; also of a pattern."""
    model = wrapped(family)
    x = inputs(model, "flat", 1)
    lengths = [7, 6, 6, 3]
    sets = [model.inputs(*zoo.random_inputs(zoo.VOCAB, lengths, side, 5)) for side in ("left", "right")]
    x = model.inputs(*zoo.random_inputs(zoo.VOCAB, [7, 7], "right", 1))
    sites = [site("z", 1, head=0), site("resid_pre", 1, pos=(1, -1)), site("pattern", 1), site("pattern", 0, pos=2)]
    for place in sites:
        worlds = [World(x, hk.mean(place, World(reference))) for reference in sets]
        one, two = (values[0] for values in Ran(model, worlds, [site("logits", pos=-1)], executor).values)
        torch.testing.assert_close(one, two, **EXACT, msg=lambda text, place=place: f"{place}: {text}")
    z = model.run(sets[1], capture="blocks.1.attn.hook_z").tape["blocks.1.attn.hook_z"][:, 4, 0]
    expected = model.run(x, hk.clamp(site("z", 1, head=0, pos=4), z[:3].mean(0))).logits[:, -1]
    (got,) = Ran(
        model,
        [World(x, hk.mean(site("z", 1, head=0, pos=slice(4, 5)), World(sets[0])))],
        [site("logits", pos=-1)],
        executor,
    ).values
    torch.testing.assert_close(got[0][:, 0], expected, **EXACT)


# Reads of this world


def from_here(place: Site, read: Site) -> hk.Intervention:
    """Add to a site a number for each row, which is made of everything read at position 2."""

    def add(x: Tensor, value: Tensor, ctx: hk.Context) -> Tensor:
        total = torch.where(value.isfinite(), value, 0.0).flatten(1).sum(1)
        return x + torch.tanh(total).reshape([-1] + [1] * (x.ndim - 1)) * torch.arange(x.shape[-1]).double().cos()

    return hk.intervene(place, add, hk.here(read))


@pytest.mark.parametrize(("family", "turn"), [("gpt2", 0), ("llama", 1), ("small_attn_only", 2)])
def test_this_world_is_read_at_any_earlier_site(family, turn):
    """Every pair of sites: one computed earlier is read alike in each executor; one that is not is a cycle.

    The earlier ones are a third of all in each family.
    """
    model = wrapped(family)
    x = inputs(model, "left", 1)
    order = [info.name for info in model.sites()]
    where = {name: site(name, 0 if hk.KINDS[name].per_layer else None) for name in order}
    worlds = []
    for late, name in enumerate(order):
        for early, read in enumerate(order):
            if where[name].key == where[read].key or early >= late:
                with pytest.raises(hk.errors.CycleError, match="freeze"):
                    model.check(hk.Plan((from_here(where[name], where[read]),)))
            else:
                worlds.append(World(x, from_here(where[name], where[read].at(pos=2))))
    worlds, reads = worlds[turn::3], [site("logits", pos=-1), site("logits", pos=1)]
    oracle = Ran(model, [*worlds, World(x)], reads, "sequential")
    for executor in ("batched", "shared"):
        agree(oracle, Ran(model, [*worlds, World(x)], reads, executor), [*worlds, World(x)], reads)
    moved = [float((values[0] - oracle.values[-1][0]).abs().max()) > 1e-9 for values in oracle.values[:-1]]
    assert sum(moved) > 0.7 * len(worlds)


@each_executor
@several_families
def test_a_read_of_this_world_sees_what_the_plan_did_there(family, executor):
    model = wrapped(family)
    x = inputs(model, "left", 1)
    copy = hk.intervene(site("attn_out", 1, pos=3), lambda v, read, ctx: read, hk.here(site("attn_out", 0, pos=1)))
    plan = hk.scale(site("attn_out", 0, pos=1), 2.0) + copy
    kept = model.run(x, hk.scale(site("attn_out", 0, pos=1), 2.0), capture=site("attn_out", 0, pos=1)).tape
    expected = model.run(
        x,
        hk.scale(site("attn_out", 0, pos=1), 2.0) + patch(site("attn_out", 1, pos=3), kept[site("attn_out", 0, pos=1)]),
    )
    (values,) = Ran(model, [World(x, plan)], [site("logits", pos=3)], executor).values
    columns = x.order[:, 3]
    torch.testing.assert_close(values[0][:, 0], expected.logits[torch.arange(len(x)), columns], **EXACT)


@each_executor
def test_a_later_position_of_this_world_is_read_though_it_is_after_the_metric(executor):
    """Information flows backwards only through such a read, and trimming must not cut it off."""
    model = wrapped("small_rms_rotary_gqa")
    x = inputs(model, "flat", 1)
    late = hk.intervene(
        site("resid_post", 1, pos=1), lambda v, read, ctx: v + read, hk.here(site("resid_pre", 1, pos=4))
    )
    worlds = [World(x, late), World(x, late + hk.zero(site("z", 0, pos=4))), World(x, hk.zero(site("z", 0, pos=4)))]
    reads = [site("logits", pos=2)]
    oracle, mine = Ran(model, worlds, reads, "sequential"), Ran(model, worlds, reads, executor)
    agree(oracle, mine, worlds, reads)
    assert float((oracle.values[0][0] - oracle.values[1][0]).abs().max()) > 1e-3


@pytest.mark.parametrize("executor", [*EXECUTORS, "auto"])
def test_a_cycle_is_refused_before_anything_runs(executor):
    model = wrapped("gpt2")
    x = inputs(model, "flat", 1)
    for late in (site("resid_post", 1), site("z", 0), site("logits")):
        plan = from_here(site("z", 0), late)
        with pytest.raises(hk.errors.CycleError, match=r"z\.0"):
            list(hk.run_worlds(model, [World(x, plan)], [site("logits")], executor=executor))
        with pytest.raises(hk.errors.CycleError), model.apply(plan):
            pass
        with pytest.raises(hk.errors.CycleError):
            model.run(x, patch(site("z", 1), World(x, plan)))
