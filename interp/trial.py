"""One model that is tried on some rows: which sites, by what edits, and what counts as the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hooks import Inputs, Intervention, Model, Plan, Run, Site, scale, steer
from interp.checks import Check

ALLOWED = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference that is taken for rounding, relative to the largest entry."""


class Trial:
    """A model and inputs on which it is tried, and what is compared there.

    Args:
        model: the model.
        inputs: the rows that are run.
        seed: of the edits.

    Attributes:
        layers: that are looked at: the first, the middle and the last.
        ends: what a model returns: logits or states, and pooled vectors.
        places: the sites of these layers and outside of them.
        values: what stands at them in a plain run; `plain`: what that returned.
    """

    def __init__(self, model: Model, inputs: Inputs, seed: int) -> None:
        model.refresh()
        self.model, self.inputs, self.seed = model, inputs, seed
        depth = model.n_layers
        self.layers = sorted({0, depth // 2, depth - 1})
        self.ends = [model.architecture.end, *([Site("pooled")] if model.architecture.pooler is not None else [])]
        kinds = [(s.name, s.stack, bool(s.layers)) for s in model.sites() if s.stack != "vision"]
        self.places = [Site(name, layer, stack) for name, stack, inside in kinds
                       for layer in (self.layers if inside else [None])
                       if Site(name, layer, stack).key in model.sizes]  # fmt: skip
        self.values: dict[Site, Tensor] = {}
        self.plain: Tensor | None = None

    def near(self, a: Tensor, b: Tensor) -> float:
        """The largest difference relative to the largest entry, where both are finite."""
        same_infinity = a.isinf() & (a == b)
        one, two = (torch.where(same_infinity, 0, x).double() for x in (a, b))
        most = float(two.abs().max()) if two.numel() else 0.0
        return float((one - two).abs().max()) / max(most, 1e-30) if one.numel() else 0.0

    @property
    def allowed(self) -> float:
        return ALLOWED.get(self.model.dtype, 1e-1)

    def real(self, logits: Tensor) -> Tensor:
        """The logits of tokens that are real."""
        return logits if logits.shape[1] == 1 else logits[self.inputs.mask.to(logits.device)]

    def returned(self, plan: Plan | Intervention | None = None, capture: Sequence[Site] = ()) -> tuple[Run, Tensor]:
        """A run, and what a model returns of real tokens: logits, or states and pooled vectors."""
        run = self.model.run(self.inputs, plan, capture=[*capture, *self.ends[1:]])
        return run, torch.cat([self.real(x).flatten() for x in (run.output, *(run.tape[s] for s in self.ends[1:]))])

    def compared(self, group: str, name: str, a: Tensor, b: Tensor) -> Check:
        gap = self.near(a, b)
        return Check(group, name, gap <= self.allowed, "" if gap <= self.allowed else f"differ by {gap:.1e}")

    def tried(self, group: str, name: str, what: Callable[[], Check]) -> Check:
        try:
            return what()
        except Exception as error:  # an adapter may be wrong in any way
            return Check(group, name, False, f"{type(error).__name__}: {error}")

    def edit(self, place: Site) -> Intervention:
        """A change of a site that its readers notice."""
        lengths = self.inputs.tokens_of(place)[0].lengths if self.has_pos(place) else self.inputs.lengths
        where = place.at(pos=min(1, int(lengths.min()) - 1)) if self.has_pos(place) else place
        if place.name == "pattern":
            return scale(where, 0.5)
        value = self.values[place]
        finite = value[value.isfinite()].double()
        size = float(finite.pow(2).mean().sqrt()) if finite.numel() else 1.0
        generator = torch.Generator().manual_seed(self.seed)
        if place.name == "scores":
            return steer(where.at(key_pos=0), torch.tensor(max(size, 1.0)))
        vector = torch.randn(value.shape[-1], generator=generator, dtype=torch.float64) * max(size, 1e-3)
        return steer(where, vector.to(value.dtype))

    def has_pos(self, place: Site) -> bool:
        return "pos" not in self.model.sizes[place.key]
