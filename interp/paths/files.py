"""Circuits as JSON: our own form, which keeps everything, and the one that the EAP-IG code reads and writes."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from hooks.errors import PathError
from hooks.sites import Span
from interp.paths.circuits import Circuit
from interp.paths.graph import Graph

FORMAT = "interp circuit 1"


def save_circuit(circuit: Circuit, path: str | os.PathLike[str]) -> Path:
    """Write a circuit as JSON.

    Raises:
        PathError: its graph has spans that are tensors, which belong to one set of prompts.
    """
    target = Path(path).with_suffix(".json")
    graph = circuit.graph
    data = {
        "format": FORMAT,
        "graph": {
            "heads": list(graph.heads),
            "groups": list(graph.groups),
            "mlps": list(graph.mlps),
            "parallel": graph.parallel,
            "width": graph.width,
            "granularity": graph.granularity,
            "query_heads": graph.query_heads,
            "spans": None if graph.spans is None else [[name, _plain(name, at)] for name, at in graph.spans],
        },
        "edges": [
            {"name": name, "in": bool(inside), "score": None if math.isnan(score) else float(score)}
            for name, inside, score in zip(graph.edges, circuit.members, circuit.scores, strict=True)
        ],
        "config": circuit.config,
    }
    target.write_text(json.dumps(data, indent=1) + "\n")
    return target


def load_circuit(path: str | os.PathLike[str]) -> Circuit:
    """Read a circuit that `save_circuit` wrote.

    Raises:
        PathError: the file is not one.
    """
    source = Path(path).with_suffix(".json")
    data = _read(source)
    if data.get("format") != FORMAT:
        raise PathError(f"{source} is no saved circuit (format {data.get('format')!r}, expected {FORMAT!r})")
    try:
        told = dict(data["graph"])
        spans = told.pop("spans")
        graph = Graph(
            heads=tuple(told["heads"]), groups=tuple(told["groups"]), mlps=tuple(told["mlps"]),
            parallel=bool(told["parallel"]), width=int(told["width"]), granularity=told["granularity"],
            query_heads=bool(told["query_heads"]),
            spans=None if spans is None else tuple((name, _index(at)) for name, at in spans),
        )  # fmt: skip
        names = [edge["name"] for edge in data["edges"]]
        members = np.array([edge["in"] is True for edge in data["edges"]])
        scores = np.array([math.nan if edge["score"] is None else float(edge["score"]) for edge in data["edges"]])
        config = dict(data["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise PathError(f"{source} is a damaged circuit: {type(error).__name__} {error}") from None
    if tuple(names) != graph.edges:
        raise PathError(f"{source} is a damaged circuit: its edges are not those of its graph")
    return Circuit(graph, members, scores, config)


def to_eap_ig(circuit: Circuit, path: str | os.PathLike[str]) -> Path:
    """Write a circuit in the JSON form of the EAP-IG code (`Graph.from_json` there reads it).

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
    scores = np.nan_to_num(circuit.scores)
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
    target = Path(path)
    target.write_text(json.dumps(data) + "\n")
    return target


def from_eap_ig(path: str | os.PathLike[str]) -> Circuit:
    """Read the JSON form of the EAP-IG code. Neuron-level entries are not kept.

    Raises:
        PathError: the file is not in that form, or names edges that its configuration does not have.
    """
    source = Path(path)
    data = _read(source)
    try:
        cfg, edges = data["cfg"], data["edges"]
        layers, heads = int(cfg["n_layers"]), int(cfg["n_heads"])
        graph = Graph(
            heads=(heads,) * layers, groups=(1,) * layers, mlps=(True,) * layers,
            parallel=bool(cfg["parallel_attn_mlp"]), width=int(cfg["d_model"]),
        )  # fmt: skip
        members, scores = np.zeros(len(graph), bool), np.full(len(graph), np.nan)
        for name, entry in edges.items():
            at = graph.index[graph.edge(name).name]
            scores[at], members[at] = float(entry["score"]), entry["in_graph"] is True
    except (KeyError, TypeError, AttributeError) as error:
        raise PathError(f"{source} is not in the form of the EAP-IG code: {type(error).__name__} {error}") from None
    return Circuit(graph, members, scores, {"found by": "imported", "file": source.name})


def _read(source: Path) -> dict[str, Any]:
    try:
        data = json.loads(source.read_text())
    except ValueError as error:
        raise PathError(f"{source} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise PathError(f"{source} holds a {type(data).__name__}, not a circuit")
    return data


def _plain(name: str, at: Any) -> Any:
    if at is None or isinstance(at, int):
        return at
    if isinstance(at, tuple):
        return list(at)
    if isinstance(at, slice):
        return {"start": at.start, "stop": at.stop}
    if isinstance(at, Span):
        return {"start": at.start, "stop": at.stop}
    raise PathError(f"span {name!r} is a tensor of one set of prompts, and cannot be saved with a circuit")


def _index(at: Any) -> Any:
    if isinstance(at, dict):
        return Span(at["start"], at["stop"])
    return tuple(at) if isinstance(at, list) else at
