"""GPT-OSS: experts, attention sinks, and rotary angles that are kept once for both halves of a head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import llama
from .architecture import Architecture
from .blocks import Attention, Block
from .positions import rotate


def describe(model: Any) -> Architecture:
    """Find the parts of a GPT-OSS with a language-model head."""
    arch = llama.describe(model)
    return replace(arch, blocks=tuple(_turned(block) for block in arch.blocks))


def _turned(block: Block) -> Block:
    around, feed = block.sublayers
    attention = around.fn
    assert isinstance(attention, Attention) and attention.rotary is not None
    rotary = replace(attention.rotary, turn=rotate_by_halves)
    return replace(block, sublayers=(replace(around, fn=replace(attention, rotary=rotary)), feed))


def rotate_by_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split convention: x [..., heads, D], cos and sin [..., D / 2]."""
    return rotate(x, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))
