"""Instruction contrastive decoding (ICD, Wang et al. 2024, arXiv 2403.18715): against a disturbed instruction."""

from __future__ import annotations

import torch
from torch import Tensor

from hooks import Branch, InputsError
from interp.attention.decoding import Decoder, Term, Weight


def disturbance(batch: Tensor, clean: Tensor) -> Tensor:
    """Which columns of a batch with disturbed instructions are the disturbance.

    Args:
        batch: int [B, P], the prompts with it, padded on the left.
        clean: int [B, Q], the prompts without it, padded alike; each must be its row of the batch with one run of
            tokens left out.

    Returns:
        bool [B, P].

    Raises:
        InputsError: they differ by something else.
    """
    found = torch.zeros_like(batch, dtype=torch.bool)
    extra = batch.shape[1] - clean.shape[1]
    for row in range(len(batch)):
        same = [start for start in range(clean.shape[1] + 1) if _without(batch[row], start, extra).equal(clean[row])]
        if not same:
            raise InputsError(f"row {row}: the prompts differ by more than one run of {extra} tokens")
        found[row, same[-1] : same[-1] + extra] = True
    return found


def _without(row: Tensor, start: int, count: int) -> Tensor:
    return torch.cat([row[:start], row[start + count :]])


def icd(disturbed: Tensor, alpha: Weight = 1.0, eps: float | None = 0.1) -> Decoder:
    """z = (1 + alpha) l(instruction) - alpha l(disturbed instruction).

    The prompts that `generate` is given have the disturbance; the model's own world does not see it, exactly as if it
    had not been written.

    Args:
        disturbed: bool [B, P], the columns of the disturbance (see `disturbance`).
        alpha: weight of the branch.
        eps: cut-off.
    """
    return Decoder((Term((Branch(),), alpha),), eps, own=Branch(hide=disturbed))
