"""GPT-2 (`GPT2LMHeadModel`): learned positions, LayerNorm, one fused projection to q, k and v."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from .architecture import Architecture
from .blocks import Attention, Block, Mlp, Sublayer
from .huggingface import headed, inner, swap_attention
from .projections import Projection, linear_outputs


def describe(model: Any) -> Architecture:
    """Find the parts of a GPT-2 with a language-model head."""
    head = headed(model)
    body = inner(model, "transformer")
    return Architecture(
        family="gpt2",
        embed=body.wte,
        pos_embed=body.wpe,
        blocks=tuple(_block(block) for block in body.h),
        norm=body.ln_f,
        **head,
        width=model.config.hidden_size,
        swap_attention=swap_attention,
    )


def _block(block: Any) -> Block:
    attention, mlp = block.attn, block.mlp
    part = partial(Projection, attention.c_attn, attention.num_heads, attention.head_dim)
    attend = Attention(
        module=attention,
        q=part(0),
        k=part(attention.embed_dim),
        v=part(2 * attention.embed_dim),
        out=attention.c_proj,
        scaling=attention.scaling,
    )
    feed = Mlp(mlp, mlp.c_fc, mlp.c_proj, mlp.act, width=linear_outputs(mlp.c_fc), whole=_fused(mlp))
    return Block(block, (Sublayer(block.ln_1, attend), Sublayer(block.ln_2, feed)))


def _fused(mlp: Any) -> Callable[[Tensor], Tensor] | None:
    """The layer with its activation in one kernel instead of six passes over memory."""
    if type(mlp).__name__ != "GPT2MLP" or type(mlp.act).__name__ != "NewGELUActivation":
        return None
    return partial(_in_one_kernel, mlp)


def _in_one_kernel(mlp: Any, x: Tensor) -> Tensor:
    return mlp.c_proj(nn.functional.gelu(mlp.c_fc(x), approximate="tanh"))
