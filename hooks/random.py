"""Random numbers that are a function of what they are for, so that a draw is the same alone, batched, padded or cached.

A stateful generator would give a row other numbers in a batch of two than alone. Here every draw is a hash of counters:
the seed, and integers that say where it is used (layer, row, absolute position, head). After Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3" (2011); the mixing function is the finaliser of splitmix64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


def _mixed(state: int, counter: int) -> int:
    """The same step as of tensors, of unsigned integers."""
    state = (state * _MIX_2 + counter + _GOLDEN) % (1 << 64)
    state = ((state ^ (state >> 30)) * _MIX_1) % (1 << 64)
    state = ((state ^ (state >> 27)) * _MIX_2) % (1 << 64)
    return state ^ (state >> 31)


def hash_counters(*counters: Tensor | int) -> Tensor:
    """Hash integers to 64 uniform bits.

    Args:
        *counters: int64 tensors that broadcast against one another, or ints; their order matters.

    Returns:
        int64 tensor of the broadcast shape.
    """
    # What comes before the first tensor is hashed as Python's integers, which cost nothing beside tensors of one entry.
    plain = 0
    while counters and not isinstance(counters[0], Tensor):
        plain = _mixed(plain, int(counters[0]))
        counters = counters[1:]
    if not counters:
        return torch.tensor(_signed(plain), dtype=torch.int64)
    state: Tensor | int = _signed(plain)
    for counter in counters:
        if isinstance(state, int):
            state = _signed(state * _MIX_2 + _GOLDEN) + counter
        else:
            state = state * _MIX_2 + counter + _GOLDEN
        assert isinstance(state, Tensor)
        state = (state ^ _logical_shift(state, 30)) * _MIX_1
        state = (state ^ _logical_shift(state, 27)) * _MIX_2
        state = state ^ _logical_shift(state, 31)
    assert isinstance(state, Tensor)
    return state


def uniform(*counters: Tensor | int) -> Tensor:
    """Float64 numbers in (0, 1), a function of the counters alone; see `hash_counters`."""
    return (_logical_shift(hash_counters(*counters), 11).to(torch.float64) + 0.5) * 2.0**-53


def normal(*counters: Tensor | int) -> Tensor:
    """Float64 standard normal numbers (Box-Muller), a function of the counters alone; see `hash_counters`."""
    radius = (-2.0 * uniform(*counters, 0).log()).sqrt()
    return radius * (2.0 * math.pi * uniform(*counters, 1)).cos()


def choice(n: int, *counters: Tensor | int) -> Tensor:
    """Int64 numbers in [0, n), a function of the counters alone; see `hash_counters`."""
    return (uniform(*counters) * n).to(torch.int64)
