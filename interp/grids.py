"""Grids: which parts of a model a sweep goes through, one cell at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hooks import (
    DECODER,
    DIM,
    HEAD,
    KEY,
    KINDS,
    POS,
    TEXT,
    Columns,
    Image,
    Inputs,
    Intervention,
    Model,
    Plan,
    Site,
    SiteError,
    Span,
    digest_of,
    nearest,
)
from interp.axes import Axis
from interp.entries import FromArray, freeze
from interp.pairing import Corresponding, Matched, Paired, require_own_reads
from interp.positions import BUT_BOS, positions_but_bos, row_positions, token_labels

Factory = Callable[[Site], Intervention]
"""From a site to what is done there: ``ip.zero``, or ``lambda site: ip.steer(site, v)``."""

AXES = ("layer", HEAD, POS, KEY, DIM)


@dataclass(frozen=True)
class Cell:
    """One cell: its coordinates, the sites that it edits, and the rows that have them.

    Attributes:
        index: place along each axis of the grid.
        sites: what is edited, all at once.
        present: bool [B], False for rows without such a position; None where every row has it.
        match: what in the source corresponds to its positions, where that is not the same positions.
    """

    index: tuple[int, ...]
    sites: tuple[Site, ...]
    present: Tensor | None = None
    match: Matched | None = None

    def plan(self, factory: Factory) -> Plan:
        """What is done in this cell."""
        if self.match is None:
            return Plan(tuple(factory(place) for place in self.sites))
        if isinstance(factory, Corresponding):
            return Plan(tuple(factory.matched(place, self.match) for place in self.sites))
        return Plan(tuple(require_own_reads(factory(place)) for place in self.sites))


@dataclass(frozen=True, repr=False, eq=False)
class Grid:
    """Kinds of sites, and the axes along which they are taken apart; see `grid`."""

    names: tuple[str, ...]
    axes: tuple[tuple[str, Any], ...]
    several: bool
    stack: str | None = None

    def __eq__(self, other: object) -> bool:
        return digest_of(self) == digest_of(other) if isinstance(other, Grid) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.names, tuple(name for name, _ in self.axes), self.several, self.stack))

    def __repr__(self) -> str:
        over = ", ".join(axis for axis, _ in self.axes) or "everything at once"
        where = f" in the {self.stack} stack" if self.stack is not None else ""
        return f"Grid({' + '.join(self.names)}{where} over {over})"

    @property
    def from_the_end(self) -> bool:
        """Whether its positions are named and counted from the end, so that they correspond in rows of any length."""
        given = dict(self.axes)
        if POS not in given or any(KEY in KINDS[name].axes for name in self.names):
            return False
        value = given[POS]
        if isinstance(value, Span):
            return (value.start or 0) < 0 and (value.stop is None or value.stop < 0)
        listed = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else [value]
        each = [place for entry in listed for place in (entry if isinstance(entry, tuple) else (entry,))]
        return all(isinstance(place, (Paired, Matched)) or (isinstance(place, int) and place < 0) for place in each)

    @property
    def paired(self) -> bool:
        """Whether some of its positions are a pair's."""
        value = dict(self.axes).get(POS)
        return any(isinstance(v, Paired) for v in (value.values() if isinstance(value, Mapping) else [value]))

    @property
    def matches(self) -> list[Matched]:
        """Its positions that are a pair's, as they correspond; see `on`."""
        value = dict(self.axes).get(POS)
        return [v for v in (value.values() if isinstance(value, Mapping) else [value]) if isinstance(v, Matched)]

    def on(self, edited: Inputs, source: Inputs, clean: bool, read: bool) -> Grid:
        """The grid with the positions of pairs as they correspond in a run that is edited and its source.

        Raises:
            SiteError: they do not.
        """
        if any(KEY in KINDS[name].axes for name in self.names):
            raise SiteError(f"{self!r}: between queries and keys, positions that are paired would be edges; list them")

        def found(name: str, value: Any) -> Any:
            paired = isinstance(value, Paired)
            return value.matched(name, edited, source, clean, self.stack, read) if paired else value

        axes = (
            (axis, {k: found(k, v) for k, v in value.items()} if isinstance(value, Mapping) else found(POS, value))
            for axis, value in self.axes
        )
        return Grid(self.names, tuple(axes), self.several, self.stack)

    def cells(self, model: Model, inputs: Inputs) -> tuple[tuple[Axis, ...], list[Cell]]:
        """The axes with their values on a model and inputs, and every cell, the last axis fastest.

        Raises:
            SiteError: the model lacks a site, layer, head or position.
        """
        if self.paired:
            raise SiteError(f"{self!r}: positions that are paired are of a sweep over clean and corrupt prompts")
        fixed: dict[str, Any] = {}
        axes: list[Axis] = [Axis("site", self.names)] if self.several else []
        entries: list[Sequence[Any]] = [self.names] if self.several else []
        for name, value in self.axes:
            if isinstance(value, (int, Span, Image, Matched)) or (isinstance(value, Tensor) and name in (POS, KEY)):
                fixed[name] = value
            else:
                axis, meant = self._axis(name, value, model, inputs)
                axes.append(axis)
                entries.append(meant)
        cells = []
        known: dict[Any, Any] = {}
        for index in itertools.product(*(range(len(axis)) for axis in axes)):
            chosen = fixed | {a.name: meant[i] for a, meant, i in zip(axes, entries, index, strict=True)}
            cells.append(self._cell(index, chosen, model, inputs, known))
        return tuple(axes), cells

    def _axis(self, name: str, value: Any, model: Model, inputs: Inputs) -> tuple[Axis, tuple]:
        """An axis, and what each of its entries means."""
        sizes = {self._size(name, kind, model, inputs) for kind in self.names}
        if isinstance(value, str) and value == BUT_BOS:
            value = positions_but_bos(inputs, max(sizes))
        if isinstance(value, str):
            if len(sizes) > 1:
                raise SiteError(f"{', '.join(self.names)} have different numbers of {name}s {sorted(sizes)}: list them")
            value = range(sizes.pop())
        if isinstance(value, FromArray) and len(value) == len(inputs) > 1:
            raise SiteError(
                f"{name}: an array of {len(value)} positions for {len(inputs)} rows may be {len(value)} values of an "
                f"axis, or one a row: give a list for the first, {name}={{'name': array}} for the second"
            )
        labels: tuple[str, ...] = ()
        if isinstance(value, Mapping):
            labels, value = tuple(map(str, value)), list(value.values())
        tokens, said = self._tokens(name, self.names[0], inputs)
        values = tuple(self._group(name, v, max(sizes), tokens) if isinstance(v, Span) else v for v in value)
        if not values:
            raise SiteError(f"the axis {name!r} of the grid is empty")
        if name in (POS, KEY) and not labels:
            labels = token_labels(values, said)
        # Positions that differ between rows are known by their name.
        shown = (
            label if isinstance(v, (Tensor, Image, Matched)) else v
            for v, label in zip(values, labels or values, strict=True)
        )
        return Axis(name, tuple(shown), labels), values

    @staticmethod
    def _group(name: str, span: Span, size: int, tokens: Columns) -> tuple[int, ...]:
        """The entries of a slice that is one entry of an axis."""
        open_ended = span.stop is None or span.stop < 0 or (span.start or 0) < 0
        if name in (POS, KEY) and open_ended and bool((tokens.lengths != tokens.lengths[0]).any()):
            raise SiteError(f"{name}: the group {span} means other positions in rows of other lengths; list them")
        chosen = tuple(range(*slice(span.start, span.stop).indices(size)))
        if not chosen:
            raise SiteError(f"{name}: the group {span} selects nothing of {size}")
        return chosen

    @property
    def _in_text(self) -> bool:
        return self.stack in (None, TEXT, DECODER)

    def _tokens(self, name: str, kind: str, inputs: Inputs) -> tuple[Columns, Inputs | None]:
        """What positions count along an axis of a kind of site, and the prompts whose tokens these are, if any's."""
        queries, keys = inputs.tokens_of(Site(kind, 0 if KINDS[kind].per_layer else None, self.stack))
        found, encoded = (keys if name == KEY else queries), inputs.source
        if found is inputs.columns:
            return found, inputs
        return found, encoded if encoded is not None and found is encoded.columns else None

    def _depth(self, model: Model) -> int:
        """Number of layers of the stack that is meant."""
        return model.architecture.depth(None if self._in_text else self.stack)

    def _size(self, name: str, kind: str, model: Model, inputs: Inputs) -> int:
        place = Site(kind, 0 if KINDS[kind].per_layer else None, self.stack)
        if place.key not in model.sizes and kind != "resid_pre":
            model.require(place)
        if name == "layer":
            return self._depth(model)
        if name in (POS, KEY):
            return model.sizes[place.key].get(name, int(self._tokens(name, kind, inputs)[0].lengths.max()))
        model.require(place)
        return model.sizes[place.key][name]

    def _cell(
        self, index: tuple[int, ...], chosen: dict[str, Any], model: Model, inputs: Inputs, known: dict[Any, Any]
    ) -> Cell:
        """A cell, of what its entries mean; `known` is what was found out of them for other cells of the grid."""
        names = (chosen.pop("site"),) if "site" in chosen else self.names
        layers = chosen.pop("layer", None)
        present = match = None
        for axis, value in chosen.items():
            if isinstance(value, Matched):
                match, value = value, value.pos
            if axis in (POS, KEY):
                at = (axis, names[0], id(value))
                if at not in known:
                    known[at] = value, *row_positions(value, inputs, self._tokens(axis, names[0], inputs)[0])
                _, value, rows = known[at]
                if rows is not None:
                    present = rows if present is None else present & rows
            chosen[axis] = value
        at = (names, layers)
        if at not in known:
            known[at] = self._places(names, layers, model)
        sites = tuple(Site(name, layer, self.stack, **chosen) for name, layer in known[at])
        for place in sites:
            model.require(place)
        if not self._in_text:
            # A row without an image has nothing in a tower.
            some = inputs.along(self.stack).lengths > 0
            if not bool(some.all()):
                present = some if present is None else present & some
        return Cell(index, sites, present, match)

    def _places(self, names: Sequence[str], layers: Any, model: Model) -> list[tuple[str, int | None]]:
        """Kinds of sites, each in every layer that is meant."""
        depth = self._depth(model)
        listed = range(depth) if layers is None else layers if isinstance(layers, tuple) else (layers,)
        there = [layer + depth if layer < 0 else layer for layer in listed]
        return [(name, layer) for name in names for layer in (there if KINDS[name].per_layer else (None,))]


def grid(names: str | Sequence[str], *, stack: str | None = None, **axes: Any) -> Grid:
    """State what a sweep goes through.

    Args:
        names: a kind of site (``"resid_pre"``), or several, which make a first axis ``"site"``.
        stack: of which stack, in a model that has several: ``"vision"`` is a tower's.
        **axes: `layer`, `head`, `pos`, `key_pos`, `dim`, in the order of the result's axes. Each is ``"all"``, a
            sequence whose entries are single values or groups edited together (tuples), a dict of named groups, whose
            names label the result and select from it, or one value (an int, a `Span`), which restricts every cell and
            makes no axis. What is not named is edited whole:
            all positions, all heads, all layers.

    ``pos="but_bos"`` is all positions but that of BOS, at which one patches the same token into itself.

    Positions that differ between rows mean what they mean as a site's `pos`: a tensor or array, int [B] (one a row) or
    [B, n], or a mask bool [B, T]; in a dict, where it has a name, also a list with a list of ints for each row. As the
    one value of `pos` or `key_pos`, int [B, n] or a mask restricts every cell; an array [n] is n values of an axis, and
    is refused where there are n rows, so that it might be one a row. ``"image"`` and ``"image 0"`` are the tokens of a
    row's images, as the one value or among others. `interp.paired` says where one thing stands in each of two runs,
    which then may have other lengths.

    Raises:
        SiteError: an unknown site or axis, or one that the sites lack; positions of which it is not clear whether they
            are groups or one a row.

    >>> grid("z", layer="all", head="all")
    Grid(z over layer, head)
    """
    listed = (names,) if isinstance(names, str) else tuple(names)
    if not listed or len(set(listed)) != len(listed):
        raise SiteError(f"a grid names one or more different kinds of sites, got {listed}")
    for name in listed:
        if name not in KINDS:
            raise SiteError(f"unknown site {name!r}{nearest(name, KINDS)}; the sites are {', '.join(KINDS)}")
    for axis, value in axes.items():
        if axis not in AXES:
            raise SiteError(f"a grid has axes {', '.join(AXES)}, not {axis!r}{nearest(axis, AXES)}")
        known = isinstance(value, str) and (value in ("all", BUT_BOS) or Image.named(value) is not None)
        if isinstance(value, str) and not (value == "all" or (axis in (POS, KEY) and known)):
            raise SiteError(f"{axis}={value!r}: expected 'all', values, groups or one value{nearest(value, ['all'])}")
        lacking = [n for n in listed if (not KINDS[n].per_layer if axis == "layer" else axis not in KINDS[n].axes)]
        if lacking:
            raise SiteError(f"site {lacking[0]!r} has no axis {axis!r}; it has {KINDS[lacking[0]].axes}")
    frozen = tuple((axis, freeze(axis, value)) for axis, value in axes.items())
    return Grid(listed, frozen, not isinstance(names, str), stack)
