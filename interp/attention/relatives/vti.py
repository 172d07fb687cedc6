"""Visual and textual intervention (VTI, Liu et al. 2025, arXiv 2410.15778): steering towards stable features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hooks import Inputs, Model, Plan, ShapeError, Site, intervene, site


def shifts(model: Model, better: Inputs, worse: Inputs, *, stack: str | None = None, pos: int | None = -1) -> Tensor:
    """The direction, at each layer, from how the model sees `worse` inputs to how it sees `better` ones.

    It is the first principal component of the differences over rows (not centred), with their sign.

    Args:
        model: the wrapped model.
        better, worse: row by row the same, say captions without and with what is not in the picture, or pictures
            averaged over masks and masked ones.
        stack: ``"vision"`` for the image encoder.
        pos: the position that is compared; None for the mean over positions.

    Returns:
        [L, M], of the length of the mean difference.

    Raises:
        ShapeError: inputs of different rows.
    """
    if len(better) != len(worse):
        raise ShapeError(f"{len(better)} better inputs and {len(worse)} worse ones: a row is a pair")
    count = len([1 for name, _, at in model.sizes if name == "resid_post" and at == stack])
    places: list[Site | str] = [replace(site("resid_post", layer, pos=pos), stack=stack) for layer in range(count)]
    one, two = (model.run(inputs, capture=places).tape for inputs in (better, worse))
    found = []
    for place in places:
        change = (one[place].mean(1) - two[place].mean(1)).double()  # [B, M]
        direction = torch.linalg.svd(change, full_matrices=False).Vh[0]
        along = change @ direction
        found.append(direction * along.mean())
    return torch.stack(found).to(one[places[0]].dtype)


def vti(
    directions: Tensor, alpha: float = 0.4, *, stack: str | None = None, layers: Sequence[int] | None = None
) -> Plan:
    """h + alpha times the layer's direction, scaled back to the norm of h, at every layer and token.

    Args:
        directions: [L, M], of `shifts`.
        alpha: strength.
        stack: where they are of.
        layers: which; None for all.
    """

    def at(layer: int) -> Site:
        return replace(site("resid_post", layer), stack=stack)

    chosen = range(len(directions)) if layers is None else layers
    return Plan(tuple(intervene(at(layer), _towards(directions[layer], alpha)) for layer in chosen))


def _towards(direction: Tensor, alpha: float):
    def turned(h: Tensor, ctx: object) -> Tensor:
        moved = h + alpha * direction.to(h)
        return moved * (h.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True))

    return turned
