"""What every executor says that interventions did: fired, inert or pruned, on which rows and positions."""

from __future__ import annotations

import pytest
import torch

import hooks as hk
from hooks import World, patch, site
from tests import zoo
from tests.hooks.executing import EXECUTORS, Ran, agree, bend, each_family, inputs, places
from tests.turns import in_turn
from tests.zoo import wrapped

# What reached


@pytest.mark.parametrize(("family", "layout"), in_turn(zoo.FAMILIES, ["flat", "left"]))
def test_what_stands_after_the_read_is_pruned_and_has_exactly_no_effect(family, layout):
    model = wrapped(family)
    x, other = inputs(model, layout, 1), inputs(model, layout, 2)
    source, reads = World(other), [site("logits", pos=1), site("logits", pos=2, dim=(4, 8))]
    sites = [place for place in places(model) if place.name not in ("pos_embed", "logits", "ln_final")]
    each = [World(x, patch(place.at(pos=3), source)) for place in sites]
    for executor in EXECUTORS:
        # The others compute everything, whatever is read.
        worlds = [*(each if executor == "shared" else each[::3]), World(x)]
        ran = Ran(model, worlds, reads, executor)
        for world, values, status in zip(worlds[:-1], ran.values, ran.statuses, strict=False):
            for value, base in zip(values, ran.values[-1], strict=True):
                if executor == "shared":
                    assert torch.equal(value, base), world.plan
                else:  # rounding depends on how a site is reached, and on where in a batch a row stands
                    torch.testing.assert_close(value, base, rtol=0.0, atol=1e-12)
            assert status == (["pruned"] if executor == "shared" else ["fired"]), f"{executor}: {world.plan}"


@each_family
def test_in_the_last_layer_only_what_is_read_is_reached(family):
    """Queries and everything after attention at an earlier position; keys and values there do reach."""
    model = wrapped(family)
    x, last = inputs(model, "left", 1), model.n_layers - 1
    reads = [site("logits", pos=3)]
    names = [name for name in ("q", "z", "result", "attn_out", "resid_mid", "mlp_post", "mlp_out", "resid_post")]
    have = {info.name for info in model.sites()}
    dead = [World(x, hk.intervene(site(name, last, pos=2), bend)) for name in names if name in have]
    live = [World(x, hk.intervene(site(name, last, pos=2), bend)) for name in ("k", "v", "resid_pre", "attn_in")]
    live += [World(x, hk.intervene(site(name, last, pos=3), bend)) for name in ("q", "z", "attn_out", "resid_post")]
    worlds = [*dead, *live, World(x)]
    ran = {executor: Ran(model, worlds, reads, executor) for executor in EXECUTORS}
    assert ran["shared"].statuses[: len(dead)] == [["pruned"]] * len(dead)
    assert ran["shared"].statuses[len(dead) : -1] == [["fired"]] * len(live)
    for executor in EXECUTORS:
        values = [values[0] for values in ran[executor].values]
        for value in values[: len(dead)]:
            torch.testing.assert_close(value, values[-1], rtol=0.0, atol=0.0 if executor == "shared" else 1e-12)
        assert all(float((value - values[-1]).abs().max()) > 1e-6 for value in values[len(dead) : -1])


@each_family
def test_what_stands_above_the_last_layer_that_is_read_is_pruned(family):
    model = wrapped(family)
    x, other = inputs(model, "right", 1), inputs(model, "right", 2)
    last = model.n_layers - 1
    above = [hk.zero(site("z", last, pos=1)), hk.scale(site("logits"), 2.0), hk.zero(site("ln_final"))]
    above += [patch(site(name, last), World(other)) for name in ("resid_post", "k", "pattern")]
    above += [
        patch(site("logits"), World(other)),
        patch(site("ln_final", pos=2), World(other)),
        hk.freeze(site("z", last)),
    ]
    worlds = [World(x, plan) for plan in above] + [World(x, hk.zero(site("z", 0, pos=1))), World(x)]
    for reads in ([site("resid_post", 0)], [site("z", 0, pos=2), site("attn_out", 0)]):
        ran = {executor: Ran(model, worlds, reads, executor) for executor in EXECUTORS}
        agree(ran["sequential"], ran["batched"], worlds, reads)
        agree(ran["sequential"], ran["shared"], worlds, reads)
        for index in range(len(above)):
            assert ran["shared"].statuses[index] == ["pruned"], worlds[index].plan
            assert torch.equal(ran["shared"].values[index][0], ran["shared"].values[-1][0])
        edited, base = (ran["shared"].values[i][-1] for i in (-2, -1))
        assert float((edited - base).abs().max()) > 1e-6


@each_family
def test_equal_values_are_inert(family):
    model = wrapped(family)
    x, other = inputs(model, "left", 1), inputs(model, "left", 2)
    same_rows = torch.zeros(len(x), dtype=torch.bool)
    plans = [
        hk.scale(site("z", 1, head=0), 1.0),
        patch(site("resid_pre", 1), World(x)),
        patch(site("pattern", 1, pos=-1), World(x)),
        patch(site("resid_pre", 1), World(other)).strength(0.0),
        patch(site("resid_pre", 1, pos=2), World(other)).where(same_rows),
        hk.zero(site("attn_out", 0, pos=1)).where(same_rows),
        hk.recompute(site("embed")),
        hk.knockout(site("scores", 0, pos=0, key_pos=1)),
    ]
    worlds, reads = [World(x, plan) for plan in plans] + [World(x)], [site("logits", pos=-1)]
    for executor in ("sequential", "shared"):
        ran = Ran(model, worlds, reads, executor)
        for world, values, status in zip(worlds, ran.values, ran.statuses, strict=True):
            assert status == ["inert"], f"{executor}: {world.plan}"
            torch.testing.assert_close(values[0], ran.values[-1][0], rtol=0.0, atol=1e-12)


@each_family
def test_the_audit_says_how_many_rows_and_positions(family):
    model = wrapped(family)
    x = inputs(model, "left", 1)
    rows = torch.tensor([True, False, True])
    plan = (
        hk.zero(site("z", 0, head=1))
        + hk.zero(site("attn_out", 1, pos=(0, -1))).where(rows)
        + hk.zero(site("v", 1, pos=2))
    )
    for executor in EXECUTORS:
        for budget in (None, 1):
            found = [0, 0, 0], [0, 0, 0], [0.0, 0.0, 0.0]
            for outcome in hk.run_worlds(
                model, [World(x, plan)], [site("logits", pos=-1)], executor=executor, budget=budget
            ):
                for index, entry in enumerate(outcome.audit):
                    found[0][index] += entry.rows
                    found[1][index] += entry.positions
                    found[2][index] = max(found[2][index], entry.change)
            assert found[:2] == ([3, 2, 3], [16, 4, 3])
    expected = model.run(x, hk.zero(site("z", 0, head=1))).audit
    z = model.run(x, capture=site("z", 0, head=1)).tape[site("z", 0, head=1)]
    real = torch.arange(z.shape[1]) < x.lengths[:, None]
    assert expected[0].change == pytest.approx(float(z[real].abs().max()))


def test_the_largest_change_of_many_calls():
    """However many there are: the largest comes first here, and is not forgotten."""
    model = wrapped("small_ln_learned")
    ids = torch.arange(1, 30)[:, None]
    sizes = model.run(model.inputs(ids), capture=site("embed")).tape[site("embed")].abs().amax((1, 2))
    order = sizes.argsort(descending=True)
    with model.apply(hk.zero(site("embed"))) as audit, torch.no_grad():
        for call in range(140):
            model.module(ids[order[min(call, len(order) - 1)]][None])
    assert audit[0].calls == 140 and audit[0].positions == 140
    assert audit[0].change == float(sizes.max()) > float(sizes.min())


@pytest.mark.parametrize("layout", ["flat", "left"])
def test_a_recomputation_reaches_what_is_after_it(layout):
    """It is carried on though its value is the same: pruned where nothing that is read can see it, else inert."""
    model = wrapped("small_ln_learned")
    x = inputs(model, layout, 1)
    worlds = [World(x, hk.recompute(site("resid_pre", 1, pos=pos))) for pos in (3, 1)]
    ran = Ran(model, worlds, [site("logits", pos=2)], "shared")
    assert ran.statuses == [["pruned"], ["inert"]]


def test_what_fired_once_is_not_pruned():
    """A plan that is held in two runs, of which only one reads what it reaches."""
    model = wrapped("small_ln_learned")
    x = inputs(model, "flat", 1)
    late = hk.zero(site("resid_pre", 1, pos=3))
    for reads in ((1, 4), (4, 1)):
        with model.apply(late) as audit:
            for pos in reads:
                list(hk.run_worlds(model, [World(x)], [site("logits", pos=pos)], executor="shared"))
        assert (audit[0].status, audit[0].calls) == ("fired", 2)
