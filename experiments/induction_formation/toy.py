"""Three vectors multiplied: the smallest thing with the shape of the study's loss curves (figure 5a)."""

from __future__ import annotations

from typing import Any

import torch

LENGTH, RATE, STEPS = 20, 1.0, 1000
HELD = {"none": (), "c": ("c",), "b and c": ("b", "c")}


def train(held: tuple[str, ...], seed: int) -> list[float]:
    """Losses of gradient descent on 0.5 mean (a b c - a* b* c*)^2, some of the vectors held at the truth.

    Truth is uniform in [0.5, 1.5] and the start in [0, 0.2]: entries of one size, whose product begins small.

    Args:
        held: names among a, b, c.
        seed: of truth and start.
    """
    generator = torch.Generator().manual_seed(seed)
    truth = {name: 0.5 + torch.rand(LENGTH, generator=generator, dtype=torch.float64) for name in "abc"}
    start = {name: 0.2 * torch.rand(LENGTH, generator=generator, dtype=torch.float64) for name in "abc"}
    vectors = {name: (truth[name] if name in held else start[name]).clone() for name in "abc"}
    free = [vectors[name].requires_grad_() for name in "abc" if name not in held]
    target = truth["a"] * truth["b"] * truth["c"]
    found = []
    for _ in range(STEPS):
        loss = 0.5 * (vectors["a"] * vectors["b"] * vectors["c"] - target).square().mean()
        found.append(loss.item())
        with torch.no_grad():
            for vector, gradient in zip(free, torch.autograd.grad(loss, free), strict=True):
                vector -= RATE * gradient
    return found


def run(seeds: int) -> dict[str, Any]:
    """Loss curves of every set of held vectors and every seed, each thinned to every tenth step."""
    return {
        "length": LENGTH,
        "rate": RATE,
        "steps": STEPS,
        "every": 10,
        "loss": {
            name: [[float(f"{x:.4g}") for x in train(held, seed)[::10]] for seed in range(seeds)]
            for name, held in HELD.items()
        },
    }
