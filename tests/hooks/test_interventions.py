"""Every intervention against its formula, in the oracle or by hand; strength, where, draws, gradients, refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import hooks
from hooks import Context, Inputs, Plan, Site, Span, World, here, run_worlds, site
from hooks.context import context, fit
from hooks.errors import InterpError, PlanError, ShapeError, SiteError
from hooks.ops import Noise
from hooks.plan import Op, Read, as_plan
from hooks.random import choice, normal, uniform
from hooks.region import resolve
from tests import oracle, zoo
from tests.hooks.test_oracle_sites import (
    EXECUTORS,
    LOGITS,
    close,
    compare,
    either_side,
    forwards,
    replaced,
    setting,
    shrink,
)

each_family = pytest.mark.parametrize("family", zoo.FAMILIES)
some_families = pytest.mark.parametrize("family", ["gpt2", "mistral", "small_rms_rotary_gqa", "small_attn_only"])


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def places(s) -> list[Site]:
    """Sites of every form, in several layers, that a model has."""
    last = s.model.n_layers - 1
    listed = [
        "embed",
        "resid_pre",
        "q_input",
        "k",
        "pattern",
        "z",
        "result",
        "attn_out",
        "mlp_post",
        "resid_post",
        "logits",
    ]
    offered = {info.name for info in s.model.sites()}
    layers = {"q_input": 0, "k": 0, "pattern": last, "z": last, "result": 0, "attn_out": last, "mlp_post": 0}
    layers |= {"resid_pre": 1, "resid_post": last, "embed": None, "logits": None}
    return [Site(name, layers[name]) for name in listed if name in offered]


def edit(s, place: Site, function: Callable[[Tensor], Tensor], only: Tensor | None = None) -> dict:
    """The oracle's edit that applies a function of the whole activation where a site means."""
    where = s.chosen(place, only)
    return {(place.name, place.layer): lambda x: torch.where(where, function(x), x)}


def kept(s, plan, place: Site, inputs: Inputs | None = None, **options) -> Tensor:
    """The whole value of a site under a plan."""
    return s.model.run(s.corrupt if inputs is None else inputs, plan, capture=place.whole, **options).tape[place.whole]


def span(directions: Tensor) -> Tensor:
    """The projector on the span of the rows of `directions`, without an orthonormal basis."""
    directions = directions.reshape(-1, directions.shape[-1])
    return torch.linalg.pinv(directions) @ directions


# Formulas


@either_side
def test_the_builders_do_what_their_formulas_say(family, padding):
    s = setting(family, padding)
    cases = []
    for n, place in enumerate(places(s)):
        shape = s.clean_values[place.name, place.layer].shape
        source = s.clean_values[place.name, place.layer]
        part = place.at(pos=Span(1, None))
        cases.append((as_plan(hooks.zero(part)), replaced(s, part, 0.0)))
        cases.append((as_plan(hooks.scale(part, -0.5)), edit(s, part, lambda x: -0.5 * x)))
        if place.name == "pattern":
            continue
        v, u, w = normals(*shape[2:], seed=n), normals(shape[-1], seed=n + 1), normals(3, shape[-1], seed=n + 2)
        cases += [
            (as_plan(hooks.scale(part, v)), edit(s, part, lambda x, v=v: v * x)),
            (as_plan(hooks.steer(place, u, 2.5)), edit(s, place, lambda x, u=u: x + 2.5 * u)),
            (as_plan(hooks.steer(part, v, scale=v)), edit(s, part, lambda x, v=v: x + v * v)),
            (as_plan(hooks.steer(part, v, torch.tensor(0.5))), edit(s, part, lambda x, v=v: x + 0.5 * v)),
            (as_plan(hooks.project_out(place, u)), edit(s, place, lambda x, u=u: x - x @ span(u))),
            (as_plan(hooks.project_out(part, w)), edit(s, part, lambda x, w=w: x - x @ span(w))),
            (
                as_plan(hooks.interchange(place, 3.0 * u, World(s.clean))),
                edit(s, place, lambda x, u=u, y=source: x + (y - x) @ span(u)),
            ),
            (
                as_plan(hooks.interchange(part, w, s.tape)),
                edit(s, part, lambda x, w=w, y=source: x @ (torch.eye(len(w.T)) - span(w)) + y @ span(w)),
            ),
        ]
    # A projection of the residual may leave nothing to change where the source is equal, as at the first token.
    compare(s, cases, LOGITS, changes=0.9)


def test_a_whole_subspace_interchanged_is_a_patch():
    s = setting("gpt2", "left")
    place = site("z", 1, head=2)
    a = kept(s, hooks.interchange(place, normals(8, 8), s.tape), place)
    b = kept(s, hooks.patch(place, s.tape), place)
    close(a[s.mask], b[s.mask])
    removed = kept(s, hooks.project_out(place, normals(8, 8)), place)
    close(removed[:, :, 2][s.mask], torch.zeros_like(removed[:, :, 2][s.mask]))


@each_family
def test_knockout(family):
    s = setting(family, "left")
    minus = -torch.inf
    cases = []
    for layer in range(s.model.n_layers):
        for restriction in (
            {"pos": -1, "key_pos": 0},
            {"head": 1, "key_pos": Span(None, 2)},
            {"head": (0, 3), "pos": (1, 3), "key_pos": (0, 1)},
            {},
            {"pos": Span(1, None)},
            {"head": 2, "pos": -1},
        ):
            place = site("scores", layer, **restriction)
            cases.append((as_plan(hooks.knockout(place)), replaced(s, place, minus)))
    # With a sliding window the last query does not see the first key anyway.
    compare(s, cases, LOGITS, changes=0.8)
    compare(s, cases, [site("pattern", layer) for layer in range(s.model.n_layers)], changes=0.8)
    assert hooks.knockout(site("pattern", 1, head=2, key_pos=0)) == hooks.knockout(site("scores", 1, head=2, key_pos=0))
    with pytest.raises(SiteError, match="scores or pattern"):
        hooks.knockout(site("z", 0))


@each_family
def test_no_key_left_is_a_zero_pattern_and_no_nan(family):
    """Neither forwards nor backwards, for the queries of real tokens and for those of padding."""
    s = setting(family, "left")
    places = [site("pattern", 0), site("z", 0), site("scores", 0), site("scores", 1)]
    plan = hooks.knockout(site("scores", 0, pos=Span(1, 3))) + hooks.knockout(site("scores", 1, head=1))
    run = s.model.run(s.corrupt, plan, capture=places, grad=True)
    pattern = run.tape[places[0]].transpose(1, 2)
    cut = s.mask & (s.corrupt.positions >= 1) & (s.corrupt.positions < 3)
    assert torch.equal(pattern[cut], torch.zeros_like(pattern[cut]))
    assert (pattern[s.mask & ~cut].sum(-1) - 1).abs().max() < 1e-12
    assert torch.equal(run.tape[places[1]][cut], torch.zeros_like(run.tape[places[1]][cut]))
    loss = run.logits[s.mask].square().mean()
    parameters = [p for p in s.module.parameters() if p.requires_grad]
    for gradient in torch.autograd.grad(loss, [*parameters, *(run.tape[p] for p in places)], allow_unused=True):
        assert gradient is None or gradient.isfinite().all()
    assert run.logits.isfinite().all()


def reference(s, lengths: list[int], side: str) -> tuple[Inputs, dict, Tensor]:
    """Another batch, of any number of rows: its inputs, the oracle's values, and its mask."""
    ids, mask = zoo.random_inputs(zoo.VOCAB, lengths, side, seed=7)
    with torch.no_grad():
        return s.model.inputs(ids, mask), oracle.forward(s.module, ids, mask)[1], mask


def spread_mean(s, place: Site, values: dict, mask: Tensor, pooled: bool) -> Tensor:
    """The mean of a reference set at each position (and key position), laid over the columns of the corrupt batch."""
    whole = values[place.name, place.layer]
    square = place.name == "pattern"
    if square:
        whole = whole.transpose(1, 2)
    out = torch.zeros_like(s.corrupt_values[place.name, place.layer]).transpose(1, 2 if square else 1)
    real = [row.nonzero().flatten() for row in mask]
    here = [row.nonzero().flatten() for row in s.mask]
    assert not square or not pooled
    if pooled:
        return torch.cat([whole[r, columns] for r, columns in enumerate(real)]).mean(0).expand_as(out).clone()
    for b, columns in enumerate(here):
        for p, column in enumerate(columns):
            rows = [r for r in range(len(real)) if len(real[r]) > p]
            if not square:
                out[b, column] = torch.stack([whole[r, real[r][p]] for r in rows]).mean(0)
                continue
            for k, key in enumerate(columns[: p + 1]):
                out[b, column, :, key] = torch.stack([whole[r, real[r][p], :, real[r][k]] for r in rows]).mean(0)
    return out.transpose(1, 2) if square else out


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


@each_family
def test_freeze_holds_what_the_unedited_world_has(family):
    s = setting(family, "left")
    first = hooks.intervene(site("embed", pos=Span(1, None)), shrink)
    before = edit(s, first.site, shrink)
    cases = []
    for place in places(s)[1:]:
        value = s.corrupt_values[place.name, place.layer]
        part = place.at(pos=-1)
        cases.append((hooks.freeze(place) + first, {**before, **replaced(s, place, value)}))
        cases.append((first + hooks.freeze(part), {**before, **replaced(s, part, value)}))
    compare(s, cases, LOGITS, changes=None)  # a frozen residual undoes all that came before it
    with torch.no_grad():
        unfrozen, *frozen = forwards(s, [before, *(edits for _, edits in cases)])
    for values in frozen:
        assert (values["logits", None] - unfrozen["logits", None])[s.mask].abs().max() > 1e-4
    assert [entry.status for entry in s.model.run(s.corrupt, hooks.freeze(site("z", 0))).audit] == ["inert"]


@each_family
def test_recompute_changes_nothing(family):
    s = setting(family, "left")
    cases = [(as_plan(hooks.recompute(place.at(pos=1))), {}) for place in places(s)]
    compare(s, cases, LOGITS, changes=None)
    run = s.model.run(s.corrupt, hooks.recompute(site("resid_pre", 1)))
    assert run.audit[0].status == "inert"


@each_family
def test_functions_of_the_user_s_own_with_reads(family):
    s = setting(family, "left")
    last = s.model.n_layers - 1
    into, out = site("resid_pre", last), site("attn_out", last)
    clean = s.clean_values["attn_out", last]

    def mix(x: Tensor, mine: Tensor, theirs: Tensor, *, ctx: Context) -> Tensor:
        return x + 0.5 * mine - 0.25 * theirs * mine.tanh()

    reads = (here(into), Read(World(s.clean)))
    held = {}

    def first(x: Tensor) -> Tensor:
        held["x"] = 1.5 * x
        return held["x"]

    edits = {
        ("resid_pre", last): first,
        ("attn_out", last): lambda x: x + 0.5 * held["x"] - 0.25 * clean * held["x"].tanh(),
    }
    compare(s, [(hooks.intervene(out, mix, reads) + hooks.scale(into, 1.5), edits)], LOGITS)
    part = out.at(pos=(3, 1))
    edits[out.name, last] = edit(s, part, edits[out.name, last])[out.name, last]
    reads = (here(into.at(pos=(3, 1))), Read(s.tape))
    compare(s, [(hooks.intervene(part, mix, reads) + hooks.scale(into, 1.5), edits)], LOGITS)
    # Another position than the site's own: the source's first token into the last.
    plan = hooks.patch(out.at(pos=-1), s.tape, source_site=into.at(pos=0))
    first_token = s.clean_values["resid_pre", last][torch.arange(len(s.mask)), s.corrupt.order[:, 0]]
    compare(s, [(as_plan(plan), replaced(s, out.at(pos=-1), first_token[:, None].expand_as(clean)))], LOGITS)


def test_the_context_says_where_a_function_is():
    s = setting("mistral", "left")
    seen: list[tuple[Tensor, Context]] = []

    def look(x: Tensor, *, ctx: Context) -> Tensor:
        seen.append((x, ctx))
        return x

    inputs = s.model.inputs(s.corrupt.ids, s.mask, row_ids=torch.tensor([40, 7, 23]))
    s.model.run(inputs, hooks.intervene(site("scores", 2, head=(3, 1), pos=(-1, 0), key_pos=1), look), seed=9)
    (x, ctx) = seen.pop()
    assert list(x.shape) == [3, 2, 2, 1]
    assert (ctx.site, ctx.layer, ctx.axes) == ("scores", 2, ("row", "head", "pos", "key_pos"))
    assert ctx.single == (False, False, False, True) and ctx.head == (3, 1) and ctx.seed == 9
    assert ctx.row.tolist() == [40, 7, 23] and (ctx.window, ctx.total) == (slice(0, 3), 3)
    assert ctx.pos.tolist() == [[6, 0], [3, 0], [4, 0]] and ctx.key_pos.tolist() == [[1], [1], [1]]
    s.model.run(inputs, hooks.intervene(site("k", 0, head=-1, dim=Span(1, 3)), look))
    (x, ctx) = seen.pop()
    assert list(x.shape) == [3, 7, 1, 2] and ctx.head == (1,)
    assert ctx.pos[0].tolist() == list(range(7)) and ctx.pos[1][:4].tolist() == list(range(4))
    s.model.run(inputs, hooks.intervene(site("z", 0, head=Span(-2, None)), look))
    assert seen.pop()[1].head == (2, 3)
    s.model.run(inputs, hooks.intervene(site("embed"), look))
    (_, ctx) = seen.pop()
    assert ctx.layer is None and ctx.head is None and ctx.key_pos is None


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


@some_families
def test_strength_is_linear_in_between(family):
    s = setting(family, "left")
    rows = torch.tensor([0.25, 1.0, -0.5], dtype=torch.float64)
    cases = []
    for place in places(s):
        y, one = s.clean_values[place.name, place.layer], s.chosen(place.at(pos=1))
        item = hooks.patch(place, s.tape)
        each = rows.reshape([-1] + [1] * (y.ndim - 1))
        cases += [
            (as_plan(item.strength(0.3)), edit(s, place, lambda x, y=y: x + 0.3 * (y - x))),
            (as_plan(item.strength(1.7)), edit(s, place, lambda x, y=y: x + 1.7 * (y - x))),
            (as_plan(item.strength(torch.tensor(0.8))), edit(s, place, lambda x, y=y: x + 0.8 * (y - x))),
            (as_plan(item.strength(rows)), edit(s, place, lambda x, y=y, e=each: x + e * (y - x))),
            (as_plan(item.strength(0.5).strength(rows)), edit(s, place, lambda x, y=y, e=each: x + 0.5 * e * (y - x))),
            (
                Plan((item, hooks.zero(place.at(pos=1)))).strength(0.25),
                edit(s, place, lambda x, y=y, one=one: (x + (y - x) / 4) * torch.where(one, 0.75, 1)),
            ),
        ]
    # 0.8 is rounded to float32 on the way, as written down here.
    for n in range(2, len(cases), 6):
        eight = float(torch.tensor(0.8))
        place = cases[n][0][0].site
        y = s.clean_values[place.name, place.layer]
        cases[n] = (cases[n][0], edit(s, place, lambda x, y=y, e=eight: x + e * (y - x)))
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
    """Every builder on rows and on tokens; what it reads stays with the tokens that it is for."""
    s = setting(family, "left")
    rows = torch.tensor([True, False, True])
    tokens = s.mask & (torch.tensor([[True], [False], [False]]) | (s.corrupt.positions % 2 == 1))
    inputs, values, mask = reference(s, [7, 6, 7, 5], "right")
    cases = []
    for n, place in enumerate(p for p in places(s) if p.name != "pattern"):
        only = tokens if n % 2 else rows
        y, u = s.clean_values[place.name, place.layer], normals(s.clean_values[place.name, place.layer].shape[-1])
        mean = spread_mean(s, place, values, mask, pooled=False)
        cases += [
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


# Gradients


@dataclasses.dataclass
class Tiny:
    """A model small enough for numerical derivatives, and a function from interventions to some of its logits."""

    model: hooks.Model
    inputs: Inputs
    source: Inputs

    def logits(self, plan, apply: bool = False) -> Tensor:
        if not apply:
            return self.model.run(self.inputs, plan, grad=True).logits[self.inputs.mask][:, :6]
        with self.model.apply(plan):
            out = self.model.module(self.inputs.ids, attention_mask=self.inputs.mask.long())
        return (out if isinstance(out, Tensor) else out.logits)[self.inputs.mask][:, :6]


def tiny(family: str) -> Tiny:
    model = hooks.wrap(zoo.make(family))
    inputs = model.inputs([[1, 2, 3, 4], [5, 6, 7]], padding="right")
    return Tiny(model, inputs, model.inputs([[8, 9, 10, 11], [12, 13, 14]], padding="right"))


def learned(t: Tiny) -> dict[str, tuple[Callable, Tensor]]:
    """Plans with something in them to learn: a function from it to the plan, and where it starts."""
    width = t.model.architecture.width
    head = t.model.sizes["z", 0, None]["dim"]
    tape = t.model.run(t.source, capture=[site("resid_pre", 1), site("z", 0)]).tape
    resid, z = site("resid_pre", 1), site("z", 0, head=(1, 3))
    two = torch.full((2,), 0.4, dtype=torch.float64)
    world = World(t.source)
    return {
        "steer.vector": (lambda v: hooks.steer(resid, v, 2.0), normals(width)),
        "steer.vector a head": (lambda v: hooks.steer(z, v), normals(2, head)),
        "steer.scale": (lambda a: hooks.steer(resid, normals(width), a), torch.tensor(0.7).double()),
        "steer, last position": (lambda v: hooks.steer(site("attn_out", 0, pos=-1), v), normals(width)),
        "clamp": (lambda v: hooks.clamp(z, v), normals(2, head)),
        "scale": (lambda v: hooks.scale(resid, v), normals(width)),
        "noise.std": (lambda a: hooks.noise(resid, a), torch.tensor(0.5).double()),
        "project_out": (lambda v: hooks.project_out(resid, v), normals(width)),
        "project_out two": (lambda v: hooks.project_out(z, v), normals(2, head)),
        "interchange": (lambda v: hooks.interchange(resid, v, tape), normals(3, width)),
        "interchange one": (lambda v: hooks.interchange(z, v, world), normals(head)),
        "interchange.source": (lambda v: hooks.interchange(z, normals(2, head), v), normals(2, 4, 2, head)),
        "through an interchange": (
            lambda v: hooks.steer(site("embed"), v) + hooks.interchange(resid, normals(3, width), tape),
            normals(width),
        ),
        "through a projection": (
            lambda v: hooks.steer(site("embed"), v) + hooks.project_out(resid, normals(3, width)),
            normals(width),
        ),
        "through noise": (
            lambda v: hooks.steer(site("embed"), v) + hooks.noise(resid, 0.3) + hooks.scale(z, 0.5),
            normals(width),
        ),
        "patch.source": (lambda v: hooks.patch(z, v), normals(2, 4, 2, head)),
        "mean.source": (lambda v: hooks.mean(site("z", 0), v), normals(3, 4, *t.model.sizes["z", 0, None].values())),
        "strength": (lambda a: hooks.patch(resid, tape).strength(a), torch.tensor(0.3).double()),
        "strength above a half": (lambda a: hooks.patch(resid, tape).strength(a), torch.tensor(0.8).double()),
        "strength at 0": (lambda a: hooks.patch(resid, tape).strength(a), torch.tensor(0.0).double()),
        "strength at 1": (lambda a: hooks.zero(z).strength(a), torch.tensor(1.0).double()),
        "strength a row": (lambda a: hooks.patch(z, world).strength(a), two),
        "strength of a zeroed pattern": (lambda a: hooks.zero(site("pattern", 1, head=0)).strength(a), two),
        "strength of zeroed scores": (lambda a: hooks.zero(site("scores", 1, head=0)).strength(a), two),
        "scale of scores": (lambda a: hooks.scale(site("scores", 1), a), torch.tensor(0.6).double()),
        "clamped scores": (lambda a: hooks.clamp(site("scores", 1, key_pos=0), a), torch.tensor(0.6).double()),
        "a user's function": (
            lambda v: hooks.intervene(resid, lambda x, r, ctx: x + torch.sigmoid(v) * (r - x), Read(world)),
            normals(width),
        ),
        "through what is read here": (
            lambda v: (
                hooks.steer(site("embed"), v)
                + hooks.intervene(
                    site("resid_post", 1), lambda x, r, ctx: 0.1 * x + r.tanh(), here(site("attn_out", 0))
                )
            ),
            normals(width),
        ),
    }


@pytest.mark.parametrize("name", list(learned(tiny("small_ln_learned"))))
@pytest.mark.parametrize("family", ["small_ln_learned", "llama"])
def test_gradients_reach_what_is_learned(family, name):
    """Checked numerically, in run() and (for the first family) in a call of the user's own under apply()."""
    t = tiny(family)
    plan, start = learned(t)[name]
    start = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(t.logits(plan(start)).square().sum(), start)
    assert gradient.isfinite().all() and gradient.abs().max() > 1e-6
    assert torch.autograd.gradcheck(lambda v: t.logits(plan(v)), start, fast_mode=True)
    if family != "llama":
        assert torch.autograd.gradcheck(lambda v: t.logits(plan(v), apply=True), start, fast_mode=True)


@pytest.mark.parametrize("apply", [False, True], ids=["run", "apply"])
def test_gradients_reach_the_plan_of_a_world_that_is_read(apply):
    """They flow through what an intervention reads, unless its function stops them."""
    t = tiny("small_ln_learned")
    resid, width = site("resid_pre", 1), t.model.architecture.width

    def plan(v: Tensor) -> Plan:
        source = World(t.source, hooks.steer(site("embed"), v))
        return as_plan(hooks.patch(resid.at(pos=-1), source))

    start = normals(width).requires_grad_()
    (gradient,) = torch.autograd.grad(t.logits(plan(start), apply).sum(), start)
    assert gradient.abs().max() > 1e-6
    assert torch.autograd.gradcheck(lambda v: t.logits(plan(v), apply), start, fast_mode=True)


@pytest.mark.parametrize("apply", [False, True], ids=["run", "apply"])
@pytest.mark.parametrize("family", ["small_ln_learned", "gpt2", "llama", "qwen3"])
def test_gradients_of_the_weights_under_a_plan(family, apply):
    """A training step on an edited model: d loss / d weights as the oracle has them."""
    s = setting(family, "right" if apply else "left")  # without position ids, models misplace left-padded rows
    z, attn = site("z", 1, head=1), site("attn_out", 0, pos=Span(1, None))
    u = normals(s.model.architecture.width)
    plan = hooks.scale(z, 0.5) + hooks.knockout(site("scores", 0, head=2, key_pos=0)) + hooks.steer(attn, u)
    plan += hooks.zero(site("pattern", 1, pos=1)).strength(0.5)
    edits = {
        **edit(s, z, lambda x: 0.5 * x),
        **replaced(s, site("scores", 0, head=2, key_pos=0), -torch.inf),
        **edit(s, attn, lambda x: x + u),
        **edit(s, site("pattern", 1, pos=1), lambda x: 0.5 * x),
    }
    weights = dict(s.module.named_parameters())
    logits, _ = oracle.forward(s.module, s.corrupt.ids, s.mask, edits)
    expected = torch.autograd.grad(logits[s.mask].square().mean(), list(weights.values()), materialize_grads=True)
    if apply:
        with s.model.apply(plan):
            out = s.module(s.corrupt.ids, attention_mask=s.mask.long())
        out = out if isinstance(out, Tensor) else out.logits
    else:
        out = s.model.run(s.corrupt, plan, grad=True).logits
    close(out[s.mask], logits[s.mask])
    found = torch.autograd.grad(out[s.mask].square().mean(), list(weights.values()), materialize_grads=True)
    for name, a, b in zip(weights, found, expected, strict=True):
        close(a, b, name)
    assert max(float(g.abs().max()) for g in expected) > 1e-3


def test_gradients_of_frozen_values():
    """A frozen site depends on the weights before it, as it does in the unedited world."""
    s = setting("small_ln_learned", "none")
    place = site("attn_out", 1)
    plan = hooks.steer(site("embed"), normals(32)) + hooks.freeze(place)
    _, values = oracle.forward(s.module, s.corrupt.ids, s.mask)
    edits = {("embed", None): lambda x: x + normals(32), ("attn_out", 1): lambda x: values["attn_out", 1]}
    logits, _ = oracle.forward(s.module, s.corrupt.ids, s.mask, edits)
    weights = [s.module.blocks[1].attn.v_proj.weight, s.module.embed.weight]
    expected = torch.autograd.grad(logits.square().mean(), weights)
    found = torch.autograd.grad(
        s.model.run(s.corrupt, plan, grad=True).logits.square().mean(), weights, materialize_grads=True
    )
    with s.model.apply(plan):
        applied = torch.autograd.grad(s.module(s.corrupt.ids).square().mean(), weights, materialize_grads=True)
    for a, b, c in zip(found, applied, expected, strict=True):
        assert c.abs().max() > 1e-4
        close(b, c, "apply")
        close(a, c, "run")


def test_without_grad_nothing_is_kept_attached():
    t = tiny("small_ln_learned")
    vector = normals(32).requires_grad_()
    run = t.model.run(t.inputs, hooks.steer(site("embed"), vector), capture=site("z", 0))
    assert not run.logits.requires_grad and not run.tape[site("z", 0)].requires_grad


# What fits, and what is refused


def sizes_of(place: Site) -> dict[str, int]:
    return {axis: size for axis, size in (("head", 4), ("dim", 5)) if axis in place.axes}


def at_z(**restrictions) -> tuple[Tensor, Context]:
    """A part of z [B=2, T=3, H=4, D=5], and its context."""
    place = site("z", 0, **restrictions)
    inputs = Inputs.of(torch.ones(2, 3, dtype=torch.long))
    region = resolve(place, inputs, sizes_of(place))
    return region.get(normals(2, 3, 4, 5)), context(region, inputs, 0, slice(0, 2), torch.device("cpu"))


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
    region = resolve(place, inputs, {"dim": 4}).rows(slice(2, 4))
    ctx = context(region, inputs, 0, slice(2, 4), torch.device("cpu"))
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
