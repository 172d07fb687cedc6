"""Norms as the model has them: what they divide by, found out by trying, and their output where that is another."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

EPSILONS = ("eps", "variance_epsilon", "norm_eps", "epsilon")
"""What norms call the number under their root."""
_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True)
class Scale:
    """What a norm divides by: the root of the mean square of x, less its mean where it is centred, and eps.

    Attributes:
        centered: whether the mean is taken off (LayerNorm), or not (RMSNorm).
        eps: what is added under the root.
    """

    centered: bool
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """The scale [..., 1] of x [..., M], in x's dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.centered:
            wide = wide - wide.mean(-1, keepdim=True)
        return (wide.square().mean(-1, keepdim=True) + self.eps).sqrt().to(x.dtype)


def rescaled(norm: nn.Module, out: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """The output [..., M] of a norm whose scale [..., 1] is another."""
    if new is old:
        return out
    bias = getattr(norm, "bias", None)
    return out * (old / new) if bias is None else (out - bias) * (old / new) + bias


_KNOWN: WeakKeyDictionary[nn.Module, tuple[float | None, Scale | None]] = WeakKeyDictionary()


def scale_of(norm: nn.Module | None, width: int) -> Scale | None:
    """What a norm divides by, or None where that is not the root of a mean square.

    It is tried on two tokens: a module's class does not say whether it takes the mean off, nor what its weight means.
    """
    if norm is None:
        return None
    named = (getattr(norm, name, None) for name in EPSILONS)
    eps = next((float(e) for e in named if isinstance(e, (int, float)) and not isinstance(e, bool)), None)
    known = _KNOWN.get(norm)
    if known is not None and known[0] == eps:
        return known[1]
    found = None if eps is None else _tried(norm, width, eps)
    if found is not None or eps is None or not _is_meta(norm):
        _KNOWN[norm] = (eps, found)
    return found


def _is_meta(norm: nn.Module) -> bool:
    return any(p.is_meta for p in norm.parameters())


@torch.no_grad()
def _tried(norm: nn.Module, width: int, eps: float) -> Scale | None:
    if _is_meta(norm):
        return None
    weight, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
    like = weight if isinstance(weight, Tensor) else torch.zeros((), dtype=torch.float32)
    steps = torch.arange(width, dtype=torch.float64)
    shape = torch.sin(steps * 1.7) + 0.3 * torch.cos(steps * 0.31) + 0.4
    # One token is as small as eps, which would not show in a larger one.
    x = torch.stack([shape, shape * eps**0.5]).to(like.device, like.dtype)
    try:
        out = norm.forward(x[None])[0].double()
    except Exception:  # whatever a module of the user's raises of such a token: it is not known
        return None
    limit = _CLOSE.get(like.dtype, 3e-2) * float(out.abs().max().clamp_min(1e-30))
    shift = 0.0 if bias is None else bias.double()
    weights = [torch.ones((), dtype=torch.float64, device=like.device)]
    if isinstance(weight, Tensor):
        weights = [weight.double(), 1 + weight.double()]
    for centered in (True, False):
        scale = Scale(centered, eps)
        normed = x.double()
        normed = normed - normed.mean(-1, keepdim=True) if centered else normed
        normed = normed / scale(x.double())
        if any(float((normed * w + shift - out).abs().max()) <= limit for w in weights):
            return scale
    return None
