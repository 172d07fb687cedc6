"""Models of transformers made to compute in float64 throughout: by themselves they round norms and attention to
float32, and two ways of computing one number then differ wherever they round to different neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _WideNorm(nn.Module):
    """The forward of transformers' RMSNorms, in float32 or the input's dtype, whichever is wider."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class _WideGemmaNorm(nn.Module):
    """The same of Gemma's, whose gain is 1 + weight."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.to(wide.dtype))).to(x.dtype)


def widen_norms(model: nn.Module) -> None:
    """Give each of transformers' RMSNorms, in place, a subclass of its own class that does not narrow float64."""
    for module in model.modules():
        kind = type(module)
        if kind.__name__.startswith("Gemma") and kind.__name__.endswith("RMSNorm"):
            module.__class__ = type(kind.__name__, (_WideGemmaNorm, kind), {})
        elif kind.__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.__class__ = type(kind.__name__, (_WideNorm, kind), {})


def widen_attention(model: nn.Module) -> None:
    """Make a model's eager attention softmax in the scores' dtype or float32, whichever is wider."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register("wide_eager", _wide_eager)
    AttentionMaskInterface.register("wide_eager", eager_mask)
    model.set_attn_implementation("wide_eager")


def _wide_eager(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.mT) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores, wide = scores + mask, torch.promote_types(q.dtype, torch.float32)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    pattern = scores.softmax(-1, dtype=wide).to(q.dtype)
    pattern = pattern if s_aux is None else pattern[..., :-1]
    return (torch.nn.functional.dropout(pattern, dropout) @ v).transpose(1, 2), pattern
