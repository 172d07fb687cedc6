"""The masks that models hand to their attention functions, in whatever form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError


def read_mask(
    mask: Any,
    queries: int,
    keys: int,
    device: torch.device,
    window: int | None = None,
    causal: bool = True,
    first: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Split a mask in whatever form a model hands to its attention into what is allowed and what is added.

    Args:
        mask: bool 4-D, additive float 4-D, 2-D [B, S] of real keys, None, where all keys are real, or the `BlockMask`
            of flex attention.
        window: width of the layer's sliding window, which a mask that is 2-D or None does not tell.
        causal: whether the attention is, which such a mask does not tell either.
        first: the key column that is the first query's own; None where the last query's is the last one. A static cache
            has columns that nothing is written in yet.

    Returns:
        (allowed, bias): bool broadcastable to [B, H, T, S] or None, and a float bias or None.
    """
    if mask is not None and not isinstance(mask, Tensor):
        return _dense(mask, device), None
    if mask is None and queries == 1 and first in (None, keys - 1) and (window is None or keys <= window):
        return None, None  # a token that is decoded sees all that there is
    if mask is None or mask.ndim == 2:
        allowed = causal_mask(queries, keys, device, window, first) if causal else None
        if mask is not None:
            real = mask.bool()[:, None, None, :]
            allowed = real if allowed is None else allowed & real
        return allowed, None
    if mask.dtype == torch.bool:
        return mask, None
    allowed = mask > torch.finfo(mask.dtype).min / 2
    return allowed, torch.where(allowed, mask, 0)


def causal_mask(
    queries: int, keys: int, device: torch.device, window: int | None = None, first: int | None = None
) -> Tensor:
    """bool [1, 1, T, S]: each query sees its own key and those before, in a window; see `read_mask`."""
    first = keys - queries if first is None else first
    own = torch.arange(first, first + queries, device=device)[:, None]
    key = torch.arange(keys, device=device)
    allowed = key <= own
    return (allowed if window is None else allowed & (key > own - window))[None, None]


def _dense(mask: Any, device: torch.device) -> Tensor:
    """bool [B, 1 or H, T, S] of a block mask, which is a function of row, head, query and key.

    Raises:
        ModelError: the mask is of some other kind.
    """
    if not hasattr(mask, "mask_mod"):
        raise ModelError(f"an attention mask of type {type(mask).__name__} is not understood")
    from torch.nn.attention.flex_attention import create_mask

    rows, heads, queries, keys = mask.shape
    return create_mask(mask.mask_mod, rows, heads, queries, keys, device=str(device))
