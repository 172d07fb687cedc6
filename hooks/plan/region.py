"""A site resolved on a batch: which entries of the activation are meant, to be taken out and put back without in-place
writes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ShapeError, SiteError
from .columns import Columns
from .kinds import ROW
from .sites import DIM, HEAD, KEY, POS, Index, Site, Span
from .spans import Image, New
from .tokens import beyond, columns_of, listed

Steps = tuple[tuple[int, Tensor], ...]
"""The number of an axis and an index [n] or [B, n] along it, for each axis that is restricted."""


@dataclass(frozen=True, eq=False)
class Entries:
    """Entries of an activation, as tensors alone; attributes as of a `Region`."""

    steps: Steps
    valid: Tensor | None

    def get(self, x: Tensor) -> Tensor:
        """Take the part out of a full activation."""
        return taken(x, self.steps)

    def put(self, x: Tensor, part: Tensor) -> Tensor:
        """Return the activation with the part replaced (where it is valid)."""
        return replaced(x, part, self.steps, self.valid)

    def there(self, x: Tensor) -> Tensor | None:
        """See `Region.there`; a graph is of whole texts, whose keys are all in some column."""
        return self.valid


@dataclass(frozen=True, eq=False)
class Region:
    """The entries of an activation that a site means on given inputs.

    Attributes:
        site: the site that was resolved.
        shape: sizes of the selected part, by axis name.
        steps: (axis number, index [n] or [B, n]) for each restricted axis.
        valid: bool, broadcastable to the part; False where a row has fewer entries than the widest row, or is left out.
            None means that every entry counts.
        cols: int64 [B, n], the columns of the query positions.
        key_cols: int64 [B, m], the columns of the key positions, for sites that have them.
        elsewhere: axes (numbers) along which some of the positions that the site lists are in another call of the text.
            Such a place has no column: the one beyond the last stands for it, and what is put there is dropped.
    """

    site: Site
    shape: dict[str, int]
    steps: Steps
    valid: Tensor | None
    cols: Tensor
    key_cols: Tensor | None
    elsewhere: frozenset[int] = frozenset()

    def get(self, x: Tensor) -> Tensor:
        """Take the part out of a full activation."""
        return taken(x, self._on(x), self.elsewhere)

    def put(self, x: Tensor, part: Tensor) -> Tensor:
        """Return the activation with the part replaced (where it is valid)."""
        steps, valid = self._on(x), None if self.valid is None else self.valid.to(x.device)
        return replaced(x, part, steps, valid, self.elsewhere)

    def there(self, x: Tensor) -> Tensor | None:
        """bool, broadcastable to the part, False where it has nothing of its own; None where it has all over.

        That is filler of rows that have fewer entries, and keys that no column of x is of any more. What `get` gives in
        their place is another entry's, which what mixes keys must not count.
        """
        return None if self.valid is None else self.valid.to(x.device)

    def full_valid(self) -> Tensor:
        """bool of the part's shape, True where an entry counts."""
        shape = tuple(self.shape[axis] for axis in self.site.axes)
        return torch.ones(shape, dtype=torch.bool) if self.valid is None else self.valid.expand(shape)

    def to(self, device: torch.device) -> Region:
        """The same region with what `get` and `put` index by on a device; columns stay where they are."""
        steps = tuple((axis, index.to(device)) for axis, index in self.steps)
        valid = None if self.valid is None else self.valid.to(device)
        return Region(self.site, self.shape, steps, valid, self.cols, self.key_cols, self.elsewhere)

    def rows(self, window: slice) -> Region:
        """The region restricted to a range of rows."""
        if window.start == 0 and window.stop >= self.shape[ROW]:
            return self
        steps = tuple((axis, index if index.ndim == 1 else index[window]) for axis, index in self.steps)
        valid = self.valid if self.valid is None or len(self.valid) == 1 else self.valid[window]
        keys = None if self.key_cols is None else self.key_cols[window]
        shape = dict(self.shape, row=window.stop - window.start)
        return Region(self.site, shape, steps, valid, self.cols[window], keys, self.elsewhere)

    def _on(self, x: Tensor) -> Steps:
        return tuple((axis, index.to(x.device)) for axis, index in self.steps)


def taken(x: Tensor, steps: Steps, elsewhere: frozenset[int] = frozenset()) -> Tensor:
    """The entries of an activation that indices, one axis after another, select; see `Region.elsewhere`."""
    return _levels(x, steps, elsewhere)[-1]


def replaced(
    x: Tensor, part: Tensor, steps: Steps, valid: Tensor | None = None, elsewhere: frozenset[int] = frozenset()
) -> Tensor:
    """An activation with the selected entries replaced, where they are valid."""
    levels = _levels(x, steps, elsewhere)
    if valid is not None:
        part = torch.where(valid, part, levels[-1])
    for (axis, index), level in zip(reversed(steps), reversed(levels[:-1]), strict=True):
        if index.ndim == 1:
            part = level.index_copy(axis, index, part)
        elif axis in elsewhere:
            more = torch.cat([level, level.narrow(axis, 0, 1)], axis)
            part = more.scatter(axis, _spread(index, axis, part), part).narrow(axis, 0, level.shape[axis])
        else:
            part = level.scatter(axis, _spread(index, axis, part), part)
    return part


def _levels(x: Tensor, steps: Steps, elsewhere: frozenset[int]) -> list[Tensor]:
    levels = [x]
    for axis, index in steps:
        if axis in elsewhere:
            index = index.clamp_max(x.shape[axis] - 1)
        x = x.index_select(axis, index) if index.ndim == 1 else x.gather(axis, _spread(index, axis, x))
        levels.append(x)
    return levels


def _spread(index: Tensor, axis: int, like: Tensor) -> Tensor:
    """Give an index [B, n] along `axis` the rank and the other sizes of `like`."""
    shape = [1] * like.ndim
    shape[0], shape[axis] = index.shape
    size = list(like.shape)
    size[axis] = index.shape[1]
    return index.reshape(shape).expand(size)


def resolve(
    site: Site, queries: Columns, sizes: dict[str, int], where: Tensor | None = None, keys: Columns | None = None
) -> Region:
    """Resolve a site on a batch.

    Args:
        site: what is meant.
        queries: the tokens that the activation has.
        sizes: sizes of the activation's `head` and `dim` axes, and of `pos` where that is not the number of tokens.
        where: bool [B] or [B, T], rows or columns to which the region is restricted besides.
        keys: the tokens that may be attended to, where they are not the same.

    Raises:
        SiteError: a head, position or dimension that is not there.
        ElsewhereError: none of the tokens that are meant is among these, which are a part of a text.
        ShapeError: a mask or index whose shape does not fit the batch.
    """
    axes, queries = site.axes, _as_wide(queries, sizes)
    keys = queries if keys is None else keys
    rows = len(queries.real)
    cols, valid = columns_of(POS, site.pos, queries, where, site)
    shape = {ROW: rows, POS: cols.shape[1]}
    steps = _position_steps(axes.index(POS), cols, queries.width)
    flags = [] if valid is None else [_on_axes(valid, POS, axes)]
    elsewhere = {POS: beyond(cols, queries.width)}
    cols, key_cols = cols.clamp_max(queries.width - 1), None
    if HEAD in axes:
        shape[HEAD], step = _entries(HEAD, site, sizes[HEAD], axes)
        steps += step
    if KEY in axes:
        key_cols, key_valid = columns_of(KEY, site.key_pos, keys, None, site)
        shape[KEY] = key_cols.shape[1]
        steps += _position_steps(axes.index(KEY), key_cols, keys.width)
        elsewhere[KEY] = beyond(key_cols, keys.width)
        key_cols = key_cols.clamp_max(keys.width - 1)
        if key_valid is not None:
            flags.append(_on_axes(key_valid, KEY, axes))
    if DIM in axes:
        shape[DIM], step = _entries(DIM, site, sizes[DIM], axes, rows)
        steps += step
    merged = None
    for flag in flags:
        merged = flag if merged is None else merged & flag
    gone = frozenset(axes.index(axis) for axis, some in elsewhere.items() if some)
    return Region(site, shape, tuple(steps), merged, cols, key_cols, gone)


def corresponding(
    region: Region,
    mine: Columns,
    source: Columns,
    sizes: dict[str, int],
    keys: Columns | None = None,
    source_keys: Columns | None = None,
) -> Region:
    """The region of a source's activation that belongs to a region resolved on other tokens, position by position.

    Positions that the site lists are looked up in the source's own rows (so -1 is the source's last token); those that
    it takes by a slice or a mask, or all of them, are the same positions p in both.

    Raises:
        ShapeError: the source has other lengths, or lacks such a position.
    """
    their_keys = source if source_keys is None else source_keys
    if source.laid_like(mine) and (keys is None or their_keys.laid_like(keys)):
        return region
    site, axes = region.site, region.site.axes
    mine, source = _as_wide(mine, sizes), _as_wide(source, sizes)
    here = {POS: mine, KEY: mine if keys is None else keys}
    theirs = {POS: source, KEY: source if source_keys is None else source_keys}
    found: dict[str, Tensor] = {}
    steps: list[tuple[int, Tensor]] = []
    for axis, cols in ((POS, region.cols), (KEY, region.key_cols)):
        if cols is None:
            continue
        index: Index = getattr(site, axis)
        mine, source = here[axis], theirs[axis]
        if index is None and bool((mine.lengths != source.lengths).any()):
            row = int((mine.lengths != source.lengths).nonzero()[0])
            raise ShapeError(
                f"{site}: row {row} has {int(source.lengths[row])} tokens in the source, "
                f"{int(mine.lengths[row])} here; clean and corrupt of different lengths do not correspond"
            )
        if listed(index):
            found[axis], _ = columns_of(axis, index, source, None, site)
        elif isinstance(index, Image):
            valid = None if region.valid is None else _along(region.full_valid(), axes.index(axis))
            found[axis] = _of_images(axis, index, cols, valid, source, site)
        else:
            wanted = mine.index.gather(1, cols)
            real = mine.real.gather(1, cols)
            if region.valid is not None:
                real = real & _along(region.full_valid(), axes.index(axis))
            found[axis], there = source.find(wanted)
            lacking = (~there & real).any(1).nonzero().flatten().tolist()
            if lacking:
                row = lacking[0]
                raise ShapeError(
                    f"{site}: row {row} of the source has {int(source.lengths[row])} tokens, and position "
                    f"{int(wanted[row][real[row]].max())} is wanted"
                    + ("" if mine.prompt is None else "; a slice, as pos=slice(None), means the prompt's tokens alone")
                )
        steps += _position_steps(axes.index(axis), found[axis], source.width)
    steps += [step for step in region.steps if axes[step[0]] in (HEAD, DIM)]
    return Region(site, region.shape, tuple(steps), region.valid, found[POS], found.get(KEY))


def _of_images(axis: str, index: Image, cols: Tensor, valid: Tensor | None, source: Columns, site: Site) -> Tensor:
    """The columns [B, n] of a source's images, token by token as of ours, which stand at `cols` where they are valid.

    Raises:
        ShapeError: images of a row have other numbers of tokens.
    """
    there, counted = columns_of(axis, index, source, None, site)
    theirs = torch.full((len(there),), there.shape[1]) if counted is None else counted.sum(1)
    ours = torch.full_like(theirs, cols.shape[1]) if valid is None else valid.sum(1)
    odd = ((ours != theirs) & (ours > 0)).nonzero().flatten().tolist()
    if odd:
        row = odd[0]
        raise ShapeError(
            f"{site}: row {row} has {int(ours[row])} tokens of {axis}={str(index)!r}, and {int(theirs[row])} in the "
            "source, so they do not correspond"
        )
    short = cols.shape[1] - there.shape[1]
    return torch.nn.functional.pad(there, (0, short)) if short > 0 else there[:, : cols.shape[1]]


def _along(valid: Tensor, axis: int) -> Tensor:
    """Reduce flags of a part to flags [B, n] along one of its axes."""
    others = [i for i in range(1, valid.ndim) if i != axis]
    return valid.amax(dim=others) if others else valid


def entire(site: Site, queries: Columns, sizes: dict[str, int], keys: Columns | None = None) -> Region:
    """The region of a whole activation, in the columns of the batch, padding included."""
    rows, width = _as_wide(queries, sizes).real.shape
    breadth = width if keys is None else keys.width
    cols = torch.arange(width).expand(rows, -1)
    key_cols = torch.arange(breadth).expand(rows, -1) if KEY in site.axes else None
    shape = {axis: {ROW: rows, POS: width, KEY: breadth}.get(axis, sizes.get(axis, 0)) for axis in site.axes}
    return Region(site, shape, (), None, cols, key_cols)


def _as_wide(columns: Columns, sizes: dict[str, int]) -> Columns:
    """The tokens as a site has them: as many as its positions, where it has fewer than there are tokens."""
    width = sizes.get(POS)
    return columns if width is None else columns.cut(width)


def _on_axes(valid: Tensor, axis: str, axes: tuple[str, ...]) -> Tensor:
    shape = [1] * len(axes)
    shape[0], shape[axes.index(axis)] = valid.shape
    return valid.reshape(shape)


def _position_steps(axis: int, cols: Tensor, width: int) -> list[tuple[int, Tensor]]:
    """The index steps that take columns [B, n] out of an axis of `width`."""
    if cols.shape[1] == width and bool((cols == torch.arange(width)).all()):
        return []
    if bool((cols == cols[:1]).all()) and not beyond(cols, width):
        return [(axis, cols[0].contiguous())]
    return [(axis, cols)]


def _entries(axis: str, site: Site, size: int, axes: tuple[str, ...], rows: int = 0) -> tuple[int, list]:
    """Size of, and index steps for, an axis of heads or dimensions."""
    index: Index = getattr(site, axis)
    assert not isinstance(index, (New, Image))
    if index is None:
        return size, []
    if isinstance(index, Tensor):
        if index.shape[0] != rows:
            raise ShapeError(f"{site}: {axis} is given for {index.shape[0]} rows, the inputs have {rows}")
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= size:
            raise SiteError(f"{site}: {axis} {low if low < 0 else high} is outside 0 .. {size - 1}")
        return index.shape[1], [(axes.index(axis), index.long().cpu())]
    if isinstance(index, Span):
        chosen = tuple(range(*slice(index.start, index.stop).indices(size)))
    else:
        chosen = index if isinstance(index, tuple) else (index,)
    chosen = tuple(i + size if i < 0 else i for i in chosen)
    for i in chosen:
        if not 0 <= i < size:
            what = "head" if axis == HEAD else "dimension"
            raise SiteError(f"{site}: there is no {what} {i}, the site has {size} (0 .. {size - 1})")
    if not chosen:
        raise SiteError(f"{site}: {axis}={index} selects nothing of {size}")
    if len(set(chosen)) != len(chosen):
        raise SiteError(f"{site}: {axis}={index} names one of the {size} twice")
    return len(chosen), [(axes.index(axis), torch.tensor(chosen))]
