"""Gemma 3 with its SigLIP tower: tokens of one image see one another, later ones too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..plan.pictures import Pictures
from . import clip, llama
from .architecture import Architecture, Tower
from .blocks import Block, Sublayer
from .huggingface import swap_attention
from .positions import Rotary
from .seeing import filled, given_images, require_sizes, tensor_of, with_tower


def describe(model: Any) -> Architecture:
    """Find the parts of a Gemma 3 that sees."""
    vision, config = model.model.vision_tower, model.config
    tower = Tower(
        embed=vision.embeddings,
        blocks=clip.blocks(vision),
        norm=vision.post_layernorm,
        width=config.vision_config.hidden_size,
        swap_attention=swap_attention,
        look=partial(_look, config),
        arguments=_arguments,
        token=config.image_token_id,
        nested=True,
        mutual=True,
    )
    return with_tower(model, model.model.language_model, tower, _text)


def _text(model: Any) -> Architecture:
    """The language model: a Llama with norms on both sides of its sublayers, and angles by the kind of its layer.

    Raises:
        ModelError: its logits are capped, or its text sees later tokens too.
    """
    config = model.config
    if config.final_logit_softcapping is not None or config.use_bidirectional_attention:
        raise ModelError("this Gemma 3 caps its logits, or its text sees later tokens too; neither is known here")
    arch, rotary = llama.describe(model), model.model.rotary_emb
    blocks = []
    for block, layer in zip(arch.blocks, model.model.layers, strict=True):
        kind = layer.self_attn.layer_type
        turned = Rotary(partial(_angles, rotary, kind)) if kind is not None else block.attention.rotary
        attend = replace(block.attention, rotary=turned, softcap=layer.self_attn.attn_logit_softcapping)
        feed = llama.gated(layer.mlp)
        first = Sublayer(layer.input_layernorm, attend, post=layer.post_attention_layernorm)
        second = Sublayer(layer.pre_feedforward_layernorm, feed, post=layer.post_feedforward_layernorm)
        blocks.append(Block(layer, (first, second)))
    return replace(arch, blocks=tuple(blocks))


def _angles(module: nn.Module, kind: str, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return module(torch.empty((), dtype=dtype, device=positions.device), positions, kind)


def _arguments(ids: Tensor, mask: Tensor, pictures: Pictures | None) -> dict[str, Tensor]:
    """Without the kinds of its tokens the model would let those of an image see only what comes before them."""
    if not pictures:
        return {}
    return {**pictures.tensors, "token_type_ids": (pictures.image >= 0).long()}


def _look(config: Any, ids: Tensor, mask: Tensor, given: Mapping[str, Any]) -> Pictures | None:
    if not given_images(given):
        return None
    vision = config.vision_config
    pixels = tensor_of(given, "pixel_values", (4,))
    require_sizes("pixel_values", pixels, (vision.num_channels, vision.image_size, vision.image_size))
    each = torch.ones(len(pixels), dtype=torch.int64)
    return filled(
        ids,
        mask,
        config.image_token_id,
        [config.mm_tokens_per_image] * len(pixels),
        {"pixel_values": pixels},
        parts={"pixel_values": each},
        patches=each * (vision.image_size // vision.patch_size) ** 2,
    )
