"""The project's own small transformer, known by its class's name: this package imports nothing from `interp`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from .architecture import Architecture, AttentionFunction
from .blocks import Attention, Block, Mlp, Sublayer
from .positions import Rotary
from .projections import Projection


@contextmanager
def swap_attention(attention: Any, function: AttentionFunction) -> Iterator[None]:
    """Shadow the class's attention function on one module, and what stood on the module itself."""
    own = vars(attention).get("attend")
    attention.attend = partial(function, own=attention.attend)
    try:
        yield
    finally:
        if own is None:
            del attention.attend
        else:
            attention.attend = own


def describe(model: Any) -> Architecture:
    """Find the parts of an `interp.models.Transformer`."""
    config = model.config
    rotary = Rotary(model.rotary) if config.positions == "rotary" else None
    return Architecture(
        family="small",
        embed=model.embed,
        pos_embed=model.pos_embed,
        blocks=tuple(_block(block, rotary) for block in model.blocks),
        norm=model.ln_final,
        unembed=model.unembed,
        width=config.d_model,
        vocabulary=model.unembed.weight.shape[0],
        swap_attention=swap_attention,
    )


def _block(block: Any, rotary: Rotary | None) -> Block:
    attention, mlp = block.attn, block.mlp
    attend = Attention(
        module=attention,
        q=Projection(attention.q_proj, attention.num_heads, attention.head_dim),
        k=Projection(attention.k_proj, attention.num_kv_heads, attention.head_dim),
        v=Projection(attention.v_proj, attention.num_kv_heads, attention.head_dim),
        out=attention.o_proj,
        scaling=attention.scaling,
        q_norm=attention.q_norm,
        k_norm=attention.k_norm,
        rotary=rotary,
    )
    sublayers = (Sublayer(block.ln1, attend),)
    if mlp is not None:
        gate = mlp.gate is not None
        up = mlp.up if gate else None
        feed = Mlp(mlp, mlp.gate if gate else mlp.up, mlp.down, mlp.act, up=up, width=mlp.up.out_features)
        sublayers = (*sublayers, Sublayer(block.ln2, feed))
    return Block(block, sublayers)
