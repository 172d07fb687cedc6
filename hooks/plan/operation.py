"""What every operation is: a pure function of the value at a site and of values read elsewhere."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

from torch import Tensor

from .context import Context
from .encoding import Put
from .sites import same

Value = Tensor | float


class Op:
    """A pure function ``f(x, *reads, ctx)``; subclasses are frozen dataclasses of its parameters.

    It returns a new tensor of the shape, dtype and device of `x`, reads nothing on the host, and acts on every row and
    position by itself, unless it says that it mixes them.

    Attributes:
        name: what prints and saves.
        mixes: ``"row"`` and ``"pos"``, where these depend on one another.
        writes_inf: whether it writes -inf, so that it has no strength.
        reads_alike: whether what is read has to have x's shape.
        needs_full_rows: whether each row of a reference set must have every position that is edited.
        reads_constants: whether no gradient flows into what is read.
        still: whether it leaves x alone where what is read equals it; `replaces`: whether what is read is its result.
        stacks: whether several worlds may go through it at once, under `torch.vmap`.
        masked: whether it is to be told, in `ctx.allowed`, where attention is allowed.
        looks: whether it looks at `ctx` for more than the shape of its parameters.
        numbers: parameters that may be tensors [] in place of numbers, so that in a compiled graph others are the same
            graph.
        tables: parameters that are moved to the device of what they are applied to.
    """

    name: ClassVar[str]
    mixes: ClassVar[frozenset[str]] = frozenset()
    writes_inf: ClassVar[bool] = False
    reads_alike: ClassVar[bool] = False
    needs_full_rows: ClassVar[bool] = False
    reads_constants: ClassVar[bool] = False
    still: ClassVar[bool] = False
    replaces: ClassVar[bool] = False
    stacks: ClassVar[bool] = False
    masked: ClassVar[bool] = False
    looks: ClassVar[bool] = True
    numbers: ClassVar[frozenset[str]] = frozenset()
    tables: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        """Return the new value, of x's shape, dtype and device."""
        raise NotImplementedError

    @property
    def pools_positions(self) -> bool:
        """Whether it takes all positions of a reference set together, so that x may have others."""
        return False

    def parameters(self) -> dict[str, Any]:
        """The function's parameters by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    def encoded(self, put: Put) -> dict[str, Any]:
        """The operation as data."""
        return {"type": "op", "name": self.name, "fields": {k: put(v) for k, v in self.parameters().items()}}

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return False
        mine, theirs = self.parameters(), other.parameters()  # type: ignore[attr-defined]
        return all(same(mine[name], theirs[name]) for name in mine)

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        parts = []
        for name, value in self.parameters().items():
            text = (
                f"{value.dtype}{list(value.shape)}".removeprefix("torch.") if isinstance(value, Tensor) else repr(value)
            )
            parts.append(f"{name}={text}")
        return f"{self.name}({', '.join(parts)})" if parts else self.name
