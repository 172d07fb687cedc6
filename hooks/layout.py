"""What a forward pass is of: rows, the tokens that are fed, and the tokens that these may see."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .plan.columns import Columns
from .plan.context import Context
from .plan.inputs import Inputs
from .plan.region import Region, entire, resolve
from .plan.sites import DIM, HEAD, ROW, Site


@dataclass(frozen=True, eq=False)
class Layout:
    """The rows and columns of a forward pass of one stack of layers. Nothing else is derived from a mask.

    Attributes:
        rows: int64 [B], the identity of each row, which random interventions are a function of.
        queries: the tokens that are fed now, in T columns.
        keys: the tokens that they may see, in S columns: those of the past, then those that are fed, S - T further on.
        stack: which stack of layers, in a model that has several.
    """

    rows: Tensor
    queries: Columns
    keys: Columns
    stack: str | None = None
    _known: dict[Any, Region] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, inputs: Inputs) -> Layout:
        """The layout of a pass over whole inputs, without a past."""
        if inputs not in _LAYOUTS:
            _LAYOUTS[inputs] = cls(inputs.row_ids, inputs.columns, inputs.columns)
        return _LAYOUTS[inputs]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def offset(self) -> int:
        """The key column of the first query."""
        return self.keys.width - self.queries.width

    def window(self, rows: slice) -> Layout:
        """The same for a range of rows."""
        queries = self.queries.rows(rows)
        return Layout(
            self.rows[rows], queries, queries if self.keys is self.queries else self.keys.rows(rows), self.stack
        )

    def resolve(self, site: Site, sizes: dict[str, int], only: Tensor | None = None) -> Region:
        """The entries of an activation that a site means; see `hooks.plan.region.resolve`."""
        indices = (site.head, site.pos, site.key_pos, site.dim)
        if only is not None or any(isinstance(index, Tensor) for index in indices):
            return resolve(site, self.queries, sizes, only, self.keys)
        # The cells of a sweep mean the same entries in every layer.
        key = (site.axes, indices, tuple(sizes.items()))
        if key not in self._known:
            self._known[key] = resolve(site, self.queries, sizes, None, self.keys)
        return replace(self._known[key], site=site)

    def entire(self, site: Site, sizes: dict[str, int]) -> Region:
        """The region of a whole activation, padding included."""
        return entire(site, self.queries, sizes, self.keys)

    def context(self, region: Region, seed: int, window: slice, device: torch.device | None) -> Context:
        """Describe a region, resolved on this layout and restricted to the rows of a window, to a function.

        Its tensors are on a device, or stay on the CPU without one.
        """
        site, steps = region.site, dict(region.steps)
        entries: dict[str, Tensor] = {}
        for axis in (HEAD, DIM):
            if axis in site.axes:
                index = steps.get(site.axes.index(axis))
                entries[axis] = torch.arange(region.shape[axis]) if index is None else index
        keys = region.key_cols

        def on(x: torch.Tensor) -> torch.Tensor:
            return x if device is None else x.to(device)

        return Context(
            site=site.name,
            layer=site.layer,
            axes=site.axes,
            single=tuple(axis != ROW and isinstance(getattr(site, axis), int) for axis in site.axes),
            row=on(self.rows[window]),
            pos=on(self.queries.index[window].gather(1, region.cols)),
            key_pos=None if keys is None else on(self.keys.index[window].gather(1, keys)),
            head=tuple(entries[HEAD].tolist()) if HEAD in entries else None,
            dim=on(entries[DIM]) if DIM in entries else None,
            seed=seed,
            window=window,
            total=len(self.rows),
        )


_LAYOUTS: WeakKeyDictionary[Inputs, Layout] = WeakKeyDictionary()
"""The layout of inputs that are run, which worlds on them share."""
