"""Where in the picture, and at which words, attention causes the answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooks import Inputs, InputsError, MetricError, Model, site, zero
from interp.grids import grid
from interp.metrics import Metric, call
from interp.sweeps import sweep


def token_map(
    model: Model, inputs: Inputs, *, metric: Metric, exact: bool = False, layers: Any = None, **options: Any
) -> Tensor:
    """The effect on a metric of all attention to each token, M - M without those edges.

    To first order the sum over layers, heads and queries of <dM/da, a>, by one backward pass; exact by a world for each
    position, in which the edges to it carry nothing.

    Args:
        model: the wrapped model.
        inputs: the prompts.
        metric: what is measured; it compares with no other run.
        exact: knock the edges out.
        layers: which; None for all.
        **options: as of `interp.sweep`, where it is exact.

    Returns:
        float64 [B, T] by column of the inputs; nan at padding.

    Raises:
        MetricError: the metric has no gradient, or compares with another run.
    """
    chosen = tuple(range(model.n_layers) if layers is None else layers)
    if exact:
        cells = grid("pattern", layer={"all": chosen}, key_pos="all")
        found = sweep(model, inputs, None, cells, metric=metric, intervention=zero, **options)
        by_position = torch.as_tensor(-found.effect[0]).T  # [B, positions]
    else:
        by_position = _first_order(model, inputs, metric, chosen)
    index, real = inputs.columns.index, inputs.mask.bool().cpu()
    return torch.where(real, by_position.gather(1, index.clamp_max(by_position.shape[1] - 1)), torch.nan)


def _first_order(model: Model, inputs: Inputs, metric: Metric, layers: tuple[int, ...]) -> Tensor:
    if metric.reference is not None:
        raise MetricError(f"{metric.name} compares with another run, which a map has none of")
    bound = metric.bind(model, inputs)
    places = [site("pattern", layer) for layer in layers]
    run = model.run(inputs, capture=[*places, *bound.reads], grad=True)
    with torch.enable_grad():
        measured = call(bound, metric.name, slice(0, len(inputs)), [run.tape[read] for read in bound.reads])
    if not measured.requires_grad:
        raise MetricError(f"metric {metric.name!r} has no gradient: exact=True measures it")
    total = torch.zeros(inputs.ids.shape, dtype=torch.float64)
    for place, gradient in zip(places, run.gradient(measured, *places), strict=True):
        pattern = run.tape[place].detach()
        total += torch.where(pattern == 0, 0, gradient * pattern).sum((1, 2)).to("cpu", torch.float64)
    # From columns to positions, of which padding has none.
    real = inputs.mask.bool().cpu()
    return torch.zeros_like(total).scatter_add(1, inputs.columns.index, torch.where(real, total, 0))


def image_map(tokens: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
    """A map over tokens as one over the patches of the picture, [B, h, w].

    Args:
        tokens: [B, T], as `token_map` gives it.
        image: bool [B, T], the columns of the image, as many in every row.
        size: (h, w), how many patches the picture has each way, row by row.

    Raises:
        InputsError: the image has another number of tokens.
    """
    count = int(image.sum(1)[0])
    if not bool((image.sum(1) == size[0] * size[1]).all()):
        raise InputsError(f"{size[0]} x {size[1]} patches, and the image is {count} tokens")
    return tokens[image].reshape(len(tokens), *size)


def overlay(picture: Any, values: Any, ax: Any = None, *, largest: float | None = None, alpha: float = 0.55) -> Any:
    """Draw a picture with a map over it: red where attention speaks for the answer, blue where against it.

    Args:
        picture: [3, height, width] or [height, width, 3], 0 to 1; what lies outside is cut off.
        values: [h, w].
        ax: where; None for a new figure.
        largest: value of the strongest colour; default the largest of these.
        alpha: how much of the picture the map covers.

    Returns:
        The axes.
    """
    import matplotlib.pyplot as plt

    ax = plt.subplots()[1] if ax is None else ax
    shown = np.asarray(picture, dtype=np.float64)
    if shown.ndim == 3 and shown.shape[0] in (1, 3):
        shown = shown.transpose(1, 2, 0)
    height, width = shown.shape[:2]
    values = np.asarray(values, dtype=np.float64)
    largest = float(np.nanmax(np.abs(values))) if largest is None else largest
    ax.imshow(shown.clip(0, 1), extent=(0, width, height, 0))
    ax.imshow(
        values,
        cmap="RdBu_r",
        vmin=-largest,
        vmax=largest,
        alpha=alpha,
        extent=(0, width, height, 0),
        interpolation="nearest",
    )
    ax.set_xticks([])
    ax.set_yticks([])
    return ax


def said(words: list[str], values: Any, ax: Any = None, *, largest: float | None = None) -> Any:
    """Draw words on the colours of a map over them.

    Args:
        words: of the tokens, in order.
        values: [T], as many.
        ax: where; None for a new figure.
        largest: value of the strongest colour.

    Raises:
        InputsError: other numbers of words and values.

    Returns:
        The axes.
    """
    import matplotlib.pyplot as plt

    values = np.asarray(values, dtype=np.float64)
    if len(words) != len(values):
        raise InputsError(f"{len(words)} words and {len(values)} values")
    ax = plt.subplots(figsize=(0.6 * len(words) + 1, 0.6))[1] if ax is None else ax
    largest = float(np.nanmax(np.abs(values))) if largest is None else largest
    ax.imshow(values[None], cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
    for at, word in enumerate(words):
        strong = abs(values[at]) > 0.6 * largest
        ax.text(
            at, 0, word, ha="center", va="center", rotation=60 if len(word) > 4 else 0, color="w" if strong else "k"
        )
    ax.set_xticks([])
    ax.set_yticks([])
    return ax
