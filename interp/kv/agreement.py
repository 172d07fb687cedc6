"""How far a score agrees with an effect: rank correlations, recall, and what noise allows."""

from __future__ import annotations

import numpy as np


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks of numbers [N], ties shared."""
    values = np.asarray(values, float)
    order = values.argsort(kind="stable")
    placed = np.empty(len(values))
    placed[order] = np.arange(len(values))
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.bincount(group, placed) / count)[group]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two arrays; nan where either is constant."""
    x, y = ranks(np.ravel(a)), ranks(np.ravel(b))
    x, y = x - x.mean(), y - y.mean()
    size = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / size) if size > 0 else float("nan")


def per_head(scores: np.ndarray, effects: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation within each layer and head, [L, K], of two arrays [L, K, S]."""
    return np.array([[spearman(a, b) for a, b in zip(x, y, strict=True)] for x, y in zip(scores, effects, strict=True)])


def tau(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's tau-b of two arrays; nan where either is constant."""
    x, y = ranks(np.ravel(a)), ranks(np.ravel(b))
    agree = tied_x = tied_y = pairs = 0.0
    # A row at a time: all pairs of thousands of units do not fit.
    for i in range(len(x) - 1):
        dx, dy = np.sign(x[i + 1 :] - x[i]), np.sign(y[i + 1 :] - y[i])
        agree += float((dx * dy).sum())
        tied_x, tied_y = tied_x + float((dx == 0).sum()), tied_y + float((dy == 0).sum())
        pairs += len(dx)
    size = np.sqrt((pairs - tied_x) * (pairs - tied_y))
    return float(agree / size) if size > 0 else float("nan")


def recall(kept: np.ndarray, effects: np.ndarray) -> float:
    """Share of the largest effects that are of units that are kept, bool of the same shape: of as many as those."""
    best = np.argsort(-np.ravel(effects), kind="stable")[: int(kept.sum())]
    return float(np.ravel(kept)[best].mean())


def noise_ceiling(each: np.ndarray) -> float:
    """What a perfect score could reach: |effect| on every other query [..., m] against the rest, by Spearman-Brown.

    nan where there is one query alone.
    """
    if each.shape[-1] < 2:
        return float("nan")
    half = spearman(np.abs(each[..., ::2].sum(-1)), np.abs(each[..., 1::2].sum(-1)))
    return 2 * half / (1 + half) if half > -1 else float("nan")
