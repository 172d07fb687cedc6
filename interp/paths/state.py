"""Whether a model is still what it was when something was computed of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hooks import Model

SCALARS = (bool, int, float, str)
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the size of a number in bytes, the integers that have the same bits."""


def state_of(model: Model) -> tuple[Any, ...] | None:
    """What a model's activations depend on beside its inputs, cheaply: two that are equal are of one state.

    Modules with their plain settings, and of every parameter and buffer where it lies, how often it was written to, and
    the sum of its bits, which tells a write through ``.data`` or another library. It costs about one reading of the
    weights.

    Returns:
        None where nobody can tell: a plan is held on the model, or hooks or a forward of the user's stand on it.
    """
    if model.holds:
        return None
    modules = list(model.module.named_modules())
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for _, m in modules):
        return None
    held = [*model.module.named_parameters(), *model.module.named_buffers()]
    sums = [_bits(tensor) for _, tensor in held]  # all are asked for before the first is waited for
    told = [
        (name, _where(tensor), None if bits is None else int(bits))
        for (name, tensor), bits in zip(held, sums, strict=True)
    ]
    config = getattr(getattr(model.module, "config", None), "__dict__", None)
    return (*((name, id(module), _settings(module)) for name, module in modules), *told, repr(config))


def _settings(module: nn.Module) -> tuple[Any, ...]:
    return (type(module), *((name, value) for name, value in vars(module).items() if isinstance(value, SCALARS)))


def _where(tensor: Tensor) -> tuple[Any, ...]:
    written = 0 if tensor.is_inference() else tensor._version
    place = tensor.data_ptr() if _plain(tensor) else 0
    return (id(tensor), place, written, tensor.dtype, tensor.device, tuple(tensor.shape))


def _bits(tensor: Tensor) -> Tensor | None:
    """The sum of a tensor's bits, or None of one that does not lie plainly in memory."""
    if not _plain(tensor) or tensor.is_complex() or tensor.element_size() not in BITS:
        return None
    return tensor.detach().view(BITS[tensor.element_size()]).sum(dtype=torch.int64)


def _plain(tensor: Tensor) -> bool:
    strided = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    return type(tensor) in (Tensor, nn.Parameter) and strided
