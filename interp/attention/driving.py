"""Driving and resisting heads: which heads carry a false premise into the answer (MACI, arXiv 2605.19250)."""

from __future__ import annotations

from typing import Any

from hooks import Inputs, Model
from interp.metrics import Metric
from interp.paths import Graph, Pair, edge_sweep
from interp.results import Result


def driving_heads(model: Model, conflicting: Inputs, agreeing: Inputs, *, metric: Metric, **options: Any) -> Result:
    """What each head's output under a conflicting text adds directly to the logits, by path patching.

    Each head's edge to the logits is given what the head says under the conflicting text, in a run on the agreeing one.
    Positive where that favours what the metric measures: for a metric that is larger the more the model says the false
    premise, the most positive are driving heads, the most negative resisting ones.

    Args:
        model: a language model.
        conflicting, agreeing: row by row the same but for the premise, of the same lengths.
        metric: of the false premise, such as ``ip.logit_diff(false, true)``.
        **options: as of `interp.paths.edge_sweep`.

    Returns:
        A `Result` with one cell an edge, named as ``a1.h2->logits``.
    """
    graph = Graph.of(model)
    edges = [
        f"a{layer}.h{head}->logits"
        for layer in range(model.n_layers)
        for head in range(model.sizes["z", layer, None]["head"])
    ]
    return edge_sweep(Pair(model, conflicting, agreeing), metric=metric, graph=graph, edges=edges, **options)
