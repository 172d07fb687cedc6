"""Exactness where it matters: the edges that a fast score ranks highest, verified, and a bound on all others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from hooks import PathError
from interp.paths.draws import lots
from interp.results import Result

CONFIDENCE = 0.95


def adaptive(fast: Result, exactly: Callable[[Sequence[str]], Result], top: int, sample: int, seed: int = 0) -> Result:
    """Replace the largest scores by exact effects, and measure a random sample of the others for a bound.

    The sample says how wrong the rest can be without any assumption: with n edges drawn at random from the rest, all
    within a bound, at most the share 1 - (1 - confidence)^(1/n) of the rest lies beyond it, with that confidence.

    Args:
        fast: scores of every edge.
        exactly: measures edges by name.
        top: how many of the largest |mean score| are verified.
        sample: how many of the others are measured too.
        seed: of the sample.

    Returns:
        the scores, exact where measured; config["adaptive"] has "verified" and "sampled" (names), and for the rest
        "largest_sampled" (the largest |exact mean effect| in the sample), "largest_error" (the largest |score - exact|
        of a mean), "share_beyond" and "confidence".

    Raises:
        PathError: numbers below zero, or nothing to verify.
    """
    names = fast.axes[0].values
    check_counts(top, sample)
    order = np.argsort(-np.abs(fast.mean()), kind="stable")
    verified, rest = order[:top], order[top:]
    drawn = np.sort(rest[np.argsort(lots([names[i] for i in rest], seed), kind="stable")][:sample])
    chosen = np.concatenate([verified, drawn]).astype(int)
    exact = exactly([names[i] for i in chosen])
    effect, status = fast.effect.copy(), fast.status.copy()
    effect[chosen], status[chosen] = exact.effect, exact.status
    found = np.abs(exact.mean()[len(verified) :])
    errors = np.abs(exact.mean() - fast.mean()[chosen])[len(verified) :]
    about = {
        "verified": [names[i] for i in verified],
        "sampled": [names[i] for i in drawn],
        "largest_sampled": float(found.max()) if len(drawn) else None,
        "largest_error": float(errors.max()) if len(drawn) else None,
        "share_beyond": 0.0 if len(drawn) == len(rest) else _share_beyond(len(drawn)),
        "confidence": CONFIDENCE,
    }
    config = fast.config | {
        "method": "adaptive",
        "adaptive": about,
        "forward_equivalents": fast.config["forward_equivalents"] + exact.config["forward_equivalents"],
    }
    return replace(fast, effect=effect, status=status, noise_floor=exact.noise_floor, config=config)


def check_counts(top: int, sample: int) -> None:
    """Raise PathError unless these are numbers of edges, and not both zero."""
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (top, sample))
    if not whole or top + sample < 1:
        raise PathError(f"adaptive verifies some edges, of each kind 0 or more, not top={top!r} and sample={sample!r}")


def _share_beyond(drawn: int) -> float:
    return 1.0 - (1.0 - CONFIDENCE) ** (1.0 / drawn) if drawn else 1.0
