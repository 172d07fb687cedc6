"""A function of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from ...digest import digest_of
from ..context import Context
from ..encoding import Put
from ..operation import Op


@dataclass(frozen=True, eq=False)
class Custom(Op):
    """A function of the user's. It cannot be saved, because loading a plan runs no code."""

    fn: Callable[..., Tensor]
    mixing: frozenset[str] = field(default=frozenset())
    name: ClassVar[str] = "intervene"

    @property
    def mixes(self) -> frozenset[str]:  # type: ignore[override]
        return self.mixing

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        return self.fn(x, *reads, ctx=ctx)

    def encoded(self, put: Put) -> dict[str, Any]:
        """The function's name and digest, which tell it from others and cannot be loaded."""
        return {"type": "function", "name": str(self), "code": digest_of(self.fn)}

    def __str__(self) -> str:
        return getattr(self.fn, "__name__", type(self.fn).__name__)
