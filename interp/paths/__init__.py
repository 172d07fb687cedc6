"""Path interventions and circuits: which connections of a model carry its answer.

from interp import paths

pair = paths.Pair.of(model, clean, corrupt)
effects = paths.edge_sweep(pair, metric=metric)
graph = paths.Graph.of(model)
circuit = paths.greedy(effects, graph, 20)
curve = paths.faithfulness(pair, effects, graph, metric=metric)

What takes a pair takes ``model, clean, corrupt`` in its place too.
"""

from interp.paths.circuits import Circuit, circuit_metric
from interp.paths.effects import path_patch
from interp.paths.exact import edge_sweep
from interp.paths.exchange import from_eap_ig, to_eap_ig
from interp.paths.graph import Graph
from interp.paths.nodes import Edge, Reader, Writer
from interp.paths.pair import Pair
from interp.paths.quality import Curve, auroc, completeness, faithfulness, minimality, split_half, stability
from interp.paths.repair import Repair, repair, repair_plan
from interp.paths.scores import METHODS, edge_scores
from interp.paths.search import acdc, causal_graph, greedy, top_k
from interp.paths.streams import check_additive

__all__ = [
    "METHODS",
    "Circuit",
    "Curve",
    "Edge",
    "Graph",
    "Pair",
    "Reader",
    "Repair",
    "Writer",
    "acdc",
    "auroc",
    "causal_graph",
    "check_additive",
    "circuit_metric",
    "completeness",
    "edge_scores",
    "edge_sweep",
    "faithfulness",
    "from_eap_ig",
    "greedy",
    "minimality",
    "path_patch",
    "repair",
    "repair_plan",
    "split_half",
    "stability",
    "to_eap_ig",
    "top_k",
]
