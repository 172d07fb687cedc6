"""GPT-2 (`GPT2LMHeadModel`): learned positions, LayerNorm, one fused projection to q, k and v."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from .architecture import Architecture, Block, Mlp, Projection
from .huggingface import swap_attention, unembedding


def describe(model: Any) -> Architecture:
    """Find the parts of a GPT-2 with a language-model head."""
    head = unembedding(model)
    body = model.transformer
    blocks = []
    for block in body.h:
        attention, mlp = block.attn, block.mlp
        part = partial(Projection, attention.c_attn, attention.num_heads, attention.head_dim)
        blocks.append(
            Block(
                module=block,
                norm1=block.ln_1,
                attention=attention,
                q=part(0),
                k=part(attention.embed_dim),
                v=part(2 * attention.embed_dim),
                out=attention.c_proj,
                scaling=attention.scaling,
                norm2=block.ln_2,
                mlp=Mlp(mlp, mlp.c_fc, mlp.c_proj, _fused(mlp.act), width=mlp.c_fc.nf),
            )
        )
    return Architecture(
        family="gpt2",
        embed=body.wte,
        pos_embed=body.wpe,
        blocks=tuple(blocks),
        norm=body.ln_f,
        unembed=head,
        width=model.config.hidden_size,
        vocabulary=model.config.vocab_size,
        swap_attention=swap_attention,
    )


def _fused(act: nn.Module):
    # The same function in one kernel instead of six passes over memory.
    if type(act).__name__ == "NewGELUActivation":
        return partial(nn.functional.gelu, approximate="tanh")
    return act
