"""Digests: equal for what is equal, different for what differs, however the parts of a value lie in memory."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from hooks import Span, site
from hooks.digest import digest_of


def scaled(factor):
    return lambda x: factor * x


def test_every_part_of_a_value_enters():
    """Also those that come after others of their kind, whose own parts have left the memory by then."""
    values = [(Span(7, 7), Span(i, j)) for i, j in itertools.product(range(12), repeat=2)]
    assert len({digest_of(value) for value in values}) == len(values)
    sites = [(site("z", 0), site("z", 1), site("z", layer, head=head)) for layer in range(4) for head in range(4)]
    assert len({digest_of(value) for value in sites}) == len(sites)
    functions = [(scaled(0), scaled(factor), functools.partial(scaled(1), factor)) for factor in range(8)]
    assert len({digest_of(value) for value in functions}) == len(functions)


def test_how_often_something_stands_in_a_value_enters():
    one = site("z", 0)
    assert len({digest_of((one,) * n) for n in range(4)}) == 4


@pytest.mark.parametrize("make", [lambda: site("z", 1, pos=torch.tensor([1, 2])), lambda: scaled(2), lambda: [1, (2,)]])
def test_equal_values_have_one_digest_whether_they_are_one_object_or_two(make):
    one = make()
    assert digest_of((one, one)) == digest_of((make(), make()))
    assert digest_of({"a": one, "b": one}) == digest_of({"a": make(), "b": one})


def test_a_value_that_holds_itself():
    def ring(n, last):
        inner = [last]
        outer = [n, inner]
        inner.append(outer)
        return outer

    assert digest_of(ring(1, 2)) == digest_of(ring(1, 2))
    assert len({digest_of(ring(n, last)) for n in range(3) for last in range(3)}) == 9
