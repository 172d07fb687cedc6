"""What a run gives back: logits, a tape, an audit, and gradients at captured sites."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .audit import Audit
from .errors import ModelError, PlanError, SiteError, nearest
from .html import table
from .plan.sites import Site, sites_of
from .plan.tape import Tape


@dataclass(frozen=True, eq=False)
class Run:
    """What a run gives back.

    Attributes:
        output: what the model returned, for every token: the logits, or the last states [B, T, M] of a model without a
            head.
        tape: the activations that were asked for.
        audit: what each intervention did.
        taps: what gets the gradient of each value on the tape where a compiler hides the path to it; see `gradient`.
        headless: why there are no logits; empty where there are.
    """

    output: Tensor
    tape: Tape
    audit: Audit
    taps: tuple[Tensor, ...] = ()
    headless: str = ""

    @property
    def logits(self) -> Tensor:
        """[B, T, V]; [B, 1, V] of a classifier.

        Raises:
            ModelError: the model has no head.
        """
        if self.headless:
            raise ModelError(f"there are no logits: {self.headless}")
        return self.output

    def gradient(self, measured: Tensor, *where: Site | str) -> tuple[Tensor, ...]:
        """The gradient of a number at captured sites, of a run with ``grad=True``, compiled or not.

        Args:
            measured: what is differentiated, a tensor of `logits` and of values on the tape; if it is not a number, the
                sum of it. Its graph is kept, to be differentiated again.
            where: sites, as they were captured; none for all.

        Returns:
            One tensor for each site, of the shape of its value; zeros where nothing depends on it.

        Raises:
            SiteError: a site was not captured.
            PlanError: there is nothing to differentiate.
        """
        if not measured.requires_grad:
            raise PlanError("nothing to differentiate: run with grad=True, and measure what depends on a parameter")
        known = list(self.tape)
        chosen = sites_of(where) if where else known
        for place in chosen:
            if place not in known:
                raise SiteError(f"{place} was not captured{nearest(str(place), map(str, known))}")
        # A tap gets what flows back from the value on the tape as well.
        leaves = self.taps or tuple(value for _, value in self.tape.values)
        values = [leaves[known.index(place)] for place in chosen]
        found = torch.autograd.grad(measured.sum(), values, retain_graph=True, allow_unused=True)
        return tuple(torch.zeros_like(v) if g is None else g for v, g in zip(values, found, strict=True))

    def _repr_html_(self) -> str:
        kept = table(("kept", "shape"), [(place, list(value.shape)) for place, value in self.tape.values])
        did = self.audit._repr_html_() if len(self.audit) else ""
        return f"<div><code>Run({self._told})</code></div>{did}{kept if len(self.tape) else ''}"

    def __repr__(self) -> str:
        return f"Run({self._told}, {self.tape}, {self.audit})"

    @property
    def _told(self) -> str:
        return f"{'states' if self.headless else 'logits'} {list(self.output.shape)}"
