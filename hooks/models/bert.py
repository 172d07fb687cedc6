"""BERT (`BertForMaskedLM`, `BertForTokenClassification`, `BertModel`): tokens that all see each other, norms after the
addition.

The embeddings module adds positions and types of tokens and norms the sum, so `embed` is all of it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import ModelError
from .architecture import Architecture
from .blocks import Attention, Block, Mlp, Sublayer
from .huggingface import headless, inner, swap_attention
from .projections import Projection, has_outputs, linear_outputs


def describe(model: Any) -> Architecture:
    """Find the parts of a BERT with a head that reads every token, or with none.

    Raises:
        ModelError: it has another head, or is a decoder.
    """
    body, config = inner(model, "bert"), model.config
    if config.is_decoder or config.add_cross_attention:
        raise ModelError("this BERT is a decoder; the family is known as an encoder")
    missing, pooler = {}, None
    if model is body:
        norm, pooler, head = nn.Identity(), body.pooler, nn.Identity()
        missing = headless(model, "load it with AutoModelForMaskedLM")["missing"]
        missing["ln_final"] = "the last block norms its output by itself"
    elif hasattr(model, "cls") and hasattr(model.cls, "predictions"):
        norm, head = model.cls.predictions.transform, model.cls.predictions.decoder
    elif body.pooler is None and has_outputs(getattr(model, "classifier", None)):
        norm, head = nn.Identity(), model.classifier
        missing["ln_final"] = "the classifier reads the last block's output"
    else:
        raise ModelError(
            f"{type(model).__name__} has no head that reads every token: load it with AutoModelForMaskedLM or "
            "AutoModelForTokenClassification"
        )
    return Architecture(
        family=config.model_type,
        embed=body.embeddings,
        pos_embed=None,
        blocks=tuple(_block(layer) for layer in body.encoder.layer),
        norm=norm,
        unembed=head,
        width=config.hidden_size,
        vocabulary=0 if model is body else linear_outputs(head),
        swap_attention=swap_attention,
        missing=missing,
        positioned=True,
        ids=body.embeddings.word_embeddings.num_embeddings,
        pooler=pooler,
        pooled_width=config.hidden_size,
    )


def _block(layer: Any) -> Block:
    attention, around = layer.attention.self, layer.attention.output
    heads, width = attention.num_attention_heads, attention.attention_head_size
    attend = Attention(
        module=attention,
        q=Projection(attention.query, heads, width),
        k=Projection(attention.key, heads, width),
        v=Projection(attention.value, heads, width),
        out=around.dense,
        scaling=attention.scaling,
        causal=False,
    )
    up, down = layer.intermediate, layer.output
    act = up.intermediate_act_fn
    feed = Mlp(up, up.dense, down.dense, act, width=linear_outputs(up.dense), whole=partial(_fed, up, down.dense))
    return Block(
        layer,
        (
            Sublayer(None, attend, drop=around.dropout, post_add=around.LayerNorm),
            Sublayer(None, feed, drop=down.dropout, post_add=down.LayerNorm),
        ),
    )


def _fed(up: nn.Module, down: nn.Module, x: Tensor) -> Tensor:
    return down(up(x))
