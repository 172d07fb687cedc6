"""Arguments and outputs of a call whose rows are those of several worlds, one world after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def repeated(name: str, value: Any, count: int) -> Any:
    """An argument of a call, by its name, for the rows of `count` worlds, one world after another."""
    if isinstance(value, Mapping):
        each = {key: repeated(name, one, count) for key, one in value.items()}
        return each if type(value) is dict else type(value)(**each)
    if isinstance(value, (tuple, list)) and value and all(isinstance(one, Tensor) for one in value):
        return type(value)([*value] * count)
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    if name == "position_ids" and value.ndim == 3:
        return value.repeat(1, count, 1)
    if len(value) == 1 and value.ndim == 4 and name == "attention_mask":
        return value
    return value.repeat(count, *[1] * (value.ndim - 1))


def first_part(value: Any, count: int) -> Any:
    """What is the first world's of an output of all."""
    if isinstance(value, (tuple, list)):
        return type(value)(first_part(one, count) for one in value)
    return value[: len(value) // count] if isinstance(value, Tensor) and value.ndim else value


def part_of(value: Any, count: int, number: int) -> Any:
    """What is one world's of what a tower makes of the images of all, one after another."""
    if isinstance(value, Mapping):
        return type(value)(**{name: part_of(one, count, number) for name, one in value.items()})
    if isinstance(value, (tuple, list)) and value and all(isinstance(one, Tensor) for one in value):
        size = len(value) // count
        return type(value)(value[number * size : (number + 1) * size])
    return value.chunk(count)[number] if isinstance(value, Tensor) and value.ndim else value


def side_by_side(parts: Sequence[Any]) -> Any:
    """What towers made of the images of several worlds, as one."""
    first = parts[0]
    if isinstance(first, Mapping):
        return type(first)(**{name: side_by_side([one[name] for one in parts]) for name in first})
    if isinstance(first, (tuple, list)):
        return type(first)(each for one in parts for each in one)
    return torch.cat(list(parts)) if isinstance(first, Tensor) and first.ndim else first
