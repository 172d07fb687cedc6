"""Every intervention against its formula, in the oracle or by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hooks
from hooks import Context, Span, World, here, site
from hooks.errors import SiteError
from hooks.plan.plan import Read, as_plan
from tests import zoo
from tests.hooks.formulas import each_family, edit, kept, normals, places, span
from tests.hooks.test_oracle_sites import (
    LOGITS,
    close,
    compare,
    either_side,
    forwards,
    replaced,
    setting,
    shrink,
)

# Formulas


@either_side
def test_the_builders_do_what_their_formulas_say(family, padding):
    """At each site every other builder, in half of the families the one half and in the others the other."""
    s, turn = setting(family, padding), zoo.FAMILIES.index(family) // 2
    cases = []
    for n, place in enumerate(places(s), start=turn):
        shape = s.clean_values[place.name, place.layer].shape
        source = s.clean_values[place.name, place.layer]
        part = place.at(pos=Span(1, None))
        plain = [
            (as_plan(hooks.zero(part)), replaced(s, part, 0.0)),
            (as_plan(hooks.scale(part, -0.5)), edit(s, part, lambda x: -0.5 * x)),
        ]
        if place.name == "pattern":
            cases += plain
            continue
        v, u, w = normals(*shape[2:], seed=n), normals(shape[-1], seed=n + 1), normals(3, shape[-1], seed=n + 2)
        all_of_them = [
            *plain,
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
        cases += all_of_them[n % 2 :: 2]
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


@each_family
def test_freeze_holds_what_the_unedited_world_has(family):
    """Whole, or in part, in turn."""
    s = setting(family, "left")
    first = hooks.intervene(site("embed", pos=Span(1, None)), shrink)
    before = edit(s, first.site, shrink)
    cases = []
    for n, place in enumerate(places(s)[1:], start=zoo.FAMILIES.index(family)):
        value = s.corrupt_values[place.name, place.layer]
        part = place.at(pos=-1)
        if n % 2:
            cases.append((hooks.freeze(place) + first, {**before, **replaced(s, place, value)}))
        else:
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
