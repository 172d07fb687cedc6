"""Positions of a grid on some prompts: which rows have them, and what stands there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hooks import Columns, Image, Inputs, SiteError

BUT_BOS = "but_bos"
"""All positions but that of BOS."""


def row_positions(value: Any, inputs: Inputs, tokens: Columns | None = None) -> tuple[Any, Tensor | None]:
    """A position, group or mask as a site takes it, and which rows have it (None: all).

    Args:
        value: what a grid means.
        inputs: the prompts.
        tokens: what positions count there; by default the prompts'.

    Raises:
        SiteError: no row has it.
    """
    tokens = inputs.columns if tokens is None else tokens
    if isinstance(value, Image):
        if tokens.image is None:
            raise SiteError(f"{str(value)!r} is of none of these inputs, which have no images")
        return value, _rows_with(value.holds(tokens.image), str(value))
    if isinstance(value, Tensor) and value.dtype == torch.bool and value.shape == tokens.real.shape:
        return value, _rows_with(value.cpu() & tokens.real, "the mask")
    if not isinstance(value, (int, tuple)):
        return value, None
    reach = [p + 1 if p >= 0 else -p for p in (value if isinstance(value, tuple) else (value,))]
    if max(reach) <= int(tokens.lengths.min()):
        return value, None
    listed = torch.tensor(value if isinstance(value, tuple) else (value,))
    lengths = tokens.lengths[:, None]
    has = ((listed < lengths) & (listed >= -lengths)).all(1)
    if bool(has.all()):
        return value, None
    if not bool(has.any()):
        raise SiteError(f"no row has position {value}: the longest has {int(lengths.max())} tokens")
    at = torch.where(listed < 0, listed + lengths, listed).clamp(0, tokens.width - 1)
    cols = torch.argsort((~tokens.real).byte(), dim=1, stable=True).gather(1, at)
    return torch.zeros_like(tokens.real).scatter(1, cols, True) & has[:, None], has


def _rows_with(chosen: Tensor, what: str) -> Tensor | None:
    """Which rows have some of the tokens bool [B, T] (None: all)."""
    some = chosen.any(1)
    if not bool(some.any()):
        raise SiteError(f"{what} selects no token of any row")
    return None if bool(some.all()) else some


def token_labels(values: tuple, inputs: Inputs | None) -> tuple[str, ...]:
    """The token at each position; with an ellipsis where it is only that of the first row which has the position."""
    rows = (
        [inputs.labels(row) for row in range(len(inputs))] if inputs is not None and inputs.tokens is not None else []
    )
    labels = []
    for value in values:
        text = str(value)
        if isinstance(value, int):
            here = list(dict.fromkeys(row[value] for row in rows if -len(row) <= value < len(row)))
            text = here[0] + "…" * (len(here) > 1) if here else text
        labels.append(text)
    return tuple(labels)


def positions_but_bos(inputs: Inputs, size: int) -> range:
    """All positions but the first, where that is BOS in every row.

    Raises:
        SiteError: it is in no row, or only in some, where a position is not BOS in all or none.
    """
    first = inputs.ids.gather(1, inputs.order[:, :1])[:, 0]
    have = torch.zeros(len(inputs)) if inputs.bos_id is None else (first == inputs.bos_id).float()
    if not bool(have.all()):
        some = (
            "no row begins with BOS"
            if not bool(have.any())
            else f"{int(have.sum())} of {len(have)} rows begin with BOS"
        )
        raise SiteError(f"pos={BUT_BOS!r}: {some}; list the positions")
    return range(1, size)
