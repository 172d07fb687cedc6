"""Circuits in the JSON form that the EAP-IG code reads and writes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from hooks import PathError
from interp.paths.circuits import Circuit
from interp.paths.files import number, one, read, write
from interp.paths.graph import Graph


def to_eap_ig(circuit: Circuit, path: str | os.PathLike[str]) -> Path:
    """Write a circuit in the JSON form of the EAP-IG code (``Graph.from_json`` there reads it).

    An edge without a score is written with 0, which is what it has there.

    Raises:
        PathError: that form has heads, q, k and v of every query head, an MLP in every layer, and no positions; this
            graph does not.
    """
    graph = circuit.graph
    grouped = any(group > 1 for group in graph.groups) and not graph.query_heads
    if graph.granularity != "heads" or graph.spans is not None or grouped or not all(graph.mlps):
        raise PathError(
            "the EAP-IG form has heads and MLPs in every layer, q, k and v of every query head, and no positions: "
            f"{graph} cannot be written so"
        )
    if len(set(graph.heads)) != 1:
        raise PathError(f"the EAP-IG form has one number of heads for all layers, this graph {graph.heads}")
    nodes = set(circuit.nodes)
    scores = np.where(np.isnan(circuit.scores), 0.0, circuit.scores)
    data = {
        "cfg": {
            "n_layers": graph.layers,
            "n_heads": graph.heads[0],
            "parallel_attn_mlp": graph.parallel,
            "d_model": graph.width,
        },
        "nodes": {name: {"in_graph": name in nodes} for name in [*(w.name for w in graph.writers), "logits"]},
        "edges": {
            name: {"score": float(score), "in_graph": bool(inside)}
            for name, score, inside in zip(graph.edges, scores, circuit.members, strict=True)
        },
    }
    return write(Path(path), data)


def from_eap_ig(path: str | os.PathLike[str]) -> Circuit:
    """Read the JSON form of the EAP-IG code. Neuron-level entries are not kept.

    Raises:
        PathError: the file is not in that form, or names edges that its configuration does not have.
    """
    source = Path(path)
    data = read(source)
    try:
        cfg, edges = data["cfg"], data["edges"]
        layers, heads = one(cfg["n_layers"], int), one(cfg["n_heads"], int)
        graph = Graph(
            heads=(heads,) * layers, groups=(1,) * layers, mlps=(True,) * layers,
            parallel=one(cfg["parallel_attn_mlp"], bool), width=one(cfg["d_model"], int),
        )  # fmt: skip
        members, scores = np.zeros(len(graph), bool), np.full(len(graph), np.nan)
        for name, entry in edges.items():
            at = graph.index[graph.edge(name).name]
            scores[at], members[at] = number(entry["score"]), one(entry["in_graph"], bool)
    except PathError as error:
        raise PathError(f"{source}: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise PathError(f"{source} is not in the form of the EAP-IG code: {type(error).__name__} {error}") from None
    return Circuit(graph, members, scores, {"found by": "imported", "file": source.name})
