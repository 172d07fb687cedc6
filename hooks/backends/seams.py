"""Methods of an object that are answered for a while by a function of ours: on that object alone, not on its class."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any
from weakref import ref


class Seam:
    """What stands in a method's place: it calls `function(own, ...)`, where `own` is what stood there before.

    It holds its object weakly, so that nobody keeps a cache or a model by it. In a copy of the object, which has a copy
    of the seam on it, it calls the copy's own method and does nothing else.
    """

    def __init__(self, owner: Any, name: str, function: Callable[..., Any] | None = None) -> None:
        self.owner, self.name, self.function, self.before = ref(owner), name, function, vars(owner).get(name)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.own)

    @property
    def own(self) -> Callable[..., Any]:
        """The method as it is without us."""
        owner = self.owner()
        assert owner is not None
        if self.before is not None:
            return self.before
        # Bound as the class binds it: some releases of transformers have static methods where others have none.
        return inspect.getattr_static(type(owner), self.name).__get__(owner, type(owner))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.own(*args, **kwargs) if self.function is None else self.function(self.own, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return Seam, (self.owner(), self.name)


class Copies(Seam):
    """The same in the place of ``__deepcopy__``, which `copy.deepcopy` asks an object for, and most have none of."""

    def __init__(self, owner: Any, name: str = "__deepcopy__", function: Callable[..., Any] | None = None) -> None:
        super().__init__(owner, name, function)

    @property
    def own(self) -> Callable[..., Any]:
        """Makes a copy as it is made without us."""
        return self._copied

    def _copied(self, memo: dict[int, Any]) -> Any:
        owner = self.owner()
        assert owner is not None
        held = vars(owner).pop(self.name, None)
        if self.before is not None:
            vars(owner)[self.name] = self.before
        try:
            return copy.deepcopy(owner, memo)
        finally:
            if held is not None:
                vars(owner)[self.name] = held

    def __reduce__(self) -> tuple[Any, ...]:
        return Copies, (self.owner(),)


def place(owner: Any, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Put a function in a method's place; returns what takes it away again, if the object is still there."""
    seam = (Copies if name == "__deepcopy__" else Seam)(owner, name, function)
    vars(owner)[name] = seam
    where = seam.owner

    def remove() -> None:
        owner = where()
        if owner is None or vars(owner).get(name) is not seam:
            return
        if seam.before is None:
            del vars(owner)[name]
        else:
            vars(owner)[name] = seam.before

    return remove
