"""Accuracies, what a branch's log-odds are made of, and intervals that pair a decoder with plain decoding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.modality_priors.splits import Split
from interp.attention import plausible


def decoded(own: Tensor, branch: Tensor | None, g: float, eps: float | None) -> Tensor:
    """z = l + g (l - l'), cut off."""
    z = own if branch is None else own + g * (own - branch)
    return plausible(z, own, eps)


def greedy(z: Tensor, answer: Tensor) -> Tensor:
    """1 where the likeliest token is the right one, float64 [B]."""
    return (z.argmax(-1) == answer).double()


def sampled(z: Tensor, answer: Tensor) -> Tensor:
    """The probability that a sample is the right one, float64 [B]: the expectation, without drawing any."""
    return z.softmax(-1).gather(1, answer[:, None])[:, 0]


def composition(colours: Tensor, split: Split) -> dict[str, float]:
    """Regress a world's centred logits of the four colours on log L and both log priors: lambda, mu's, and R^2."""

    def centred(x: Tensor) -> Tensor:
        return (x - x.mean(1, keepdim=True)).flatten().double()

    target = centred(colours)
    sources = torch.stack([centred(x) for x in (split.evidence, split.language, split.vision)], 1)
    weights = torch.linalg.lstsq(sources, target[:, None]).solution[:, 0]
    left = target - sources @ weights
    total = float(target.square().sum())
    return {
        "evidence": float(weights[0]),
        "language": float(weights[1]),
        "vision": float(weights[2]),
        "r2": 1 - float(left.square().sum()) / total if total else 0.0,
    }


def predicted(own: dict[str, float], branch: dict[str, float], g: float, split: Split) -> float:
    """The greedy accuracy that the regressions of the two worlds say z has."""
    weights = {name: (1 + g) * own[name] - g * branch[name] for name in ("evidence", "language", "vision")}
    z = sum(weights[name] * getattr(split, name) for name in weights)
    assert isinstance(z, Tensor)
    return float((z.argmax(1) == split.scenes.colour).double().mean())


def paired(each: Sequence[Tensor], base: Sequence[Tensor], seed: int = 0, draws: int = 2000) -> dict[str, Any]:
    """Mean and its difference from a base on the same questions, with a 95 % interval.

    The bootstrap draws models, and of each its questions, so that the interval is of new models and new questions.

    Args:
        each, base: for each model, a value for each question.
    """
    change = np.stack([(a - b).numpy() for a, b in zip(each, base, strict=True)])
    models, rows = change.shape
    chosen, counts = _draws(models, rows, seed, draws)
    # The mean of each drawn model over its own drawn questions.
    means = np.einsum("dmr,dmr->dm", counts, change[chosen]) / rows
    low, high = np.quantile(means.mean(1), [0.025, 0.975])
    return {
        "mean": float(torch.stack(list(each)).mean()),
        "change": float(change.mean()),
        "low": float(low),
        "high": float(high),
        "by model": [float(x) for x in change.mean(1)],
    }


@cache
def _draws(models: int, rows: int, seed: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Which models a draw holds [draws, models], and how often each question of each [draws, models, rows]."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(models, size=(draws, models))
    return chosen, rng.multinomial(rows, [1 / rows] * rows, size=(draws, models)).astype(np.float32)


def yes_no(z: Tensor, answer: Tensor, yes: int, no: int) -> dict[str, float]:
    """Accuracy, F1 of yes, and how often yes is said, as POPE counts them."""
    said, right = z[:, yes] > z[:, no], answer == yes
    true = float((said & right).sum())
    precision, recall = true / max(1.0, float(said.sum())), true / max(1.0, float(right.sum()))
    f1 = 2 * precision * recall / (precision + recall) if true else 0.0
    return {"accuracy": float((said == right).double().mean()), "f1": f1, "yes": float(said.double().mean())}
