"""GPT-NeoX and Pythia: parallel blocks, LayerNorm, partial rotary positions, q, k and v side by side for each head."""

from __future__ import annotations

from functools import partial
from typing import Any

from .architecture import Architecture, Block, Mlp, Projection
from .huggingface import rotary, swap_attention, unembedding


def describe(model: Any) -> Architecture:
    """Find the parts of a GPT-NeoX with a language-model head."""
    head = unembedding(model)
    body, config = model.gpt_neox, model.config
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    blocks = []
    for layer in body.layers:
        attention, mlp = layer.attention, layer.mlp
        part = partial(Projection, attention.query_key_value, heads, width, start=0, stride=3 * width)
        blocks.append(
            Block(
                module=layer,
                norm1=layer.input_layernorm,
                attention=attention,
                q=part(offset=0),
                k=part(offset=width),
                v=part(offset=2 * width),
                out=attention.dense,
                scaling=attention.scaling,
                norm2=layer.post_attention_layernorm,
                mlp=Mlp(mlp, mlp.dense_h_to_4h, mlp.dense_4h_to_h, mlp.act, width=config.intermediate_size),
                parallel=layer.use_parallel_residual,
                drop1=layer.post_attention_dropout,
                drop2=layer.post_mlp_dropout,
            )
        )
    return Architecture(
        family="gpt_neox",
        embed=body.embed_in,
        pos_embed=None,
        blocks=tuple(blocks),
        norm=body.final_layer_norm,
        unembed=head,
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        rotary=rotary(body.rotary_emb),
        swap_attention=swap_attention,
    )
