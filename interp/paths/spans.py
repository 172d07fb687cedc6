"""Named positions: how a user states them, and which tokens of a batch they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooks import Index, PathError, Span


def spans_of(positions: Any) -> tuple[tuple[str, Index], ...] | None:
    """Positions, a list or a dict of named ones, as spans: names, each with positions as a site takes them.

    Raises:
        PathError: none, something else than positions, or a name that is given twice or cannot stand in an edge's.
    """
    if positions is None:
        return None
    if isinstance(positions, str) or not isinstance(positions, Iterable):
        raise PathError(f"positions is a list of positions or a dict of named ones, not {positions!r}")
    if isinstance(positions, Tensor):
        positions = positions.tolist()
    named = list(positions.items() if isinstance(positions, Mapping) else ((p, p) for p in positions))
    names = [str(name) for name, _ in named]
    if not names or any(not name or "@" in name or "->" in name for name in names):
        raise PathError("give at least one position, under a name without '@' and '->'")
    if len(set(names)) != len(names):
        raise PathError(f"positions have names of their own, got {', '.join(names)}")
    return tuple((name, _place(name, at)) for name, (_, at) in zip(names, named, strict=True))


def _place(name: str, at: Any) -> Index:
    """A position as a site takes it: an int, ints, a span, or a tensor of one set of prompts."""
    if isinstance(at, (Span, Tensor)):
        return at
    if isinstance(at, np.ndarray) and at.ndim:
        return torch.as_tensor(at)
    if isinstance(at, slice) and at.step in (None, 1):
        return Span(at.start, at.stop)
    listed = [at] if isinstance(at, (int, np.integer)) else at
    if not isinstance(listed, Iterable) or not (listed := list(listed)):
        raise PathError(f"position {name!r} is an int, ints, a Span, or a tensor of one set of prompts, not {at!r}")
    if not all(isinstance(p, (int, np.integer)) and not isinstance(p, bool) for p in listed):
        raise PathError(f"position {name!r} is made of ints, not {at!r}")
    return int(at) if isinstance(at, (int, np.integer)) else tuple(int(p) for p in listed)
