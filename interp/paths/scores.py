"""Fast scores of every edge, through one interface: how large its exact effect would be, to first order."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from hooks import MetricError, PathError, budget_of, nearest, rows_per_pass
from interp.metrics import Metric
from interp.paths.adaptive import adaptive, check_counts
from interp.paths.exact import edge_sweep
from interp.paths.fronts import on_pair
from interp.paths.gradients import Gradients
from interp.paths.graph import Graph, graph_of
from interp.paths.measuring import Measure
from interp.paths.pair import Pair
from interp.paths.rewire import check_heads, span_tokens
from interp.results import Result

METHODS = ("eap", "eap-ig", "receiver-exact", "exact", "adaptive")
WRITERS = 16
"""How many writers' changes are held at once, so that memory does not grow with their number."""


@on_pair()
@torch.no_grad()
def edge_scores(
    pair: Pair,
    *,
    metric: Metric,
    method: str = "eap",
    graph: Graph | None = None,
    steps: int = 5,
    top: int = 100,
    sample: int = 100,
    progress: bool | None = None,
) -> Result:
    """Score every edge of a graph.

    - "eap" (Syed et al. 2023): sum over positions of <d_u, gradient of the metric at in_v>, in the run that is edited.
    - "eap-ig" (Hanna et al. 2024): the gradient averaged over `steps` points between the two prompts' embeddings,
      corrupt + k / steps (clean - corrupt) for k = 1 .. steps. Where values are not patched, the edited run stands for
      clean, and what its embeddings are replaced by for corrupt.
    - "receiver-exact": <gradient at what v computes, the exact change of that when v reads in_v + d_u>. What v computes
      is a head's projected query, key or value, or what an MLP adds to the residual stream: the norm before it and an
      MLP's nonlinearity are exact, and what follows is first-order. Edges into the logits are exact.
    - "exact": `edge_sweep`.
    - "adaptive": "receiver-exact", then the `top` largest and a random `sample` of the rest exactly; see `adaptive`.

    Memory grows with rows x tokens x heads x width, and not with the number of writers.

    Args:
        pair: the two runs; or a model, clean and corrupt prompts in its place, as in `edge_sweep`.
        metric, graph, progress: as in `edge_sweep`; the metric is differentiable.
        method: one of `METHODS`.
        steps: points of "eap-ig".
        top, sample: of "adaptive".

    Returns:
        A `Result` with one axis, "edge", like that of `edge_sweep`; its config has "method".

    Raises:
        PathError: the method is unknown; its `steps`, `top` or `sample` are out of range; or it is first-order, and the
            graph is of query heads that share keys and values.
        MetricError: the metric has no gradient, or it or its gradient is nan.
    """
    if method not in METHODS:
        raise PathError(f"method is one of {', '.join(METHODS)}, not {method!r}{nearest(str(method), METHODS)}")
    model, graph = pair.model, graph_of(pair.model, graph)
    exactly = partial(edge_sweep.bare, pair, metric=metric, graph=graph, progress=progress)
    if method == "exact":
        result = exactly()
        result.config["method"] = "exact"
        return result
    if method == "adaptive":
        check_counts(top, sample)
        fast = edge_scores.bare(pair, metric=metric, method="receiver-exact", graph=graph, progress=progress)
        return adaptive(fast, lambda edges: exactly(edges=edges), top, sample, pair.seed)
    check_heads(graph, "first-order scores")
    if method == "eap-ig" and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise PathError(f"eap-ig averages over one or more steps, not {steps!r}")
    measure = Measure.of(metric, pair)
    inputs = measure.inputs
    spans = [span_tokens(graph, span, inputs, model) for span in graph.span_names]
    points = _points(pair, method, steps)
    base = np.full(len(inputs), np.nan) if 0.0 in points else measure.all(measure.plain[:1])[0][0]
    scores = np.zeros((len(graph), len(inputs)))
    # The graph of a backward pass keeps every layer's activations, and readers' gradients come on top.
    limit = budget_of(model, pair.budget) // (2 * model.n_layers)
    step = rows_per_pass(model, inputs, limit)
    for start in range(0, len(inputs), step):
        window = slice(start, min(start + step, len(inputs)))
        part = pair.rows(window)
        marks = [None if span is None else span[window] for span in spans]
        line = part.stack(graph.writers[:1])[0]
        for fraction in points:
            embedded = part.base.embedded + fraction * line if fraction else None
            gradients = Gradients(measure, part.base, window, marks, embedded)
            if not fraction:
                base[window] = gradients.metric
            scores[:, window] += _scores(graph, part, gradients, method == "receiver-exact") / len(points)
    found = np.concatenate([base[None], base[None], base + scores])
    if np.isnan(scores).any():
        missing = np.flatnonzero(np.isnan(scores).any(0)).tolist()
        raise MetricError(f"the gradient of metric {metric.name!r} is nan on rows {missing}: use method='exact'")
    if method == "receiver-exact":
        exact = exactly(readers="logits")
        at = [graph.index[name] + 2 for name in exact.axes[0].values]
        found[at] = base + exact.effect
        measure.meter.work += exact.config["forward_equivalents"] * measure.meter.row(measure.tokens)
    result = measure.result(graph, found, np.zeros(found.shape, np.int8), graph.listed)
    result.config["method"] = method if method != "eap-ig" else f"eap-ig ({steps} steps)"
    return result


def _points(pair: Pair, method: str, steps: int) -> list[float]:
    """How far from the edited run to the other one the gradient is taken."""
    if method != "eap-ig":
        return [0.0]
    fractions = [k / steps for k in range(1, steps + 1)]  # of the way from corrupt to clean
    return fractions if pair.role == "denoising" else [1 - f for f in fractions]


def _scores(graph: Graph, pair: Pair, gradients: Gradients, exactly: bool) -> np.ndarray:
    """Scores float64 [edges, b] at one point; `exactly` where the response of readers (but the logits) is exact."""
    scores = np.zeros((len(graph), len(pair.base.inputs)))
    for layer in range(graph.layers + (not exactly)):
        readers = [i for i, reader in enumerate(graph.readers) if reader.layer == layer]
        kinds = list(dict.fromkeys(graph.readers[i].kind for i in readers))
        respond = (gradients.at_outputs if exactly else gradients.at_inputs)(kinds, layer)
        last = max(graph.readers[i].time for i in readers)
        writers = [i for i, writer in enumerate(graph.writers) if writer.time < last]
        for start in range(0, len(writers), WRITERS):
            some = writers[start : start + WRITERS]
            numbers = respond(pair.stack([graph.writers[i] for i in some])).to("cpu", torch.float64).numpy()
            places = graph.table[:, some][:, :, readers]
            scores[places[places >= 0]] = numbers[places >= 0]
    return scores
