"""Driving heads turned down under a conflict detector (MACI, arXiv 2605.19250)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hooks import Plan, scale, site
from interp.attention.gates import Gate, gated, heads_of


def suppress(
    heads: Sequence[tuple[int, int]],
    factor: float = 0.0,
    *,
    detector: Gate | None = None,
    queries: Sequence[Any] = (-1, "new"),
) -> Plan:
    """Scale the outputs of heads that drive the answer towards a false premise, where a conflict is seen.

    Args:
        heads: (layer, head), found by path patching between a conflicting and an agreeing text
            (`interp.attention.driving_heads`).
        factor: of their outputs; 1 changes nothing.
        detector: where there is a conflict, such as a `Detector` on resisting heads of earlier layers; None for
            everywhere.
        queries: which tokens; the prompt's last and all that are generated.
    """
    items = [
        scale(site("z", layer, head=chosen, pos=pos), factor)
        for layer, chosen in heads_of(heads).items()
        for pos in queries
    ]
    return Plan(tuple(item if detector is None else gated(item, detector) for item in items))
