"""The formulas of CausalMM's released code (The-Martyr/CausalMM), to compare with: not a do().

That code edits the attention of one layer of the image encoder, averages it over heads, resizes it to the grid of
patches and multiplies the features by it; both branches of the decoder then go on from one key/value cache, so that
from the second token on its counterfactual equals its fact. Nothing here is a default.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hooks import PlanError, nearest

FORMS = ("random", "uniform", "reversed", "shuffle")


def edited_attention(attention: Tensor, form: str = "shuffle", generator: torch.Generator | None = None) -> Tensor:
    """Attention weights edited as in the code, which does not normalise them.

    Args:
        attention: [B, H, N, N], of the encoder.
        form: ``"random"``: uniform in [0, 2); ``"uniform"``: each head's mean; ``"reversed"``: each head's largest
            minus each; ``"shuffle"``: each head's entries permuted, alike in all rows.
        generator: of the draws.

    Raises:
        PlanError: an unknown form.
    """
    if form == "random":
        return 2 * torch.rand(attention.shape, generator=generator, dtype=attention.dtype)
    if form == "uniform":
        return attention.mean((2, 3), keepdim=True).expand_as(attention)
    if form == "reversed":
        return attention.amax((2, 3), keepdim=True) - attention
    if form == "shuffle":
        heads = []
        for head in attention.flatten(2).unbind(1):
            heads.append(head[:, torch.randperm(head.shape[1], generator=generator)])
        return torch.stack(heads, 1).reshape_as(attention)
    raise PlanError(f"unknown form {form!r}{nearest(form, FORMS)}; the code has {', '.join(FORMS)}")


def weighted_features(features: Tensor, attention: Tensor) -> Tensor:
    """Visual features multiplied by edited attention, patch by patch.

    Args:
        features: [B, N, M], N patches of a square.
        attention: [B, H, S, S], edited.

    Returns:
        [B, N, M].
    """
    side = math.isqrt(features.shape[1])
    resized = torch.nn.functional.interpolate(attention, size=(side, side), mode="bilinear", align_corners=False)
    return features * resized.mean(1).flatten(1)[..., None]


def contrasted(
    own: Tensor,
    visual: Tensor | None = None,
    language: Tensor | None = None,
    gamma: float = 0.5,
    epsilon: float = 0.1,
) -> Tensor:
    """(1 + n gamma) l - gamma l_v - gamma l_l over the n branches given, -inf where l < ln epsilon + max l.

    Args:
        own: [..., V]; `visual` and `language` alike.
        gamma, epsilon: with the defaults of the code.
    """
    z = own
    for branch in (visual, language):
        if branch is not None:
            z = z + gamma * (own - branch)
    return z.masked_fill(own < math.log(epsilon) + own.amax(-1, keepdim=True), -torch.inf)
