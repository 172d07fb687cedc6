"""Circuits as JSON, in our own form, which keeps everything."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from hooks import PathError, Span, pair, write_all
from interp.paths.graph import GRANULARITIES, Graph
from interp.paths.members import Members

FORMAT = "interp circuit 1"


def save_circuit(circuit: Members, path: str | os.PathLike[str]) -> Path:
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
    return write(target, data, indent=1)


def load_circuit(path: str | os.PathLike[str]) -> tuple[Graph, np.ndarray, np.ndarray, dict[str, Any]]:
    """Read the graph, members, scores and config of a circuit that `save_circuit` wrote.

    Raises:
        FileNotFoundError: there is none.
        PathError: the file is not one.
    """
    source = pair(path)[0]
    data = read(source)
    if data.get("format") != FORMAT:
        raise PathError(f"{source} is no saved circuit (format {data.get('format')!r}, expected {FORMAT!r})")
    try:
        told = data["graph"]
        granularity, spans = told["granularity"], told["spans"]
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity {granularity!r}")
        graph = Graph(
            heads=_all(told["heads"], int), groups=_all(told["groups"], int), mlps=_all(told["mlps"], bool),
            parallel=one(told["parallel"], bool), width=one(told["width"], int), granularity=granularity,
            query_heads=one(told["query_heads"], bool),
            spans=None if spans is None else tuple((one(name, str), _index(at)) for name, at in spans),
        )  # fmt: skip
        if not len(graph.heads) == len(graph.groups) == len(graph.mlps):
            raise ValueError("layers that differ in number")
        names = tuple(one(edge["name"], str) for edge in data["edges"])
        members = np.array(_all([edge["in"] for edge in data["edges"]], bool))
        scores = np.array([math.nan if edge["score"] is None else number(edge["score"]) for edge in data["edges"]])
        config = one(data["config"], dict)
        if names != graph.edges:
            raise ValueError("its edges are not those of its graph")
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise PathError(f"{source} is a damaged circuit: {type(error).__name__} {error}") from None
    return graph, members, scores, config


def read(source: Path) -> dict[str, Any]:
    try:
        data = json.loads(source.read_text())
    except (ValueError, RecursionError) as error:
        raise PathError(f"{source} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise PathError(f"{source} holds a {type(data).__name__}, not a circuit")
    return data


def write(target: Path, data: dict[str, Any], indent: int | None = None) -> Path:
    try:
        text = json.dumps(data, indent=indent, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PathError(f"the circuit is not JSON data: {error}") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    write_all({target: (text + "\n").encode()})
    return target


def one(value: Any, kind: type) -> Any:
    """The value, where it is of exactly that type: a truth value is no number."""
    if type(value) is not kind:
        raise TypeError(f"{value!r} is not {kind.__name__}")
    return value


def _all(values: Any, kind: type) -> tuple[Any, ...]:
    return tuple(one(value, kind) for value in values)


def number(value: Any) -> float:
    return float(value if type(value) is int else one(value, float))


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
        start, stop = (None if at[end] is None else one(at[end], int) for end in ("start", "stop"))
        return Span(start, stop)
    return _all(at, int) if isinstance(at, list) else one(at, int)
