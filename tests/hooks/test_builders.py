"""What the builders of interventions refuse as they are called: a mistake is best told where it is made."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hooks as hk
from hooks import Model, Plan, Read, World, site
from hooks.errors import PlanError, ShapeError, SiteError
from tests import zoo

RESID = site("resid_pre", 1)


def wrapped() -> Model:
    return zoo.wrapped("gpt2")


def example(seed: int = 1) -> hk.Inputs:
    return wrapped().inputs(*zoo.random_inputs(zoo.VOCAB, [5, 5], "right", seed))


# Values


@pytest.mark.parametrize("value", [np.ones(32), [1.0, 2.0], "2", None, True, 1j])
@pytest.mark.parametrize("build", [hk.clamp, hk.scale, hk.noise, lambda at, v: hk.steer(at, torch.ones(32), v)])
def test_a_value_is_a_number_or_a_tensor(build, value):
    with pytest.raises(PlanError, match=f"number or a tensor, not {type(value).__name__}"):
        build(RESID, value)


def test_numbers_of_numpy_are_numbers():
    assert hk.scale(RESID, np.float32(0.5)) == hk.scale(RESID, 0.5)
    x = example()
    assert torch.equal(
        wrapped().run(x, hk.scale(RESID, np.float32(0.5))).logits, wrapped().run(x, hk.scale(RESID, 0.5)).logits
    )


@pytest.mark.parametrize(
    ("directions", "error", "words"),
    [
        (torch.zeros(32), PlanError, "span 0"),
        (torch.ones(2, 32), PlanError, "2 directions span 1"),
        (torch.eye(3, 2), PlanError, "3 directions span 2"),
        (torch.full((32,), torch.nan), PlanError, "finite"),
        (torch.zeros(0, 32), ShapeError, r"\[0, 32\]"),
        (torch.ones(2, 2, 8), ShapeError, r"\[2, 2, 8\]"),
        (torch.tensor(1.0), ShapeError, r"\[\]"),
        (torch.ones(32, dtype=torch.int64), ShapeError, "int64"),
        (np.ones(32), ShapeError, "ndarray"),
    ],
    ids=str,
)
def test_directions_that_span_no_subspace(directions, error, words):
    for build in (hk.project_out, lambda at, d: hk.interchange(at, d, World(example()))):
        with pytest.raises(error, match=words):
            build(RESID, directions)


def test_directions_of_any_length_and_angle():
    """Neither a short direction nor one close to another is taken for one that depends on the others."""
    u = torch.zeros(3, 32, dtype=torch.float64)
    u[0, 0], u[1, 1], u[2, :2], u[2, 2] = 1e-7, 1e6, 1.0, 1e-3
    x = example()
    kept = wrapped().run(x, hk.project_out(RESID, u), capture=RESID).tape[RESID]
    plain = wrapped().run(x, capture=RESID).tape[RESID]
    expected = plain.clone()
    expected[..., :3] = 0
    torch.testing.assert_close(kept, expected, rtol=0, atol=1e-8)
    assert float((kept - plain).abs().max()) > 1e-2


def test_directions_under_vmap_are_taken_as_they_are():
    x = torch.randn(4, 32, dtype=torch.float64)

    def removed(direction):
        return hk.project_out(RESID, direction).op(x, ctx=None)

    directions = torch.randn(3, 32, dtype=torch.float64)
    out = torch.vmap(removed)(directions)
    torch.testing.assert_close(out, torch.stack([removed(d) for d in directions]), rtol=0, atol=1e-10)
    assert float((out - x).abs().max()) > 1e-2


# Sources


@pytest.mark.parametrize("source", [3.0, "clean", np.ones(3), [1.0]])
def test_a_source_is_a_world_a_plan_a_tape_or_a_tensor(source):
    for build in (hk.patch, hk.mean, hk.resample, lambda at, s: hk.intervene(at, torch.add, Read(s))):
        with pytest.raises(PlanError, match=f"not from {type(source).__name__}"):
            build(RESID, source)


def test_a_tensor_has_no_other_site():
    whole = torch.randn(2, 5, 32, dtype=torch.float64)
    for source_site in (RESID.at(pos=0), site("resid_mid", 0)):
        with pytest.raises(PlanError, match=str(source_site).split("[")[0]):
            hk.patch(RESID.at(pos=-1), whole, source_site=source_site)


@pytest.mark.parametrize("executor", ["sequential", "batched", "shared"])
def test_a_read_of_inputs_is_one_of_their_world(executor):
    model, x, other = wrapped(), example(1), example(2)
    worlds = [
        World(x, hk.intervene(RESID, lambda x, y, ctx: (x + y) / 2, Read(source))) for source in (other, World(other))
    ]
    got = [o.values[0] for o in hk.run_worlds(model, [*worlds, World(x)], [site("logits")], executor=executor)]
    assert torch.equal(got[0], got[1]) and float((got[0] - got[2]).abs().max()) > 1e-3
    assert hk.patch(RESID, other) == hk.patch(RESID, World(other))


def test_an_intervention_is_read_as_the_plan_of_it():
    item = hk.scale(site("z", 0), 2.0)
    assert Read(item).source == Plan((item,))


# Functions


def test_what_is_no_function():
    with pytest.raises(PlanError, match="not Tensor"):
        hk.intervene(RESID, torch.ones(32))  # type: ignore[arg-type]


def test_reads_of_a_function():
    one, two = hk.here(site("z", 0)), hk.here(site("attn_out", 0))
    fn = lambda x, a, b, ctx: x  # noqa: E731
    assert hk.intervene(RESID, fn, [one, two]) == hk.intervene(RESID, fn, (one, two))
    with pytest.raises(PlanError, match="not World"):
        hk.intervene(RESID, fn, [one, World(example())])  # type: ignore[list-item]


def test_what_a_function_mixes():
    fn = lambda x, ctx: x  # noqa: E731
    assert hk.intervene(RESID, fn, mixes="row").op.mixes == {"row"}
    assert hk.intervene(RESID, fn, mixes=["pos", "row"]).op.mixes == {"row", "pos"}
    with pytest.raises(PlanError, match="rows"):
        hk.intervene(RESID, fn, mixes="rows")


# Restrictions


@pytest.mark.parametrize(
    ("one", "two"), [((1,), (4,)), ((4,), (1,)), ((2, 5), (1, 5)), ((2, 5), (2, 1)), ((3,), (2, 5)), ((1, 5), (2,))]
)
def test_masks_that_would_broadcast(one, two):
    item = hk.zero(RESID).where(torch.ones(one, dtype=torch.bool))
    with pytest.raises(ShapeError, match="mask before"):
        item.where(torch.ones(two, dtype=torch.bool))


def test_an_entry_that_is_named_twice_in_a_row():
    twice = torch.tensor([[3, 4], [5, 5]])
    x = example()
    read = wrapped().run(x, capture=site("logits", pos=-1, dim=twice)).tape.values[0][1]
    assert read.shape == (2, 1, 2) and torch.equal(read[1, 0, 0], read[1, 0, 1])
    with pytest.raises(SiteError, match="twice"):
        wrapped().run(x, hk.clamp(site("logits", pos=-1, dim=twice), 0.0))
