"""What every study here does: exact effects, fast scores beside them, circuits, and how good those are."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import interp as ip
from interp import paths
from interp.provenance import versions
from interp.results import Result

SIZES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
METHODS = ("eap", "eap-ig", "receiver-exact", "exact")
FEW = 16
"""Pairs that ACDC runs on, which tries every edge one after another."""
RANDOM = 10
"""Random circuits of each size, that the found ones are compared with."""


def analyse(
    model: ip.Model,
    train: tuple[ip.Inputs, ip.Inputs, ip.Metric],
    held_out: tuple[ip.Inputs, ip.Inputs, ip.Metric],
    out: Path,
    name: str,
    direction: str = "noising",
) -> tuple[dict[str, Result], dict[str, Any]]:
    """Score every edge with every method on one set of pairs, and measure circuits on another.

    Args:
        model: a wrapped model.
        train: clean and corrupt prompts and the metric, on which edges are scored.
        held_out: those on which circuits are measured.
        out: folder of the results.
        name: their file.
        direction: of the scores; circuits are noised.

    Returns:
        the scores by method, and what is written to ``name.json``.
    """
    start = time.perf_counter()
    graph = paths.Graph.of(model)
    clean, corrupt, metric = train
    scores: dict[str, Result] = {}
    record: dict[str, Any] = {
        "model": repr(model),
        "graph": repr(graph),
        "pairs": len(clean),
        "held_out_pairs": len(held_out[0]),
        "direction": direction,
        "additivity": paths.check_additive(model, clean),
        "versions": versions(),
        "methods": {},
    }
    for method in METHODS:
        scores[method] = paths.edge_scores(
            model, clean, corrupt, metric=metric, method=method, direction=direction, progress=False
        )
    exact = scores["exact"]
    exact.save(out / f"{name}_edges")
    record |= {"whole": float(np.mean(exact.base)), "empty": float(np.mean(exact.source))}
    top = max(1, round(0.05 * len(graph)))
    causal = paths.causal_graph(exact, graph, share=0.01)
    for method, found in scores.items():
        curves = {}
        for choose in (paths.greedy, paths.top_k):
            curve = paths.faithfulness(
                model, *held_out[:2], found, graph, metric=held_out[2], sizes=SIZES, choose=choose
            )
            curves[choose.__name__] = asdict(curve)
        record["methods"][method] = {
            "forward_equivalents": found.config["forward_equivalents"],
            "rank_correlation_with_exact": paths.stability(found, exact, graph, top)["spearman"],
            "auroc_of_causal_graph": paths.auroc(found, causal) if 0 < len(causal) < len(graph) else None,
            "split_half": paths.split_half(found, graph, top),
            "curves": curves,
        }
    record["random"] = random_curve(model, graph, *held_out)
    record["causal_graph"] = {"edges": causal.edges, "share": 0.01, "q": 0.05}
    causal.save(out / f"{name}_causal_graph")
    circuit = paths.greedy(exact, graph, top)
    circuit.save(out / f"{name}_circuit")
    record["circuit"] = {
        "asked": top,
        "edges": circuit.edges,
        "completeness": paths.completeness(model, circuit, *held_out[:2], metric=held_out[2]),
        "minimality": paths.minimality(model, circuit, *held_out[:2], metric=held_out[2]),
    }
    few = slice(0, FEW)
    acdc = paths.acdc(model, clean.rows(few), corrupt.rows(few), tau=0.01, progress=False)
    record["acdc"] = {
        **acdc.config,
        "pairs": min(FEW, len(clean)),
        "edges": acdc.edges,
        "jaccard_with_circuit": acdc.compare(circuit)["jaccard"],
    }
    record["took_seconds"] = time.perf_counter() - start
    return scores, record


def random_curve(
    model: ip.Model, graph: paths.Graph, clean: ip.Inputs, corrupt: ip.Inputs, metric: ip.Metric
) -> dict[str, Any]:
    """Faithfulness of circuits of random edges, mean and largest over draws, at every size but the whole."""
    draw = np.random.default_rng(0)
    nothing, everything = paths.Circuit.all(graph).without(graph.edges), paths.Circuit.all(graph)
    low, high = paths.circuit_metric(model, [nothing, everything], clean, corrupt, metric=metric).mean(1)
    found: dict[str, list[float]] = {"sizes": [], "mean": [], "largest": []}
    for size in SIZES[:-1]:
        circuits = []
        for _ in range(RANDOM):
            members = np.zeros(len(graph), bool)
            members[draw.choice(len(graph), round(size * len(graph)), replace=False)] = True
            circuits.append(paths.Circuit(graph, members, np.full(len(graph), np.nan)))
        share = (paths.circuit_metric(model, circuits, clean, corrupt, metric=metric).mean(1) - low) / (high - low)
        found["sizes"].append(size)
        found["mean"].append(float(share.mean()))
        found["largest"].append(float(share.max()))
    return found


def write(record: dict[str, Any], out: Path, name: str) -> None:
    """Write a record as JSON."""
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def told(record: dict[str, Any]) -> str:
    """A table of a record, for a terminal."""
    lines = [f"{record['graph']}; metric {record['whole']:+.2f} whole, {record['empty']:+.2f} empty"]
    lines.append(
        "method           forwards  rank corr.  " + "  ".join(f"{100 * s:5.0f}%" for s in SIZES) + "   CPR    CMD"
    )
    for method, found in record["methods"].items():
        curve = found["curves"]["greedy"]
        shares = "  ".join(f"{f:6.2f}" for f in curve["faithfulness"])
        lines.append(
            f"{method:15}  {found['forward_equivalents']:8.0f}  {found['rank_correlation_with_exact']:10.2f}  {shares}"
            f"  {curve['cpr']:.3f}  {curve['cmd']:.3f}"
        )
    random_shares = "  ".join(f"{f:6.2f}" for f in record["random"]["mean"])
    lines.append(f"{'random':15}  {'':8}  {'':10}  {random_shares}")
    lines.append(f"circuit at 5 %: {', '.join(record['circuit']['edges'])}")
    lines.append(
        f"causal graph: {len(record['causal_graph']['edges'])} edges; ACDC: {len(record['acdc']['edges'])} edges"
    )
    return "\n".join(lines)
