"""What a file or a picture needs to know of a circuit."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from interp.paths.graph import Graph
from interp.paths.nodes import Edge


class Members(Protocol):
    """Some edges of a graph, with scores; see `interp.paths.Circuit`."""

    @property
    def graph(self) -> Graph:
        """Whose edges they are."""
        ...

    @property
    def members(self) -> np.ndarray:
        """bool [edges]."""
        ...

    @property
    def scores(self) -> np.ndarray:
        """float64 [edges]."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """How they were found."""
        ...

    def __len__(self) -> int:
        """How many there are."""
        ...

    def targets(self, edge: Edge) -> tuple[str, ...]:
        """The nodes that an edge of theirs leads to."""
        ...
