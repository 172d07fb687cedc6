"""How near what a tower of CLIP or SigLIP pools is to what the other tower pooled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hooks import Inputs, MetricError, Model, Site, sites_of
from interp.metrics import Bound, Metric
from interp.readouts import Rows, wide


def similarity(
    to: Tensor,
    *,
    read: Site | str = "pooled",
    through: Callable[[Tensor], Tensor] | None = None,
    scale: float = 1.0,
    bias: float = 0.0,
) -> Metric:
    """Cosine of a row's pooled vector and another, times `scale`, plus `bias`: with those of a model its logit of an
    image and a text (Radford et al. 2021; Zhai et al. 2023).

    Args:
        to: [P] for all rows, or one for each row [B, P]; of any length.
        read: what is compared: a site of which one position is read, as ``site("ln_final", pos=-1)`` for the end token
            of a CLIPTextModel.
        through: what it goes through first, from [B, M] to [B, P], as ``clip.visual_projection``.
        scale: as ``clip.logit_scale.exp()``; `bias`: as SigLIP's ``logit_bias``.

    Raises:
        MetricError: on use, where `to` is of another width or number of rows, or zero, or several positions are read.
    """
    if not isinstance(to, Tensor) or to.ndim not in (1, 2) or not to.is_floating_point():
        raise MetricError("similarity() compares with a vector [P], or with one for each row [B, P]")
    if not bool((to.norm(dim=-1) > 0).all()):
        raise MetricError("similarity() compares with a vector that is zero, which has no direction")
    (place,) = sites_of(read)
    stated = (to, place, through, float(scale), float(bias))
    return Metric(
        "similarity", _Similarity(to.detach().cpu(), place, through, float(scale), float(bias)), stated=stated
    )


@dataclass(frozen=True, eq=False)
class _Similarity:
    to: Tensor
    read: Site
    through: Callable[[Tensor], Tensor] | None
    scale: float
    bias: float

    def __call__(self, model: Model, inputs: Inputs) -> Bound:
        model.require(self.read)
        if self.to.ndim == 2 and len(self.to) != len(inputs):
            raise MetricError(f"{len(self.to)} vectors to compare with, and {len(inputs)} rows")
        return Bound((self.read,), _Cosine(self.to.expand(len(inputs), -1), self.through, self.scale, self.bias))


@dataclass(frozen=True, eq=False)
class _Cosine:
    to: Tensor
    through: Callable[[Tensor], Tensor] | None
    scale: float
    bias: float

    def __call__(self, rows: Rows, values: Tensor) -> Tensor:
        if values.ndim != 3 or values.shape[1] != 1:
            raise MetricError(f"similarity() reads one vector of each row, not {list(values.shape)}: name one position")
        pooled = values[:, 0] if self.through is None else self.through(values[:, 0])
        if pooled.shape[-1] != self.to.shape[-1]:
            raise MetricError(f"similarity() compares {pooled.shape[-1]} numbers of each row with {self.to.shape[-1]}")
        other = self.to[rows].to(pooled.device)
        cosine = torch.nn.functional.cosine_similarity(wide(pooled), wide(other).to(wide(pooled).dtype), dim=-1)
        return self.scale * cosine + self.bias
