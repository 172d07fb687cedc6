"""Functions of a user's own, in the forms in which people write them."""

from __future__ import annotations

import functools

import pytest
import torch

import interp as ip
from tests import zoo

SITE = ip.site("mlp_out", layer=0)


@pytest.fixture(scope="module")
def model():
    return ip.wrap(zoo.make("gpt2", dtype=torch.float64))


class Half(torch.nn.Module):
    def forward(self, x):
        return x / 2


def named(x, ctx):
    return x / 2


@pytest.mark.parametrize(
    "fn",
    [
        named,
        lambda x: x / 2,
        lambda x, *, ctx: x / 2,
        lambda x, *rest, **more: x / 2,
        lambda x, factor=0.5: x * factor,
        functools.partial(torch.mul, other=0.5),
        functools.partial(lambda x, factor: x * factor, factor=0.5),
        Half(),
    ],
)
def test_with_and_without_a_context(model, fn):
    inputs = model.inputs([[1, 2, 3]])
    expected = model.run(inputs, ip.scale(SITE, 0.5)).logits
    run = model.run(inputs, ip.intervene(SITE, fn))
    assert torch.allclose(run.logits, expected, atol=1e-12)
    assert not torch.allclose(expected, model.run(inputs).logits)


def test_functions_of_torchs_own(model):
    inputs = model.inputs([[1, 2, 3]])
    expected = model.run(inputs, ip.intervene(SITE, lambda x: torch.relu(x))).logits
    assert torch.equal(model.run(inputs, ip.intervene(SITE, torch.relu)).logits, expected)


def test_reads_beside_x(model):
    inputs = model.inputs([[1, 2, 3]])
    reads = ip.here(ip.site("attn_out", layer=0))
    with_ctx = model.run(inputs, ip.intervene(SITE, lambda x, y, ctx: x + y, reads)).logits
    assert torch.equal(model.run(inputs, ip.intervene(SITE, lambda x, y: x + y, reads)).logits, with_ctx)
    with pytest.raises(ip.PlanError, match="called with x and 1 read"):
        ip.intervene(SITE, lambda x: x, reads)
    with pytest.raises(ip.PlanError, match=r"is called with x, and ctx="):
        ip.intervene(SITE, lambda x, y: x + y)


@pytest.mark.parametrize(
    "fn", [lambda x, hook: x, lambda x, hook=None: x, functools.partial(lambda x, hook, a: x, a=1)]
)
def test_transformerlens_style_functions_are_told_how(fn):
    with pytest.raises(ip.PlanError, match=r"TransformerLens.*fn\(x, \*reads, ctx=ctx\)"):
        ip.intervene(SITE, fn)
