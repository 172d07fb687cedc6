"""Causal route gating (arXiv 2605.24024): in heads that speak from the prior, the text's route is turned down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hooks import Plan, scale, site
from interp.attention.gates import ShareBelow, gated, heads_of


def gate_routes(
    heads: Sequence[tuple[int, int]],
    image: Tensor,
    real: Tensor,
    factor: float = 0.5,
    *,
    share: float | None = 0.5,
    queries: Sequence[Any] = (-1, "new"),
) -> Plan:
    """Scale the text route of heads, z = z_img + factor z_txt, for tokens at which they look little at the image.

    Args:
        heads: (layer, head), the prior-dominant ones (`Routes.prior_dominant` finds them).
        image: bool [B, P], the columns of the prompt that are the image's.
        real: bool or int [B, P], the attention mask of the prompt.
        factor: of the text route; 1 changes nothing.
        share: only where a head's attention to the image is below this; None for everywhere.
        queries: which tokens: the prompt's last, and all that are generated.
    """
    image = image & real.bool()
    found = []
    for layer, chosen in heads_of(heads).items():
        for pos in queries:
            looked = site("scores", layer, head=chosen, pos=pos, key_pos=image)
            for keys in (real.bool() & ~image, "new"):
                item = scale(site("pattern", layer, head=chosen, pos=pos, key_pos=keys), factor)
                found.append(item if share is None else gated(item, ShareBelow(looked, share)))
    return Plan(tuple(found))
