"""What a forward pass is of: rows, the tokens that are fed, and the tokens that these may see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .errors import ElsewhereError
from .plan.columns import Columns
from .plan.context import Context
from .plan.inputs import KEYS_OF_CROSS, Inputs
from .plan.kinds import ROW
from .plan.pictures import Pictures
from .plan.region import Region, entire, resolve
from .plan.sites import CROSS, DECODER, DIM, ENCODER, HEAD, TEXT, VISION, Site


@dataclass(frozen=True, eq=False)
class Layout:
    """The rows and columns of a forward pass of one stack of layers. Nothing else is derived from a mask.

    Attributes:
        rows: int64 [B], the identity of each row, which random interventions are a function of.
        queries: the tokens that are fed now, in T columns.
        keys: the tokens that they may see, in S columns: those of the past, then those that are fed, S - T further on.
        stack: which stack of layers, in a model that has several.
        kept: of how many of the last queries there are logits; None for all.
        windows: for each layer whose attention has other key columns than the text, the column of the text that its
            first is and how many it has. They are the last ones where it slides, and may go on beyond what is written.
        origin: int64 [B], the row of the plan that each row is, where beams or samples share one; None where it is
            its own.
        given: how many rows the plan is for; None for as many as there are.
        towers: the layouts of other stacks that run in this pass, by name; those of a tower have `pictures`, the images
            that it sees.
    """

    rows: Tensor
    queries: Columns
    keys: Columns
    stack: str | None = None
    kept: int | None = None
    windows: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    origin: Tensor | None = None
    given: int | None = None
    towers: Mapping[str, Layout] = field(default_factory=dict)
    pictures: Pictures | None = None
    _known: dict[Any, Region] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, inputs: Inputs) -> Layout:
        """The layout of a pass over whole inputs, without a past."""
        if inputs not in _LAYOUTS:
            towers = {} if inputs.pictures is None else {VISION: cls.of_tower(inputs.pictures, inputs.row_ids)}
            made = cls(inputs.row_ids, inputs.columns, inputs.columns, towers=towers)
            _LAYOUTS[inputs] = made if inputs.source is None else made.after(inputs.source.columns)
        return _LAYOUTS[inputs]

    def after(self, encoded: Columns, encodes: bool = True) -> Layout:
        """The layout of a pass that decodes what it encodes in it, or what was encoded before.

        Args:
            encoded: the tokens of that.
            encodes: whether they run through the encoder in this pass.
        """
        shared = {"kept": None, "windows": {}, "_known": {}}
        towers = {CROSS: replace(self, stack=CROSS, keys=encoded, **shared)}
        if encodes:
            towers[ENCODER] = replace(self, stack=ENCODER, queries=encoded, keys=encoded, **shared)
        return replace(self, towers=towers, _known={})

    @classmethod
    def of_tower(cls, pictures: Pictures, rows: Tensor) -> Layout:
        """The layout of a tower that sees the images of some rows."""
        columns = pictures.columns
        return cls(rows, columns, columns, stack=VISION, pictures=pictures)

    def of_stack(self, stack: str | None) -> Layout:
        """The layout of the stack that a site names.

        Raises:
            ElsewhereError: that stack does not run in this pass.
        """
        if stack in (None, TEXT, DECODER) or stack == self.stack:
            return self
        if stack not in self.towers:
            why = "no row has an image" if stack == VISION else "what it makes was made in an earlier one"
            raise ElsewhereError(f"the {stack} stack does not run in this call: {why}")
        return self.towers[stack]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def offset(self) -> int:
        """The key column of the first query."""
        return self.keys.width - self.queries.width

    @property
    def total(self) -> int:
        """How many rows the plan is for."""
        return len(self.rows) if self.given is None else self.given

    def first(self, layer: int) -> int:
        """The key column of a layer's attention that is the first query's own."""
        return self.offset - self.windows.get(layer, (0, 0))[0]

    def columns(self, site: Site) -> tuple[Columns, Columns]:
        """The tokens along the query and the key axis of an activation."""
        if self.stack is None and site.stack not in (None, TEXT, DECODER):
            if site.stack == CROSS and site.name in KEYS_OF_CROSS and self.offset:
                raise ElsewhereError(f"{site} is computed in the first call, whose cache this one goes on from")
            return self.of_stack(site.stack).columns(site)
        if self.stack == CROSS:
            return (self.keys if site.name in KEYS_OF_CROSS else self.queries), self.keys
        queries, keys = self.queries, self.keys
        if self.kept is not None and site.name == "logits":
            end = queries.start + queries.width
            prompt = end if queries.prompt is None else queries.prompt
            queries = replace(queries.between(end - self.kept, end), prompt=prompt)
        window = None if site.layer is None else self.windows.get(site.layer)
        if window is not None:
            start, width = window
            keys = keys.between(start, start + width)
        return queries, keys

    def of_rows(self, index: Any) -> Any:
        """What a plan says of its rows, a tensor [R, ...], for each row that there is; anything else as it is."""
        if self.origin is None or not isinstance(index, Tensor) or len(index) != self.total:
            return index
        return index[self.origin.to(index.device)]

    def for_rows(self, site: Site) -> Site:
        """A site that lists positions or entries for each row of the plan, for each row that there is."""
        if self.origin is None:
            return site
        return site.at(**{axis: self.of_rows(getattr(site, axis)) for axis in site.axes if axis != ROW})

    def alike(self, other: Layout) -> bool:
        """Whether another layout says the same of every token."""
        if self is other:
            return True
        mine, its = ((one.stack, one.kept, dict(one.windows), one.given) for one in (self, other))
        if mine != its or not self.queries.like(other.queries) or not self.keys.like(other.keys):
            return False
        if self.towers.keys() != other.towers.keys():
            return False
        if not all(tower.alike(other.towers[name]) for name, tower in self.towers.items()):
            return False
        if (self.pictures is None) != (other.pictures is None):
            return False
        if self.pictures is not None and other.pictures is not None and not self.pictures.stand_like(other.pictures):
            return False
        return _equal(self.rows, other.rows) and _equal(self.origin, other.origin)

    def window(self, rows: slice) -> Layout:
        """The same for a range of rows."""
        queries = self.queries.rows(rows)
        return Layout(
            self.rows[rows],
            queries,
            queries if self.keys is self.queries else self.keys.rows(rows),
            self.stack,
            towers={name: tower.window(rows) for name, tower in self.towers.items()},
            pictures=None if self.pictures is None else self.pictures.rows(rows),
        )

    def resolve(self, site: Site, sizes: dict[str, int], only: Tensor | None = None) -> Region:
        """The entries of an activation that a site means; see `hooks.plan.region.resolve`."""
        return replace(self.entries(site, sizes, only), site=site)

    def entries(self, site: Site, sizes: dict[str, int], only: Tensor | None = None) -> Region:
        """The same, of this site or of another with the same indices, such as that of another layer."""
        indices = (site.head, site.pos, site.key_pos, site.dim)
        queries, keys = self.columns(site)
        given = [index for index in indices if isinstance(index, Tensor)]
        if only is not None or given:
            return resolve(self.for_rows(site), queries, sizes, self.of_rows(only), keys)
        # The cells of a sweep mean the same entries in every layer.
        layer = site.layer if self.windows else None
        key = (site.axes, indices, tuple(sizes.items()), layer, self._apart(site), site.key[2])
        if key not in self._known:
            self._known[key] = resolve(site, queries, sizes, None, keys)
        return self._known[key]

    @staticmethod
    def _apart(site: Site) -> str:
        """The name of a site that has other tokens than the rest of its stack."""
        return site.name if site.name == "logits" or site.name in KEYS_OF_CROSS else ""

    def entire(self, site: Site, sizes: dict[str, int]) -> Region:
        """The region of a whole activation, padding included."""
        queries, keys = self.columns(site)
        return entire(site, queries, sizes, keys)

    def context(
        self, region: Region, seed: int, window: slice, device: torch.device | None, site: Site | None = None
    ) -> Context:
        """Describe a region, resolved on this layout and restricted to the rows of a window, to a function.

        Its tensors are on a device, or stay on the CPU without one. The region may be that of another site with the
        same indices.
        """
        site, steps = region.site if site is None else site, dict(region.steps)
        entries: dict[str, Tensor] = {}
        for axis in (HEAD, DIM):
            if axis in site.axes:
                index = steps.get(site.axes.index(axis))
                entries[axis] = torch.arange(region.shape[axis]) if index is None else index
        cols = region.key_cols
        queries, keys = self.columns(site)

        def on(x: torch.Tensor) -> torch.Tensor:
            return x if device is None else x.to(device)

        return Context(
            site=site.name,
            layer=site.layer,
            stack=site.key[2],
            axes=site.axes,
            single=tuple(axis != ROW and isinstance(getattr(site, axis), int) for axis in site.axes),
            row=on(self.rows[window]),
            pos=on(queries.index[window].gather(1, region.cols)),
            key_pos=None if cols is None else on(keys.index[window].gather(1, cols)),
            head=tuple(entries[HEAD].tolist()) if HEAD in entries else None,
            dim=on(entries[DIM]) if DIM in entries else None,
            seed=seed,
            window=window if self.origin is None else on(self.origin),
            total=self.total,
        )


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.device == other.device and torch.equal(one, other)


_LAYOUTS: WeakKeyDictionary[Inputs, Layout] = WeakKeyDictionary()
"""The layout of inputs that are run, which worlds on them share."""
