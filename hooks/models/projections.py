"""Linear layers whose columns belong to heads, wherever in a fused weight those lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ModelError


@dataclass(frozen=True)
class Projection:
    """The part of a linear module's output that holds q, k or v.

    Attributes:
        module: the linear module.
        heads: number of heads, each of `width` columns.
        start: first column of a module that is shared; None where the whole output is meant.
        stride: columns from one group of heads to the next, in a module whose columns are grouped; `width` by default.
        offset: column of each group at which the heads' own begin.
        each: heads of a group.
    """

    module: nn.Module
    heads: int
    width: int
    start: int | None = None
    stride: int | None = None
    offset: int = 0
    each: int = 1

    @property
    def span(self) -> slice:
        """The module's output columns from the first that is meant to the last, whole groups."""
        if self.start is None:
            return slice(None)
        return slice(self.start, self.start + self.groups * (self.stride or self.each * self.width))

    @property
    def groups(self) -> int:
        """Number of groups of heads."""
        return self.heads // self.each

    @property
    def within(self) -> slice:
        """The columns of a group that are meant."""
        return slice(self.offset, self.offset + self.each * self.width)

    def read(self, out: Tensor) -> Tensor:
        """Take [..., heads, width] out of the module's output [..., columns]."""
        if self.start is None:
            return out.unflatten(-1, (self.heads, -1))
        part = out[..., self.span].unflatten(-1, (self.groups, -1))[..., self.within]
        return part if self.each == 1 else part.flatten(-2).unflatten(-1, (self.heads, -1))

    def write(self, out: Tensor, part: Tensor) -> Tensor:
        """Return the module's output with [..., heads, width] put back."""
        if self.start is None:
            return part.flatten(-2)
        part = part.flatten(-2).unflatten(-1, (self.groups, -1))
        groups = out[..., self.span].unflatten(-1, (self.groups, -1))
        groups = torch.cat([groups[..., : self.offset], part, groups[..., self.within.stop :]], -1)
        return torch.cat([out[..., : self.start], groups.flatten(-2), out[..., self.span.stop :]], -1)

    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight [heads, width, M] and bias [heads, width] of the columns that are meant."""
        weight, bias = linear_weight(self.module)
        return self.read(weight.T).movedim(0, -1), None if bias is None else self.read(bias)

    def __call__(self, x: Tensor) -> Tensor:
        """Project x [..., M] to [..., heads, width]."""
        if self.start is None or not is_plain(self.module):
            return self.read(self.module(x))
        weight, bias = self.parameters()
        bias = None if bias is None else bias.flatten()
        return nn.functional.linear(x, weight.flatten(0, 1), bias).unflatten(-1, (self.heads, self.width))

    def per_head(self, x: Tensor) -> Tensor:
        """Project x [..., heads, M], every head from its own input, to [..., heads, width]."""
        if not is_plain(self.module):  # quantised, or with an adapter: all heads of each input, of which one is kept
            every = self.read(self.module.forward(x))
            return every.diagonal(dim1=-3, dim2=-2).movedim(-1, -2)
        weight, bias = self.parameters()
        out = torch.einsum("...hm,hdm->...hd", x, weight)
        return out if bias is None else out + bias


@dataclass(frozen=True)
class Outputs:
    """Some columns of a linear module's output, by the first of them and their number."""

    module: nn.Module
    start: int
    width: int

    @property
    def span(self) -> slice:
        """The columns."""
        return slice(self.start, self.start + self.width)

    def read(self, out: Tensor) -> Tensor:
        """Take [..., width] out of the module's output."""
        return out[..., self.span]

    def write(self, out: Tensor, part: Tensor) -> Tensor:
        """Return the module's output with [..., width] put back."""
        return torch.cat([out[..., : self.start], part, out[..., self.span.stop :]], -1)

    def __call__(self, x: Tensor) -> Tensor:
        """The columns [..., width] of what the module makes of x [..., M]."""
        if not is_plain(self.module):
            return self.read(self.module(x))
        weight, bias = linear_weight(self.module)
        return nn.functional.linear(x, weight[self.span], None if bias is None else bias[self.span])


BETWEEN_POINTS = frozenset({"LinearBridge", "UnembeddingBridge"})
"""Components of TransformerLens that are the linear layer within, between two hook points."""
NEARLY_LINEAR = 0.05
"""How much what a quantised layer makes of parts may differ from what it makes of the whole, of the latter."""
TRANSPOSED = frozenset({"Conv1D"})
"""Linear layers of transformers whose weight is [in, out]."""
PLAIN = frozenset({"FalconLinear"})
"""Subclasses of torch's linear layer whose forward is another way of writing the same."""


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose weight and bias say all that it computes."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return False
    kind = type(module)
    # A subclass with a forward of its own (low-rank adapters, say) has more to it than weight and bias.
    plain = isinstance(module, nn.Linear) and (kind.forward is nn.Linear.forward or kind.__name__ in PLAIN)
    return plain or kind.__name__ in TRANSPOSED


def linear_weight(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias [out] of a linear module (torch's, or transformers' transposed `Conv1D`).

    Raises:
        ModelError: the module keeps its weight in some other form (quantised, or wrapped), or computes more than that.
    """
    if type(module).__name__ in BETWEEN_POINTS and isinstance(module.original_component, nn.Module):
        module = module.original_component
    if not is_plain(module):
        raise ModelError(
            "a plain linear layer is needed here, to address its heads; "
            f"{type(module).__module__}.{type(module).__qualname__} is something else"
        )
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    return weight.T if type(module).__name__ in TRANSPOSED else weight, bias


def head_results(module: nn.Module, z: Tensor) -> Tensor:
    """What an output projection makes of each head's z alone, without the bias: [..., H, M] of [..., H, D]."""
    heads, width = z.shape[-2:]
    if is_plain(module):
        weight, _ = linear_weight(module)
        return torch.einsum("...hd,mhd->...hm", z, weight.unflatten(1, (heads, width)))
    # forward() rather than a call, which would run hooks once more. One head at a time, as some layers mix tokens.
    nothing = module.forward(torch.zeros_like(z).flatten(-2))
    only = torch.eye(heads, dtype=z.dtype, device=z.device)[:, :, None]
    found = torch.stack([module.forward((z * one).flatten(-2)) - nothing for one in only], -2)
    whole = module.forward(z.flatten(-2)) - nothing
    if float((found.sum(-2) - whole).abs().max()) > NEARLY_LINEAR * float(whole.abs().max()):
        raise ModelError(
            f"{type(module).__module__}.{type(module).__qualname__} is no linear layer: what heads add by themselves "
            "is not what they add together"
        )
    return found


def has_outputs(module: object) -> bool:
    """Whether something is a linear layer of some kind, quantised or wrapped ones included: it says what it returns."""
    return isinstance(module, nn.Module) and isinstance(getattr(module, "out_features", None), int)


def linear_outputs(module: nn.Module) -> int:
    """How many numbers a linear module returns of a token, quantised or wrapped ones included.

    Raises:
        ModelError: it does not say.
    """
    if is_plain(module):
        return linear_weight(module)[0].shape[0]
    for name in ("out_features", "nf"):
        if isinstance(getattr(module, name, None), int):
            return getattr(module, name)
    raise ModelError(f"{type(module).__name__} is a linear layer that does not say how many numbers it returns")
