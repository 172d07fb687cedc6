"""The three executors against one another: effects, orders and chunks."""

from __future__ import annotations

import pytest
import torch

import hooks as hk
from hooks import Inputs, World, patch, site
from hooks.record import choose
from tests import zoo
from tests.hooks.executing import (
    EXACT,
    EXECUTORS,
    LAYOUTS,
    SEVERAL,
    Ran,
    agree,
    each_executor,
    each_family,
    full_rows,
    inputs,
    menu,
    places,
    reading,
    sharing_a_prefix,
)
from tests.turns import in_turn
from tests.zoo import fresh, wrapped

# Effects


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize(
    ("family", "layout"), [*((f, "left") for f in SEVERAL), ("gpt2", "flat"), ("mistral", "right")]
)
def test_executors_agree(family, layout, inside):
    """Every other world of the menu and every other set of reads, in turn: of each combination, two families try it."""
    model = wrapped(family)
    x, other = inputs(model, layout, seed=1), inputs(model, layout, seed=2)
    *edited, base = menu(model, x, other, inside)
    turn = SEVERAL.index(family) + (layout != "left")
    worlds = [*edited[turn % 2 :: 2], base]
    assert choose(model, worlds) == choose(model, worlds, "shared")
    assert choose(model, worlds).executor == "shared"
    sets = list(reading(model, x, inside).values())[turn // 2 % 2 :: 2]
    union = [*(read for reads in sets for read in reads), site("logits")]
    oracle = Ran(model, worlds, union, "sequential")
    agree(oracle, Ran(model, worlds, union, "batched"), worlds, union)
    start = 0
    for reads in sets:
        mine = Ran(model, worlds, reads, "shared")
        theirs = object.__new__(Ran)
        theirs.values = [values[start : start + len(reads)] for values in oracle.values]
        agree(theirs, mine, worlds, reads)
        start += len(reads)
    base = oracle.values[-1][-1]
    moved = [float((values[-1] - base).abs().max()) > 1e-6 for values in oracle.values]
    assert sum(moved) > 0.7 * len(worlds)


@each_family
def test_each_site_by_itself(family):
    """One world and one read at a time, so that nothing is there because another world needed it.

    A site is edited, read, or read by an edit, which of them taking turns: four of the families try each.
    """
    model, turn = wrapped(family), zoo.FAMILIES.index(family)
    x, other = inputs(model, "right", 1), inputs(model, "right", 2)
    last = [place for place in places(model) if place.layer in (None, model.n_layers - 1)]
    for number, place in enumerate(last):
        copied = hk.intervene(
            site("logits"),
            lambda v, r, ctx: v + r.nan_to_num(0, 0, 0).flatten(1).sum(1)[:, None, None],
            hk.here(place.at(pos=1)),
        )
        ways = [
            (patch(place.at(pos=2), World(other)), site("logits", pos=-1)),
            (hk.scale(site("resid_pre", 0, pos=1), 2.0), place),
            (copied if place.name != "logits" else hk.scale(place, 2.0), site("logits", pos=-1)),
        ]
        plan, read = ways[(number + turn) % 3]
        world = World(x, plan)
        agree(Ran(model, [world], [read], "sequential"), Ran(model, [world], [read], "shared"), [world], [read])


@each_family
def test_worlds_that_share_a_prefix_with_their_source(family):
    """Where clean and corrupt agree, the worlds agree, and `shared` need not compute anything to know it."""
    model = wrapped(family)
    for layout in ("flat", "left"):
        x = inputs(model, layout, seed=1)
        other, shapes = sharing_a_prefix(x, 3), (("resid_pre", 1), ("z", 0), ("v", 1))
        source, reads = World(other), [site("logits", pos=-1), site("resid_post", 1, pos=2)]
        worlds = [World(x, patch(site(name, layer, pos=p), source)) for name, layer in shapes for p in (0, 2, 3, -1)]
        ran = {executor: Ran(model, worlds, reads, executor) for executor in EXECUTORS}
        agree(ran["sequential"], ran["batched"], worlds, reads)
        agree(ran["sequential"], ran["shared"], worlds, reads)
        base = Ran(model, [World(x)], reads, "shared").values[0]
        for index in range(len(worlds)):
            same_tokens = index % 4 < 2
            assert (ran["shared"].statuses[index] == ["inert"]) == same_tokens
            assert (ran["sequential"].statuses[index] == ["inert"]) == same_tokens
            if same_tokens:
                assert torch.equal(ran["shared"].values[index][0], base[0])
            else:
                assert float((ran["shared"].values[index][0] - base[0]).abs().max()) > 1e-6


@each_family
def test_a_base_that_itself_shares_nothing(family):
    """Worlds on several inputs, of several shapes, in one call."""
    model = wrapped(family)
    x, wide, left = inputs(model, "flat", 1), inputs(model, "right", 2), inputs(model, "left", 3)
    again = Inputs.of(x.ids.clone(), x.mask.clone())
    worlds = [
        World(given, plan)
        for plan in (hk.zero(site("z", 1, head=0, pos=-1)), hk.scale(site("resid_pre", 1, pos=2), 2.0), None)
        for given in (x, wide, left, again)
    ]
    reads = [site("logits", pos=-1), site("attn_out", 1, pos=2)]
    oracle = Ran(model, worlds, reads, "sequential")
    for executor in ("batched", "shared"):
        agree(oracle, Ran(model, worlds, reads, executor), worlds, reads)
        agree(oracle, Ran(model, worlds, reads, executor, budget=1), worlds, reads)
    for first, same_inputs in ((0, 3), (4, 7)):
        torch.testing.assert_close(oracle.values[first], oracle.values[same_inputs], **EXACT)


@pytest.mark.parametrize(
    ("family", "executor"), [("gpt2", "batched"), ("mistral", "shared"), ("neox", "shared"), ("gemma2", "batched")]
)
def test_the_order_of_worlds_does_not_matter(family, executor):
    model = wrapped(family)
    x, other = inputs(model, "left", 1), inputs(model, "left", 2)
    worlds = menu(model, x, other, inside=False)
    order = torch.randperm(len(worlds), generator=torch.Generator().manual_seed(0)).tolist()
    reads = [site("logits", pos=-1), site("logits", pos=1)]
    straight = Ran(model, worlds, reads, executor)
    mixed = Ran(model, [worlds[i] for i in order], reads, executor)
    torch.testing.assert_close(mixed.values, [straight.values[i] for i in order], **EXACT)
    assert mixed.statuses == [straight.statuses[i] for i in order]


@each_family
def test_an_attention_that_is_written_out_by_the_model(family):
    """Eager attention in the user's model: another kernel and another form of mask, which softmaxes in float32."""
    if family.startswith("small"):
        pytest.skip("the small transformers have one attention")
    model = fresh(family)
    model.module.set_attn_implementation("eager")
    for layout in LAYOUTS:
        x, other = inputs(model, layout, 1), inputs(model, layout, 2)
        worlds = [
            World(x, patch(site(n, 1, pos=p), World(other))) for n in ("resid_pre", "pattern", "k") for p in (2, -1)
        ]
        reads = [site("logits", pos=-1), site("pattern", 0, pos=-1), site("z", 1, pos=2)]
        oracle = Ran(model, worlds, reads, "sequential")
        agree(oracle, Ran(model, worlds, reads, "shared"), worlds, reads, 1e-5)
        agree(oracle, Ran(wrapped(family), worlds, reads, "sequential"), worlds, reads, 1e-5)


# Chunks


# Chunks of the executors that compute everything are cut by one loop, which knows nothing of families.
COMPLETE = [
    ("gpt2", "sequential"),
    ("mistral", "batched"),
    ("gemma2", "sequential"),
    ("small_rms_rotary_gqa", "batched"),
]


@pytest.mark.parametrize(
    ("family", "executor", "budget"),
    [
        *in_turn(SEVERAL, ["shared"], [1, 40_000]),
        *((*pair, budget) for pair, budget in zip(COMPLETE, (1, 40_000, 40_000, 1), strict=True)),
    ],
)
def test_a_chunked_run_equals_an_unchunked_one(family, executor, budget):
    model = wrapped(family)
    x, other = inputs(model, "left", 1), inputs(model, "left", 2)
    worlds = menu(model, x, other, inside=False)[:: 2 if executor == "shared" else 6]
    reads = [site("logits", pos=-1), site("logits", pos=torch.tensor([2, 0, 1]), dim=(1, 4))]
    whole, parts = Ran(model, worlds, reads, executor), Ran(model, worlds, reads, executor, budget=budget)
    assert whole.chunks == len(worlds)
    if budget == 1:
        assert parts.chunks == len(worlds) * len(x)
    agree(whole, parts, worlds, reads)


@pytest.mark.parametrize(
    ("family", "executor", "layout"),
    [*in_turn(SEVERAL, ["shared"], ["left", "right"]), *((*pair, "left") for pair in COMPLETE)],
)
def test_reads_of_every_form_in_chunks(family, executor, layout):
    """Spans, masks and whole sites are as wide in a chunk of short rows as they are in the whole batch."""
    model = wrapped(family)
    x, other = inputs(model, layout, 1), inputs(model, layout, 2)
    worlds = [
        World(x, plan)
        for plan in (
            patch(site("pattern", 1), World(other)),
            patch(site("resid_pre", 1, pos=slice(1, None)), World(other)),
            hk.mean(site("z", 1, head=0), World(other)),
            hk.resample(site("z", 1, pos=2), World(other)),
            hk.noise(site("v", 0), 1.0),
            hk.freeze(site("attn_out", 1)) + hk.scale(site("embed"), 1.5),
            hk.scale(site("resid_pre", 1), 2.0).strength(torch.tensor([0.2, 0.9, 0.5]).double()),
            hk.zero(site("attn_out", 0)).where(torch.tensor([False, True, False])),
        )
    ]
    sets = (
        [site("logits")],
        [site("logits", pos=slice(2, None))],
        [site("logits", pos=slice(5, None), dim=(1, 2)), site("logits", pos=0)],
        [site("resid_post", 1), site("resid_post", 0, pos=slice(5, None)), site("z", 1, head=1)],
        [site("pattern", 1), site("pattern", 0, pos=-1), site("scores", 1, pos=1, key_pos=(0, 1))],
    )
    # What `shared` computes depends on what is read; the others compute everything.
    for reads in sets if executor == "shared" else ([read for some in sets for read in some],):
        whole, parts = Ran(model, worlds, reads, executor), Ran(model, worlds, reads, executor, budget=1)
        assert parts.chunks == len(worlds) * len(x)
        agree(whole, parts, worlds, reads)


@each_executor
def test_what_mixes_rows_sees_all_of_them_in_chunks(executor):
    model = wrapped("llama")
    x, other = inputs(model, "flat", 1), inputs(model, "flat", 2)
    swap = hk.intervene(site("resid_pre", 1, pos=3), lambda v, ctx: v.flip(0), mixes=("row",))
    worlds = [
        World(x, swap),
        World(x, swap + hk.zero(site("z", 1, pos=1))),
        World(x),
        World(x, patch(site("resid_pre", 2, pos=3), World(other, swap))),
    ]
    reads = [site("logits", pos=-1)]
    whole = Ran(model, worlds, reads, executor)
    agree(whole, Ran(model, worlds, reads, executor, budget=1), worlds, reads)
    agree(whole, Ran(model, worlds, reads, "sequential"), worlds, reads)
    assert float((whole.values[0][0] - whole.values[2][0]).abs().max()) > 1e-3


@each_executor
def test_a_source_that_mixes_rows_sees_all_of_them_in_chunks(executor):
    model = wrapped("llama")
    x, other = inputs(model, "flat", 1), inputs(model, "flat", 2)
    swapped = World(other, hk.intervene(site("resid_pre", 1), lambda v, ctx: v.flip(0), mixes=("row",)))
    worlds, reads = [World(x, patch(site("resid_pre", 2, pos=3), swapped))], [site("logits", pos=-1)]
    whole = Ran(model, worlds, reads, executor)
    agree(whole, Ran(model, worlds, reads, executor, budget=1), worlds, reads)
    expected = Ran(model, [World(x, patch(site("resid_pre", 2, pos=3), World(other)))], reads, "sequential")
    assert float((whole.values[0][0] - expected.values[0][0]).abs().max()) > 1e-3


@each_executor
def test_what_is_given_for_each_row_in_chunks(executor):
    """Values, strengths, masks, positions and entries with an axis of rows: a chunk of rows takes its own."""
    model = wrapped("small_ln_learned")
    x, width = inputs(model, "left", 1), model.architecture.width
    draw = torch.randn(len(x), 2, width, generator=torch.Generator().manual_seed(3)).double()
    place, each = site("resid_pre", 1, pos=(1, -1)), torch.tensor([0.25, 1.5, -0.5]).double()
    plans = [
        hk.clamp(place, draw),
        hk.steer(place, draw, 2.0),
        hk.steer(place, draw, draw.square()),
        hk.scale(place, draw),
        hk.noise(place, draw.abs()),
        patch(place, draw),
        patch(place, torch.linspace(-1, 1, x.mask.numel() * width).double().reshape(*x.mask.shape, width)),
        hk.zero(place).strength(each),
        hk.zero(place).where(torch.tensor([False, True, True])),
        hk.zero(site("attn_out", 1)).where(x.mask & (x.positions == torch.tensor([[1], [3], [0]]))),
        hk.zero(site("resid_pre", 1, pos=torch.tensor([3, 0, 2]))),
        hk.mean(site("z", 0, pos=torch.tensor([[3, 1], [0, 2], [2, 1]])), World(full_rows(model, x))),
    ]
    worlds = [World(x, plan) for plan in plans]
    reads = [site("logits", pos=-1), site("logits", pos=3, dim=torch.tensor([[1, 2], [3, 4], [9, 0]]))]
    whole, cut = Ran(model, worlds, reads, "sequential"), Ran(model, worlds, reads, executor, budget=1)
    assert cut.chunks > whole.chunks or executor == "batched"
    agree(whole, cut, worlds, reads)
    base = model.run(x).logits[torch.arange(len(x)), x.order.gather(1, x.lengths[:, None] - 1)[:, 0]]
    for values in whole.values:
        assert float((values[0][:, 0] - base).abs().amax(1).max()) > 1e-3


@each_executor
def test_random_interventions_draw_the_same_in_every_chunk(executor):
    """A row draws by its id, not by its place in a chunk; another seed draws something else."""
    model = wrapped("small_ln_learned")
    x = inputs(model, "right", 1)
    worlds = [
        World(x, hk.noise(site("z", 0), 1.0)),
        World(x, hk.resample(site("z", 0), World(full_rows(model, x)))),
    ]
    reads = [site("logits", pos=-1)]
    one, two = Ran(model, worlds, reads, executor), Ran(model, worlds, reads, executor, budget=1)
    agree(one, two, worlds, reads)
    seeded = Ran(model, worlds, reads, executor, seed=5)
    agree(seeded, Ran(model, worlds, reads, "sequential", seed=5), worlds, reads)
    assert float((one.values[0][0] - seeded.values[0][0]).abs().max()) > 1e-3
    subset = Inputs.of(x.ids[1:], x.mask[1:], row_ids=torch.tensor([1, 2]))
    alone = Ran(model, [World(subset, worlds[0].plan)], reads, executor)
    torch.testing.assert_close(alone.values[0][0], one.values[0][0][1:], **EXACT)
