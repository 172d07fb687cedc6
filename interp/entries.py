"""What a user may write for an axis of a grid, brought into the few forms that a grid keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooks import KEY, POS, Image, Site, SiteError, Span
from interp.pairing import Paired


class FromArray(tuple):
    """The values of an axis of positions that were given as an array, of which one a row might have been meant."""


def freeze(axis: str, value: Any) -> Any:
    """Bring what a user may write for an axis into one of the forms that a `Grid` keeps."""
    if isinstance(value, (Tensor, np.ndarray)):
        flags = str(value.dtype).removeprefix("torch.") == "bool"
        if axis in (POS, KEY) and (flags or value.ndim > 1):
            return _by_row(axis, value)
        value = value.tolist()
        if axis in (POS, KEY) and isinstance(value, list):
            return FromArray(_entry(axis, v) for v in value)
    if isinstance(value, slice):
        return _span(axis, value)
    if isinstance(value, Mapping):
        if len({str(name) for name in value}) < len(value):
            raise SiteError(f"{axis}: two groups of one name, {', '.join(map(repr, value))}")
        return {str(name): _named(axis, v) for name, v in value.items()}
    if isinstance(value, str) and axis in (POS, KEY):
        return Image.named(value) or value
    if isinstance(value, Paired) and axis == POS:
        return value
    if isinstance(value, (str, Span, Image)) or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if isinstance(value, (list, tuple, range)):
        return tuple(_entry(axis, v) for v in value)
    raise SiteError(f"{axis}={value!r}: expected 'all', values, groups or one value")


def _named(axis: str, value: Any) -> Any:
    """An entry that has a name, and so may differ between rows."""
    if axis in (POS, KEY):
        if isinstance(value, (Tensor, np.ndarray)) and value.ndim:
            return _by_row(axis, value)
        if isinstance(value, Paired):
            return value
        if isinstance(value, (list, tuple)) and value and all(isinstance(v, (list, tuple, range)) for v in value):
            rows = [_entry(axis, tuple(v)) for v in value]
            if len({len(row) for row in rows}) > 1:
                raise SiteError(
                    f"{axis}: each row lists as many positions, got {[len(row) for row in rows]}: give a mask [B, T]"
                )
            return torch.tensor(rows)
    return _entry(axis, value)


def _by_row(axis: str, value: Tensor | np.ndarray) -> Tensor:
    """Positions that differ between rows, as a site takes them."""
    at = torch.as_tensor(value)
    index = Site("pattern", 0, pos=at).pos if axis == POS else Site("pattern", 0, key_pos=at).key_pos
    assert isinstance(index, Tensor)
    return index


def _entry(axis: str, value: Any) -> Any:
    """One entry of an axis: an int, or ints edited together."""
    if axis in (POS, KEY) and isinstance(value, (Tensor, np.ndarray)) and value.ndim:
        raise SiteError(
            f"{axis}: an array in a list may be a group, or one position a row: give a tuple for the first, and for "
            f"the second a name, {axis}={{'name': array}}"
        )
    if isinstance(value, (Tensor, np.ndarray, np.integer)):
        value = value.tolist()
    if isinstance(value, str) and axis in (POS, KEY) and Image.named(value) is not None:
        return Image.named(value)
    if (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, Image) and axis in (POS, KEY)):
        return value
    if isinstance(value, (slice, Span)):
        return _span(axis, value)
    if isinstance(value, (list, tuple, range)) and len(value) and all(type(v) is int for v in value):
        return tuple(value)
    raise SiteError(f"{axis}: an entry is an int or a group of ints, not {value!r}")


def _span(axis: str, value: slice | Span) -> Span:
    if axis == "layer":
        raise SiteError(f"layer={value!r}: list the layers, as range(4, 8)")
    if isinstance(value, slice) and value.step not in (None, 1):
        raise SiteError(f"{axis}={value!r}: a step other than 1 is not understood; list the entries")
    return value if isinstance(value, Span) else Span(value.start, value.stop)
