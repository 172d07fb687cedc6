"""What stands in a method's place calls what stood there, however its class binds it."""

from __future__ import annotations

import pytest

from hooks.backends import seams


class Owner:
    def plain(self, x: int) -> tuple[object, int]:
        return self, x

    @staticmethod
    def static(x: int) -> tuple[None, int]:
        return None, x

    @classmethod
    def of_class(cls, x: int) -> tuple[type, int]:
        return cls, x


@pytest.mark.parametrize("name", ["plain", "static", "of_class"])
def test_a_method_of_any_kind_is_called_as_it_was(name):
    owner, seen = Owner(), []
    expected = getattr(owner, name)(x=3)

    def function(own, *args, **kwargs):
        seen.append(name)
        return own(*args, **kwargs)

    remove = seams.place(owner, name, function)
    assert getattr(owner, name)(x=3) == expected and getattr(owner, name)(3) == expected
    assert seen == [name, name]
    remove()
    assert getattr(owner, name)(x=3) == expected and len(seen) == 2 and not vars(owner)
