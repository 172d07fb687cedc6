"""Fast scores of every edge, through one interface: how large its exact effect would be, to first order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooks import Inputs, Model, Plan, Site, World, patch
from hooks.editing import Edits
from hooks.errors import MetricError, PathError, nearest
from hooks.meter import Meter
from hooks.worlds import default_budget, exposed_layers, hooked_pass, rows_per_pass
from interp.axes import Axis
from interp.metrics import Metric, call
from interp.paths.adaptive import adaptive
from interp.paths.exact import cells_of, describe, edge_sweep
from interp.paths.graph import QKV, Graph
from interp.paths.measuring import Measure
from interp.paths.readers import responses
from interp.paths.rewire import span_tokens
from interp.paths.sources import Pair, pair_of
from interp.paths.streams import require_additive
from interp.results import Result
from interp.sweeps import assemble, check_model, source_metrics

METHODS = ("eap", "eap-ig", "receiver-exact", "exact", "adaptive")
SOME = 16
"""Writers whose changes are held at a time."""
BACKWARD = 2
"""A backward pass costs about two forward passes."""


@torch.no_grad()
def edge_scores(
    model: Model,
    clean: Inputs,
    corrupt: Inputs | None,
    *,
    metric: Metric,
    method: str = "eap",
    graph: Graph | None = None,
    direction: str = "denoising",
    values: str = "patch",
    reference: Inputs | None = None,
    pooled: bool = False,
    steps: int = 5,
    top: int = 100,
    sample: int = 100,
    budget: int | None = None,
    progress: bool | None = None,
    seed: int = 0,
) -> Result:
    """Score every edge of a graph.

    - "eap" (Syed et al. 2023): sum over positions of <d_u, gradient of the metric at in_v>, in the run that is edited.
    - "eap-ig" (Hanna et al. 2024): the gradient averaged over `steps` points between the two prompts' embeddings,
      corrupt + k / steps (clean - corrupt) for k = 1 .. steps.
    - "receiver-exact": <gradient at what v computes, the exact change of that when v reads in_v + d_u>: the norm, and
      an MLP's nonlinearity, are exact, and what follows is first-order. Edges into the logits are exact.
    - "exact": `edge_sweep`.
    - "adaptive": "receiver-exact", then the `top` largest and a random `sample` of the rest exactly; see `adaptive`.

    Memory grows with rows x tokens x heads x width, and not with the number of writers.

    Args:
        model, clean, corrupt, metric, graph, direction, values, reference, pooled, budget, progress, seed: as in
            `edge_sweep`; the metric is differentiable.
        method: one of `METHODS`.
        steps: points of "eap-ig".
        top, sample: of "adaptive".

    Returns:
        A `Result` with one axis, "edge", like that of `edge_sweep`; its config has "method".

    Raises:
        PathError: the method is unknown, or there is no corrupt run to integrate from.
        MetricError: the metric has no gradient.
    """
    if method not in METHODS:
        raise PathError(f"method is one of {', '.join(METHODS)}, not {method!r}{nearest(str(method), METHODS)}")
    graph = Graph.of(model) if graph is None else graph
    graph.require(model)
    options: dict[str, Any] = {
        "metric": metric, "graph": graph, "direction": direction, "values": values, "reference": reference,
        "pooled": pooled, "budget": budget, "progress": progress, "seed": seed,
    }  # fmt: skip
    if method == "exact":
        result = edge_sweep(model, clean, corrupt, **options)
        result.config["method"] = "exact"
        return result
    if method == "adaptive":
        fast = edge_scores(model, clean, corrupt, method="receiver-exact", **options)
        return adaptive(
            fast, lambda edges: edge_sweep(model, clean, corrupt, edges=edges, **options), top, sample, seed
        )
    check_model(model, "denoising")
    if graph.query_heads and any(group > 1 for group in graph.groups):
        raise PathError("the model has key/value heads: first-order scores need a graph with query_heads=False")
    if method == "eap-ig" and (not isinstance(steps, int) or steps < 1):
        raise PathError(f"eap-ig averages over one or more steps, not {steps!r}")
    pair = pair_of(model, clean, corrupt, direction, values, reference, pooled, seed, budget)
    require_additive(pair.base)
    inputs, run = pair.base.inputs, pair.source.run
    source = World(run.inputs) if run is not None and values == "patch" else None
    meter = Meter(model.architecture)
    measure = Measure.of(model, metric, inputs, source, budget=budget, seed=seed, meter=meter)
    found = np.zeros((1, len(graph) + 2, len(inputs)))
    # The graph of a backward pass keeps every layer's activations, and readers' gradients come on top.
    limit = (budget if budget is not None else default_budget(model.device)) // (2 * model.n_layers)
    step = rows_per_pass(model, inputs, limit)
    for start in range(0, len(inputs), step):
        window = slice(start, min(start + step, len(inputs)))
        scores, base = _scores(measure, graph, pair.rows(window), window, method, steps)
        found[0, :2, window] = base
        found[0, 2:, window] = base + scores
    if method == "receiver-exact":
        exact = edge_sweep(model, clean, corrupt, readers="logits", **options)
        at = [graph.index[name] + 2 for name in exact.axes[0].values]
        found[0, at] = exact.base + exact.effect
        meter.work += exact.config["forward_equivalents"] * meter.row(1) * float(inputs.lengths.double().mean())
    measured_source = None if source is None else source_metrics(model, [metric], source, [measure.others], budget)
    status = np.zeros(found.shape[1:], np.int8)
    axis = Axis("edge", graph.edges)
    result = assemble(
        found, status, (axis,), cells_of(graph, graph.listed, inputs), [metric], False, measured_source, inputs, model
    )
    result.config.update(describe(model, graph, pair, "edge", values, "recompute", seed))
    result.config["method"] = method if method != "eap-ig" else f"eap-ig ({steps} steps)"
    result.config["forward_equivalents"] = meter.forwards(float(inputs.lengths.double().mean()))
    return result


def _points(pair: Pair, method: str, steps: int) -> list[float]:
    """How far from the edited run to the other one the gradient is taken."""
    if method != "eap-ig":
        return [0.0]
    fractions = [k / steps for k in range(1, steps + 1)]  # of the way from corrupt to clean
    return fractions if pair.direction == "denoising" else [1 - f for f in fractions]


def _scores(
    measure: Measure, graph: Graph, pair: Pair, window: slice, method: str, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scores float64 [edges, b] of a range of rows, and the metric of the edited run [b]."""
    scores = np.zeros((len(graph), window.stop - window.start))
    base = np.zeros(0)
    points = _points(pair, method, steps)
    line = pair.stack(graph.writers[:1])[0]
    exactly = method == "receiver-exact"
    for fraction in points:
        gradients = _Gradients(measure, graph, pair, window, fraction, line)
        if fraction == 0.0:
            base = gradients.metric
        for layer in range(graph.layers + 1):
            readers = [i for i, reader in enumerate(graph.readers) if reader.layer == layer]
            if exactly and layer == graph.layers:
                continue
            last = max(graph.readers[i].time for i in readers)
            writers = [i for i, writer in enumerate(graph.writers) if writer.time < last]
            respond = gradients.at_outputs if exactly else gradients.at_inputs(layer)
            # A layer's worth of writers at a time, so that memory does not grow with their number.
            for start in range(0, len(writers), SOME):
                some = writers[start : start + SOME]
                changes = pair.stack([graph.writers[i] for i in some])
                part = respond(layer, changes)  # [S, U, R, b]
                edges = graph.table[np.ix_(range(len(graph.span_names)), some, readers)]
                there = edges >= 0
                scores[edges[there]] += part.to("cpu", torch.float64).numpy()[there] / len(points)
    if not len(base):
        base = measure.all([World(measure.inputs)])[0, window]
    return scores, base


class _Gradients:
    """The gradients of a metric in one run, at what readers read and compute."""

    def __init__(
        self, measure: Measure, graph: Graph, pair: Pair, window: slice, fraction: float, line: Tensor
    ) -> None:
        self.measure, self.graph, self.pair = measure, graph, pair
        model, inputs = measure.model, measure.inputs
        self.arch = model.architecture
        sites = []
        for layer, block in enumerate(self.arch.blocks):
            sites += [Site(name, layer) for name in ("attn_in", *QKV)]
            sites += [Site(name, layer) for name in ("mlp_in", "mlp_out")] if block.mlp is not None else []
        sites.append(Site("resid_post", model.n_layers - 1))
        plan = Plan()
        if fraction:
            embedded = pair.base.embedded + fraction * line
            whole = embedded.new_zeros((len(inputs), *embedded.shape[1:]))
            whole[window] = embedded
            plan = Plan((patch(Site("resid_pre", 0), whole),))
        edits = Edits(World(inputs, plan), model.sizes, {}, measure.seed, window)
        captures = [*sites, *measure.bound.reads]
        expose = exposed_layers([], measure.bound.reads)
        with torch.enable_grad():
            session, _ = hooked_pass(model, [edits], [captures], expose, graph=True)
            kept = [session.kept[0][i] for i in range(len(captures))]
            values = [*kept[len(sites) :], *(other[window] for other in measure.others)]
            measured = call(measure.bound, measure.metric.name, window, values)
            if not measured.requires_grad:
                raise MetricError(f"metric {measure.metric.name!r} has no gradient: score edges with method='exact'")
            found = torch.autograd.grad(measured.sum(), kept[: len(sites)], allow_unused=True)
        real = inputs.mask[window].to(measured.device)
        self.values = {site.key: value.detach() for site, value in zip(sites, kept, strict=False)}
        self.gradients = {
            site.key: torch.zeros_like(value) if g is None else _masked(g, real)
            for site, value, g in zip(sites, kept, found, strict=False)
        }
        self.metric = measured.detach().to("cpu", torch.float64).numpy()
        tokens = int(inputs.mask[window].sum())
        if measure.meter is not None:
            measure.meter.work += (1 + BACKWARD) * measure.meter.row(tokens)
        self.spans = [
            None if span is None else span_tokens(graph, span, pair.base.inputs, model).to(measured.device)
            for span in graph.span_names
        ]

    def at_inputs(self, layer: int) -> Callable[[int, Tensor], Tensor]:
        """What gives <d_u, gradient at in_v> summed over positions, [S, U, R, b], of changes [U, b, T, M]."""
        gradient = torch.cat([self._of_input(kind, layer) for kind in _kinds(self.graph, layer)], 2)

        def respond(layer: int, changes: Tensor) -> Tensor:
            return torch.stack([torch.einsum("ubtm,btrm->urb", c, gradient) for c in self._by_span(changes)])

        return respond

    def at_outputs(self, layer: int, changes: Tensor) -> Tensor:
        """<what v computes from in_v + d_u less what it does, the gradient there>, [S, U, R, b]."""
        found = []
        for masked in self._by_span(changes):
            parts = []
            for kind in _kinds(self.graph, layer):
                now, before = (self._computed(kind, layer, change) for change in (masked, torch.zeros_like(masked[:1])))
                total: Any = 0
                for name in now:
                    gradient = self.gradients[Site(name, layer).key]
                    per_head = (
                        "ubtm,btm->ub" if kind == "mlp" else "ubthd,bthd->uhb" if kind in QKV else "ubthd,bthd->ub"
                    )
                    product = torch.einsum(per_head, now[name] - before[name], gradient)
                    total = total + (product if kind in QKV else product.unsqueeze(1))
                parts.append(total)
            found.append(torch.cat(parts, 1))
        return torch.stack(found)

    def _by_span(self, changes: Tensor) -> list[Tensor]:
        return [changes if span is None else changes * span.to(changes)[..., None] for span in self.spans]

    def _computed(self, kind: str, layer: int, change: Tensor) -> dict[str, Tensor]:
        base, block = self.pair.base, self.arch.blocks[layer]
        meter, tokens = self.measure.meter, change[..., 0].numel()
        if kind == "mlp":
            assert block.mlp is not None
            assert block.norm2 is not None
            out = block.mlp.module(block.norm2(base.read_by(kind, layer) + change))
            if meter is not None:
                meter.block(layer, "mlp", tokens)
            return {"mlp_out": out if block.post2 is None else block.post2(out)}
        if kind == "attn":
            return {name: responses(base, name, layer, change)[name] for name in QKV}
        if meter is not None:
            meter.block(layer, kind, tokens)
        return responses(base, kind, layer, change)

    def _of_input(self, kind: str, layer: int) -> Tensor:
        """The gradient at what each reader of a kind reads, [b, T, R, M]."""
        if kind == "logits":
            return self.gradients["resid_post", layer - 1, None].unsqueeze(2)
        if kind in ("mlp", "attn"):
            return self.gradients[Site(f"{kind}_in", layer).key].unsqueeze(2)
        block = self.arch.blocks[layer]
        projection, read = getattr(block, kind), self.values[Site("attn_in", layer).key]
        with torch.enable_grad():
            copies = read.unsqueeze(2).expand(-1, -1, projection.heads, -1).detach().requires_grad_()
            out = projection.per_head(block.norm1(copies))
            return torch.autograd.grad(out, copies, self.gradients[Site(kind, layer).key])[0]


def _masked(gradient: Tensor, real: Tensor) -> Tensor:
    return gradient * real.reshape(*real.shape, *[1] * (gradient.ndim - 2)).to(gradient)


def _kinds(graph: Graph, layer: int) -> list[str]:
    """The kinds of a layer's readers, in the graph's order."""
    return list(dict.fromkeys(reader.kind for reader in graph.readers if reader.layer == layer))
