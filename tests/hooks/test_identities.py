"""What must hold for any model: empty plans, clean into clean, whole residuals, composition, padding on either side."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import hooks as hk
from hooks import Inputs, Model, Plan, Site, World, patch, site
from tests import zoo
from tests.turns import in_turn, pairs
from tests.zoo import wrapped

EXACT = {"rtol": 0.0, "atol": 1e-10}
LAYOUTS = {"flat": ([6, 6], "right"), "right": ([7, 3, 5], "right"), "left": ([7, 3, 5], "left")}
EXECUTORS = ("sequential", "batched", "shared")
INSIDE = ("scores", "pattern")

each_family = pytest.mark.parametrize("family", zoo.FAMILIES)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
# Every two of them meet.
each_family_layout_and_executor = pytest.mark.parametrize(
    ("family", "layout", "executor"), pairs(zoo.FAMILIES, LAYOUTS, EXECUTORS)
)


def inputs(model: Model, layout: str, seed: int) -> Inputs:
    lengths, side = LAYOUTS[layout]
    return model.inputs(*zoo.random_inputs(zoo.VOCAB, lengths, side, seed))


def bare(module: nn.Module, x: Inputs) -> Tensor:
    """The user's own call: as plain as the inputs allow."""
    arguments = {"input_ids": x.ids}
    if x.padded:
        arguments |= {"attention_mask": x.mask.long(), "position_ids": x.positions}
    if hasattr(module.config, "use_cache"):
        arguments["use_cache"] = False
    out = module(**arguments)
    return out if isinstance(out, Tensor) else out.logits


def every_site(model: Model) -> list[Site]:
    return [
        site(info.name, layer if info.layers else None) for info in model.sites() for layer in range(info.layers or 1)
    ]


def logits(model: Model, worlds: list[World], executor: str) -> list[Tensor]:
    """All logits of each world at its real tokens [N, V]."""
    found: dict[int, Tensor] = {}
    for outcome in hk.run_worlds(model, worlds, [site("logits")], executor=executor):
        assert outcome.rows == slice(0, len(worlds[outcome.index].inputs))
        assert outcome.index not in found
        found[outcome.index] = outcome.values[0][worlds[outcome.index].inputs.mask]
    return [found[index] for index in range(len(worlds))]


# An empty plan


@each_family
@each_layout
@torch.no_grad()
def test_an_empty_plan_is_the_bare_model_bitwise(family, layout):
    model = wrapped(family)
    x = inputs(model, layout, seed=1)
    expected = bare(model.module, x)
    assert torch.equal(model.run(x).logits, expected)
    assert torch.equal(model.run(World(x)).logits, expected)
    assert torch.equal(model.run(x, Plan(), grad=True).logits, expected)
    with model.apply(Plan()) as audit:
        assert torch.equal(bare(model.module, x), expected)
    assert len(audit) == 0
    (outcome,) = hk.run_worlds(model, [World(x)], [site("logits")], executor="sequential")
    assert torch.equal(outcome.values[0], expected)


@each_family
@each_layout
@torch.no_grad()
def test_keeping_every_site_changes_nothing(family, layout):
    model = wrapped(family)
    x = inputs(model, layout, seed=1)
    run = model.run(x, capture=every_site(model))
    torch.testing.assert_close(run.logits[x.mask], bare(model.module, x)[x.mask], **EXACT)
    assert torch.equal(run.tape["logits"], run.logits)


# Clean into clean


@each_family_layout_and_executor
def test_clean_patched_into_clean_changes_nothing(family, layout, executor):
    """Of every site; apart from those inside attention, so that both kernels are asked."""
    model = wrapped(family)
    x = inputs(model, layout, seed=1)
    source, expected = World(x), model.run(x).logits[x.mask]
    for inside in (False, True):
        places = [place for place in every_site(model) if (place.name in INSIDE) == inside]
        for place, got in zip(
            places, logits(model, [World(x, patch(p, source)) for p in places], executor), strict=True
        ):
            torch.testing.assert_close(got, expected, **EXACT, msg=lambda text, place=place: f"{place}: {text}")


@pytest.mark.parametrize(("family", "layout"), in_turn(zoo.FAMILIES, LAYOUTS))
def test_another_run_patched_in_changes_something_at_every_site(family, layout):
    """The check above can fail: the same patches, taken from other prompts, change the logits."""
    model = wrapped(family)
    x, other = inputs(model, layout, seed=1), inputs(model, layout, seed=2)
    expected = model.run(x).logits[x.mask]
    places = [place for place in every_site(model) if place.name != "pos_embed"]
    for place, got in zip(
        places, logits(model, [World(x, patch(p, World(other))) for p in places], "sequential"), strict=True
    ):
        assert float((got - expected).abs().max()) > 1e-3, place


# Whole residuals


@each_family_layout_and_executor
def test_a_whole_residual_reproduces_the_other_run(family, layout, executor):
    model = wrapped(family)
    x, other = inputs(model, layout, seed=1), inputs(model, layout, seed=2)
    assert torch.equal(x.mask, other.mask)
    expected = model.run(other).logits[other.mask]
    assert float((expected - model.run(x).logits[x.mask]).abs().max()) > 0.1
    source = World(other)
    places = [site(name, layer) for layer in range(model.n_layers) for name in ("resid_pre", "resid_post")]
    places += [site("embed"), site("ln_final"), site("logits")]
    for place, got in zip(
        places, logits(model, [World(x, patch(place, source)) for place in places], executor), strict=True
    ):
        torch.testing.assert_close(got, expected, **EXACT, msg=lambda text, place=place: f"{place}: {text}")


@each_family
def test_the_parts_that_add_up_to_a_residual_reproduce_the_other_run(family):
    """Both sublayers' outputs and the residual before them, patched one by one."""
    model = wrapped(family)
    x, other = inputs(model, "left", seed=1), inputs(model, "left", seed=2)
    source, last = World(other), model.n_layers - 1
    plan = patch(site("resid_pre", last), source) + patch(site("attn_out", last), source)
    if family != "small_attn_only":
        plan = plan + patch(site("mlp_out", last), source)
    torch.testing.assert_close(model.run(x, plan).logits[x.mask], model.run(other).logits[x.mask], **EXACT)


# Composition


def bend(x: Tensor, ctx: hk.Context) -> Tensor:
    """Nonlinear, not invariant under any norm, and commuting with nothing below."""
    return torch.where(x.isfinite(), 0.6 * x + torch.cos(3.0 * x), x)


def push(x: Tensor, ctx: hk.Context) -> Tensor:
    return torch.where(x.isfinite(), 1.3 * x + 0.2 * x.abs() + 0.1, x)


def held(model: Model, x: Inputs, *plans: hk.Intervention) -> Tensor:
    """Logits under plans that are applied one inside the other, the first outermost."""
    if not plans:
        return bare(model.module, x)
    with model.apply(plans[0]):
        return held(model, x, *plans[1:])


def composes(model: Model, x: Inputs, pairs: list[tuple[Site, Site]]) -> None:
    wrong = []
    for first, second in pairs:
        a, b = hk.intervene(first, bend), hk.intervene(second, push)
        expected = model.run(x, a + b).logits[x.mask]
        try:
            error = float((held(model, x, a, b)[x.mask] - expected).abs().max())
        except Exception as failure:
            wrong.append(f"{second} inside {first}: {type(failure).__name__}: {failure}")
            continue
        if not error < 1e-10:
            wrong.append(f"{second} inside {first}: off by {error:.2g}")
    assert not wrong, f"{len(wrong)} of {len(pairs)} pairs:\n" + "\n".join(wrong)


def start(family: str) -> int:
    return zoo.FAMILIES.index(family) % 2


GROUPS = (
    ("attn_in", "q_input", "k_input", "v_input", "q", "k", "v"),
    ("rot_q", "rot_k", "scores", "pattern"),
    ("z", "result", "attn_out"),
    ("resid_mid", "mlp_in", "mlp_pre", "mlp_post", "mlp_out", "resid_post"),
)


@pytest.mark.parametrize("group", GROUPS, ids=["projections", "inside", "heads", "residual"])
@each_family
@torch.no_grad()
def test_composition_equals_sequence_within_a_layer(family, group):
    """A plan inside another gives what their sum gives, for sites close enough to get in each other's way.

    Every other pair, the first in half of the families and the second in the others.
    """
    model = wrapped(family)
    names = [info.name for info in model.sites() if info.name in group]
    if not names:
        pytest.skip("an attention-only model has none of them")
    near = [(site(a, 0), site(b, 0)) for i, a in enumerate(names) for b in names[(i + start(family)) % 2 :: 2]]
    composes(model, inputs(model, "left", seed=1), near)


@pytest.mark.parametrize("family", ["gpt2", "small_rms_rotary_gqa"])
@torch.no_grad()
def test_composition_equals_sequence_at_any_two_sites(family):
    """Each of the two has a half of the pairs."""
    model = wrapped(family)
    places = [place for place in every_site(model) if place.layer in (None, 0)]
    near = [{name for name in group} for group in GROUPS]
    far = [(a, b) for a in places for b in places if not any({a.name, b.name} <= group for group in near)]
    later = [site(name, 1) for name in ("resid_post", "z", "q")]
    far += [pair for a in later for b in places for pair in ((a, b), (b, a))]
    composes(model, inputs(model, "flat", seed=1), far[start(family) :: 2])


@each_family
@torch.no_grad()
def test_within_a_site_the_order_of_the_plan_decides(family):
    model = wrapped(family)
    x = inputs(model, "flat", seed=1)
    place = site("resid_post", 0, pos=2)
    a, b = hk.intervene(place, bend), hk.intervene(place, push)
    one, two = model.run(x, a + b).logits, model.run(x, b + a).logits
    assert float((one - two).abs().max()) > 1e-3
    torch.testing.assert_close(held(model, x, b, a), two, **EXACT)
    # What the last one sets stands, for every way of applying both.
    for name in EXECUTORS:
        zeroed, set_to_one = (
            model.run(x, plan).logits.flatten(0, 1) for plan in (hk.zero(place), hk.clamp(place, 1.0))
        )
        worlds = [World(x, hk.clamp(place, 1.0) + hk.zero(place)), World(x, hk.zero(place) + hk.clamp(place, 1.0))]
        torch.testing.assert_close(logits(model, worlds, name), [zeroed, set_to_one], **EXACT)
    torch.testing.assert_close(held(model, x, hk.clamp(place, 1.0), hk.zero(place)).flatten(0, 1), zeroed, **EXACT)
    twice = model.run(x, hk.scale(place, 3.0) + hk.scale(place, 3.0)).logits
    torch.testing.assert_close(twice, model.run(x, hk.scale(place, 9.0)).logits, **EXACT)


@each_family
@torch.no_grad()
def test_a_plan_with_tapes_inside_another_plan(family):
    model = wrapped(family)
    x, other = inputs(model, "right", seed=1), inputs(model, "right", seed=2)
    tape = model.run(other, capture=[site("z", 1), site("resid_post", 0)]).tape
    a = hk.scale(site("resid_pre", 0, pos=1), 2.0)
    b = patch(site("z", 1, head=(0, 2), pos=-1), tape) + patch(site("resid_post", 0, pos=slice(2, None)), tape)
    torch.testing.assert_close(held(model, x, a, b)[x.mask], model.run(x, a + b).logits[x.mask], **EXACT)


@each_family
@torch.no_grad()
def test_a_frozen_site_is_frozen_whatever_a_plan_inside_does_before_it(family):
    model = wrapped(family)
    x = inputs(model, "right", seed=1)
    a, b = hk.freeze(site("attn_out", 1)), hk.scale(site("resid_pre", 0), 1.5)
    torch.testing.assert_close(held(model, x, a, b)[x.mask], model.run(x, a + b).logits[x.mask], **EXACT)


@each_family
@torch.no_grad()
def test_a_run_while_a_plan_is_held(family):
    """`run` inside `apply` is a plan inside a plan, and what it keeps is what both did."""
    model = wrapped(family)
    x = inputs(model, "right", seed=1)
    a, b = hk.intervene(site("resid_post", 0), bend), hk.intervene(site("z", 1, head=1), push)
    expected = model.run(x, a + b, capture="blocks.1.hook_attn_out")
    with model.apply(a):
        got = model.run(x, b, capture="blocks.1.hook_attn_out")
    torch.testing.assert_close(got.logits[x.mask], expected.logits[x.mask], **EXACT)
    torch.testing.assert_close(
        got.tape["blocks.1.hook_attn_out"][x.mask], expected.tape["blocks.1.hook_attn_out"][x.mask]
    )


# Padding


def vector(width: int) -> Tensor:
    return torch.linspace(-2.0, 2.0, width, dtype=torch.float64).cos()


PLANS: dict[str, Callable[[Model], Plan]] = {
    "ints": lambda m: (
        hk.steer(site("resid_pre", 1, pos=1), vector(m.architecture.width))
        + hk.scale(site("z", 0, head=1, pos=(0, -1)), 3.0)
    ),
    "spans": lambda m: (
        hk.zero(site("attn_out", 0, pos=slice(1, -1))) + hk.scale(site("v", 1, pos=slice(-2, None)), -2.0)
    ),
    "edges": lambda m: (
        hk.knockout(site("scores", 1, pos=-1, key_pos=0)) + hk.scale(site("pattern", 0, key_pos=(1, -1)), 0.3)
    ),
    "noise": lambda m: (
        hk.noise(site("resid_pre", 0), 0.5, seed=7) + hk.noise(site("q", 1, head=2), 0.5) + hk.noise(site("k", 1), 1.0)
    ),
    "frozen": lambda m: hk.scale(site("resid_pre", 0, pos=1), 2.0) + hk.freeze(site("attn_out", 0, pos=slice(2, None))),
    "strength": lambda m: hk.zero(site("attn_out", 1)).strength(0.3) + hk.zero(site("embed", pos=1)).strength(0.7),
    "inputs": lambda m: (
        hk.scale(site("q_input", 1, head=0), 0.5) + hk.steer(site("k_input", 1), vector(m.architecture.width))
    ),
    "all": lambda m: hk.intervene(site("resid_post", 0), bend),
}


@pytest.mark.parametrize("name", PLANS)
@each_family
def test_a_row_padded_on_the_left_or_the_right_is_the_row_alone(family, name):
    model = wrapped(family)
    plan = PLANS[name](model)
    left, right = inputs(model, "left", seed=3), inputs(model, "right", seed=3)
    one, two = model.run(left, plan).logits[left.mask], model.run(right, plan).logits[right.mask]
    torch.testing.assert_close(one, two, **EXACT)
    alone = [
        model.run(model.inputs(right.ids[row : row + 1, :n], row_ids=torch.tensor([row])), plan).logits[0]
        for row, n in enumerate(right.lengths.tolist())
    ]
    torch.testing.assert_close(two, torch.cat(alone), **EXACT)
    assert float((two - model.run(right).logits[right.mask]).abs().max()) > 1e-3


@each_family
def test_a_mask_with_a_gap_is_the_row_without_it(family):
    """Position p is the p-th real token, also where padding stands between tokens."""
    if family in ("mistral", "gemma2"):
        pytest.skip("a sliding window is counted in columns, padding included")
    model = wrapped(family)
    ids = torch.tensor([[3, 9, 4, 8, 5]])
    gap = model.inputs(ids, torch.tensor([[1, 1, 0, 1, 1]]))
    alone = model.inputs(ids[:, [0, 1, 3, 4]])
    plan = hk.scale(site("resid_pre", 1, pos=2), 2.0) + hk.zero(site("z", 1, head=0, pos=-1))
    expected = model.run(alone, plan).logits[0]
    for executor in EXECUTORS:
        torch.testing.assert_close(logits(model, [World(gap, plan)], executor)[0], expected, **EXACT)


@pytest.mark.parametrize(("family", "way"), in_turn(zoo.FAMILIES, ["run", "apply"]))
@torch.no_grad()
def test_inputs_that_are_left_padded_read_tapes_that_are_right_padded(family, way):
    model = wrapped(family)
    left, right = inputs(model, "left", seed=3), inputs(model, "right", seed=3)
    names = ("resid_pre", "z", "pattern", "scores", "rot_k", "mlp_post")
    places = [p for p in every_site(model) if p.name in names and p.layer == 1]
    tape = model.run(inputs(model, "right", seed=4), capture=places).tape
    for place in places:
        for part in (place, place.at(pos=-1), place.at(pos=(0, 2)), place.at(pos=slice(1, None))):
            plan = patch(part, tape)
            expected = model.run(right, plan).logits[right.mask]
            got = (model.run(left, plan).logits if way == "run" else held(model, left, plan))[left.mask]
            torch.testing.assert_close(got, expected, **EXACT, msg=lambda text, part=part: f"{part}: {text}")


@each_family
def test_the_tape_of_a_row_does_not_depend_on_its_padding(family):
    model = wrapped(family)
    left, right = inputs(model, "left", seed=3), inputs(model, "right", seed=3)
    places = [place.at(pos=(0, 1, -1)) for place in every_site(model)]
    one, two = model.run(left, capture=places).tape, model.run(right, capture=places).tape
    for place in places:
        a, b = one[place], two[place]
        if "key_pos" in place.axes:  # a row's forbidden keys are laid out differently: compare those it may attend to
            a, b = (torch.where(x.isfinite(), x, 0.0).sort(-1).values for x in (a, b))
        torch.testing.assert_close(a, b, **EXACT, msg=lambda text, place=place: f"{place}: {text}")
