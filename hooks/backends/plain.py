"""Which models the backends of other tools understand: those whose blocks add what is read of the stream, as it is."""

from __future__ import annotations

from torch import nn

from ..errors import ModelError
from ..models.architecture import Architecture
from ..models.blocks import Mlp


def require_plain(arch: Architecture, where: str) -> None:
    """Refuse a model whose sites are elsewhere than where these backends look for them.

    Raises:
        ModelError: factors, norms after the addition, or none before a sublayer, experts, parts that share a module.
    """
    why = _bends(arch)
    if why:
        raise ModelError(
            f"{arch.family} has {why}, which is not understood in {where}: wrap the model of transformers itself"
        )


def _bends(arch: Architecture) -> str:
    if len(arch.stacks) > 1:
        return "several stacks of layers"
    if arch.headless:
        return "no head"
    if arch.embed_scale != 1.0 or arch.logit_scale != 1.0:
        return "embeddings or logits that are scaled outside their module"
    if arch.positioned or arch.at_positions is not None or arch.readout is not None:
        return "positions of its own kind"
    for block in arch.blocks:
        around = block.of_mlp
        if block.shares_norm:
            return "one norm for attention and the MLP"
        if around is not None and (not isinstance(around.fn, Mlp) or not isinstance(around.fn.pre, nn.Module)):
            return "experts, or an MLP whose parts share a module"
        if block.attention.opaque or block.attention.sinks is not None:
            return "attention of its own kind"
        for sublayer in block.sublayers:
            if sublayer.pre is None or sublayer.post_add is not None or sublayer.scale != 1.0 or sublayer.ends:
                return "sublayers with a factor, or norms elsewhere than before them"
    return ""
