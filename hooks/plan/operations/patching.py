"""Values of other worlds, in place of the value there or of a part of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..context import Context
from ..operation import Op


@dataclass(frozen=True, eq=False)
class Patch(Op):
    """The value read, in place of x (Vig et al. 2020; Meng et al. 2022)."""

    name: ClassVar[str] = "patch"
    still: ClassVar[bool] = True
    replaces: ClassVar[bool] = True
    stacks: ClassVar[bool] = True
    looks: ClassVar[bool] = False
    reads_alike: ClassVar[bool] = True

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        return reads[0].expand_as(x)


@dataclass(frozen=True, eq=False)
class PatchConstant(Patch):
    """The value read, in place of x, as a constant: no gradient flows into what is read."""

    name: ClassVar[str] = "patch_constant"
    reads_constants: ClassVar[bool] = True

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        return reads[0].detach().expand_as(x)


@dataclass(frozen=True, eq=False)
class Freeze(Patch):
    """The value that this world has without any intervention."""

    name: ClassVar[str] = "freeze"
