"""The three executors against one another: effects, what reached, chunks, early stops, and where `shared` gives way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import hooks as hk
from hooks import Inputs, Model, Site, World, patch, site
from hooks.worlds import choose
from tests import zoo
from tests.zoo import fresh, wrapped

EXACT = {"rtol": 0.0, "atol": 1e-10}
LAYOUTS = {"flat": ([6, 6], "right"), "right": ([7, 4, 5], "right"), "left": ([7, 4, 5], "left")}
EXECUTORS = ("sequential", "batched", "shared")
SEVERAL = ["gpt2", "mistral", "qwen3", "neox", "gemma2", "small_rms_rotary_gqa", "small_attn_only", "small_qk_norm"]

each_family = pytest.mark.parametrize("family", zoo.FAMILIES)
several_families = pytest.mark.parametrize("family", SEVERAL)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_executor = pytest.mark.parametrize("executor", EXECUTORS)


def inputs(model: Model, layout: str, seed: int) -> Inputs:
    lengths, side = LAYOUTS[layout]
    return model.inputs(*zoo.random_inputs(zoo.VOCAB, lengths, side, seed))


def sharing_a_prefix(x: Inputs, keep: int) -> Inputs:
    """Inputs whose rows agree with those of `x` in their first `keep` tokens, and in no token from there on."""
    ids = torch.where(x.mask & (x.positions >= keep), x.ids % (zoo.VOCAB - 1) + 1, x.ids)
    return Inputs.of(ids, x.mask)


def full_rows(model: Model, x: Inputs) -> Inputs:
    """Donors that have every position of `x`."""
    return model.inputs(*zoo.random_inputs(zoo.VOCAB, [x.width] * 3, "right", 9))


def counts(place: Site, value: Tensor, x: Inputs) -> Tensor:
    """A read with zeros where it stands at padding, of which nothing is promised."""
    if place.restricted and isinstance(place.pos, (int, tuple)):
        return value
    if isinstance(place.pos, Tensor) and place.pos.dtype != torch.bool:
        return value
    if place.restricted:
        low, high = (place.pos.start, place.pos.stop) if isinstance(place.pos, hk.Span) else (None, None)
        sizes = [len(range(*slice(low, high).indices(n))) for n in x.lengths.tolist()]
        real = torch.arange(value.shape[place.axes.index("pos")]) < torch.tensor(sizes)[:, None]
    else:
        real = x.mask
    shape = [1] * value.ndim
    shape[0], shape[place.axes.index("pos")] = real.shape
    return torch.where(real.reshape(shape), value, 0.0)


class Ran:
    """Everything that worlds gave, put together from its chunks."""

    def __init__(self, model: Model, worlds: list[World], reads: list[Site], executor: str, **options: int) -> None:
        pieces: dict[int, dict[int, hk.Outcome]] = {}
        self.chunks = 0
        for outcome in hk.run_worlds(model, worlds, reads, executor=executor, **options):
            self.chunks += 1
            mine = pieces.setdefault(outcome.index, {})
            assert outcome.rows.start not in mine, "a row came twice"
            mine[outcome.rows.start] = outcome
            rows = outcome.rows.stop - outcome.rows.start
            assert [len(value) for value in outcome.values] == [rows] * len(reads)
        assert sorted(pieces) == list(range(len(worlds)))
        self.values: list[list[Tensor]] = []
        self.statuses: list[list[str]] = []
        for index, world in enumerate(worlds):
            ordered = [pieces[index][start] for start in sorted(pieces[index])]
            assert [o.rows.start for o in ordered] == [0, *(o.rows.stop for o in ordered[:-1])]
            assert ordered[-1].rows.stop == len(world.inputs)
            whole = [torch.cat([o.values[i] for o in ordered]) for i in range(len(reads))]
            self.values.append([counts(r, v, world.inputs) for r, v in zip(reads, whole, strict=True)])
            self.statuses.append([o.status for o in ordered])


def agree(one: Ran, two: Ran, worlds: list[World], reads: list[Site], atol: float = 1e-10) -> None:
    wrong = []
    for world, mine, theirs in zip(worlds, one.values, two.values, strict=True):
        for read, a, b in zip(reads, mine, theirs, strict=True):
            if a.shape != b.shape:
                wrong.append(f"{read} under {world.plan}: shapes {list(a.shape)} and {list(b.shape)}")
            elif not bool(((a - b).abs() <= atol).logical_or(a == b).all()):
                wrong.append(f"{read} under {world.plan}: off by {float((a - b).nan_to_num(9.9).abs().max()):.2g}")
    assert not wrong, f"{len(wrong)} disagree:\n" + "\n".join(wrong[:20])


def places(model: Model) -> list[Site]:
    return [
        site(info.name, layer if info.layers else None) for info in model.sites() for layer in range(info.layers or 1)
    ]


def bend(x: Tensor, ctx: hk.Context) -> Tensor:
    return torch.where(x.isfinite(), 0.6 * x + torch.cos(3.0 * x), x)


def menu(model: Model, x: Inputs, other: Inputs, inside: bool) -> list[World]:
    """A world for nearly everything that a plan can say, with and without sites inside attention."""
    source, reference, donors = World(other), World(sharing_a_prefix(x, 1)), World(full_rows(model, x))
    last, plans = model.n_layers - 1, []
    ways = [
        lambda place: hk.intervene(place.at(pos=(1, 3)), bend),
        lambda place: hk.scale(place.at(pos=-2), 0.5) if inside else hk.mean(place.at(pos=-2), reference),
        lambda place: patch(place.at(pos=-1), source),
        lambda place: hk.resample(place.at(pos=(1, -1)), donors),
        lambda place: patch(place.at(pos=slice(1, -1)), source).strength(0.4),
        lambda place: hk.zero(place.at(pos=2)),
        lambda place: hk.noise(place.at(pos=3), 0.5),
    ]
    for number, place in enumerate(p for p in places(model) if p.layer in (None, 0, last)):
        if (place.name in ("scores", "pattern")) != inside:
            continue
        plans += [patch(place, source), ways[number % 7](place)]
        if "head" in place.axes and number % 2:
            plans.append(patch(place.at(head=-1), source))
    if inside:
        plans += [
            hk.knockout(site("scores", 0, head=1, pos=3, key_pos=(0, 2))),
            hk.knockout(site("pattern", last, key_pos=1)),
        ]
        plans += [hk.zero(site("pattern", last, key_pos=slice(1, 3))), hk.knockout(site("scores", 1, pos=0, key_pos=0))]
        plans += [hk.scale(site("pattern", 0, pos=3), 0.5) + patch(site("scores", 0, pos=2), source)]
        plans += [patch(site("pattern", 1, pos=-1, head=2), source) + hk.zero(site("v", 1, pos=1))]
    else:
        width = model.architecture.width
        basis = torch.stack([torch.linspace(-1, 1, width).double(), torch.linspace(0, 3, width).double().sin()])
        rows = torch.tensor([True, False, True])[: len(x)]
        plans += [
            hk.steer(site("resid_post", 0, pos=2), basis[0], scale=3.0),
            hk.project_out(site("resid_pre", last), basis),
            hk.interchange(site("resid_post", 0, pos=(0, -1)), basis[1], source),
            hk.freeze(site("attn_out", last)) + hk.scale(site("resid_pre", 0, pos=1), 2.0),
            hk.freeze(site("z", 1, head=0, pos=3)) + patch(site("resid_pre", 1, pos=2), source),
            patch(site("z", 0, head=2), source) + hk.zero(site("attn_out", 0, pos=1)) + hk.scale(site("q", 1), 1.5),
            patch(site("z", 1), source).where(rows),
            hk.zero(site("attn_out", 1)).where(x.mask & (x.positions != 2)),
            hk.scale(site("resid_pre", 1), 3.0).strength(torch.tensor([0.5, 1.0, 0.0])[: len(x)].double()),
            hk.recompute(site("resid_pre", 1, pos=2)),
            hk.clamp(site("k", 0, head=0, dim=(1, 2)), torch.tensor([0.5, -0.5]).double()),
            hk.zero(site("resid_post", 0, pos=torch.arange(len(x)))),
            hk.zero(site("resid_post", 0, pos=x.mask & (x.positions % 2 == 1))),
            patch(site("resid_pre", 1, pos=3), source, source_site=site("resid_pre", 0, pos=1)),
            patch(site("logits", pos=-1), source) + hk.zero(site("ln_final", pos=1)),
            hk.scale(site("embed", pos=1), 2.0) + hk.scale(site("embed", pos=1), 2.0),
        ]
    return [World(x, plan) for plan in plans] + [World(x)]


def reading(model: Model, x: Inputs, inside: bool) -> dict[str, list[Site]]:
    last, rows = model.n_layers - 1, len(x)
    mid = site("resid_mid" if ("resid_mid", last, None) in model.sizes else "attn_out", last)
    sets = {
        "last": [site("logits", pos=-1)],
        "second": [site("logits", pos=2)],
        "columns": [
            site("logits", pos=-1, dim=(3, 7)),
            site("logits", pos=1, dim=torch.arange(2 * rows).reshape(rows, 2)),
        ],
        "rows": [site("logits", pos=torch.tensor([2, 3, 1])[:rows]), site("logits", pos=(1, -2), dim=5)],
        "whole": [site("logits")],
        "span": [site("logits", pos=slice(2, None))],
        "mixture": [site("logits", pos=-1), mid, site("z", 1, head=(1, 3)), site("resid_pre", 1, pos=2), site("embed")],
        "early": [site("attn_out", 0), site("resid_post", 0, pos=(0, 3)), site("k", 0), site("q", 0, pos=-1)],
        "first": [site("resid_pre", 0, pos=slice(1, None)), site("v_input", 0, head=0)],
        "final": [site("ln_final", pos=-1), site("result", last, head=0)],
    }
    if inside:
        sets["pattern"] = [site("logits", pos=-1), site("pattern", last, pos=-1), site("scores", 0, head=1, pos=2)]
        sets["square"] = [site("pattern", 0)]
    return sets


# Effects


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize(
    ("family", "layout"), [*((f, "left") for f in zoo.FAMILIES), ("gpt2", "flat"), ("mistral", "right")]
)
def test_executors_agree(family, layout, inside):
    model = wrapped(family)
    x, other = inputs(model, layout, seed=1), inputs(model, layout, seed=2)
    worlds = menu(model, x, other, inside)
    assert choose(model, worlds) == choose(model, worlds, "shared")
    assert choose(model, worlds).executor == "shared"
    sets = reading(model, x, inside)
    union = [read for reads in sets.values() for read in reads]
    oracle = Ran(model, worlds, union, "sequential")
    agree(oracle, Ran(model, worlds, union, "batched"), worlds, union)
    start = 0
    for reads in sets.values():
        mine = Ran(model, worlds, reads, "shared")
        theirs = object.__new__(Ran)
        theirs.values = [values[start : start + len(reads)] for values in oracle.values]
        agree(theirs, mine, worlds, reads)
        start += len(reads)
    whole = union.index(site("logits"))
    base = oracle.values[-1][whole]
    moved = [float((values[whole] - base).abs().max()) > 1e-6 for values in oracle.values]
    assert sum(moved) > 0.7 * len(worlds)


@each_family
def test_each_site_by_itself(family):
    """One world and one read at a time, so that nothing is there because another world needed it."""
    model = wrapped(family)
    x, other = inputs(model, "right", 1), inputs(model, "right", 2)
    last = [place for place in places(model) if place.layer in (None, model.n_layers - 1)]
    for place in last:
        world, read = World(x, patch(place.at(pos=2), World(other))), [site("logits", pos=-1)]
        agree(Ran(model, [world], read, "sequential"), Ran(model, [world], read, "shared"), [world], read)
        world, read = World(x, hk.scale(site("resid_pre", 0, pos=1), 2.0)), [place]
        agree(Ran(model, [world], read, "sequential"), Ran(model, [world], read, "shared"), [world], read)
        copied = hk.intervene(
            site("logits"),
            lambda v, r, ctx: v + r.nan_to_num(0, 0, 0).flatten(1).sum(1)[:, None, None],
            hk.here(place.at(pos=1)),
        )
        if place.name != "logits":
            world, read = World(x, copied), [site("logits", pos=-1)]
            agree(Ran(model, [world], read, "sequential"), Ran(model, [world], read, "shared"), [world], read)


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


@pytest.mark.parametrize("executor", ["batched", "shared"])
@several_families
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


@pytest.mark.parametrize("budget", [1, 40_000])
@each_executor
@several_families
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


@each_executor
@several_families
def test_reads_of_every_form_in_chunks(family, executor):
    """Spans, masks and whole sites are as wide in a chunk of short rows as they are in the whole batch."""
    model = wrapped(family)
    for layout in ("right", "left") if executor == "shared" else ("left",):
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


# What reached


@pytest.mark.parametrize("layout", ["flat", "left"])
@each_family
def test_what_stands_after_the_read_is_pruned_and_has_exactly_no_effect(family, layout):
    model = wrapped(family)
    x, other = inputs(model, layout, 1), inputs(model, layout, 2)
    source, reads = World(other), [site("logits", pos=1), site("logits", pos=2, dim=(4, 8))]
    sites = [place for place in places(model) if place.name not in ("pos_embed", "logits", "ln_final")]
    worlds = [World(x, patch(place.at(pos=3), source)) for place in sites] + [World(x)]
    for executor in EXECUTORS:
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
    for executor in EXECUTORS:
        for budget in (None, 1):
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


@each_executor
@several_families
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


@pytest.mark.parametrize("family", ["gpt2", "llama", "small_attn_only"])
def test_this_world_is_read_at_any_earlier_site(family):
    """Every pair of sites: one computed earlier is read alike in each executor; one that is not is a cycle."""
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
    reads = [site("logits", pos=-1), site("logits", pos=1)]
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


# Where shared gives way


def test_functions_that_mix_are_run_batched_and_the_reason_says_so():
    model = wrapped("qwen3")
    x, other = inputs(model, "flat", 1), inputs(model, "flat", 2)
    over_rows = hk.intervene(site("z", 1, head=1), lambda v, ctx: v - v.mean(0, keepdim=True), mixes=("row",))
    over_positions = hk.intervene(site("resid_pre", 1), lambda v, ctx: v.flip(1), mixes=("pos",))
    for plan, word in ((over_rows, "row"), (over_positions, "pos"), (over_rows + over_positions, "mixes")):
        worlds = [World(x, plan), World(x, hk.zero(site("z", 0, pos=1)) + plan), World(other, plan), World(x)]
        for asked in ("auto", "shared"):
            choice = choose(model, worlds, asked)
            assert choice.executor == "batched"
            assert word in choice.reason and "shared" in choice.reason
        reads = [site("logits", pos=2), site("logits", pos=-1)]
        oracle = Ran(model, worlds, reads, "sequential")
        for budget in (None, 1):
            agree(oracle, Ran(model, worlds, reads, "shared", budget=budget), worlds, reads)
        assert float((oracle.values[0][1] - oracle.values[3][1]).abs().max()) > 1e-3


def submodules(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if part is not module and next(part.parameters(), None) is not None]


@several_families
def test_hooks_of_the_users_own_are_respected(family):
    model = fresh(family)
    x, other = inputs(model, "left", 1), inputs(model, "left", 2)
    block = model.architecture.blocks[1]
    for part in (block.module, block.norm1, block.attention, block.out, model.architecture.embed):
        name = next(n for n, m in model.module.named_modules() if m is part)

        def bump(_module: nn.Module, _args: tuple, out: Tensor | tuple) -> Tensor | tuple:
            first = out[0] if isinstance(out, tuple) else out
            first = first + torch.arange(first.shape[-1]).double().cos()
            return (first, *out[1:]) if isinstance(out, tuple) else first

        handle = part.register_forward_hook(bump)
        worlds, reads = [World(x, patch(site("resid_pre", 1, pos=1), World(other))), World(x)], [site("logits", pos=-1)]
        choice = choose(model, worlds, "auto")
        assert choice.executor != "shared" and name in choice.reason
        oracle = Ran(model, worlds, reads, "sequential")
        agree(oracle, Ran(model, worlds, reads, "auto"), worlds, reads)
        handle.remove()
        assert choose(model, worlds, "auto").executor == "shared"
        plain = Ran(model, worlds, reads, "shared")
        assert float((oracle.values[0][0] - plain.values[0][0]).abs().max()) > 1e-3
    handle = block.module.register_forward_pre_hook(lambda m, args: None)
    assert choose(model, [World(x)]).executor != "shared"
    handle.remove()


@pytest.mark.parametrize("whole", [True, False], ids=["model", "a block"])
def test_training_mode_is_not_shared(whole):
    """Dropout draws afresh for every forward pass, wherever in the model it is switched on."""
    model = fresh("gpt2")
    for part in model.module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.5
    x = inputs(model, "flat", 1)
    assert choose(model, [World(x)]).executor == "shared"
    (model.module if whole else model.architecture.blocks[1].module).train()
    choice = choose(model, [World(x)])
    assert choice.executor != "shared"
    assert "training" in choice.reason


def test_executors_by_name():
    model = wrapped("gpt2")
    x = inputs(model, "flat", 1)
    for name in ("sequential", "batched"):
        assert choose(model, [World(x)], name) == hk.worlds.Choice(name)
    assert choose(model, [], "auto").executor == "shared"
    assert list(hk.run_worlds(model, [], [site("logits")])) == []


# Unfired


def without_its_last_block(family: str) -> Model:
    """A model that no longer computes its last block, though it was wrapped with it."""
    model = fresh(family)
    model.module.blocks = model.module.blocks[:-1]
    return model


def test_what_never_fires_raises():
    model = without_its_last_block("small_ln_learned")
    x = inputs(model, "flat", 1)
    idle, busy = hk.zero(site("z", 1)), hk.zero(site("z", 0))
    with pytest.raises(hk.errors.UnfiredError, match=r"never fired: zero at z\.1"):
        model.run(x, busy + idle)
    with pytest.raises(hk.errors.UnfiredError, match=r"z\.1"), model.apply(busy + idle):
        model.module(input_ids=x.ids)
    with pytest.raises(hk.errors.UnfiredError, match=r"z\.0.*z\.1"), model.apply(busy + idle):
        pass
    assert model.run(x, busy).audit[0].status == "fired"


def test_what_never_fires_hides_no_other_exception():
    model = without_its_last_block("small_ln_learned")
    x = inputs(model, "flat", 1)
    with pytest.raises(KeyError, match="mine"), model.apply(hk.zero(site("z", 1))):
        raise KeyError("mine")

    def fail(value: Tensor, ctx: hk.Context) -> Tensor:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        model.run(x, hk.intervene(site("z", 0), fail) + hk.zero(site("z", 1)))


@pytest.mark.parametrize("executor", ["sequential", "batched"])
def test_worlds_that_never_fire_raise(executor):
    model = without_its_last_block("small_ln_learned")
    x = inputs(model, "flat", 1)
    with pytest.raises(hk.errors.UnfiredError):
        list(hk.run_worlds(model, [World(x, hk.zero(site("z", 1)))], [site("logits", pos=-1)], executor=executor))


def test_a_forward_of_the_users_own_is_run():
    """A method that was replaced on one module: the copy-on-write executor does not call it, so another one is used."""
    model = fresh("gpt2")
    x = inputs(model, "flat", 1)
    worlds = [World(x), World(x, hk.zero(site("z", 1, head=0)))]
    before = [o.values[0] for o in hk.run_worlds(model, worlds, [site("logits")])]
    mlp = model.architecture.blocks[0].mlp.module
    whole = mlp.forward
    mlp.forward = lambda v: 0.5 * whole(v)
    choice = choose(model, worlds)
    assert choice.executor == "batched" and "mlp" in choice.reason and "forward" in choice.reason
    after = [o.values[0] for o in hk.run_worlds(model, worlds, [site("logits")])]
    torch.testing.assert_close(after[0], model.run(x).logits, rtol=0, atol=1e-10)
    assert min(float((a - b).abs().max()) for a, b in zip(after, before, strict=True)) > 1e-3


def test_a_model_on_several_devices_is_not_shared():
    model = fresh("small_ln_learned")
    assert model.unshareable() == ""
    model.module.unembed.to("meta")
    assert "cpu, meta" in model.unshareable()
