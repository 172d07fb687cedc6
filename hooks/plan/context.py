"""What an intervention's function is told besides the values: where it is, and how its parameters fit there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ShapeError
from .kinds import LATER, ROW
from .sites import DIM, HEAD, KEY, KINDS, POS, STACKS, key_of

_BEYOND, _STACK = 1 << 32, 1 << 40
_FIRST = {name: number for number, name in enumerate(kind for kind in KINDS if kind not in LATER)}


@dataclass(frozen=True)
class Reference:
    """How a reference set, which has rows of its own, lies in the tensor [R, ...] that a function gets of it.

    Attributes:
        valid: bool, broadcastable to that tensor, False at filler; None where every entry is real.
        by_position: axes of the tensor (numbers) along which entry p is position p, and all positions are there; along
            the others entry i corresponds to entry i of x.
    """

    valid: Tensor | None
    by_position: tuple[int, ...]

    def pick(self, value: Tensor, ctx: Context) -> Tensor:
        """Take the positions of x out of a value [B or 1, ...] laid out like the reference set."""
        for axis in self.by_position:
            index = ctx.pos if ctx.axes[axis] == POS else ctx.key_pos
            assert index is not None
            shape = [1] * value.ndim
            shape[0], shape[axis] = index.shape
            size = list(value.shape)
            size[0], size[axis] = index.shape
            source = value.expand(len(index), *value.shape[1:])
            value = source.gather(axis, index.reshape(shape).expand(size))
        return value


@dataclass(frozen=True)
class Context:
    """Where a function is applied. Everything here is known before the run, so using it never waits for the device.

    Attributes:
        site: name of the site, `layer` its block (None outside the blocks) and `stack` which of several, None of the
            main one.
        axes: names of the axes of `x`, in order.
        single: for each axis, whether the site selected it with one int (such an axis has size 1 in `x`, and a value
            given for it may leave it out).
        row: int64 [B], ids of the rows.
        pos: int64 [B, n], absolute query positions; `key_pos` [B, m] those of the keys, where the site has them.
        head: the heads of `x`'s head axis, or None where the site has none; int64 [H] in a compiled graph, as the seed
            is int64 [], so that others are the same graph, and where worlds are stacked.
        dim: int64 [n] or [B, n], the entries of its last axis, or None where that is one of keys.
        seed: the seed of the run.
        window: the rows of the whole batch that `x` holds, of `total`: a slice, or int64 [B] where several rows that
            are generated go on from one.
        references: for each read, how the positions of a reference set are laid out; None for reads row by row.
        allowed: bool of `x`'s shape, where the masks allow attention, for an operation on patterns that asks for it;
            None where they allow all of it.
    """

    site: str
    layer: int | None
    axes: tuple[str, ...]
    single: tuple[bool, ...]
    row: Tensor
    pos: Tensor
    key_pos: Tensor | None
    head: tuple[int, ...] | Tensor | None
    dim: Tensor | None
    seed: int | Tensor
    window: slice | Tensor
    total: int
    references: tuple[Reference | None, ...] = ()
    allowed: Tensor | None = None
    stack: str | None = None

    @property
    def salt(self) -> int:
        """A number of the site, layer and stack, so that draws at different places differ."""
        return _salt(self.site, self.layer, self.stack)

    def counters(self, ndim: int) -> list[Tensor]:
        """Where each entry of `x` is: its row id, position, head, key position and entry, each broadcastable to `x`."""
        device = self.row.device
        heads = beside(torch.tensor(self.head), device) if isinstance(self.head, tuple) else self.head
        given = {ROW: self.row, POS: self.pos, HEAD: heads, KEY: self.key_pos, DIM: self.dim}
        out = []
        for number, axis in enumerate(self.axes):
            index = given[axis]
            assert index is not None
            shape = [1] * ndim
            shape[number] = index.shape[-1]
            if index.ndim == 2:
                shape[0] = index.shape[0]
            out.append(index.reshape(shape))
        return out


# Not cached by a decorator: what operations call goes to other machines by value, where such a function could not.
def _salt(site: str, layer: int | None, stack: str | None) -> int:
    name, number, own = key_of(site, layer, stack)
    beyond = 0 if own is None else (STACKS.index(own) + 1) * _STACK
    if name in LATER:
        return beyond + (LATER.index(name) + 1) * _BEYOND + number
    return beyond + _FIRST[name] + len(_FIRST) * (number + 1)


def with_references(ctx: Context, references: tuple[Reference | None, ...]) -> Context:
    """The same context, saying how each reference set is laid out."""
    return replace(ctx, references=references)


def beside(value: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A value on a device, where a copy to it is not waited for; one from it is, since the host goes on with it."""
    return value.to(device=device, dtype=dtype, non_blocking=device.type != "cpu")


def fit(value: Tensor | float, x: Tensor, ctx: Context, whole: bool = False) -> Tensor | float:
    """Shape a parameter to broadcast against `x`, refusing what would broadcast by accident.

    A number fits everywhere. A tensor must have exactly the sizes of the last axes of `x` (a direction [M], one for
    each head [H, M], one for each position [n, M], everything [B, n, M]); axes that the site selects with one int may
    be left out. Size 1 is not a wild card.

    Args:
        value: a number or a tensor of `x`'s dtype on its device.
        x: the selected part of the activation.
        ctx: where it is.
        whole: only accept a tensor with every axis.

    Raises:
        ShapeError: the shape, dtype or device does not fit.
    """
    if not isinstance(value, Tensor):
        return value
    place = ctx.site if ctx.layer is None else f"{ctx.site}.{ctx.layer}"
    if value.device != x.device:
        raise ShapeError(f"{place}: a value on {value.device} for an activation on {x.device}; move it with .to()")
    if value.ndim == 0 and not whole:
        return value.to(x.dtype)
    if value.dtype != x.dtype:
        raise ShapeError(f"{place}: a value of {value.dtype} for an activation of {x.dtype}; convert it with .to()")
    kept = (ctx.total, *x.shape[1:])
    for axes in (tuple(i for i in range(x.ndim) if not ctx.single[i]), tuple(range(x.ndim))):
        for start in range(1 if whole else len(axes)):
            if tuple(value.shape) == tuple(kept[i] for i in axes[start:]):
                if axes[start] == 0:
                    value = value[ctx.window]
                shape = [1] * x.ndim
                for i, size in zip(axes[start:], value.shape, strict=True):
                    shape[i] = size
                return value.reshape(shape)
    sizes = ", ".join(f"{axis} {size}" for axis, size in zip(ctx.axes, kept, strict=True))
    how = "every axis" if whole else "the last axes"
    raise ShapeError(f"{place}: a value of shape {list(value.shape)} does not fit; {how} must match ({sizes})")


def times(value: Tensor | float, y: Tensor | float, x: Tensor, ctx: Context) -> Tensor:
    """value * y, for a parameter that fits `x` (see `fit`) and a `y` of x's dtype.

    A number counts as exactly where it is a tensor [] as where it is one of Python's: in half precision it is not
    rounded first.
    """
    fitted = fit(value, x, ctx)
    assert isinstance(y, Tensor)
    if not isinstance(value, Tensor) or value.ndim or value.dtype == y.dtype:
        return fitted * y
    wide = torch.promote_types(y.dtype, torch.float32)
    return (y.to(wide) * value.to(wide)).to(y.dtype)
