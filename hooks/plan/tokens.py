"""Which columns the positions of a site are, on an axis of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ElsewhereError, ShapeError, SiteError
from .columns import Columns
from .sites import Index, Site, Span
from .spans import Image, New

_EVER = 1 << 62


def listed(index: Index) -> bool:
    """Whether an index of positions lists them (by an int, ints, or ints for each row)."""
    return isinstance(index, (int, tuple)) or (isinstance(index, Tensor) and index.dtype != torch.bool)


def columns_of(
    axis: str, index: Index, tokens: Columns, where: Tensor | None, site: Site
) -> tuple[Tensor, Tensor | None]:
    """Columns [B, n] of the positions meant, and which of them count (None: all)."""
    rows, width = tokens.real.shape
    lengths = tokens.lengths[:, None]
    if isinstance(index, Tensor) and index.shape[0] != rows:
        raise ShapeError(f"{site}: {axis} is given for {index.shape[0]} rows, the inputs have {rows}")
    if (
        index is None
        or isinstance(index, (Span, New, Image))
        or (isinstance(index, Tensor) and index.dtype == torch.bool)
    ):
        if isinstance(index, Tensor):
            shape = (rows, width if tokens.prompt is None else tokens.prompt)
            if index.shape != shape:
                raise ShapeError(f"{site}: the mask is {list(index.shape)}, the inputs {list(shape)}")
            chosen = tokens.of_prompt(index.cpu())
            if bool((chosen & ~tokens.real).any()):
                raise ShapeError(f"{site}: the mask selects padding; intersect it with inputs.mask")
        elif isinstance(index, Span):
            low, high = _bound(index.start, 0, lengths), _bound(index.stop, _EVER, lengths)
            chosen = tokens.real & (tokens.index >= low) & (tokens.index < torch.minimum(high, lengths))
        elif isinstance(index, New):
            chosen = tokens.real & index.holds(tokens.index - lengths)
        elif isinstance(index, Image):
            if tokens.image is None:
                raise SiteError(f"{site}: {axis}={str(index)!r}, and these inputs have no images")
            chosen = tokens.real & index.holds(tokens.image)
        else:
            chosen = tokens.real
        if where is not None:
            chosen = chosen & _where_columns(where, tokens, site)
        count = chosen.sum(1)
        widest = int(count.max())
        if widest == 0 and (isinstance(index, New) or not tokens.has_prompt):
            what = "new token" if isinstance(index, New) else "token"
            raise ElsewhereError(f"{site}: {axis} selects no {what} in this call: it has none of those that are meant")
        if widest == 0:
            what = f"{axis}={str(index)!r}" if isinstance(index, Image) else axis
            raise SiteError(f"{site}: {what} selects no token of any row")
        # A stable sort puts the chosen columns first and keeps all columns of a row distinct, as scatter requires.
        cols = torch.argsort((~chosen).byte(), dim=1, stable=True)[:, :widest]
        ragged = bool((count != widest).any())
        return cols, (torch.arange(widest) < count[:, None]) if ragged else None
    if isinstance(index, Tensor):
        pos = index.long().cpu().reshape(rows, -1)
    else:
        pos = torch.tensor(index if isinstance(index, tuple) else (index,)).expand(rows, -1)
    resolved = torch.where(pos < 0, pos + lengths, pos)
    cols, there = tokens.find(resolved)
    inside = there
    if tokens.prompt is not None:
        inside = (resolved >= 0) & (resolved < lengths)
        there = there & inside
        cols = torch.where(there, cols, width)
    outside = (~inside).any(1).nonzero().flatten().tolist()
    if outside:
        row = outside[0]
        raise SiteError(
            f"{site}: {axis} {pos[row].tolist()} is not in row {row}, which has {int(lengths[row])} "
            + ("tokens" if site.name != "logits" or width > 1 else "position there")
            + (f" (nor in {len(outside) - 1} other rows)" if len(outside) > 1 else "")
            + "; a slice or a mask takes from each row what it has"
        )
    ordered = resolved.sort(1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise SiteError(f"{site}: {axis}={index} names one position of a row twice")
    if not bool(there.any()):
        raise ElsewhereError(f"{site}: {axis}={index} is in no row of this call")
    valid = None if bool(there.all()) else there
    if where is not None:
        chosen = _where_columns(where, tokens, site).gather(1, cols.clamp_max(width - 1))
        valid = chosen if valid is None else valid & chosen
    return cols, valid


def beyond(cols: Tensor, width: int) -> bool:
    """Whether some of the columns are none of an axis's, which are `width`."""
    return bool((cols >= width).any())


def _bound(value: int | None, default: int, lengths: Tensor) -> Tensor:
    if value is None:
        return torch.full_like(lengths, default)
    return lengths + value if value < 0 else torch.full_like(lengths, value)


def _where_columns(where: Tensor, tokens: Columns, site: Site) -> Tensor:
    where = where.cpu()
    shape = (len(tokens.real), tokens.width if tokens.prompt is None else tokens.prompt)
    if where.dtype != torch.bool or where.shape not in (shape, shape[:1]):
        raise ShapeError(
            f"{site}: where() takes a bool mask of shape {list(shape[:1])} or {list(shape)}, "
            f"got {where.dtype} of shape {list(where.shape)}"
        )
    return (tokens.of_prompt(where) if where.ndim == 2 else where[:, None]) & tokens.real
