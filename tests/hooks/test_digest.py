"""Digests: equal for what is equal, different for what differs, however the parts of a value lie in memory."""

from __future__ import annotations

import collections
import fractions
import functools
import itertools
import types

import numpy as np
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


# Functions


LIMITS = [3]


def over(values):
    def fn(x):
        return [x * v for v in values]

    return fn


def reading(x):
    return x * LIMITS[0]


def calling(x):
    return reading(x) + 1


def noting(notes):
    def fn(x):
        if len(notes) == 6:
            raise KeyboardInterrupt
        notes.append(x)
        return x

    return fn


def counting(start):
    n = start

    def fn(x):
        nonlocal n
        n += 1
        return x

    return fn


def filing(table):
    def fn(x):
        table[x] = x
        table["n"][0] = 1
        return x

    return fn


def noting_in_a_comprehension(notes):
    return lambda xs: [notes.append(x) for x in xs]


def with_default(*, ids):
    def fn(x, ids=ids):
        return x[ids]

    return fn


class Scaled:
    factor = 2

    def __init__(self, by):
        self.by = by

    def __call__(self, x):
        return self.factor * self.by * x


class Slotted:
    __slots__ = ("by",)

    def __init__(self, by):
        self.by = by


@pytest.mark.parametrize(
    "make",
    [
        over,
        lambda v: functools.partial(over, v),
        lambda v: with_default(ids=v),
        lambda v: over(over(v)),
        lambda v: over({"a": v}),
        lambda v: over(torch.tensor(v)),
        lambda v: over(np.array(v)),
        lambda v: over(np.array([v, None], dtype=object)),
        lambda v: over(range(*v)),
        lambda v: over(slice(*v)),
        lambda v: over(collections.deque(v)),
        lambda v: over(bytearray(v)),
        lambda v: over(Scaled(v)),
        lambda v: over(Scaled(v).__call__),
        lambda v: over(Slotted(v)),
        lambda v: over(fractions.Fraction(*v)),
        lambda v: over(torch.nn.Linear(*v)),
        lambda v: over(torch.nn.Dropout(v[0] / 10)),
    ],
)
def test_what_a_function_closes_over_enters(make):
    def seeded(v):
        torch.manual_seed(0)
        return make(v)

    assert digest_of(seeded([1, 2])) == digest_of(seeded([1, 2]))
    assert digest_of(seeded([1, 2])) != digest_of(seeded([3, 5]))


@pytest.mark.parametrize("fn", [reading, calling, lambda x: [calling(y) for y in x]])
def test_globals_enter_by_value(monkeypatch, fn):
    before = digest_of(fn)
    monkeypatch.setitem(globals(), "LIMITS", [3])
    assert digest_of(fn) == before
    monkeypatch.setitem(globals(), "LIMITS", [4])
    assert digest_of(fn) != before


def test_what_is_read_of_a_module_of_the_users(monkeypatch):
    settings = types.ModuleType("settings")
    settings.ids = [1, 2]  # type: ignore[attr-defined]
    settings.other = 1  # type: ignore[attr-defined]
    monkeypatch.setitem(globals(), "settings", settings)
    fn = eval("lambda x: x[settings.ids]", globals())
    before = digest_of(fn)
    settings.other = 2  # type: ignore[attr-defined]
    assert digest_of(fn) == before
    settings.ids = [1, 3]  # type: ignore[attr-defined]
    assert digest_of(fn) != before


@pytest.mark.parametrize(
    ("make", "empty", "full"),
    [
        (noting, [], [1, 2]),
        (noting_in_a_comprehension, [], [1, 2]),
        (filing, {}, {"a": 1}),
        (counting, 0, 7),
    ],
)
def test_notes_that_a_function_keeps_are_not_what_it_is(make, empty, full):
    assert digest_of(make(empty)) == digest_of(make(full))


def test_a_method_that_shares_a_lists_name_is_no_note():
    def adding(t):
        return lambda x: x @ t.add(1)

    assert digest_of(adding(torch.ones(2))) != digest_of(adding(torch.zeros(2)))


def test_the_code_of_a_class_enters():
    def cls(factor, code="self.by * x"):
        made: dict = {}
        exec(f"class Made:\n factor = {factor}\n def __call__(self, x): return {code}", {"__name__": "mine"}, made)
        return made["Made"]()

    assert digest_of(cls(1)) == digest_of(cls(1))
    assert len({digest_of(cls(1)), digest_of(cls(2)), digest_of(cls(1, "x"))}) == 3


def test_functions_that_know_themselves_or_nothing_yet():
    def recursive(n):
        return 0 if n == 0 else recursive(n - 1)

    def early():
        return later

    digest_of(early)
    later = 1
    assert digest_of(early) == digest_of(early) and digest_of(recursive)


def test_modules_differ_in_their_settings_and_hooks():
    def norm(eps=1e-5, hook=None):
        made = torch.nn.Sequential(torch.nn.LayerNorm(3, eps=eps))
        if hook is not None:
            made[0].register_forward_hook(hook)
        return made

    doubled = norm(hook=lambda module, args, out: 2 * out)
    assert digest_of(norm()) == digest_of(norm()) == digest_of(norm().eval())
    assert len({digest_of(norm()), digest_of(norm(1e-3)), digest_of(doubled)}) == 3
