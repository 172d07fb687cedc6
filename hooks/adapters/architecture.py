"""What the engine needs to know of a transformer: its parts, named once, for both ways of running it.

Forward hooks are placed on these modules, and the copy-on-write executor calls them on packed tokens. A part is a
module of the user's model, never a copy of its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError


@dataclass(frozen=True)
class Projection:
    """The part of a linear module's output that holds q, k or v: `heads` heads of `width`, from column `start` on."""

    module: nn.Module
    heads: int
    width: int
    start: int | None = None

    @property
    def columns(self) -> slice:
        """The module's output columns that are meant; all of them where the module is not shared."""
        return slice(None) if self.start is None else slice(self.start, self.start + self.heads * self.width)

    def read(self, out: Tensor) -> Tensor:
        """Take [..., heads, width] out of the module's output [..., columns]."""
        return out[..., self.columns].unflatten(-1, (self.heads, self.width))

    def write(self, out: Tensor, part: Tensor) -> Tensor:
        """Return the module's output with [..., heads, width] put back."""
        flat = part.flatten(-2)
        if self.start is None:
            return flat
        return torch.cat([out[..., : self.start], flat, out[..., self.columns.stop :]], -1)

    def __call__(self, x: Tensor) -> Tensor:
        """Project x [..., M] to [..., heads, width]."""
        if self.start is None:
            return self.module(x).unflatten(-1, (self.heads, self.width))
        weight, bias = linear_weight(self.module)
        bias = None if bias is None else bias[self.columns]
        return nn.functional.linear(x, weight[self.columns], bias).unflatten(-1, (self.heads, self.width))

    def per_head(self, x: Tensor) -> Tensor:
        """Project x [..., heads, M], every head from its own input, to [..., heads, width]."""
        weight, bias = linear_weight(self.module)
        weight = weight[self.columns].unflatten(0, (self.heads, self.width))
        out = torch.einsum("...hm,hdm->...hd", x, weight)
        return out if bias is None else out + bias[self.columns].unflatten(0, (self.heads, self.width))


@dataclass(frozen=True)
class Mlp:
    """A feed-forward layer: down(act(pre(x))), or down(act(pre(x)) * up(x)) where it is gated."""

    module: nn.Module
    pre: nn.Module
    down: nn.Module
    act: Callable[[Tensor], Tensor]
    up: nn.Module | None = None
    width: int = 0


@dataclass(frozen=True)
class ImageFormat:
    """The images that a model takes, which it cuts into patches from left to right and from top to bottom.

    Attributes:
        channels, height, width: of an image, in numbers and pixels.
        patch: height and width of a patch, in pixels; what is left over on the right and below belongs to none.
    """

    channels: int
    height: int
    width: int
    patch: tuple[int, int]


@dataclass(frozen=True)
class Block:
    """One pre-norm block, attention and then the MLP (None in an attention-only model).

    `dropout` is a module of the block's own between the MLP and the residual, or None where there is none.
    """

    module: nn.Module
    norm1: nn.Module
    attention: nn.Module
    q: Projection
    k: Projection
    v: Projection
    out: nn.Module
    scaling: float
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None
    window: int | None = None
    norm2: nn.Module | None = None
    mlp: Mlp | None = None
    dropout: nn.Module | None = None


AttentionFunction = Callable[..., tuple[Tensor, None]]


@dataclass(frozen=True)
class Architecture:
    """The parts of a transformer: a causal decoder, unless it says otherwise.

    Attributes:
        family: what the adapter calls it.
        embed: token embedding, called on ids (or on pixels, for every token of an image and with its position);
            `pos_embed`: learned positions, a module called on positions, or None.
        blocks: the blocks in order.
        norm: the final norm; `unembed`: the module from it to logits.
        width: M; vocabulary: V, the tokens or classes that there are logits for.
        rotary: from positions [...] and a dtype to (cos, sin), each [..., D], or None where there is no rotary
            embedding.
        swap_attention: context manager that makes one attention module call a given function
            ``f(module, q [B,H,T,D], k [B,K,S,D], v, mask, scaling=..., dropout=...) -> (z [B,T,H,D], None)``.
        causal: whether a token attends to those before it and itself, or to all.
        readout: the position whose final state alone is unembedded, in a classifier; None where every one is.
        images: what images the model takes, or None where it takes tokens.
    """

    family: str
    embed: nn.Module
    pos_embed: nn.Module | None
    blocks: tuple[Block, ...]
    norm: nn.Module
    unembed: nn.Module
    width: int
    vocabulary: int
    swap_attention: Callable[[Any, AttentionFunction], AbstractContextManager[None]]
    rotary: Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]] | None = None
    causal: bool = True
    readout: int | None = None
    images: ImageFormat | None = None


def linear_weight(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias [out] of a linear module (torch's, or transformers' transposed `Conv1D`).

    Raises:
        ModelError: the module keeps its weight in some other form (quantised, or wrapped).
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if isinstance(module, nn.Linear) and isinstance(weight, Tensor):
        return weight, bias
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor):
        return weight.T, bias
    raise ModelError(
        f"a plain linear layer is needed here, to address its heads; {type(module).__name__} is something else"
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split convention: x [..., heads, D], cos and sin [..., D] (Su et al. 2021)."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)
