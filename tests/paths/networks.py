"""Networks whose weights are written by hand, so that the paths through them are known before they are measured."""

from __future__ import annotations

import torch
from torch import Tensor

from interp.models import Transformer, TransformerConfig

# Two linear blocks

LINEAR = torch.tensor([[1.0, 2.0], [3.0, 4.0]])  # head h multiplies the residual elementwise by row h
UP, DOWN = 0, 1  # tokens: [1, 1] and [-1, -1]


def blank(config: TransformerConfig) -> Transformer:
    """A model in float64 and eval mode whose every weight is zero."""
    model = Transformer(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def linear_blocks() -> Transformer:
    """Two blocks of two heads on a residual of width two, for prompts of one token; the logits are the residual."""
    model = blank(
        TransformerConfig(
            vocab_size=2, n_layers=2, d_model=2, n_heads=2, d_head=2, norm="none", positions="none", bias=False
        )
    )
    with torch.no_grad():
        model.embed.weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
        model.unembed.weight.copy_(torch.eye(2))
        for block in model.blocks:
            block.attn.v_proj.weight.copy_(torch.cat([row.diag() for row in LINEAR]))
            block.attn.o_proj.weight.copy_(torch.eye(2).repeat(1, 2))
    return model


# Induction

START, A, B, C, D, X = range(6)
TOKENS, LENGTH = 6, 6
PREVIOUS, INDUCTION = "a0.h1", "a1.h0"
SHARPNESS = 40.0  # of a score that matches, in nats


def induction() -> Transformer:
    """Two layers of two heads that continue ``A B ... A`` with B.

    The residual has five parts: the token here, the position, the token before, the prediction, and one that nothing
    reads. Head 1 of layer 0 looks one position back by positions alone and copies that token to "before"; head 0 of
    layer 1 looks for the position whose "before" is the token here, and copies its token to "prediction", from which
    the logits are read. The other two heads attend evenly and write, but only where nothing reads.
    """
    width = TOKENS
    here, place, before, prediction, unread = (slice(i * width, (i + 1) * width) for i in range(5))
    model = blank(
        TransformerConfig(
            vocab_size=TOKENS,
            n_layers=2,
            d_model=5 * width,
            n_heads=2,
            d_head=width,
            n_ctx=LENGTH,
            norm="none",
            bias=False,
        )
    )
    one = torch.eye(width)

    def head(layer: int, index: int, q: Tensor | None, k: Tensor | None, v: slice, out: slice) -> None:
        attn, rows = model.blocks[layer].attn, slice(index * width, (index + 1) * width)
        if q is not None and k is not None:
            attn.q_proj.weight[rows] = q * SHARPNESS * width**0.5
            attn.k_proj.weight[rows] = k
        attn.v_proj.weight[rows, v] = one
        attn.o_proj.weight[out, rows] = one

    def reading(part: slice, matrix: Tensor = one) -> Tensor:
        weight = torch.zeros(width, 5 * width)
        weight[:, part] = matrix
        return weight

    with torch.no_grad():
        model.embed.weight[:, here] = one
        model.pos_embed.weight[:, place] = one
        model.unembed.weight[:, prediction] = 10 * one
        head(0, 0, None, None, here, unread)
        head(0, 1, reading(place), reading(place, one.roll(1, 0)), here, before)  # key of s answers query s + 1
        head(1, 0, reading(here), reading(before), here, prediction)
        head(1, 1, None, None, here, unread)
    return model


# Two heads that do the same, or the opposite

OFF, ON = 0, 1  # tokens
WANTED = 0  # the logit that says how much


def two_heads(second: float, d_mlp: int | None) -> Transformer:
    """One layer of two heads that read whether the token is `ON` and write 1 and `second`, for prompts of one token.

    Without an MLP the logit is their sum. With one it is min(sum, 1): an OR of two heads that both write 1.
    """
    model = blank(
        TransformerConfig(
            vocab_size=2, n_layers=1, d_model=3, n_heads=2, d_head=1, d_mlp=d_mlp, norm="none", positions="none",
            activation="relu",
        )
    )  # fmt: skip
    token, total, out = range(3)
    attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
    with torch.no_grad():
        model.embed.weight[ON, token] = 1.0
        attn.v_proj.weight[:, token] = 1.0
        attn.o_proj.weight[total] = torch.tensor([1.0, second])
        model.unembed.weight[WANTED, total if mlp is None else out] = 1.0
        if mlp is not None:
            mlp.up.weight[:, total] = 1.0
            mlp.up.bias[1] = -1.0
            mlp.down.weight[out] = torch.tensor([1.0, -1.0])
    return model
