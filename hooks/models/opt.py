"""OPT: learned positions two rows further on, queries scaled before they are used, an MLP that is no module.

The smallest but one norms after the addition, and has embeddings narrower than its stream.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import ModelError
from .architecture import Architecture
from .blocks import Attention, Block, Mlp, Sublayer
from .huggingface import headed, inner, swap_attention
from .projections import Projection, linear_outputs


def describe(model: Any) -> Architecture:
    """Find the parts of an OPT with a language-model head.

    Raises:
        ModelError: its embeddings are narrower than its stream.
    """
    head = headed(model)
    body, config = inner(model, "model").decoder, model.config
    if body.project_in is not None or body.project_out is not None:
        raise ModelError(
            f"the embeddings of this OPT have {config.word_embed_proj_dim} numbers and its stream has "
            f"{config.hidden_size}: what projects one to the other is at no site"
        )
    norm, missing = body.final_layer_norm, head.pop("missing", {})
    return Architecture(
        family=config.model_type,
        embed=body.embed_tokens,
        pos_embed=body.embed_positions,
        blocks=tuple(_block(layer) for layer in body.layers),
        norm=nn.Identity() if norm is None else norm,
        **head,
        width=config.hidden_size,
        swap_attention=swap_attention,
        at_positions=partial(_at, body.embed_positions),
        missing=missing if norm is not None else {**missing, "ln_final": "the last block norms what is unembedded"},
    )


def _at(module: Any, positions: Tensor) -> Tensor:
    return module(positions, 0, position_ids=positions)


def _block(layer: Any) -> Block:
    attention, before = layer.self_attn, layer.do_layer_norm_before
    heads, width = attention.num_heads, attention.head_dim
    attend = Attention(
        module=attention,
        q=Projection(attention.q_proj, heads, width),
        k=Projection(attention.k_proj, heads, width),
        v=Projection(attention.v_proj, heads, width),
        out=attention.out_proj,
        scaling=attention.scaling,
    )
    hidden, down, act = layer.fc1, layer.fc2, layer.activation_fn
    feed = Mlp(hidden, hidden, down, act, width=linear_outputs(hidden), whole=partial(_fed, hidden, act, down))
    norms = (layer.self_attn_layer_norm, layer.final_layer_norm)
    sublayers = tuple(
        Sublayer(norm if before else None, fn, post_add=None if before else norm, ends=ends)
        for norm, fn, ends in zip(norms, (attend, feed), (None, down), strict=True)
    )
    return Block(layer, sublayers)


def _fed(hidden: nn.Module, act: Any, down: nn.Module, x: Tensor) -> Tensor:
    return down(act(hidden(x)))
