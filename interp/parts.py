"""Parts of the residual stream: what each head adds to it, and what a norm makes of a part while its scale is held."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hooks import Block, ModelError, linear_weight

Linear = Callable[[Tensor], Tensor]
"""From a part of the residual stream [..., M] to what becomes of it, [..., M]."""


@torch.no_grad()
def frozen_norm(norm: nn.Module | None, x: Tensor) -> Linear:
    """A norm without its bias as a linear function, its scale held at what it is for x.

    ``frozen_norm(norm, x)(d)`` is norm(x + d) - norm(x), had d not changed the scale; ``frozen_norm(norm, x)(x)`` is
    norm(x) less the norm's bias.

    Args:
        norm: a LayerNorm or an RMSNorm, with or without weights, an identity, or None for that.
        x: [..., M].

    Raises:
        ModelError: another kind of norm, or one of those names that computes something else.
    """
    if norm is None or isinstance(norm, nn.Identity):
        return lambda d: d
    centered = isinstance(norm, nn.LayerNorm)
    eps = _eps(norm, x)
    if eps is None or not (centered or "RMSNorm" in type(norm).__name__):
        raise ModelError(f"{type(norm).__name__} is no norm whose scale is known: LayerNorm and RMSNorm are")
    wide = torch.promote_types(x.dtype, torch.float32)  # in which squares of half-precision numbers do not overflow
    gain = _gain(norm, x, eps).detach().to(wide)

    def held_at(whole: Tensor) -> Linear:
        middle = _centered(whole.to(wide)) if centered else whole.to(wide)
        scale = (middle.square().mean(-1, keepdim=True) + eps).rsqrt()
        return lambda d: ((_centered(d.to(wide)) if centered else d.to(wide)) * scale * gain).to(d.dtype)

    _certify(norm, held_at, x)
    return held_at(x)


def _eps(norm: nn.Module, x: Tensor) -> float | None:
    """What a norm adds to the mean square; None where it says nothing of it."""
    if isinstance(norm, nn.RMSNorm) and norm.eps is None:
        return torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    return next((getattr(norm, n) for n in ("eps", "variance_epsilon") if getattr(norm, n, None) is not None), None)


def _gain(norm: nn.Module, x: Tensor, eps: float) -> Tensor:
    """What a norm multiplies its normalised input by, [M] or a number."""
    if isinstance(norm, nn.LayerNorm):
        return torch.ones((), dtype=x.dtype, device=x.device) if norm.weight is None else norm.weight
    # An RMSNorm may keep its gain as 1 + weight. Whatever it keeps, the gain is what it makes of ones.
    # forward() rather than a call, which would run the hooks of a plan that is held.
    return norm.forward(x.new_ones(x.shape[-1])) * (1 + eps) ** 0.5


def _centered(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def _certify(norm: nn.Module, held_at: Callable[[Tensor], Linear], x: Tensor) -> None:
    """Raise ModelError unless a norm does to one vector what it is taken to do."""
    probe = torch.arange(1, x.shape[-1] + 1, device=x.device).sin().to(x.dtype)
    expected, found = held_at(probe)(probe), norm.forward(probe)
    bias = getattr(norm, "bias", None)
    expected = expected if bias is None else expected + bias
    # Norms of transformers compute in float32, in a model of float64 too.
    limit = max(1e-4, 16 * torch.finfo(x.dtype).eps) * expected.abs().max()
    if not bool((found - expected).abs().max() <= limit):
        raise ModelError(
            f"{type(norm).__name__} is not the LayerNorm or RMSNorm that its name says: its scale is unknown"
        )


def post_norm(block: Block, z: Tensor) -> Linear:
    """How a layer's attention output is scaled on its way into the stream, of a head's part [..., H, M] or [..., M]: by
    the norm on it, where there is one, and by the layer's own factor.

    Args:
        block: the block.
        z: what the heads mix, [..., H, D], whose sum sets the scale.
    """
    norm, factor = block.of_attention.post, block.of_attention.scale
    if norm is None:
        return lambda part: part if factor == 1.0 else part * factor
    frozen = frozen_norm(norm, block.attention.out.forward(z.flatten(-2)))

    def scaled(part: Tensor) -> Tensor:
        return frozen(part) if factor == 1.0 else frozen(part) * factor

    def each(part: Tensor) -> Tensor:
        # Over heads, the scale is that of their sum.
        return scaled(part.movedim(-2, 0)).movedim(0, -2) if part.ndim == z.ndim else scaled(part)

    return each


def head_outputs(block: Block, z: Tensor, post: Linear | None = None) -> Tensor:
    """What each head adds to the residual stream, [..., H, M], of z [..., H, D]; `post` is the block's `post_norm`."""
    weight, _ = linear_weight(block.attention.out)
    post = post_norm(block, z) if post is None else post
    return post(
        torch.einsum("...hd,mhd->...hm", z, weight.unflatten(1, (block.attention.q.heads, block.attention.q.width)))
    )


def bias_output(block: Block, z: Tensor, post: Linear | None = None) -> Tensor | None:
    """What attention adds beside its heads, [..., M] or [M]: biases of its output and of the norm on that; or None."""
    _, bias = linear_weight(block.attention.out)
    around = block.of_attention
    own = getattr(around.post, "bias", None)
    if bias is not None and (around.post is not None or around.scale != 1.0):
        bias = (post_norm(block, z) if post is None else post)(bias.expand(*z.shape[:-2], -1))
    return own if bias is None else bias if own is None else bias + own
