"""What the engine needs to know of a transformer: its parts, named once, for both ways of running it.

Forward hooks are placed on these modules, and the copy-on-write executor calls them on packed tokens. A part is a
module of the user's model, never a copy of its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

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
    """One block: attention and an MLP (None in an attention-only model), each behind a norm.

    Attributes:
        module: the block.
        norm1: the norm before attention; `norm2`: the one before the MLP.
        attention: the attention sublayer; `q`, `k`, `v` and `out` are its projections.
        scaling: factor of q k.
        q_norm, k_norm: norms of single heads' queries and keys, before the rotary embedding.
        window: width of a sliding window of keys, in tokens, the query's own included.
        softcap: c of c tanh(scores / c), which the scores go through before the softmax.
        parallel: attention and the MLP both read the residual before the block (attention is computed first, there is
            no residual between them); else the MLP reads what attention has added to.
        post1, post2: norms of what attention and the MLP add to the residual.
        drop1, drop2: dropout outside the sublayers, the last thing before what they return is added; may be one module.
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
    softcap: float | None = None
    norm2: nn.Module | None = None
    mlp: Mlp | None = None
    parallel: bool = False
    post1: nn.Module | None = None
    post2: nn.Module | None = None
    drop1: nn.Module | None = None
    drop2: nn.Module | None = None

    @property
    def attention_end(self) -> nn.Module:
        """The module that returns what attention adds to the residual."""
        return next(end for end in (self.drop1, self.post1, self.attention) if end is not None)

    @property
    def mlp_end(self) -> nn.Module:
        """The module that returns what the MLP adds to the residual."""
        assert self.mlp is not None
        return next(end for end in (self.drop2, self.post2, self.mlp.module) if end is not None)


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
        rotary: from positions [...] and a dtype to (cos, sin), each [..., R] for the first R dimensions of a head (the
            others are not turned), or None where there is no rotary embedding.
        cap: what the unembedding's output goes through to be the logits, entry by entry, or None.
        lift_cap: context manager within which the model leaves `cap` out, so that edits of the logits come after it.
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
    cap: Callable[[Tensor], Tensor] | None = None
    lift_cap: Callable[[], AbstractContextManager[None]] = nullcontext

    def logits(self, final: Tensor) -> Tensor:
        """Logits [..., V] of the final norm's output [..., M]."""
        return self.capped(self.unembed(final))

    def capped(self, out: Tensor) -> Tensor:
        """The logits of some of the unembedding's output."""
        return out if self.cap is None else self.cap(out)


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


def softcap(x: Tensor, cap: float) -> Tensor:
    """c tanh(x / c), which stays between -c and c (Bello et al. 2016)."""
    return cap * torch.tanh(x / cap)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split convention: x [..., heads, D], cos and sin [..., R] (Su et al. 2021).

    Where R is less than D, the dimensions from R on stay as they are (Black et al. 2022).
    """
    first, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    half = first.shape[-1] // 2
    turned = torch.cat([-first[..., half:], first[..., :half]], -1)
    first = first * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)
    return torch.cat([first, rest], -1) if rest.shape[-1] else first
