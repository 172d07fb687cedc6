"""Three vectors multiplied: the smallest thing with the shape of the study's loss curves (figure 5a).

python -m experiments.induction_formation.toy   # results/toy.json, in seconds

Source: Singh et al., "What needs to go right for an induction head?" (ICML 2024), and their code's
`simple_model_solver.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LENGTH, RATE, STEPS, SEEDS, EVERY = 20, 1.0, 1000, 10, 10
HELD = {"none": (), "c": ("c",), "b and c": ("b", "c")}
OUT = Path(__file__).parent / "results" / "toy.json"


def product(vectors: dict[str, Tensor]) -> Tensor:
    """The outer product a_i b_j c_k, [LENGTH, LENGTH, LENGTH]."""
    return torch.einsum("i,j,k->ijk", vectors["a"], vectors["b"], vectors["c"])


def train(held: Sequence[str], seed: int) -> tuple[list[float], float]:
    """Gradient descent on half the mean squared error of a product, some of the vectors held at the truth.

    Truth and start are of the standard normal distribution.

    Args:
        held: names among a, b, c.
        seed: of truth and start.

    Returns:
        the loss before each step, and half the mean squared target: the loss of a product that is 0.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, 3, LENGTH, generator=generator, dtype=torch.float64)
    truth, start = (dict(zip("abc", each, strict=True)) for each in drawn)
    vectors = {name: (truth[name] if name in held else start[name]).clone() for name in "abc"}
    free = [vectors[name].requires_grad_() for name in "abc" if name not in held]
    target = product(truth)
    found = []
    for _ in range(STEPS):
        loss = 0.5 * (product(vectors) - target).square().mean()
        found.append(loss.item())
        with torch.no_grad():
            for vector, gradient in zip(free, torch.autograd.grad(loss, free), strict=True):
                vector -= RATE * gradient
    return found, 0.5 * target.square().mean().item()


def run(seeds: int = SEEDS) -> dict[str, Any]:
    """Curves of every set of held vectors and every seed, as shares of half the mean squared target.

    Returns:
        ``loss``: by what is held and seed, thinned to every tenth step; ``half``: the first step at which it is below a
        half, None where it never is.
    """
    record: dict[str, Any] = {"length": LENGTH, "rate": RATE, "steps": STEPS, "every": EVERY, "loss": {}, "half": {}}
    for name, held in HELD.items():
        curves = [[x / height for x in losses] for losses, height in (train(held, seed) for seed in range(seeds))]
        record["loss"][name] = [[float(f"{x:.4g}") for x in curve[::EVERY]] for curve in curves]
        record["half"][name] = [next((i for i, x in enumerate(curve) if x < 0.5), None) for curve in curves]
    return record


def main() -> None:
    """Train all of them and write what came out."""
    OUT.parent.mkdir(exist_ok=True)
    record = run()
    OUT.write_text(json.dumps(record) + "\n")
    print(f"{OUT}: steps to half the plateau's height: {record['half']}")


if __name__ == "__main__":
    main()
