"""The project's own small transformer, known by its class's name: this package imports nothing from `interp`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .architecture import Architecture, AttentionFunction, Block, Mlp, Projection


@contextmanager
def swap_attention(attention: Any, function: AttentionFunction) -> Iterator[None]:
    """Shadow the class's attention function on one module, and what stood on the module itself."""
    own = vars(attention).get("attend")
    attention.attend = function
    try:
        yield
    finally:
        if own is None:
            del attention.attend
        else:
            attention.attend = own


def describe(model: Any) -> Architecture:
    """Find the parts of an `interp.models.Transformer`."""
    blocks = []
    for block in model.blocks:
        attention, mlp = block.attn, block.mlp
        blocks.append(
            Block(
                module=block,
                norm1=block.ln1,
                attention=attention,
                q=Projection(attention.q_proj, attention.num_heads, attention.head_dim),
                k=Projection(attention.k_proj, attention.num_kv_heads, attention.head_dim),
                v=Projection(attention.v_proj, attention.num_kv_heads, attention.head_dim),
                out=attention.o_proj,
                scaling=attention.scaling,
                q_norm=attention.q_norm,
                k_norm=attention.k_norm,
                norm2=block.ln2,
                mlp=None
                if mlp is None
                else Mlp(mlp, mlp.up if mlp.gate is None else mlp.gate, mlp.down, mlp.act,
                         up=None if mlp.gate is None else mlp.up, width=mlp.up.out_features),
            )
        )  # fmt: skip
    config = model.config
    return Architecture(
        family="small",
        embed=model.embed,
        pos_embed=model.pos_embed,
        blocks=tuple(blocks),
        norm=model.ln_final,
        unembed=model.unembed,
        width=config.d_model,
        vocabulary=config.vocab_size,
        rotary=model.rotary if config.positions == "rotary" else None,
        swap_attention=swap_attention,
    )
