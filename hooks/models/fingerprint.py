"""Whether a model is still made of the parts that it was described by."""

from __future__ import annotations

from typing import Any

from torch import nn

_PLAIN = (int, float, bool, str, type(None))
# A rotary embedding's memory of the longest text so far, which changes no part.
_MEMORY = "max_seq_len_cached"


class Fingerprint:
    """The modules of a model, their classes and forwards, their plain attributes, and the shapes of their parameters.

    Two of one model are equal while nothing of that has changed: no module put in, taken out or replaced, no class or
    forward patched, no weight resized. Values of weights do not enter, nor do hooks or modes.
    """

    def __init__(self, module: nn.Module) -> None:
        # The modules are held, so that none that was replaced leaves its identity to another.
        self.modules = list(module.modules())
        self.parts = [_part(part) for part in self.modules]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fingerprint) and self.parts == other.parts

    __hash__ = None  # type: ignore[assignment]


def _part(module: nn.Module) -> tuple[Any, ...]:
    kind, own = type(module), vars(module)
    plain = [
        (name, value)
        for name, value in own.items()
        if type(value) in _PLAIN and name != "training" and not name.endswith(_MEMORY)
    ]
    shapes = [None if p is None else (p.shape, p.dtype) for p in own["_parameters"].values()]
    forward, compiled = own.get("forward"), own.get("_compiled_call_impl")
    return (id(module), id(kind), id(kind.forward), id(forward), compiled is not None, plain, shapes)
