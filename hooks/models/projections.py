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
        stride: columns from one head to the next, in a module whose columns are grouped by head; `width` by default.
        offset: column of each group at which the head's own begin.
    """

    module: nn.Module
    heads: int
    width: int
    start: int | None = None
    stride: int | None = None
    offset: int = 0

    @property
    def span(self) -> slice:
        """The module's output columns from the first that is meant to the last, whole groups."""
        if self.start is None:
            return slice(None)
        return slice(self.start, self.start + self.heads * (self.stride or self.width))

    @property
    def within(self) -> slice:
        """The columns of a group that are meant."""
        return slice(self.offset, self.offset + self.width)

    def read(self, out: Tensor) -> Tensor:
        """Take [..., heads, width] out of the module's output [..., columns]."""
        return out[..., self.span].unflatten(-1, (self.heads, -1))[..., self.within]

    def write(self, out: Tensor, part: Tensor) -> Tensor:
        """Return the module's output with [..., heads, width] put back."""
        if self.start is None:
            return part.flatten(-2)
        groups = out[..., self.span].unflatten(-1, (self.heads, -1))
        groups = torch.cat([groups[..., : self.offset], part, groups[..., self.within.stop :]], -1)
        return torch.cat([out[..., : self.start], groups.flatten(-2), out[..., self.span.stop :]], -1)

    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight [heads, width, M] and bias [heads, width] of the columns that are meant."""
        weight, bias = linear_weight(self.module)
        weight = weight[self.span].unflatten(0, (self.heads, -1))[:, self.within]
        return weight, None if bias is None else bias[self.span].unflatten(0, (self.heads, -1))[:, self.within]

    def __call__(self, x: Tensor) -> Tensor:
        """Project x [..., M] to [..., heads, width]."""
        if self.start is None:
            return self.module(x).unflatten(-1, (self.heads, self.width))
        weight, bias = self.parameters()
        bias = None if bias is None else bias.flatten()
        return nn.functional.linear(x, weight.flatten(0, 1), bias).unflatten(-1, (self.heads, self.width))

    def per_head(self, x: Tensor) -> Tensor:
        """Project x [..., heads, M], every head from its own input, to [..., heads, width]."""
        weight, bias = self.parameters()
        out = torch.einsum("...hm,hdm->...hd", x, weight)
        return out if bias is None else out + bias


def linear_weight(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias [out] of a linear module (torch's, or transformers' transposed `Conv1D`).

    Raises:
        ModelError: the module keeps its weight in some other form (quantised, or wrapped), or computes more than that.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        # A subclass with a forward of its own (low-rank adapters, say) has more to it than weight and bias.
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            return weight, bias
        if type(module).__name__ == "Conv1D":
            return weight.T, bias
    raise ModelError(
        f"a plain linear layer is needed here, to address its heads; {type(module).__name__} is something else"
    )
