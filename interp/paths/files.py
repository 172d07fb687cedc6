"""Circuits as JSON: our own form, which keeps everything, and the one that the EAP-IG code reads and writes."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from hooks import Span
from hooks.errors import PathError
from hooks.files import pair, write_all
from interp.paths.circuits import Circuit
from interp.paths.graph import GRANULARITIES, Graph

FORMAT = "interp circuit 1"


def save_circuit(circuit: Circuit, path: str | os.PathLike[str]) -> Path:
    """Write a circuit as JSON, under the path with the suffix .json.

    Raises:
        PathError: its graph has spans that are tensors, which belong to one set of prompts; or its config is not JSON
            data.
    """
    target = pair(path)[0]
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
    return _write(target, data, indent=1)


def load_circuit(path: str | os.PathLike[str]) -> Circuit:
    """Read a circuit that `save_circuit` wrote.

    Raises:
        FileNotFoundError: there is none.
        PathError: the file is not one.
    """
    source = pair(path)[0]
    data = _read(source)
    if data.get("format") != FORMAT:
        raise PathError(f"{source} is no saved circuit (format {data.get('format')!r}, expected {FORMAT!r})")
    try:
        told = data["graph"]
        granularity, spans = told["granularity"], told["spans"]
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity {granularity!r}")
        graph = Graph(
            heads=_all(told["heads"], int), groups=_all(told["groups"], int), mlps=_all(told["mlps"], bool),
            parallel=_one(told["parallel"], bool), width=_one(told["width"], int), granularity=granularity,
            query_heads=_one(told["query_heads"], bool),
            spans=None if spans is None else tuple((_one(name, str), _index(at)) for name, at in spans),
        )  # fmt: skip
        if not len(graph.heads) == len(graph.groups) == len(graph.mlps):
            raise ValueError("layers that differ in number")
        names = tuple(_one(edge["name"], str) for edge in data["edges"])
        members = np.array(_all([edge["in"] for edge in data["edges"]], bool))
        scores = np.array([math.nan if edge["score"] is None else _number(edge["score"]) for edge in data["edges"]])
        config = _one(data["config"], dict)
        if names != graph.edges:
            raise ValueError("its edges are not those of its graph")
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise PathError(f"{source} is a damaged circuit: {type(error).__name__} {error}") from None
    return Circuit(graph, members, scores, config)


def to_eap_ig(circuit: Circuit, path: str | os.PathLike[str]) -> Path:
    """Write a circuit in the JSON form of the EAP-IG code (`Graph.from_json` there reads it).

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
    return _write(Path(path), data)


def from_eap_ig(path: str | os.PathLike[str]) -> Circuit:
    """Read the JSON form of the EAP-IG code. Neuron-level entries are not kept.

    Raises:
        PathError: the file is not in that form, or names edges that its configuration does not have.
    """
    source = Path(path)
    data = _read(source)
    try:
        cfg, edges = data["cfg"], data["edges"]
        layers, heads = _one(cfg["n_layers"], int), _one(cfg["n_heads"], int)
        graph = Graph(
            heads=(heads,) * layers, groups=(1,) * layers, mlps=(True,) * layers,
            parallel=_one(cfg["parallel_attn_mlp"], bool), width=_one(cfg["d_model"], int),
        )  # fmt: skip
        members, scores = np.zeros(len(graph), bool), np.full(len(graph), np.nan)
        for name, entry in edges.items():
            at = graph.index[graph.edge(name).name]
            scores[at], members[at] = _number(entry["score"]), _one(entry["in_graph"], bool)
    except PathError as error:
        raise PathError(f"{source}: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise PathError(f"{source} is not in the form of the EAP-IG code: {type(error).__name__} {error}") from None
    return Circuit(graph, members, scores, {"found by": "imported", "file": source.name})


def _read(source: Path) -> dict[str, Any]:
    try:
        data = json.loads(source.read_text())
    except (ValueError, RecursionError) as error:
        raise PathError(f"{source} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise PathError(f"{source} holds a {type(data).__name__}, not a circuit")
    return data


def _write(target: Path, data: dict[str, Any], indent: int | None = None) -> Path:
    try:
        text = json.dumps(data, indent=indent, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PathError(f"the circuit is not JSON data: {error}") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    write_all({target: (text + "\n").encode()})
    return target


def _one(value: Any, kind: type) -> Any:
    """The value, where it is of exactly that type: a truth value is no number."""
    if type(value) is not kind:
        raise TypeError(f"{value!r} is not {kind.__name__}")
    return value


def _all(values: Any, kind: type) -> tuple[Any, ...]:
    return tuple(_one(value, kind) for value in values)


def _number(value: Any) -> float:
    return float(value if type(value) is int else _one(value, float))


def _plain(name: str, at: Any) -> Any:
    if isinstance(at, int):
        return at
    if isinstance(at, tuple):
        return list(at)
    if isinstance(at, Span):
        return {"start": at.start, "stop": at.stop}
    raise PathError(f"span {name!r} is a tensor of one set of prompts, and cannot be saved with a circuit")


def _index(at: Any) -> Any:
    if isinstance(at, dict):
        start, stop = (None if at[end] is None else _one(at[end], int) for end in ("start", "stop"))
        return Span(start, stop)
    return _all(at, int) if isinstance(at, list) else _one(at, int)
