"""T5 (`T5ForConditionalGeneration`, `T5Model`, `T5EncoderModel`, mT5's): an encoder, and a decoder that attends to it.

Positions are a bias of the scores, which the first layer of a stack makes for all, so nothing is scaled or turned. The
attention of the decoder's layers to what is encoded is a stack of its own, of as many layers: its queries are the
decoder's tokens, its keys the encoder's.
"""

from __future__ import annotations

from typing import Any

from ..errors import ModelError
from .architecture import Architecture, Stack
from .blocks import Attention, Block, Mlp, Sublayer
from .huggingface import headless, swap_attention
from .projections import Projection, linear_outputs

UNSHARED = "its attention adds a bias for how far apart two tokens are, which the description does not compute"
_AROUND = "the stream around the attention to what is encoded is the decoder's: resid_pre and resid_mid of its layer"
_KEYS = "what its keys and values read is what the encoder returns: ln_final of the encoder"


def describe(model: Any) -> Architecture:
    """Find the parts of a T5 with a language-model head, or with no head.

    Raises:
        ModelError: it has another head.
    """
    kind, config = type(model).__name__, model.config
    if not hasattr(model, "encoder"):
        raise ModelError(
            f"a {kind} is known neither with a head that generates nor without one: load a T5 with "
            "AutoModelForSeq2SeqLM, or its encoder as T5EncoderModel"
        )
    head: Any = getattr(model, "lm_head", None)
    if head is None and getattr(model, "base_model", None) is not model:
        raise ModelError(f"a {kind} has a head that is not known: load it with AutoModelForSeq2SeqLM")
    body, decodes = getattr(model, "decoder", model.encoder), hasattr(model, "decoder")
    ids = body.embed_tokens.num_embeddings
    headed = (
        headless(model, "load it with AutoModelForSeq2SeqLM", ids)
        if head is None
        else {"unembed": head, "vocabulary": linear_outputs(head), "ids": ids}
    )
    scaled = head is not None and bool(getattr(config, "scale_decoder_outputs", False))
    return Architecture(
        family=config.model_type,
        embed=body.embed_tokens,
        pos_embed=None,
        blocks=_blocks(body, causal=decodes),
        norm=body.final_layer_norm,
        **headed,
        width=config.d_model,
        swap_attention=swap_attention,
        unshared=UNSHARED,
        final_scale=config.d_model**-0.5 if scaled else 1.0,
        encoder=_encoder(model.encoder, config) if decodes else None,
        cross=_cross(body, config) if decodes else None,
    )


def _encoder(body: Any, config: Any) -> Stack:
    return Stack(body.embed_tokens, _blocks(body, causal=False), body.final_layer_norm, config.d_model, swap_attention)


def _cross(body: Any, config: Any) -> Stack:
    blocks = []
    for layer in body.block:
        around = layer.layer[1]
        attend = _attention(around.EncDecAttention, causal=False)
        blocks.append(Block(around, (Sublayer(around.layer_norm, attend, drop=around.dropout),)))
    missing = {"resid_pre": _AROUND, "resid_post": _AROUND, "k_input": _KEYS, "v_input": _KEYS}
    return Stack(None, tuple(blocks), None, config.d_model, swap_attention, missing)


def _blocks(body: Any, causal: bool) -> tuple[Block, ...]:
    return tuple(_block(layer, causal) for layer in body.block)


def _block(layer: Any, causal: bool) -> Block:
    first, last = layer.layer[0], layer.layer[-1]
    attend = _attention(first.SelfAttention, causal)
    return Block(
        layer,
        (
            Sublayer(first.layer_norm, attend, drop=first.dropout),
            Sublayer(last.layer_norm, _feed(last.DenseReluDense), drop=last.dropout),
        ),
    )


def _attention(attention: Any, causal: bool) -> Attention:
    heads, width = attention.n_heads, attention.key_value_proj_dim
    return Attention(
        module=attention,
        q=Projection(attention.q, heads, width),
        k=Projection(attention.k, heads, width),
        v=Projection(attention.v, heads, width),
        out=attention.o,
        scaling=attention.scaling,
        causal=causal,
        biased=True,
    )


def _feed(mlp: Any) -> Mlp:
    if hasattr(mlp, "wi_0"):
        return Mlp(mlp, mlp.wi_0, mlp.wo, mlp.act, up=mlp.wi_1, width=linear_outputs(mlp.wi_0))
    return Mlp(mlp, mlp.wi, mlp.wo, mlp.act, width=linear_outputs(mlp.wi))
