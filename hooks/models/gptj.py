"""GPT-J: attention and MLP read one norm side by side; neighbouring dimensions are turned; scores are of float32.

Its attention does not go through the attention interface of transformers, but through a method, which we put ours in
the place of.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .architecture import Architecture, AttentionFunction
from .blocks import Attention, Block, Mlp, Sublayer
from .huggingface import headed, inner
from .positions import Rotary, rotate_pairs
from .projections import Projection, linear_outputs


def describe(model: Any) -> Architecture:
    """Find the parts of a GPT-J with a language-model head."""
    head = headed(model)
    body, config = inner(model, "transformer"), model.config
    return Architecture(
        family=config.model_type,
        embed=body.wte,
        pos_embed=None,
        blocks=tuple(_block(layer) for layer in body.h),
        norm=body.ln_f,
        **head,
        width=config.n_embd,
        swap_attention=swap_attention,
    )


@contextmanager
def swap_attention(attention: Any, function: AttentionFunction) -> Iterator[None]:
    """Shadow the method that mixes values on one module; what stood on the module itself comes back."""
    before, own = vars(attention).get("_attn"), attention._attn

    def called(q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> tuple[Tensor, Tensor | None]:
        wide = torch.promote_types(q.dtype, torch.float32)
        dropout = attention.attn_dropout.p if attention.training else 0.0
        z, pattern = function(attention, q.to(wide), k.to(wide), v, mask, own=plainly, dropout=dropout)
        return z.transpose(1, 2), pattern

    def plainly(_module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> tuple[Tensor, Tensor | None]:
        z, pattern = own(q, k, v, mask)
        return z.transpose(1, 2), pattern

    attention._attn = called
    try:
        yield
    finally:
        if before is None:
            del attention._attn
        else:
            attention._attn = before


def _block(layer: Any) -> Block:
    attention, mlp = layer.attn, layer.mlp
    heads, width = attention.num_attention_heads, attention.head_dim
    fused = "_attn" not in inspect.getsource(type(attention).forward)
    attend = Attention(
        module=attention,
        q=Projection(attention.q_proj, heads, width),
        k=Projection(attention.k_proj, heads, width),
        v=Projection(attention.v_proj, heads, width),
        out=attention.out_proj,
        scaling=width**-0.5,
        rotary=Rotary(partial(_angles, attention), turn=rotate_pairs),
        opaque="this GPT-J runs flash attention, which shows no scores: load it with attn_implementation='eager'"
        if fused
        else "",
    )
    feed = Mlp(mlp, mlp.fc_in, mlp.fc_out, mlp.act, width=linear_outputs(mlp.fc_in))
    return Block(layer, (Sublayer(layer.ln_1, attend), Sublayer(layer.ln_1, feed)), parallel=True)


def _angles(attention: Any, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    table = attention.embed_positions.to(positions.device)
    sin, cos = table[positions].to(dtype).chunk(2, dim=-1)
    return cos, sin
