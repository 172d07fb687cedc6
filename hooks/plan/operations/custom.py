"""A function of the user's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from ...digest import digest_of
from ...errors import PlanError
from ..context import Context
from ..encoding import Put
from ..operation import Op


@dataclass(frozen=True, eq=False)
class Custom(Op):
    """A function of the user's. It cannot be saved, because loading a plan runs no code.

    Attributes:
        fn: the function.
        mixing: what it mixes, "row" and "pos".
        bare: whether it takes the values alone, and no `ctx`.
    """

    fn: Callable[..., Tensor]
    mixing: frozenset[str] = field(default=frozenset())
    bare: bool = False
    name: ClassVar[str] = "intervene"

    @property
    def mixes(self) -> frozenset[str]:  # type: ignore[override]
        return self.mixing

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        return self.fn(x, *reads) if self.bare else self.fn(x, *reads, ctx=ctx)

    def encoded(self, put: Put) -> dict[str, Any]:
        """The function's name and digest, which tell it from others and cannot be loaded."""
        return {"type": "function", "name": str(self), "code": digest_of(self.fn)}

    def __str__(self) -> str:
        return _named(self.fn)


def takes_values_alone(fn: Callable[..., Any], reads: int) -> bool:
    """Whether a function of a user's takes x and so many reads, and no `ctx`.

    Raises:
        PlanError: it takes neither these nor `ctx` beside them.
    """
    # A module says what it takes by its forward.
    inside = fn.forward if isinstance(fn, nn.Module) else fn
    try:
        signature = inspect.signature(inside)
    except (TypeError, ValueError):  # one of torch's own, as torch.relu
        return True
    names, values = list(signature.parameters), (None,) * (1 + reads)
    if "hook" in names[1:]:
        raise PlanError(
            f"{_named(fn)} takes a hook, as TransformerLens hands one over; here a function is fn(x, *reads, ctx=ctx), "
            "or fn(x, *reads) alone, and returns a new tensor: ctx.site and ctx.layer say where it is, ctx.pos and "
            "ctx.head what of it"
        )
    for bare in (False, True):
        try:
            signature.bind(*values, **({} if bare else {"ctx": None}))
        except TypeError:
            continue
        return bare
    read = f"x and {reads} read{'s' * (reads != 1)}" if reads else "x"
    raise PlanError(f"{_named(fn)}{signature} is called with {read}, and ctx= if it takes it: fn(x, *reads, ctx=ctx)")


def _named(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", type(fn).__name__)
