"""The gradients of a metric in one run, at what readers read and at what they compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hooks import MetricError, PathError, Plan, Site, World, patch, record
from interp.attribution import require_rows_apart
from interp.metrics import call
from interp.paths.measuring import Measure
from interp.paths.nodes import QKV
from interp.paths.readers import responses
from interp.paths.streams import Streams, edits

BACKWARD = 2
"""A backward pass costs about two forward passes."""
Respond = Callable[[Tensor], Tensor]
"""From changes of writers [U, b, T, M] to scores [S, U, R, b], of S spans and R readers of one layer."""


class Gradients:
    """One forward and backward pass over some rows.

    Args:
        measure: the metric, bound to all rows.
        base: the edited run's streams of these rows.
        window: which rows.
        spans: for each span the tokens that it is, bool [b, T]; None for all.
        embedded: embeddings [b, T, M] that the gradients are taken at; by default the edited run's.

    Attributes:
        metric: the metric there, float64 [b].

    Raises:
        MetricError: the metric has no gradient.
        PlanError: a plan that is held on the model mixes rows.
    """

    def __init__(
        self,
        measure: Measure,
        base: Streams,
        window: slice,
        spans: Sequence[Tensor | None],
        embedded: Tensor | None = None,
    ) -> None:
        self.base, self.meter = base, measure.meter
        self.spans = [None if span is None else span.to(base.embedded)[..., None] for span in spans]
        model, inputs = measure.model, measure.inputs
        self.blocks = model.architecture.blocks
        sites = []
        for layer, block in enumerate(self.blocks):
            sites += [Site(name, layer) for name in ("attn_in", *QKV)]
            sites += [Site(name, layer) for name in ("mlp_in", "mlp_out")] if block.mlp is not None else []
        sites += [*base.per_head, Site("resid_post", model.n_layers - 1)]
        require_rows_apart(model.held_on(inputs)[0])
        world = World(inputs)
        if embedded is not None:
            whole = embedded.new_zeros((len(inputs), *embedded.shape[1:]))
            whole[window] = embedded
            world = World(inputs, Plan((patch(Site("resid_pre", 0), whole),)))
        captures = [*sites, *measure.bound.reads]
        (outcome,) = record(
            model, [world], captures, grad=True, seed=measure.seed, budget=measure.budget, rows=window, together=True
        )
        kept = outcome.values
        with model.suspended(), torch.enable_grad():
            values = [*kept[len(sites) :], *(other[window] for other in measure.others)]
            measured = call(measure.bound, measure.metric.name, window, values)
            if not measured.requires_grad:
                raise MetricError(f"metric {measure.metric.name!r} has no gradient: score edges with method='exact'")
            # A site that the metric does not depend on (an MLP after the position that it reads, say) has none.
            found = torch.autograd.grad(measured.sum(), kept[: len(sites)], allow_unused=True)
        real = inputs.mask[window].to(measured.device)
        self.values = {site.key: value.detach() for site, value in zip(sites, kept, strict=False)}
        self.gradients = {
            site.key: torch.zeros_like(value) if g is None else _masked(g, real)
            for site, value, g in zip(sites, kept, found, strict=False)
        }
        self.metric = measure.numbers(measured)
        self.meter.work += (1 + BACKWARD) * sum(map(self.meter.row, inputs.lengths[window].tolist()))

    def at_inputs(self, kinds: Sequence[str], layer: int) -> Respond:
        """<d_u, gradient at in_v>, summed over positions."""
        gradient = torch.cat([self._of_input(kind, layer) for kind in kinds], 2)
        return lambda changes: torch.stack(
            [torch.einsum("ubtm,btrm->urb", change, gradient) for change in self._by_span(changes)]
        )

    def at_outputs(self, kinds: Sequence[str], layer: int) -> Respond:
        """<what v computes from in_v + d_u less what it does from in_v, the gradient there>, summed over positions."""
        unchanged = torch.zeros_like(self.base.embedded)
        before = {kind: self._computed(kind, layer, unchanged) for kind in kinds}

        def moved(kind: str, change: Tensor) -> Tensor:
            now = self._computed(kind, layer, change)
            found = [self._along(name, layer, now[name] - before[kind][name]) for name in now]
            # One reader for each head, or one alone.
            return found[0] if kind in QKV else torch.cat(found, 1).sum(1, keepdim=True)

        return lambda changes: torch.stack(
            [torch.cat([moved(kind, change) for kind in kinds], 1) for change in self._by_span(changes)]
        )

    def _by_span(self, changes: Tensor) -> list[Tensor]:
        return [changes if span is None else changes * span for span in self.spans]

    def _along(self, name: str, layer: int, moved: Tensor) -> Tensor:
        """<moved [U, b, T, heads, D], gradient>, [U, heads, b]; a value without heads is one head's."""
        gradient = self.gradients[Site(name, layer).key]
        if gradient.ndim == 3:
            moved, gradient = moved.unsqueeze(3), gradient.unsqueeze(2)
        return torch.einsum("ubthd,bthd->uhb", moved, gradient)

    def _computed(self, kind: str, layer: int, change: Tensor) -> dict[str, Tensor]:
        """What the readers compute from in_v + change, by site."""
        if edits(self.base.held, kind, layer):
            raise PathError(
                f"the plan that is held on the model edits what the {kind} readers of layer {layer} compute, of which "
                "receiver-exact scores take the exact change: use method='eap', 'eap-ig' or 'exact'"
            )
        block, tokens = self.blocks[layer], change[..., 0].numel()
        for part in QKV if kind == "attn" else (kind,):
            self.meter.block(layer, part, tokens)
        if kind != "mlp":
            # At `attn_in` every head reads the same, so its q, k and v are what those of each head's readers would be.
            return {n: responses(self.base, n, layer, change)[n] for n in (QKV if kind == "attn" else (kind,))}
        around = block.of_mlp
        assert around is not None
        with self.base.model.suspended():
            read = around.read(self.base.read_by(kind, layer) + change)
            return {"mlp_out": around.added(around.fn.module(read))}

    def _of_input(self, kind: str, layer: int) -> Tensor:
        """The gradient at what each reader of a kind reads, [b, T, R, M]."""
        if kind == "logits":
            return self.gradients[Site("resid_post", layer - 1).key].unsqueeze(2)
        if kind in ("mlp", "attn"):
            return self.gradients[Site(f"{kind}_in", layer).key].unsqueeze(2)
        alone = Site(f"{kind}_input", layer)
        if alone in self.base.per_head:
            return self.gradients[alone.key]
        # The heads share one tensor that they read, so each head's part is taken through a copy of its own.
        projection, read = getattr(self.blocks[layer].attention, kind), self.values[Site("attn_in", layer).key]
        with self.base.model.suspended(), torch.enable_grad():
            copies = read.unsqueeze(2).expand(-1, -1, projection.heads, -1).detach().requires_grad_()
            out = projection.per_head(self.blocks[layer].of_attention.read(copies))
            return torch.autograd.grad(out, copies, self.gradients[Site(kind, layer).key])[0]


def _masked(gradient: Tensor, real: Tensor) -> Tensor:
    return gradient * real.reshape(*real.shape, *[1] * (gradient.ndim - 2)).to(gradient)
