"""The activations that a run was asked to keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import SiteError, nearest
from .encoding import Put, Record
from .inputs import Inputs
from .region import Region, resolve
from .sites import Key, Site, same, site


@dataclass(frozen=True, eq=False)
class Tape:
    """Values after editing, by site.

    Index it with a site in either spelling: ``tape["blocks.8.attn.hook_z"]``, ``tape[site("z", layer=8, head=6)]``. A
    part of a site that was kept whole is taken out on reading.

    Attributes:
        inputs: what the run was on.
        values: pairs of a site, restricted as it was asked for, and its value.
        sizes: sizes of the head and last axes of each kept site, by site key.
        window: the rows of a larger batch that the tape holds, where it is a part of one; None for all.
    """

    inputs: Inputs
    values: tuple[tuple[Site, Tensor], ...]
    sizes: Mapping[Key, dict[str, int]]
    window: slice | None = None

    def __getitem__(self, where: Site | str) -> Tensor:
        wanted = site(where)
        for kept, value in self.values:
            if kept == wanted:
                return value
        whole = self.whole(wanted)
        if whole is not None:
            return self._part(wanted).get(whole)
        kept = [str(s) for s, _ in self.values]
        raise SiteError(
            f"{wanted} was not kept{nearest(str(wanted), kept)}; the tape has {', '.join(kept) or 'nothing'}"
        )

    def _part(self, wanted: Site) -> Region:
        queries, keys = self.inputs.tokens_of(wanted)
        return resolve(wanted, queries, self.sizes[wanted.key], keys=None if keys is queries else keys)

    def whole(self, where: Site) -> Tensor | None:
        """The whole activation, or None where it was not kept or only a part of it was."""
        for kept, value in self.values:
            if kept.key == where.key and not kept.restricted:
                return value
        return None

    @property
    def size_table(self) -> tuple:
        """`sizes` of the sites that are kept, as tuples."""
        kept = {site.key for site in self}
        return tuple((key, tuple(sorted(self.sizes[key].items()))) for key in sorted(kept, key=str))

    def encoded(self, put: Put) -> dict[str, Any]:
        """The tape as data."""
        return TAPE_RECORD.encoded(self, put)

    def __contains__(self, where: Site | str) -> bool:
        wanted = site(where)
        return self.whole(wanted) is not None or any(kept == wanted for kept, _ in self.values)

    def __iter__(self) -> Iterator[Site]:
        return (kept for kept, _ in self.values)

    def __len__(self) -> int:
        return len(self.values)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tape:
        """The same tape on another device or in another dtype."""
        return replace(self, values=tuple((s, v.to(device=device, dtype=dtype)) for s, v in self.values))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tape):
            return NotImplemented
        return (
            len(self) == len(other)
            and same(self.inputs.ids, other.inputs.ids)
            and same(self.inputs.mask, other.inputs.mask)
            and same(self.inputs.pixels, other.inputs.pixels)
            and same(self.inputs.contents(), other.inputs.contents())
            and all(a == b and same(v, w) for (a, v), (b, w) in zip(self.values, other.values, strict=True))
        )

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __str__(self) -> str:
        kept = ", ".join(f"{s} {list(v.shape)}" for s, v in self.values)
        return f"Tape({kept})"

    __repr__ = __str__


def _tape(inputs: Inputs, values: tuple, size_table: tuple) -> Tape:
    return Tape(inputs, values, {key: dict(sizes) for key, sizes in size_table})


TAPE_RECORD = Record("tape", {"inputs": (Inputs,), "values": (tuple,), "size_table": (tuple,)}, _tape)
"""How a tape stands in a file."""
