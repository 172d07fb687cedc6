"""Attention with its inside exposed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

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
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
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
        sinks: [H] or [B, H], a score that queries of a head have besides those of their keys, which mixes nothing in.

    Returns:
        z [B, T, H, D], and the pattern [B, H, T, S] as it was used. A query that may attend to nothing has a zero one.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = attention_scores(q, k, allowed, scaling, bias, cap)
    allowed = None if allowed is None else allowed.expand_as(scores)
    scores = visit("scores", scores, None if allowed is None else (allowed, -torch.inf))
    pattern = attention_pattern(scores, sinks).to(v.dtype)
    pattern = visit("pattern", pattern, None if allowed is None else (allowed, 0.0))
    if dropout:
        pattern = torch.nn.functional.dropout(pattern, dropout)
    return (pattern @ v).transpose(1, 2), pattern


def attention_scores(
    q: Tensor, k: Tensor, allowed: Tensor | None, scaling: float, bias: Tensor | None = None, cap: float | None = None
) -> Tensor:
    """Scores [B, H, T, S] of queries [B, H, T, D] and keys [B, H, S, D], -inf where attention is not allowed."""
    scores = (q @ k.transpose(-1, -2)) * scaling
    if cap is not None:
        scores = softcap(scores, cap)
    if bias is not None:
        scores = scores + bias
    return scores if allowed is None else scores.masked_fill(~allowed.expand_as(scores), -torch.inf)


def attention_pattern(scores: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Softmax of scores [B, H, T, S], in float32 at least; zero for a query that may attend to nothing.

    Args:
        scores: or of other axes, the keys last.
        sinks: [H] or [B, H]; or what has all axes of the scores, of which the last is 1.
    """
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    # A dead row is softmaxed over zeros, so that neither its value nor its gradient is NaN, and then set to zero.
    wide = torch.promote_types(scores.dtype, torch.float32)
    scores = torch.where(dead, 0.0, scores)
    if sinks is not None:
        sinks = sinks if sinks.ndim == scores.ndim else sinks[..., None, None]
        scores = torch.cat([scores, sinks.to(scores).expand(*scores.shape[:-1], 1)], -1)
    pattern = scores.softmax(-1, dtype=wide)
    if sinks is not None:
        pattern = pattern[..., :-1]
    return torch.where(dead, 0.0, pattern)


def softcap(x: Tensor, cap: float) -> Tensor:
    """c tanh(x / c), which stays between -c and c (Bello et al. 2016)."""
    return cap * torch.tanh(x / cap)
