"""How much memory activations may take, and how many rows go through a model at a time within it."""

from __future__ import annotations

import torch

from .errors import ModelError
from .models.architecture import Architecture, Tower
from .models.network import Network
from .plan.inputs import Inputs

CPU_BUDGET = 1 << 30
"""Bytes of activations that a chunk of worlds may take on a CPU, unless the caller says otherwise."""


def default_budget(device: torch.device) -> int:
    """A quarter of a GPU's free memory, or `CPU_BUDGET`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 4
    return CPU_BUDGET


def budget_of(network: Network, asked: float | None) -> float:
    """The bytes that a caller asks for, or the default of the model's device.

    Raises:
        ModelError: what is asked for is not a positive number.
    """
    if asked is None:
        return default_budget(network.device)
    if isinstance(asked, bool) or not isinstance(asked, (int, float)) or not 0 < asked < float("inf"):
        raise ModelError(f"a memory budget is a positive number of bytes, not {asked!r}")
    return asked


def bytes_per_token(network: Network) -> int:
    """About how many bytes of activations one token takes in a pass that is not trained."""
    return _numbers(network.architecture) * network.dtype.itemsize


def _numbers(arch: Architecture | Tower) -> int:
    block = arch.blocks[0]
    q, k = block.attention.q, block.attention.k
    numbers = 8 * arch.width + 3 * (q.heads + 2 * k.heads) * q.width
    if block.mlp is not None:
        numbers += 3 * block.mlp.width
    return numbers


def held_per_token(network: Network) -> int:
    """Bytes of activations that the copy-on-write executor holds of one token in a block: the stream, what is read and
    added, queries, keys, values and z, each once or twice.
    """
    arch, block = network.architecture, network.architecture.blocks[0]
    q, k = block.attention.q, block.attention.k
    return (4 * arch.width + 2 * (q.heads + 2 * k.heads) * q.width) * network.dtype.itemsize


def rows_per_pass(network: Network, inputs: Inputs, limit: float | None) -> int:
    """How many rows of inputs one forward pass may take within a budget of bytes; all without one."""
    return min(len(inputs), rows_in_budget(network, inputs, limit))


def rows_in_budget(network: Network, inputs: Inputs, limit: float | None) -> int:
    """How many rows like these, of several worlds, one forward pass may take; without a budget those of one."""
    if limit is None or keeps_rows_together(network, inputs):
        return len(inputs)
    row = bytes_per_token(network) * inputs.width
    if inputs.pictures is not None and network.architecture.tower is not None:
        tower = network.architecture.tower
        row += _numbers(tower) * network.dtype.itemsize * inputs.pictures.columns.width
    return max(1, int(limit // row))


def keeps_rows_together(network: Network, inputs: Inputs) -> bool:
    """Whether values of a row depend on which other rows are run, so that a budget may not part them."""
    return network.angles_by_length and bool((inputs.lengths != inputs.lengths[0]).any())
