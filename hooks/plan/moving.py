"""Plans whose values are on another device or in another dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .inputs import Inputs
from .sites import Site
from .tape import Tape


def mover(device: torch.device | str | None, dtype: torch.dtype | None) -> Callable[[Any], Any]:
    """A function that moves a value and all that it is made of; what is one object in two places is one afterwards."""
    known: dict[int, tuple[Any, Any]] = {}

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            # Masks say which rows are meant, which is decided on the host.
            if value.dtype == torch.bool:
                return value
            return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        if not is_dataclass(value) or isinstance(value, (type, Inputs, Site)):
            return value
        if id(value) not in known:
            parts = {} if isinstance(value, Tape) else {f.name: moved(getattr(value, f.name)) for f in fields(value)}
            # The value itself is kept with what is made of it, so that its id stays its own.
            known[id(value)] = value, value.to(device, dtype) if isinstance(value, Tape) else replace(value, **parts)
        return known[id(value)][1]

    return moved
