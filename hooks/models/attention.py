"""Attention with its inside exposed, and the masks that models hand to their attention functions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .architecture import softcap

Visit = Callable[[str, Tensor, "tuple[Tensor, float] | None"], Tensor]


def exposed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None,
    scaling: float,
    visit: Visit,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    cap: float | None = None,
) -> Tensor:
    """Softmax attention that shows its scores and its pattern.

    Args:
        q: [B, H, T, D]; k and v: [B, K, S, D], with K a divisor of H.
        allowed: bool, broadcastable to [B, H, T, S], True where a query may attend to a key; None: everywhere.
        scaling: factor of q k.
        visit: called as ``visit(name, x, guard)`` for "scores" and "pattern", x [B, H, T, S]; returns the value to go
            on with. The guard says where edits may change x, and what stands elsewhere; None where everything is
            allowed.
        bias: added to the scores.
        dropout: probability with which pattern entries are dropped.
        cap: what the scaled scores are soft-capped to, before anything is added to them or forbidden.

    Returns:
        z [B, T, H, D]. A query that may attend to nothing has a zero pattern.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.transpose(-1, -2)) * scaling
    if cap is not None:
        scores = softcap(scores, cap)
    if bias is not None:
        scores = scores + bias
    if allowed is not None:
        allowed = allowed.expand_as(scores)
        scores = scores.masked_fill(~allowed, -torch.inf)
    scores = visit("scores", scores, None if allowed is None else (allowed, -torch.inf))
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    # A dead row is softmaxed over zeros, so that neither its value nor its gradient is NaN, and then set to zero.
    wide = torch.promote_types(scores.dtype, torch.float32)
    pattern = torch.where(dead, 0.0, scores).softmax(-1, dtype=wide).to(q.dtype)
    pattern = torch.where(dead, 0.0, pattern)
    pattern = visit("pattern", pattern, None if allowed is None else (allowed, 0.0))
    if dropout:
        pattern = torch.nn.functional.dropout(pattern, dropout)
    return (pattern @ v).transpose(1, 2)


def read_mask(
    mask: Tensor | None, queries: int, keys: int, device: torch.device, window: int | None = None, causal: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Split a mask in whatever form a model hands to its attention into what is allowed and what is added.

    Args:
        mask: bool 4-D, additive float 4-D, 2-D [B, S] of real keys, or None, where all keys are real.
        window: width of the layer's sliding window, which a mask that is 2-D or None does not tell.
        causal: whether the attention is, which such a mask does not tell either.

    Returns:
        (allowed, bias): bool broadcastable to [B, H, T, S] or None, and a float bias or None.
    """
    if mask is None or mask.ndim == 2:
        allowed = causal_mask(queries, keys, device, window) if causal else None
        if mask is not None:
            real = mask.bool()[:, None, None, :]
            allowed = real if allowed is None else allowed & real
        return allowed, None
    if mask.dtype == torch.bool:
        return mask, None
    allowed = mask > torch.finfo(mask.dtype).min / 2
    return allowed, torch.where(allowed, mask, 0)


def causal_mask(queries: int, keys: int, device: torch.device, window: int | None = None) -> Tensor:
    """bool [1, 1, T, S]: the last query's own key is the last one; each sees that and those before, in a window."""
    own = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)
    allowed = key <= own
    return (allowed if window is None else allowed & (key > own - window))[None, None]
