"""The routes inside a head: its output, a sum over keys, is what came from the image and what came from the text.

z = z_img + z_txt, with z_m the sum over keys of modality m of a v (causal route gating, arXiv 2605.24024).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooks import Inputs, InputsError, Model, zero
from interp.attribution import attribution
from interp.grids import grid
from interp.metrics import Metric
from interp.results import Result
from interp.sweeps import sweep


@dataclass(frozen=True, eq=False)
class Routes:
    """The effects of the two routes of every head on a metric, M - M without the route.

    Attributes:
        image, text: results with axes [layer, head, row].
    """

    image: Result
    text: Result

    @property
    def visual_share(self) -> np.ndarray:
        """|E_img| / (|E_img| + |E_txt|) of the mean effects, [layer, head]; nan where both are 0."""
        image, text = np.abs(self.image.mean()), np.abs(self.text.mean())
        total = image + text
        return np.divide(image, total, out=np.full(total.shape, np.nan), where=total > 0)

    def prior_dominant(self, share: float = 0.5) -> list[tuple[int, int]]:
        """Heads whose routes disagree and that hear the text: (layer, head), the strongest text route first.

        Args:
            share: the visual share under which a head is one.
        """
        image, text = self.image.mean(), self.text.mean()
        with np.errstate(invalid="ignore"):
            chosen = (image * text < 0) & (self.visual_share < share)
        layers = self.image.axes[0].values
        found = [(int(layers[i]), int(j)) for i, j in zip(*np.nonzero(chosen), strict=True)]
        return sorted(found, key=lambda at: -abs(float(text[list(layers).index(at[0]), at[1]])))


def route_effects(
    model: Model,
    inputs: Inputs,
    image: Tensor,
    *,
    metric: Metric,
    exact: bool = False,
    queries: Any = None,
    **options: Any,
) -> Routes:
    """The effect of the image's and of the text's route of every head.

    To first order <dM/dz, z_m>, of all heads by one backward pass; exact by a world for each route, in which its edges
    carry nothing (their weights are 0, and the others stay what they are).

    Args:
        model: the wrapped model.
        inputs: the prompts.
        image: bool [B, T], the columns of the inputs that are the image's; any other split of the keys does as well.
        metric: what is measured.
        exact: knock each route out, in place of the first-order estimate.
        queries: which tokens' attention, as `pos` of a site; None for all.
        **options: as of `interp.sweep` (exact) or `interp.attribution`.

    Raises:
        InputsError: `image` is no mask over the columns of the inputs, or names none or all of them.
    """
    real = inputs.mask.bool()
    if not isinstance(image, Tensor) or image.dtype != torch.bool or image.shape != real.shape:
        given = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise InputsError(f"image= is a mask bool {list(real.shape)} over the columns of the inputs, not {given}")
    image = image.to(real.device) & real
    if not bool(image.any(1).all()) or not bool((real & ~image).any(1).all()):
        raise InputsError("each row needs columns of both kinds: of the image, and of the text")
    where = {} if queries is None else {"pos": queries}

    def effect(keys: Tensor) -> Result:
        cells = grid("pattern", layer="all", head="all", key_pos=keys, **where)
        measure = sweep if exact else attribution
        found = measure(model, inputs, None, cells, metric=metric, intervention=zero, **options)
        return _negated(found)

    return Routes(effect(image), effect(real & ~image))


def _negated(result: Result) -> Result:
    return replace(result, effect=-result.effect)
