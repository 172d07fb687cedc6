"""Random draws among named things, which depend on their names and not on their places in a list."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from hooks import uniform


def lots(names: Sequence[str], *counters: int) -> np.ndarray:
    """A random number in (0, 1) for each name, float64 [n]: a function of the name and the counters alone.

    The k names of the smallest numbers are a random sample. With other names in the list, each keeps its number.
    """
    keys = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
    words = torch.tensor([int.from_bytes(key, "little", signed=True) for key in keys], dtype=torch.int64)
    return uniform(*counters, words).numpy()
