"""Every site that a model offers, kept and edited, in each executor, against the forward pass written out by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import hooks
from hooks import Inputs, Plan, Site, Span, World, run_worlds, site
from hooks.plan.plan import as_plan
from tests import oracle, zoo
from tests.hooks.test_region import chosen, entries, outer

EXECUTORS = ("sequential", "batched", "shared")
PADDINGS = {"none": ([6, 6], "right"), "right": ([7, 4, 5], "right"), "left": ([7, 4, 5], "left")}
EXACT = {"rtol": 0.0, "atol": 1e-10}
SQUARE = ("scores", "pattern")

each_family = pytest.mark.parametrize("family", zoo.FAMILIES)
each_padding = pytest.mark.parametrize("padding", PADDINGS)
# Padded on one side or the other: what matters to a padded batch is tested in half of the families for each.
either_side = pytest.mark.parametrize(
    ("family", "padding"), [(f, ("right", "left")[i % 2]) for i, f in enumerate(zoo.FAMILIES)]
)


@dataclass(frozen=True, eq=False)
class Setting:
    """A model, two batches that differ from their second token on, and what the oracle makes of each."""

    module: nn.Module
    model: hooks.Model
    mask: Tensor
    clean: Inputs
    corrupt: Inputs
    clean_values: dict
    corrupt_values: dict
    tape: hooks.Tape  # of every site, whole, on the clean batch

    def sites(self, middle: bool = False) -> list[Site]:
        """Every site of the first and the last layer (and of a middle one), and those outside the blocks."""
        layers = sorted({0, self.model.n_layers - 1, *([self.model.n_layers // 2] if middle else [])})
        return [Site(s.name, layer) for s in self.model.sites() for layer in (layers if s.layers else [None])]

    def chosen(self, place: Site, only: Tensor | None = None) -> Tensor:
        return chosen(place, self.mask, self.corrupt_values[place.name, place.layer].shape, only)

    def forbidden(self, key: tuple) -> Tensor:
        """Entries of an activation that no edit can move, and whose gradient therefore means nothing: closed edges."""
        if key[0] in SQUARE:
            return self.corrupt_values["scores", key[1]].isinf()
        return torch.zeros(self.corrupt_values[key].shape, dtype=torch.bool)

    def parts(self, place: Site) -> list[tuple[Tensor, ...]]:
        """For each row, what takes the part that a site means out of that row of the whole activation."""
        shape = self.corrupt_values[place.name, place.layer].shape
        return [outer(entries(place, row, self.mask, shape)) for row in range(len(self.mask))]

    def real(self, name: str, value: Tensor) -> Tensor:
        """The entries of a whole activation that belong to a real query."""
        return value.transpose(1, 2)[self.mask] if name in SQUARE else value[self.mask]


@functools.cache
def setting(family: str, padding: str) -> Setting:
    lengths, side = PADDINGS[padding]
    module = zoo.make(family)
    model = hooks.wrap(module)
    clean, mask = zoo.random_inputs(zoo.VOCAB, lengths, side, seed=1)
    other, _ = zoo.random_inputs(zoo.VOCAB, lengths, side, seed=2)
    first = mask & (mask.long().cumsum(1) == 1)
    corrupt = torch.where(first, clean, other)
    with torch.no_grad():
        clean_values = oracle.forward(module, clean, mask)[1]
        corrupt_values = oracle.forward(module, corrupt, mask)[1]
    inputs = [model.inputs(ids, mask) for ids in (clean, corrupt)]
    everything = [Site(*key) for key in clean_values]
    tape = model.run(inputs[0], capture=everything).tape
    return Setting(module, model, mask, *inputs, clean_values, corrupt_values, tape)


Edits = dict[tuple, Callable[[Tensor], Tensor]]


def replaced(s: Setting, place: Site, value: Tensor | float, only: Tensor | None = None) -> Edits:
    """The oracle's edit that writes `value`, of the whole activation's shape, at the entries that a site means."""
    where = s.chosen(place, only)
    return {(place.name, place.layer): lambda x: torch.where(where, value, x)}


def forwards(s: Setting, cases: Sequence[Edits]) -> list[dict]:
    """The oracle's values of the corrupt batch under each of several sets of edits, all in one pass."""
    rows, gathered = len(s.mask), {}
    for n, edits in enumerate(cases):
        for key, edit in edits.items():
            gathered.setdefault(key, []).append((slice(n * rows, (n + 1) * rows), edit))

    def apply(x: Tensor, edits: list) -> Tensor:
        x = x.clone()
        for mine, edit in edits:
            x[mine] = edit(x[mine].clone())
        return x

    ids, mask = s.corrupt.ids.repeat(len(cases), 1), s.mask.repeat(len(cases), 1)
    edits = {key: functools.partial(apply, edits=some) for key, some in gathered.items()}
    _, values = oracle.forward(s.module, ids, mask, edits)
    return [{key: value[n * rows : (n + 1) * rows] for key, value in values.items()} for n in range(len(cases))]


@torch.no_grad()
def compare(
    s: Setting,
    cases: Sequence[tuple[Plan, Edits]],
    reads: Sequence[Site],
    executors: Sequence[str] = EXECUTORS,
    changes: float | None = 1.0,
    seed: int = 0,
) -> None:
    """Run plans on the corrupt batch in each executor, and edits in the oracle, and compare what is read.

    Args:
        changes: the share of the cases that has to change something that is read; None: do not look.
    """
    values = forwards(s, [edits for _, edits in cases])
    if changes is not None:
        everywhere = [(s.chosen(r), r.name, r.layer) for r in reads]
        base = [s.corrupt_values[name, layer][where] for where, name, layer in everywhere]
        changed = [
            any(
                not torch.allclose(v[name, layer][w], b, rtol=0, atol=1e-4)
                for b, (w, name, layer) in zip(base, everywhere, strict=True)
            )
            for v in values
        ]
        idle = [plan for (plan, _), moved in zip(cases, changed, strict=True) if not moved]
        assert len(idle) <= len(cases) * (1 - changes), f"these change nothing that is read, and test nothing: {idle}"
    parts = {r: s.parts(r) for r in reads if r.restricted}
    worlds = [World(s.corrupt, plan) for plan, _ in cases]
    for executor in executors:
        seen = set()
        for outcome in run_worlds(s.model, worlds, reads, executor=executor, seed=seed):
            assert outcome.rows == slice(0, len(s.corrupt))
            seen.add(outcome.index)
            for r, value in zip(reads, outcome.values, strict=True):
                whole = values[outcome.index][r.name, r.layer]
                if r.restricted:
                    for row, index in enumerate(parts[r]):
                        part = value[row][tuple(slice(n) for n in index[0].shape)]
                        close(part, whole[row][index], executor, cases[outcome.index][0], r, row)
                else:
                    close(s.real(r.name, value), s.real(r.name, whole), executor, cases[outcome.index][0], r)
        assert seen == set(range(len(worlds)))


def close(value: Tensor, expected: Tensor, *what: object) -> None:
    if value.shape != expected.shape or not torch.allclose(
        value, expected, **EXACT
    ):  # which is quick, and says nothing
        torch.testing.assert_close(value, expected, **EXACT, msg=lambda text: f"{', '.join(map(str, what))}\n{text}")


def restrictions(s: Setting, place: Site) -> list[dict]:
    """Restrictions of every form, for the axes that a site has."""
    lengths = s.mask.sum(1)
    order = torch.argsort((~s.mask).byte(), dim=1, stable=True)
    ragged = torch.zeros_like(s.mask)  # the last token of every row, and of the first row two more
    ragged[torch.arange(len(lengths)), order.gather(1, lengths[:, None] - 1)[:, 0]] = True
    ragged[0, order[0, 1:3]] = True
    keys = torch.zeros_like(s.mask).scatter(1, order[:, 1:2], True)  # the second token of every row, ...
    keys[0, order[0, 0]] = True  # ... and of the first row the first
    last = lengths - 1
    heads, dims = s.model.sizes[place.key].get("head"), s.model.sizes[place.key].get("dim")
    listed = [
        {"pos": -1, "key_pos": (0, 2), "head": 0, "dim": Span(1, None)},
        {"pos": Span(1, None), "key_pos": 1, "head": -1, "dim": tuple(range(0, dims or 1, 2))},
        {"pos": ragged, "key_pos": Span(None, -1), "head": Span(1, None)},
        {"pos": torch.stack([last, last - 1], 1), "key_pos": keys, "dim": Span(None, -3)},
        {"pos": last, "key_pos": torch.stack([last - 1, last], 1), "head": (1, 0)},
        {"pos": (2, 1), "key_pos": -lengths + 1, "head": tuple(range(0, heads or 1, 2))},
        {"pos": Span(-2, None), "key_pos": Span(-3, -1)},
        {"head": 1, "key_pos": Span(1, 3), "dim": (5, 3, 0, 1, 2, 4, 6, 7)},
    ]
    # What a norm divides by is one number, of which there is no part.
    axes = [axis for axis in place.axes if axis != "dim" or dims != 1]
    parts = ({axis: index for axis, index in one.items() if axis in axes} for one in listed)
    return [part for part in parts if part]


def restriction(s: Setting, place: Site, turn: int) -> dict:
    """One of them, in turn."""
    found = restrictions(s, place)
    return found[turn % len(found)]


LOGITS = [site("logits")]


def narrow(s: Setting) -> list[Site]:
    """Reads of the logits that let an executor leave most of them out."""
    lengths = s.mask.sum(1)
    tokens = torch.stack(
        [torch.arange(len(lengths)) * 3 + 1, torch.arange(len(lengths)) + 7, 40 - torch.arange(len(lengths))], 1
    )
    return [
        site("logits", pos=-1),
        site("logits", pos=-1, dim=(7, 3)),
        site("logits", pos=lengths - 1, dim=tokens),
        site("logits", pos=torch.stack([lengths - 1, lengths - 2], 1), dim=5),
    ]


# Reading


@each_family
@each_padding
def test_every_site_is_kept_as_the_oracle_has_it(family, padding):
    s = setting(family, padding)
    assert {place.name for place in s.sites(middle=True)} == {name for name, _ in s.clean_values}
    places = [Site(*key) for key in s.corrupt_values]
    run = s.model.run(s.corrupt, capture=places)
    assert len(run.tape) == len(places)
    for place in places:
        expected = s.corrupt_values[place.name, place.layer]
        close(s.real(place.name, run.tape[place]), s.real(place.name, expected), place)
        assert not run.tape[place].requires_grad
    close(run.logits[s.mask], s.corrupt_values["logits", None][s.mask], "logits")
    assert run.logits.dtype == torch.float64


@each_family
def test_what_is_kept_is_nobody_else_s_memory(family):
    """One tensor of the model may be several sites, and the logits: writing into one must not change another."""
    s = setting(family, "right")
    places = [Site(*key) for key in s.clean_values]
    parts = [place.at(pos=Span(None, None)) for place in places[::5]]
    run = s.model.run(s.clean, capture=[*places, *parts])
    kept = [value for _, value in run.tape.values]
    storages = {value.untyped_storage().data_ptr() for value in [*kept, run.logits]}
    assert len(storages) == len(places) + len(parts) + 1


@each_family
def test_a_site_kept_alone_is_the_site_kept_with_all(family):
    """Hooks that stand on a model for one site must not need those of another."""
    s = setting(family, "left")
    for place in s.sites():
        run = s.model.run(s.clean, capture=[place.hook])
        close(s.real(place.name, run.tape[place]), s.real(place.name, s.tape[place]), place)


@either_side
def test_restricted_reads(family, padding):
    s = setting(family, padding)
    half = zoo.FAMILIES.index(family) // 2
    places = [p.at(**r) for i, p in enumerate(s.sites()) for r in restrictions(s, p)[(i + half) % 2 :: 2]]
    run = s.model.run(s.corrupt, capture=places)
    for place in places:
        whole = s.corrupt_values[place.name, place.layer]
        for row, index in enumerate(s.parts(place)):
            part = run.tape[place][row][tuple(slice(n) for n in index[0].shape)]
            close(part, whole[row][index], place, row)


@each_family
@each_padding
def test_reads_of_an_unedited_world(family, padding):
    s = setting(family, padding)
    compare(s, [(Plan(), {})], [*s.sites(), *narrow(s)], changes=None)
    compare(s, [(Plan(), {})], narrow(s), changes=None)


# Writing


def donors(s: Setting, place: Site, which: int) -> tuple[World | hooks.Tape | Tensor, Tensor]:
    """What a patch reads, and the values [whole activation] that it should find there: a world, a tape or a tensor."""
    value = s.clean_values[place.name, place.layer]
    if place.name == "pos_embed":  # the same on both batches, so that a patch from one would do nothing
        value = value.flip(-1)
        return value, value
    return (World(s.clean), s.tape, value)[which % 3], value


def patched(s: Setting, place: Site, which: int, only: Tensor | None = None) -> tuple[Plan, Edits]:
    source, value = donors(s, place, which)
    item = hooks.patch(place, source)
    return as_plan(item if only is None else item.where(only)), replaced(s, place, value, only)


def shrink(x: Tensor, *, ctx: hooks.Context | None = None) -> Tensor:
    """Far from the identity, and undone by no norm."""
    return torch.sign(x) * x.abs() ** 0.7


def turn(family: str, padding: str) -> int:
    """Where a family and padding begin, when they take turns at what all of them need not do."""
    return zoo.FAMILIES.index(family) + list(PADDINGS).index(padding)


@each_family
@each_padding
def test_a_whole_site_patched(family, padding):
    """A third of the sites in each family and padding: each site in every family, and in every padding in four."""
    s = setting(family, padding)
    cases = [
        patched(s, place, i + i // 3)
        for i, place in enumerate(s.sites(middle=True))
        if place.name == "logits" or (i + turn(family, padding)) % 3 == 0
    ]
    compare(s, cases, LOGITS, executors=EXECUTORS if padding == "left" else ["batched", "shared"])
    compare(s, cases, narrow(s), executors=["shared"])


@each_family
@each_padding
def test_a_part_patched(family, padding):
    """A twelfth of the sites' restrictions in each family and padding: of the 36, three try each."""
    s = setting(family, padding)
    mine = 3 * zoo.FAMILIES.index(family) + list(PADDINGS).index(padding)
    cases = [
        patched(s, place.at(**restriction), i + j // 2)
        for i, place in enumerate(s.sites())
        for j, restriction in enumerate(restrictions(s, place))
        if (i + 5 * j + mine) % 12 == 0
    ]
    compare(s, cases, LOGITS, executors=["batched", "shared"])
    compare(s, cases, narrow(s), executors=["shared"], changes=None)


@pytest.mark.parametrize("family", ["gpt2", "mistral", "qwen3", "neox", "gemma2", "small_attn_only"])
def test_every_site_by_itself(family):
    """The copy-on-write executor keeps of the base what the worlds of a call need: here each world is the only one.

    A site is edited in part, edited whole, or read, which of them taking turns: two of the families try each.
    """
    s = setting(family, "left")
    for i, place in enumerate(s.sites()):
        way = (i + turn(family, "left")) % 3
        if way == 0:
            part = patched(s, place.at(**restriction(s, place, i)), i)
            compare(s, [part], LOGITS if i % 2 else narrow(s)[1:3], executors=["shared"], changes=None)
        elif way == 1:
            compare(s, [(as_plan(hooks.intervene(place, shrink)), {(place.name, place.layer): shrink})], LOGITS)
        else:
            compare(s, [patched(s, site("embed", pos=Span(1, None)), i)], [place], executors=["shared"], changes=None)


def half(s: Setting, family: str) -> list[tuple[int, Site]]:
    """Every other site, numbered; of two pairs of families, whose paddings differ, each has another half."""
    return list(enumerate(s.sites()))[zoo.FAMILIES.index(family) // 2 % 2 :: 2]


@either_side
def test_clamps(family, padding):
    """To a number, to a value for the last axes, to a value for each row at one position; every other site."""
    s = setting(family, padding)
    cases = []
    for i, place in half(s, family):
        whole = s.clean_values[place.name, place.layer]
        part = place.at(**restriction(s, place, i))
        number = 0.7 if place.name != "pattern" else 0.2
        cases.append((as_plan(hooks.clamp(part, number)), replaced(s, part, number)))
        if place.name in SQUARE:
            # For each row, head and two keys; the one query has no axis.
            value = torch.rand(len(s.mask), whole.shape[1], 2, dtype=torch.float64)
            part, spread = place.at(pos=-1, key_pos=(0, 2)), torch.zeros_like(whole)
            for row in range(len(s.mask)):
                columns = s.mask[row].nonzero().flatten()
                spread[row][:, columns[-1], columns[[0, 2]]] = value[row]
            cases.append((as_plan(hooks.clamp(part, value)), replaced(s, part, spread)))
            continue
        value = torch.randn(whole.shape[2:], dtype=torch.float64)
        part = place.at(pos=Span(1, None))
        cases.append((as_plan(hooks.clamp(part, value)), replaced(s, part, value.expand_as(whole))))
        value = torch.randn(len(s.mask), *whole.shape[2:], dtype=torch.float64)
        part = place.at(pos=-2)
        cases.append((as_plan(hooks.clamp(part, value)), replaced(s, part, value[:, None].expand_as(whole))))
    compare(s, cases, LOGITS, executors=["batched", "shared"], changes=0.95)


@either_side
def test_where(family, padding):
    """Rows, and tokens: a row that keeps fewer tokens than another one gets its own values, and not its neighbours'."""
    s = setting(family, padding)
    rows = torch.arange(len(s.mask)) != 1
    # Of the first row every token, of the others every second: the part is as wide as the whole.
    tokens = s.mask & ((torch.arange(len(s.mask))[:, None] == 0) | (s.corrupt.positions % 2 == 1))
    cases = []
    for i, place in half(s, family):
        only = (rows, tokens)[i // 2 % 2]
        cases.append(patched(s, place, i // 2, only))
        cases.append((as_plan(hooks.clamp(place, 0.3).where(only)), replaced(s, place, 0.3, only)))
        cases.append(patched(s, place.at(pos=Span(1, 4)), i // 2, (tokens, rows)[i // 2 % 2]))
    compare(s, cases, LOGITS, executors=["batched", "shared"], changes=0.95)


@each_family
@each_padding
def test_what_is_kept_is_what_the_model_went_on_with(family, padding):
    """Every site of the model after an edit of one, the edited one included; a sixth of the sites, in turn."""
    s = setting(family, padding)
    reads = [Site(*key) for key in s.corrupt_values]
    cases = [
        patched(s, place.at(**restriction(s, place, i)), i // 3)
        for i, place in enumerate(s.sites())
        if place.name == "logits" or (i + 2 * turn(family, padding) + zoo.FAMILIES.index(family) // 3) % 6 == 0
    ]
    compare(s, cases, reads)


@each_family
def test_an_edit_of_scores_or_pattern_opens_no_edge(family):
    """Neither in what the model goes on with, nor in what is kept of it, nor in what is written down as a change."""
    s = setting(family, "left")
    cases = []
    for name, value in (("scores", 0.5), ("pattern", 0.25)):
        for layer in range(s.model.n_layers):
            edit = {(name, layer): lambda x, v=value: torch.full_like(x, v)}
            cases.append((as_plan(hooks.clamp(site(name, layer), value)), edit))
    compare(s, cases, LOGITS)
    compare(s, cases, [site(name, layer) for name in SQUARE for layer in range(s.model.n_layers)])


def test_the_audit_does_not_count_forbidden_edges():
    s = setting("mistral", "left")
    forbidden = site("scores", 0, pos=0, key_pos=2), site("pattern", 0, pos=0, key_pos=2)
    for place in forbidden:
        (entry,) = s.model.run(s.corrupt, hooks.clamp(place, 0.5)).audit
        assert entry.status == "inert" and entry.change == 0.0
    (entry,) = s.model.run(s.corrupt, hooks.clamp(site("scores", 0), 0.5)).audit
    scores = s.corrupt_values["scores", 0]
    largest = (scores - 0.5).abs()[s.chosen(site("scores", 0)) & ~scores.isinf()].max()
    assert entry.change == pytest.approx(float(largest))


# Several interventions


@each_family
def test_within_a_site_the_plan_decides_the_order(family):
    s = setting(family, "left")
    cases = []
    for i, place in half(s, family):
        key = (place.name, place.layer)
        source, value = donors(s, place, i)
        less, patch = hooks.intervene(place, shrink), hooks.patch(place, source)
        cases.append((less + patch, {key: lambda x, v=value: v}))
        cases.append((patch + less, {key: lambda x, v=value: shrink(v)}))
        cases.append((less + less, {key: lambda x: shrink(shrink(x))}))
    compare(s, cases, LOGITS)
    with torch.no_grad():  # a repeat counts twice
        once = forwards(s, [{(p.name, p.layer): shrink} for _, p in half(s, family)])
        twice = forwards(s, [edits for _, edits in cases[2::3]])
    for a, b in zip(once, twice, strict=True):
        assert (a["logits", None] - b["logits", None])[s.mask].abs().max() > 1e-4


@each_family
def test_distinct_sites_apply_in_the_order_of_execution(family):
    """Plans are listed last site first; each edit depends on the value that the edits before it left."""
    s = setting(family, "left")
    keys = [key for key in s.corrupt_values if key[0] != "resid_post"]
    for step, start in ((1, 0), (3, 0), (3, 1), (7, 2), (7, 4)):
        some = keys[start::step]
        if step < 7:  # an edit of what single heads read, and one of what all of them do, do not go together
            some = [key for key in some if key[0] not in ("ln1_scale", "ln1")]
        plan = Plan(tuple(hooks.intervene(Site(*key), shrink) for key in reversed(some)))
        compare(s, [(plan, dict.fromkeys(some, shrink))], LOGITS)


@each_family
def test_two_names_of_one_tensor(family):
    """resid_post of a layer and resid_pre of the next: an edit of either is kept under both, in the plan's order."""
    s = setting(family, "left")
    post, pre = site("resid_post", 0), site("resid_pre", 1)
    value = s.clean_values["resid_pre", 1]
    cases = [
        (as_plan(hooks.patch(post, s.tape)), {("resid_pre", 1): lambda x: value}),
        (as_plan(hooks.patch(pre, World(s.clean))), {("resid_post", 0): lambda x: value}),
        (hooks.intervene(pre, shrink) + hooks.patch(post, s.tape), {("resid_post", 0): lambda x: value}),
        (hooks.patch(post, s.tape) + hooks.intervene(pre, shrink), {("resid_post", 0): lambda x: shrink(value)}),
        (hooks.patch(pre, s.tape) + hooks.intervene(post, shrink), {("resid_post", 0): lambda x: shrink(value)}),
    ]
    compare(s, cases, [post, pre, site("logits")])
    run = s.model.run(s.corrupt, hooks.patch(post, s.tape), capture=["blocks.1.hook_resid_pre"])
    assert torch.equal(run.tape[post][s.mask], s.tape[pre][s.mask])


# Reading here, and gradients


def summary(read: Tensor, square: bool, like: Tensor, axis: int) -> Tensor:
    """A number for each row and query of what is read, shaped to be added to `like`, whose queries are on `axis`."""
    query = 2 if square else 1
    total = torch.where(read.isinf(), 0, read).sum([i for i in range(1, read.ndim) if i != query])
    return torch.tanh(total).reshape([n if i in (0, axis) else 1 for i, n in enumerate(like.shape)])


@pytest.mark.parametrize(
    "family", ["gpt2", "neox", "gemma2", "small_attn_only", pytest.param("mistral", marks=pytest.mark.full)]
)
def test_every_earlier_site_can_be_read_at_every_later_one(family):
    """A read of this world gives the value, as edited, that the model has computed by then; a later one is refused.

    Of the earlier ones a third is read, in turn.
    """
    # Without padding: at padded columns, of which a part of a site has none, the oracle's edits would differ.
    s = setting(family, "none")
    names = [info.name for info in s.model.sites()]
    places = [Site(n, 0 if hooks.KINDS[n].per_layer else None) for n in names]
    together = {"q_input", "k_input", "v_input", "q", "k", "v"}  # which of these comes first is the model's business
    cases = []
    for i, later in enumerate(places):
        for j, earlier in enumerate(places):
            square = earlier.name in SQUARE
            if len({earlier.name, later.name} & {"ln1_scale", "ln1"}) == 1 and "_input" in earlier.name + later.name:
                continue

            def add(x: Tensor, read: Tensor, ctx: hooks.Context, square: bool = square) -> Tensor:
                return x + summary(read, square, x, ctx.axes.index("pos"))

            plan = hooks.intervene(earlier, shrink) + hooks.intervene(later, add, hooks.here(earlier))
            if i != j and {earlier.name, later.name} <= together:
                try:
                    s.model.check(plan)
                except hooks.InterpError:
                    continue
                s.model.run(s.corrupt, plan)
            elif j >= i:
                with pytest.raises(hooks.InterpError, match=str(earlier)):
                    s.model.check(plan)
            if j >= i or (i + j + turn(family, "none")) % 3:
                continue
            held: dict[str, Tensor] = {}

            def first(x: Tensor, held: dict[str, Tensor] = held) -> Tensor:
                held["value"] = shrink(x)
                return held["value"]

            def second(x: Tensor, held: dict[str, Tensor] = held, square: bool = square, later: Site = later) -> Tensor:
                return x + summary(held["value"], square, x, 2 if later.name in SQUARE else 1)

            cases.append((plan, {(earlier.name, earlier.layer): first, (later.name, later.layer): second}))
    assert len(cases) > 50
    compare(s, cases, LOGITS)
    for case in cases[::5]:
        compare(s, [case], narrow(s), executors=["shared"])


@each_family
@pytest.mark.parametrize("padding", ["none", "left"])
def test_gradients_of_every_site(family, padding):
    """d loss / d site from a run that keeps its graph, against the same from the oracle."""
    s = setting(family, padding)
    names = [key for key in s.corrupt_values if key[0] != "resid_post" or key[1] == s.model.n_layers - 1]
    weight = torch.randn(int(s.mask.sum()), zoo.VOCAB, dtype=torch.float64)
    deltas = {key: torch.zeros_like(s.corrupt_values[key]).requires_grad_() for key in names}
    edits = {key: lambda x, d=delta: x + d for key, delta in deltas.items()}
    logits, _ = oracle.forward(s.module, s.corrupt.ids, s.mask, edits)
    expected = torch.autograd.grad((logits[s.mask] * weight).sum(), list(deltas.values()))
    run = s.model.run(s.corrupt, capture=[Site(*key) for key in names], grad=True)
    found = torch.autograd.grad((run.logits[s.mask] * weight).sum(), [run.tape[Site(*key)] for key in names])
    for key, mine, theirs in zip(names, found, expected, strict=True):
        mine, theirs = (s.real(key[0], x.masked_fill(s.forbidden(key), 0)) for x in (mine, theirs))
        close(mine, theirs, "gradient", key)
        assert mine.abs().max() > 1e-4


@pytest.mark.parametrize("family", ["gpt2", "mistral", "neox", "gemma2", "small_rms_rotary_gqa", "small_attn_only"])
def test_gradients_of_a_part_that_is_kept(family):
    """What is kept of a site is what the model went on with, also where only a part of it is kept."""
    s = setting(family, "left")
    for place in s.sites():
        part = place.at(**restrictions(s, place)[0])
        delta = torch.zeros_like(s.corrupt_values[place.name, place.layer]).requires_grad_()
        logits, _ = oracle.forward(
            s.module, s.corrupt.ids, s.mask, {(place.name, place.layer): lambda x, d=delta: x + d}
        )
        (expected,) = torch.autograd.grad(logits[s.mask].square().sum(), delta)
        run = s.model.run(s.corrupt, capture=part, grad=True)
        (found,) = torch.autograd.grad(run.logits[s.mask].square().sum(), run.tape[part])
        for row, index in enumerate(s.parts(part)):
            allowed = ~s.forbidden((place.name, place.layer))[row][index]
            close(found[row][allowed], expected[row][index][allowed], "gradient", part)
