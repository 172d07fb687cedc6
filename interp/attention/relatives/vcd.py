"""Visual contrastive decoding (VCD, Leng et al. 2024, arXiv 2311.16922): against a noised picture."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hooks import Branch, PlanError, normal
from interp.attention.decoding import Decoder, Term, Weight


def diffused(step: int = 500, steps: int = 1000, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """Pixels after `step` of `steps` steps of a diffusion: sqrt(a) x + sqrt(1 - a) noise, the same noise in every call.

    a is the product of 1 - beta, with beta from 1e-5 to 5e-3 along a sigmoid (the published schedule).

    Raises:
        PlanError: no such step.
    """
    if not 0 <= step < steps:
        raise PlanError(f"step {step} of a diffusion of {steps} steps: 0 to {steps - 1}")
    betas = torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float64)) * (0.5e-2 - 1e-5) + 1e-5
    kept = float((1 - betas)[: step + 1].prod())

    def images(pixels: Tensor) -> Tensor:
        # A function of the entry within a picture and not of the batch, so a picture is noised alike alone.
        entry = torch.arange(pixels[0].numel(), device=pixels.device).reshape(pixels.shape[1:])
        noise = normal(seed, entry).to(pixels.dtype)
        return kept**0.5 * pixels + (1 - kept) ** 0.5 * noise

    return images


def vcd(alpha: Weight = 1.0, eps: float | None = 0.1, *, step: int = 500, seed: int = 0) -> Decoder:
    """z = (1 + alpha) l(picture) - alpha l(noised picture).

    Args:
        alpha: weight of the branch.
        eps: cut-off (beta in the paper).
        step: of the diffusion, of 1000.
        seed: of the noise.
    """
    return Decoder((Term((Branch(images=diffused(step, seed=seed)),), alpha),), eps)
