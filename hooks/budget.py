"""How much memory activations may take, and how many rows go through a model at a time within it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .errors import ModelError
from .plan.inputs import Inputs

if TYPE_CHECKING:
    from .model import Model

CPU_BUDGET = 1 << 30
"""Bytes of activations that a chunk of worlds may take on a CPU, unless the caller says otherwise."""


def default_budget(device: torch.device) -> int:
    """A quarter of a GPU's free memory, or `CPU_BUDGET`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 4
    return CPU_BUDGET


def budget_of(model: Model, asked: float | None) -> float:
    """The bytes that a caller asks for, or the default of the model's device.

    Raises:
        ModelError: what is asked for is not a positive number.
    """
    if asked is None:
        return default_budget(model.device)
    if isinstance(asked, bool) or not isinstance(asked, (int, float)) or not 0 < asked < float("inf"):
        raise ModelError(f"a memory budget is a positive number of bytes, not {asked!r}")
    return asked


def bytes_per_token(model: Model) -> int:
    """About how many bytes of activations one token takes in a pass that is not trained."""
    arch, block = model.architecture, model.architecture.blocks[0]
    numbers = 8 * arch.width + 3 * (block.q.heads + 2 * block.k.heads) * block.q.width
    if block.mlp is not None:
        numbers += 3 * block.mlp.width
    return numbers * model.dtype.itemsize


def rows_per_pass(model: Model, inputs: Inputs, limit: float | None) -> int:
    """How many rows of inputs one forward pass may take within a budget of bytes; all without one."""
    if limit is None:
        return len(inputs)
    return max(1, min(len(inputs), int(limit // (bytes_per_token(model) * inputs.width))))
