"""The one way in: what it runs, with gradients or without, all rows or some, and how short the way is."""

from __future__ import annotations

import traceback

import pytest
import torch
from torch import Tensor

import hooks as hk
import interp as ip
from hooks import Edits, World, patch, record, site
from tests.hooks.executing import inputs
from tests.zoo import wrapped

EXACT = {"rtol": 0.0, "atol": 1e-10}


@pytest.mark.parametrize(("executor", "longest"), [("shared", 10), ("sequential", 12)])
def test_few_frames_lie_between_a_sweep_and_an_operation(executor, longest):
    """Of ours, between the call of a user and the function at a residual site."""
    model = wrapped("gpt2")
    x, frames = inputs(model, "flat", 1), []

    def note(value: Tensor, ctx: hk.Context) -> Tensor:
        ours = [f for f in traceback.extract_stack() if "/hooks/" in f.filename and "/tests/" not in f.filename]
        frames.append([frame.name for frame in ours])
        return 2.0 * value

    grid = ip.grid("resid_post", layer=[0], pos="all")
    ip.sweep(
        model, x, None, grid, metric=ip.logit(5), executor=executor, intervention=lambda s: hk.intervene(s, note),
        progress=False,
    )  # fmt: skip
    assert frames and max(map(len, frames)) <= longest, frames[0]


@pytest.mark.parametrize("executor", ["batched", "sequential"])
def test_gradients_of_some_rows(executor):
    """What is read with gradients is what is read without, and its gradient is that of the whole run."""
    model = wrapped("llama")
    x = inputs(model, "left", 1)
    places = [site("z", 1), site("logits", pos=-1)]
    (whole,) = record(model, [World(x)], places, grad=True, together=True)
    (part,) = record(model, [World(x)], places, grad=True, executor=executor, rows=slice(1, 3))
    assert part.rows == slice(1, 3)
    for a, b in zip(part.values, whole.values, strict=True):
        torch.testing.assert_close(a, b[1:3], **EXACT)
    wide, narrow = (torch.autograd.grad(o.values[1][..., 5].sum(), o.values[0])[0] for o in (whole, part))
    torch.testing.assert_close(narrow, wide[1:3], **EXACT)
    assert float(narrow.abs().max()) > 1e-6
    rows = [o.rows for o in record(model, [World(x)], places, grad=True, budget=1)]
    assert rows == [slice(0, 1), slice(1, 2), slice(2, 3)]


def test_what_is_held_comes_first_and_is_recorded():
    model = wrapped("gpt2")
    x = inputs(model, "flat", 1)
    outer, inner = hk.scale(site("z", 0), 2.0), hk.zero(site("z", 1, head=0))
    (expected,) = record(model, [World(x, outer + inner)], [site("logits")])
    with model.apply(outer) as audit:
        (got,) = record(model, [World(x, inner)], [site("logits")])
        (graph,) = record(model, [World(x, inner)], [site("logits")], grad=True)
    torch.testing.assert_close(got.values[0], expected.values[0], **EXACT)
    torch.testing.assert_close(graph.values[0], expected.values[0], **EXACT)
    assert len(got.audit) == len(graph.audit) == 1 and audit[0].calls == 2


@pytest.mark.parametrize("layout", ["flat", "left"])
def test_edits_of_given_values(layout):
    """What plans make of values that are at hand is what they make of them in a run."""
    model = wrapped("qwen3")
    x, other = inputs(model, layout, 1), inputs(model, layout, 2)
    plan = patch(site("z", 1, head=1, pos=1), World(other)) + hk.scale(site("z", 1, pos=-1), 0.5)
    worlds = [World(x), World(x, plan)]
    edits, place = Edits(model, worlds), site("z", 1)
    plain = model.run(x, capture=[place]).tape[place]
    for rows in (slice(0, 2), slice(1, 2)):
        edited, audit = edits.at(1, rows, {place: plain[rows]})
        torch.testing.assert_close(edited[place], model.run(x, plan, capture=[place]).tape[place][rows], **EXACT)
        assert [e.calls for e in audit] == [1, 1]
    assert edits.at(0, slice(0, 2), {place: plain})[0] == {}
    assert float((edited[place] - plain[1:2]).abs().max()) > 1e-3
