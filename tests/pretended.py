"""A pretended GPU: tensors that say they are on ``card:0`` while a CPU computes, and that mix with no others.

What a GPU refuses, this refuses: an operation on tensors of two devices, ``numpy()`` of what is on the card. And it
counts what makes a host wait: values read, and copies between the devices. So mistakes of devices are found where there
is no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CARD = "card:0"
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default, aten.lift_fresh.default}
INDEXES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""Operations that take indices from a CPU."""
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default}
"""Operations whose answer the host waits for."""


class OnCard(Tensor):
    """A tensor that is said to be on the card."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnCard:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=torch.device(CARD),
        )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, [])

    def __getitem__(self, index: Any) -> Tensor:
        # Lists are made tensors, and copied to the device, where no mode sees it.
        parts = index if isinstance(index, tuple) else (index,)
        parts = tuple(torch.tensor(part, device=CARD) if isinstance(part, list) else part for part in parts)
        return super().__getitem__(parts if isinstance(index, tuple) else parts[0])

    def tolist(self) -> Any:
        """The numbers, which the host waits for."""
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnCard({self.inner!r})"


class Card(TorchDispatchMode):
    """While it is entered, what is made for ``card`` is on the card.

    Attributes:
        waits: the operations that made the host wait, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self.waits)


def _run(func: Any, args: Any, kwargs: dict[str, Any], waits: list[str]) -> Any:
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = [x for x in given if isinstance(x, OnCard)]
    here = [x for x in given if not isinstance(x, OnCard) and x.ndim]
    asked = kwargs.get("device")
    if there and here and func not in MOVES:
        indices = func in INDEXES and not any(x is args[0] or x is args[-1] for x in here)
        if not indices:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found card:0 and cpu")
        waits.append(f"{func} with indices of the CPU")
    target = bool(there) if asked is None else torch.device(asked).type == "card"
    if func in MOVES and asked is None and func is not aten._to_copy.default:
        target = isinstance(args[0], OnCard)
        if len(there) and len(given) > len(there):
            waits.append(str(func))
    if func is aten._to_copy.default and bool(there) != target and not kwargs.get("non_blocking"):
        waits.append(f"{func} to {'card' if target else 'cpu'}")
    if there and func in WAITS:
        waits.append(str(func))
    plain = tree_map(lambda x: x.inner if isinstance(x, OnCard) else x, (args, kwargs))
    if asked is not None:
        plain[1]["device"] = torch.device("cpu")
    out = func(*plain[0], **plain[1])
    same = {id(x.inner): x for x in there}

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, OnCard):
            return x
        if id(x) in same:
            return same[id(x)]
        return OnCard(x) if target else x

    return tree_map(wrapped, out)


@contextmanager
def pretended() -> Iterator[Card]:
    """Pretend that there is a GPU. The kind of device stays known to torch, so a process of its own is the place."""
    if torch._C._get_privateuse1_backend_name() != "card":
        _register()
    card, tensor = Card(), torch.tensor

    def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        # `torch.tensor` itself asks no mode; on a GPU, too, it makes the tensor on the CPU, and copies it.
        found = tensor(*args, **kwargs)
        return found if device is None else found.to(device)

    def alike(self: Tensor, data: Any, **kwargs: Any) -> Tensor:
        return made(data, **{"dtype": self.dtype, "device": self.device, **kwargs})

    with mock.patch.object(torch, "tensor", made), mock.patch.object(Tensor, "new_tensor", alike), card:
        yield card


def _register() -> None:
    """Tell torch of a kind of device; what this needs, only newer versions have."""

    class Backend(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

    class Hook(torch._C._acc.PrivateUse1Hooks):
        def is_available(self) -> bool:
            return True

        def has_primary_context(self, dev_id: int) -> bool:
            return True

        def is_built(self) -> bool:
            return True

    backend_registration._setup_privateuseone_for_python_backend("card", Backend(), Hook())


def move(module: nn.Module) -> nn.Module:
    """Put a module's parameters and buffers on the card, in place; those that are one stay one."""
    moved: dict[int, Any] = {}

    def one(x: Tensor) -> Tensor:
        if id(x) not in moved:
            new = OnCard(x.detach().clone())
            moved[id(x)] = nn.Parameter(new, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else new
        return moved[id(x)]

    for part in module.modules():
        for kept in (part._parameters, part._buffers):
            for name, value in kept.items():
                if value is not None and not isinstance(value, OnCard):
                    kept[name] = one(value)
    return module
