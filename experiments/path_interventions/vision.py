"""A vision transformer with a planted cue: its causal graphs and its repair.

python -m experiments.path_interventions.vision
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import interp as ip
from experiments.path_interventions import shapes
from experiments.path_interventions.pipeline import SIZES, random_curve, write
from interp import paths
from interp.provenance import versions

OUT = Path(__file__).parent / "results"
METHODS = ("eap", "eap-ig", "receiver-exact", "exact")
SHARE = 0.05
"""An edge belongs to a causal graph when its effect is significant and at least this share of the largest."""
Task = tuple[ip.Inputs, ip.Inputs, ip.Metric]


def mark_task(model: ip.Model, classes: Tensor, seed: int, noise: float = 0.0) -> Task:
    """The same images with their own mark and with another class's: what the mark alone causes."""
    wrong = shapes.other(classes, seed)
    clean, corrupt = (shapes.images(classes, marks, seed + 1) for marks in (classes, wrong))
    return _task(model, clean, corrupt, classes, wrong, noise, seed)


def shape_task(model: ip.Model, classes: Tensor, seed: int) -> Task:
    """Images without a mark, and with another shape in the same place: what the shape alone causes."""
    wrong = shapes.other(classes, seed)
    clean, corrupt = (shapes.images(kind, None, seed + 1) for kind in (classes, wrong))
    return _task(model, clean, corrupt, classes, wrong, 0.0, seed)


def _task(
    model: ip.Model, clean: Tensor, corrupt: Tensor, classes: Tensor, wrong: Tensor, noise: float, seed: int
) -> Task:
    if noise:
        more = noise * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed + 2))
        clean, corrupt = clean + more, corrupt + more
    return model.inputs(clean), model.inputs(corrupt), ip.logit_diff(classes.tolist(), wrong.tolist())


def accuracies(model: ip.Model, n: int, seed: int) -> dict[str, tuple[ip.Inputs, ip.Metric]]:
    """Fresh images with their own mark, with another's, and with none, and accuracy on them."""
    classes = shapes.labels(n, seed)
    marks = {"own mark": classes, "another mark": shapes.other(classes, seed + 1), "no mark": None}
    return {
        name: (model.inputs(shapes.images(classes, mark, seed + 2)), ip.accuracy(classes.tolist()))
        for name, mark in marks.items()
    }


def class_graphs(model: ip.Model, graph: paths.Graph, n: int, seed: int) -> dict[str, dict[str, paths.Circuit]]:
    """For each class, the causal graph of its mark and of its shape."""
    found: dict[str, dict[str, paths.Circuit]] = {}
    for i, name in enumerate(shapes.CLASSES):
        classes = torch.full((n,), i)
        found[name] = {}
        for kind, make in (("mark", mark_task), ("shape", shape_task)):
            clean, corrupt, metric = make(model, classes, seed + 100 * i)
            effects = paths.edge_sweep(model, clean, corrupt, metric=metric, direction="noising", progress=False)
            found[name][kind] = paths.causal_graph(effects, graph, share=SHARE)
    return found


def spurious(graphs: dict[str, dict[str, paths.Circuit]], graph: paths.Graph, ratio: float = 3.0) -> list[str]:
    """Edges that carry some class's mark, and carry it much more than any class's shape.

    Effects are compared as shares of the largest of their own graph, so that neither task weighs more.
    """
    share = {kind: np.max([_shares(each[kind]) for each in graphs.values()], axis=0) for kind in ("mark", "shape")}
    chosen = np.any([each["mark"].members for each in graphs.values()], axis=0) & (
        share["mark"] > ratio * share["shape"]
    )
    return [graph.edges[i] for i in np.flatnonzero(chosen)]


def _shares(circuit: paths.Circuit) -> np.ndarray:
    size = np.abs(circuit.scores)
    return size / size.max()


def repairs(
    model: ip.Model, graph: paths.Graph, edges: list[str], scores: dict[str, ip.Result], n: int, seed: int
) -> dict[str, Any]:
    """Accuracies before and after ablating the edges found, as many by gradient, and as many at random."""
    reference = model.inputs(shapes.images(shapes.labels(512, seed), shapes.labels(512, seed + 1), seed + 2))
    measured = accuracies(model, n, seed + 10)
    draw = np.random.default_rng(0)
    by_gradient = paths.top_k(scores["eap"], graph, len(edges), prune=False).edges
    chosen = {
        "causal graph": edges,
        "gradient (eap), as many": list(by_gradient),
        **{f"random {i}": draw.choice(graph.edges, len(edges), replace=False).tolist() for i in range(5)},
    }
    found = {}
    for name, some in chosen.items():
        done = paths.repair(model, some, measured, reference=reference)
        found[name] = {"edges": len(done.edges), "before": done.before, "after": done.after, "rows": done.rows}
    return found


def study(seed: int, steps: int, images: int, test: int, out: Path) -> dict[str, Any]:
    """Train one model, and all that is measured on it."""
    start = time.perf_counter()
    module = shapes.train(seed, steps)
    model = ip.wrap(module)
    graph = paths.Graph.of(model)
    record: dict[str, Any] = {
        "seed": seed, "steps": steps, "images": images, "model": repr(model), "graph": repr(graph),
        "agrees": shapes.AGREES, "versions": versions(),
        "accuracy": {
            name: float(ip.evaluate(model, inputs, metric).mean())
            for name, (inputs, metric) in accuracies(model, test, 1).items()
        },
    }  # fmt: skip
    classes = shapes.labels(images, 2)
    clean, corrupt, metric = mark_task(model, classes, 3)
    held_out = mark_task(model, shapes.labels(images, 4), 5)
    noisy = mark_task(model, classes, 3, noise=0.2)
    again = mark_task(model, shapes.labels(images, 6), 7)
    record |= {"additivity": paths.check_additive(model, clean), "methods": {}}
    top, scores = round(0.05 * len(graph)), {}
    for method in METHODS:
        runs = [
            paths.edge_scores(model, *task[:2], metric=task[2], method=method, direction="noising", progress=False)
            for task in ((clean, corrupt, metric), noisy, again)
        ]
        scores[method] = runs[0]
        curve = paths.faithfulness(model, *held_out[:2], runs[0], graph, metric=held_out[2], sizes=SIZES)
        record["methods"][method] = {
            "split_half": paths.split_half(runs[0], graph, top),
            "input_noise": paths.stability(runs[0], runs[1], graph, top),
            "other_images": paths.stability(runs[0], runs[2], graph, top),
            "curve": asdict(curve),
            "forward_equivalents": runs[0].config["forward_equivalents"],
        }
    exact = scores["exact"]
    for method, found in scores.items():
        record["methods"][method]["rank_correlation_with_exact"] = paths.stability(found, exact, graph, top)["spearman"]
    record["random"] = random_curve(model, graph, *held_out)
    graphs = class_graphs(model, graph, images, 1000)
    record["class_graphs"] = {
        name: {kind: list(circuit.edges) for kind, circuit in each.items()} for name, each in graphs.items()
    }
    names = list(graphs)
    record["overlap_of_classes"] = {
        kind: float(np.mean([
            graphs[a][kind].compare(graphs[b][kind])["jaccard"] for i, a in enumerate(names) for b in names[:i]
        ]))
        for kind in ("mark", "shape")
    }  # fmt: skip
    record["overlap_of_mark_and_shape"] = float(
        np.mean([each["mark"].compare(each["shape"])["jaccard"] for each in graphs.values()])
    )
    edges = spurious(graphs, graph)
    record["spurious"] = edges
    record["repair"] = repairs(model, graph, edges, scores, test, 5000) if edges else None
    if seed == 0:
        for kind in ("mark", "shape"):
            graphs[names[0]][kind].save(out / f"vision_{kind}")
    record["took_seconds"] = time.perf_counter() - start
    return record


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study and write its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="models that are trained")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--images", type=int, default=64, help="images that edges are scored on")
    parser.add_argument("--test", type=int, default=2000, help="images that accuracy is measured on")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    records = []
    for seed in range(options.seeds):
        records.append(study(seed, options.steps, options.images, options.test, options.out))
        write({"models": records}, options.out, "vision")
        print(told(records[-1]))


def told(record: dict[str, Any]) -> str:
    """What one model showed, for a terminal."""
    lines = [f"seed {record['seed']}: {record['graph']}; accuracy {record['accuracy']}"]
    for method, found in record["methods"].items():
        shares = "  ".join(f"{f:6.2f}" for f in found["curve"]["faithfulness"])
        rank, overlap = (found["split_half"][name]["median"] for name in ("spearman", "jaccard"))
        exact = found["rank_correlation_with_exact"]
        lines.append(
            f"{method:15} faithful {shares}  halves {rank:.2f} {overlap:.2f}"
            f"  noise {found['input_noise']['jaccard']:.2f}  exact {exact:.2f}"
        )
    lines.append(f"spurious: {', '.join(record['spurious'])}")
    for name, found in (record["repair"] or {}).items():
        change = ", ".join(f"{k} {found['before'][k]:.3f} -> {found['after'][k]:.3f}" for k in found["before"])
        lines.append(f"ablating {name} ({found['edges']}): {change}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
