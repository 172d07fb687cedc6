"""Positions of one thing in both runs of a pair, where it stands at other numbers or has another number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hooks import (
    DIM,
    POS,
    Columns,
    Inputs,
    Intervention,
    Model,
    Site,
    SiteError,
    Tape,
    World,
    nearest,
    patch,
    resolve,
    run_worlds,
)

HOWS = ("last", "first", "mean")


@dataclass(frozen=True, eq=False)
class Paired:
    """Positions of a named thing in the clean prompts and in the corrupt ones; see `paired`."""

    clean: Any
    corrupt: Any
    how: str | None = None

    def matched(self, name: str, edited: Inputs, source: Inputs, clean: bool, stack: str | None, read: bool) -> Matched:
        """Both sides as masks.

        Args:
            name: what the thing is called.
            edited, source: the run that is edited, and the one that values are taken from.
            clean: whether it is the clean one that is edited.
            stack: the stack of the sites.
            read: whether the source is read there.

        Raises:
            SiteError: a row has the thing in the source alone or in the edited run alone, or other numbers of its
                tokens, and it is not said which are taken.
        """
        given = (self.clean, self.corrupt) if clean else (self.corrupt, self.clean)
        sides = [inputs.along(stack) for inputs in (edited, source)]
        here, there = (_mask(value, columns, name) for value, columns in zip(given, sides, strict=True))
        counts: list[tuple[int, int]] = list(zip(here.sum(1).tolist(), there.sum(1).tolist(), strict=True))
        for row, (mine, theirs) in enumerate(counts if read else []):
            if mine and theirs and mine != theirs and self.how is None:
                words = [_words(inputs, mask, row) for inputs, mask in ((edited, here), (source, there))]
                raise SiteError(
                    f"pos {name!r}: in row {row} it is {mine} tokens where it is edited ({words[0]}) and {theirs} in "
                    f"the source ({words[1]}), so they do not correspond token by token: say how='last' or 'first', to "
                    "patch one token of each, or how='mean', to put the mean of the source's tokens at every one"
                )
            if bool(mine) != bool(theirs):
                only = "edited" if mine else "source"
                raise SiteError(
                    f"pos {name!r}: row {row} has it in the {only} run alone; name it in both, or in neither"
                )
        if self.how in ("last", "first"):
            here, there = (_one(mask, columns, self.how) for mask, columns in zip((here, there), sides, strict=True))
        return Matched(here, there, self.how == "mean")


@dataclass(frozen=True, eq=False)
class Matched:
    """Positions that correspond, bool [B, T] of the run that is edited and [B, S] of the source's columns.

    Attributes:
        pos: of the run that is edited.
        source: of the source, as many in each row unless their mean is taken.
        mean: whether each position gets the mean of the source's.
    """

    pos: Tensor
    source: Tensor
    mean: bool


def paired(clean: Any, corrupt: Any, *, how: str | None = None) -> Paired:
    """Positions of one thing in both runs of a pair, as ``pos={"name": ip.paired([[3, 4]], [[3]], how="last")}``.

    Args:
        clean: where it stands in the clean prompts: as `Site.pos` takes it (an int or ints for all rows, a tensor int
            [B] or [B, n] or a mask bool [B, T]), or a list with a list of ints for each row, of any lengths. A row with
            an empty list lacks the cell.
        corrupt: the same in the corrupt prompts.
        how: what corresponds where a row has other numbers of tokens of it. ``"last"`` or ``"first"``: that token
            alone, of each. ``"mean"``: every token that is edited gets the mean of the source's. None: token by token,
            refused where a row has other numbers of them.

    Raises:
        SiteError: an unknown `how`; on use, positions that rows do not have, or that do not correspond.
    """
    if how is not None and how not in HOWS:
        raise SiteError(f"how is {', '.join(map(repr, HOWS))} or None, not {how!r}{nearest(how, HOWS)}")
    return Paired(clean, corrupt, how)


@dataclass(eq=False)
class Corresponding:
    """Patches sites of one run from what corresponds to them in another.

    Attributes:
        model: the model.
        source: the world that values are taken from.
        from_the_end: whether rows have other lengths, so that positions which are no pair's are counted from the end.
        matches: the positions of the grid that are a pair's.
        options: how the source is run, where means of it are taken.
    """

    model: Model
    source: World
    from_the_end: bool
    matches: Sequence[Matched]
    options: dict[str, Any]
    _means: dict[Any, dict[int, Tensor]] = field(default_factory=dict)

    def __call__(self, site: Site) -> Intervention:
        """Patch a site at the same positions, each run's own where they are counted from the end.

        Raises:
            SiteError: some rows lack them, so that they stand as a mask, of columns of one of the two runs.
        """
        if not self.from_the_end:
            return patch(site, self.source)
        if isinstance(site.pos, Tensor):
            raise SiteError(f"{site.name}: rows lack a position; in pairs of other lengths every row has each of them")
        return patch(site, self.source, source_site=site)

    def matched(self, site: Site, match: Matched) -> Intervention:
        """Patch a site at the positions of a pair."""
        if not match.mean:
            return patch(site, self.source, source_site=site.at(pos=match.source))
        if site.key not in self._means:
            self._means[site.key] = self._take(site.whole)
        mean = self._means[site.key][id(match)]
        # Of heads and entries the part that is meant, at as many positions as the row that has most.
        region, axis = self.model.region(site.at(pos=None), self.source.inputs), site.axes.index(POS)
        for number, index in region.steps:
            if number != axis:
                mean = _along(mean, number, index.to(mean.device))
        return patch(site, mean.expand(-1, int(match.pos.sum(1).max()), *mean.shape[2:]))

    @torch.no_grad()
    def _take(self, site: Site) -> dict[int, Tensor]:
        """The mean [B, 1, ...] of a site over each of the pairs' positions in the source, row by row."""
        # What is held on the model comes first in every world that is run, so the source is run without it.
        ran = run_worlds(self.model, [World(self.source.inputs)], [site], **self.options)
        value = torch.cat([outcome.values[0] for outcome in ran])
        found = {}
        for match in self.matches:
            if match.mean:
                here = match.source.to(value.device).reshape(*match.source.shape, *[1] * (value.ndim - 2))
                total = torch.where(here, value, 0).sum(1, keepdim=True)
                found[id(match)] = total / here.sum(1, keepdim=True).clamp_min(1)
        return found


def _along(x: Tensor, axis: int, index: Tensor) -> Tensor:
    """The entries of an axis by an index [n], or [B, n] of each row."""
    if index.ndim == 1:
        return x.index_select(axis, index)
    shape = [len(x), *[1] * (x.ndim - 1)]
    shape[axis] = index.shape[1]
    return x.gather(
        axis, index.reshape(shape).expand(*(index.shape[1] if i == axis else n for i, n in enumerate(x.shape)))
    )


def require_own_reads(item: Intervention) -> Intervention:
    """An intervention of the user's at positions of a pair, which says by itself where it reads.

    Raises:
        SiteError: it reads another run at the positions that it edits, which there are other tokens.
    """
    for read in item.reads:
        if read.aligned and read.site is None and isinstance(read.source, (World, Tape)):
            raise SiteError(
                f"{item}: at positions that are paired it reads the source at the positions of the edited run; leave "
                "out intervention=, which patches what corresponds, or read at source_site="
            )
    return item


def _mask(value: Any, columns: Columns, name: str) -> Tensor:
    """The positions of a thing as bool [B, T] over columns."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, (list, tuple, range)) for v in value):
        if len(value) != len(columns.real):
            raise SiteError(f"pos {name!r}: positions of {len(value)} rows for {len(columns.real)} rows")
        mask = torch.zeros_like(columns.real)
        for row, places in enumerate(value):
            length = int(columns.lengths[row])
            if not all(type(p) is int and -length <= p < length for p in places):
                raise SiteError(f"pos {name!r}: row {row} has {length} tokens, and not all of positions {list(places)}")
            numbers = torch.tensor([p % length for p in places], dtype=torch.int64)
            mask[row] = columns.real[row] & torch.isin(columns.index[row], numbers)
        if not bool(mask.any()):
            raise SiteError(f"pos {name!r} is in no row")
        return mask
    place = Site("embed").at(pos=value)
    region = resolve(place, columns, {DIM: 1})
    chosen = torch.ones_like(region.cols, dtype=torch.bool) if region.valid is None else region.valid[..., 0]
    return torch.zeros_like(columns.real).scatter(1, region.cols, chosen)


def _one(mask: Tensor, columns: Columns, how: str) -> Tensor:
    """The first or last token of each row's."""
    index = torch.where(mask, columns.index, -1 if how == "last" else columns.width)
    best = index.amax(1, keepdim=True) if how == "last" else index.amin(1, keepdim=True)
    return mask & (columns.index == best)


def _words(inputs: Inputs, mask: Tensor, row: int) -> str:
    if inputs.tokens is None or mask.shape != inputs.mask.shape:
        return f"columns {mask[row].nonzero().flatten().tolist()}"
    labels = inputs.labels(row)
    return ", ".join(repr(labels[int(p)]) for p in inputs.positions[row][mask[row]])
