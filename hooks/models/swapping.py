"""How attention modules that are not of transformers are made to call another function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor

from ..errors import ModelError
from .architecture import AttentionFunction


def swap_method(name: str) -> Callable[[Any, AttentionFunction], AbstractContextManager[None]]:
    """For attention modules that mix values in a method ``z = self.name(q, k, v, mask)``.

    Args:
        name: of the method, which takes q [B, H, T, D], k and v [B, K, S, D] and a mask (or none), and returns z
            [B, T, H, D].

    Returns:
        What an `Architecture` takes as `swap_attention`.

    Raises:
        ModelError: when it is used, an attention module has no such method.
    """

    @contextmanager
    def swap(attention: Any, function: AttentionFunction) -> Iterator[None]:
        own: Any = getattr(attention, name, None)
        before = vars(attention).get(name)
        if not callable(own):
            raise ModelError(f"{type(attention).__name__} has no method {name!r} that mixes values")
        mix: Any = own  # narrowed by `callable`, it would return an object

        def plainly(_module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, **_: Any) -> tuple[Tensor, None]:
            mixed: Any = mix(q, k, v, mask)
            return mixed, None

        def called(q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
            return function(attention, q, k, v, mask, own=plainly)[0]

        setattr(attention, name, called)
        try:
            yield
        finally:
            delattr(attention, name) if before is None else setattr(attention, name, before)

    return swap
