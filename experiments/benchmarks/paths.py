"""Every edge of a model beside a loop of one forward pass an edge, and EAP scores beside hooks on every head.

python -m experiments.benchmarks.paths --out experiments/benchmarks/paths.json
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

import interp as ip
from experiments import machine
from experiments.benchmarks import path_report
from experiments.benchmarks.memory import forget_peak, held, peak
from experiments.benchmarks.path_sides import difference, eap_by_hooks, edge_loop
from experiments.benchmarks.setting import ANSWER, EDGE_TOKENS, FOIL, SIZES, Setting, Task
from experiments.timing import interleaved, ratio, timed
from interp import paths

STEPS = 5
METHODS = {"eap": {}, "eap-ig": {"steps": STEPS}}


def metric() -> ip.Metric:
    """The difference of two logits at the last position."""
    return ip.logit_diff(ANSWER, FOIL)


def measure_sweep(
    name: str, setting: Setting, model: ip.Model, task: Task, sample: int, readers: Sequence[str] | None = None
) -> dict[str, Any]:
    """Every edge (into some readers), and a sample of them (or all) one by one, half of it before and half after."""
    graph = paths.Graph.of(model)
    every = list(graph.select(None, None, readers))
    chosen = random.Random(0).sample(every, min(sample, len(every)))
    halves = [chosen[::2], chosen[1::2]]
    loops = [edge_loop(model.module, task.clean, task.corrupt, graph, half) for half in halves]
    clean, corrupt = model.inputs(task.clean), model.inputs(task.corrupt)
    sweep = partial(paths.edge_sweep, model, clean, corrupt, metric=metric(), progress=False, readers=readers)
    sweep(readers=graph.readers[0].name)
    edge_loop(model.module, task.clean, task.corrupt, graph, chosen[:2])()
    before, first = timed(loops[0], setting.device)
    seconds, result = timed(sweep, setting.device)
    after, second = timed(loops[1], setting.device)
    with torch.no_grad():
        plain, _ = timed(lambda: difference(model.module, task.corrupt.to(setting.device)), setting.device)
    loop = [s * len(every) / len(half) for s, half in zip((before, after), halves, strict=True)]
    place = {edge: i for i, edge in enumerate(every)}
    ours = result.effect[:, 0]
    apart = [
        float(np.abs(ours[[place[e] for e in half]] - found).max())
        for half, found in zip(halves, (first, second), strict=True)
    ]
    return {
        "model": name,
        "tokens": task.tokens,
        "shared": task.shared,
        "edges": len(every),
        "sampled": len(chosen),
        "seconds": seconds,
        "loop_seconds": loop,
        "over_ours": statistics.mean(loop) / seconds,
        "forward_seconds": plain,
        "forward_equivalents": result.config["forward_equivalents"],
        "largest_difference": max(apart),
        "largest_effect": float(np.abs(ours).max()),
    }


def measure_scores(name: str, setting: Setting, model: ip.Model, task: Task, method: str) -> dict[str, Any]:
    """Scores of every edge, ours and by hooks on every head, in turn."""
    graph = paths.Graph.of(model)
    clean, corrupt = model.inputs(task.clean), model.inputs(task.corrupt)

    def ours() -> np.ndarray:
        options: dict[str, Any] = {"method": method, "graph": graph, **METHODS[method]}
        return paths.edge_scores(model, clean, corrupt, metric=metric(), **options).effect[:, 0]

    hooks = eap_by_hooks(model.module, task.clean, task.corrupt, graph, METHODS[method].get("steps"))
    ours(), hooks()
    seconds, found = interleaved({"ours": ours, "hooks": hooks}, setting.repetitions, setting.device)
    return {
        "model": name,
        "method": method,
        "edges": len(graph),
        "seconds": seconds,
        "over_ours": ratio(seconds["hooks"], seconds["ours"]),
        "largest_difference": float(np.abs(found["ours"] - found["hooks"]).max()),
        "largest_score": float(np.abs(found["ours"]).max()),
    }


def peak_bytes(setting: Setting, side: str) -> int:
    """Bytes that a side takes at most beyond the loaded model, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak, setting, side).result()


SIDES = ("edge_sweep, one layer", "loop", "eap", "eap by hooks")


def _peak(setting: Setting, side: str) -> int:
    torch.set_num_threads(setting.threads)
    model = ip.wrap(setting.model())
    graph, task = paths.Graph.of(model), setting.task("resid_pre", EDGE_TOKENS, 0)
    clean, corrupt = model.inputs(task.clean), model.inputs(task.corrupt)
    with torch.no_grad():
        difference(model.module, setting.ids(1, 2).to(setting.device))
    middle = setting.layers // 2
    readers = [r.name for r in graph.readers if r.layer == middle]
    runs: dict[str, Callable[[], Any]] = {
        "edge_sweep, one layer": partial(
            paths.edge_sweep, model, clean, corrupt, metric=metric(), readers=readers, progress=False
        ),
        "loop": lambda: edge_loop(model.module, task.clean, task.corrupt, graph, graph.listed[:4])(),
        "eap": partial(paths.edge_scores, model, clean, corrupt, metric=metric(), method="eap"),
        "eap by hooks": lambda: eap_by_hooks(model.module, task.clean, task.corrupt, graph)(),
    }
    before = held(setting.device)
    forget_peak(setting.device)
    runs[side]()
    return peak(setting.device) - before


def measure(setting: Setting, sample: int, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Everything, as JSON data; `save` is given what there is after each part."""
    start = time.perf_counter()
    torch.set_num_threads(setting.threads)
    record: dict[str, Any] = {
        "setting": asdict(setting), "sample": sample, "steps": STEPS, "versions": machine.versions(),
        "commit": machine.commit(), "machine": machine.describe(setting.device),
        "sweeps": [], "scores": [], "memory": {},
    }  # fmt: skip

    def done(what: str) -> None:
        record["took_seconds"] = time.perf_counter() - start
        save(record)
        print(f"{record['took_seconds']:4.0f} s  {what}", flush=True)

    for name, size in SIZES.items():
        if setting.quick and not size:
            continue
        mine = replace(setting, **size)
        model = ip.wrap(mine.model())
        for method in METHODS:
            record["scores"].append(measure_scores(name, mine, model, mine.task("resid_pre", EDGE_TOKENS, 0), method))
            done(path_report.score_line(record["scores"][-1]))
        for shared in (0, EDGE_TOKENS // 2):
            task = mine.task("resid_pre", EDGE_TOKENS, shared)
            record["sweeps"].append(measure_sweep(name, mine, model, task, sample))
            done(path_report.sweep_line(record["sweeps"][-1]))
        del model
    for side in () if setting.quick else SIDES:
        record["memory"][side] = peak_bytes(setting, side)
        done(f"memory of {side}")
    return record


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, save and print; or bring the README up to date with what was saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file that is written")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sample", type=int, default=300, help="edges that the loop runs, where there are more")
    parser.add_argument("--quick", action="store_true", help="the small model only, to see that everything runs")
    parser.add_argument("--write-readme", action="store_true", help="measure nothing; put the tables in README.md")
    args = parser.parse_args(argv)
    if args.write_readme:
        path_report.write_readme(args.out, Path(__file__).parent / "README.md")
        return
    setting = Setting(device=args.device, threads=args.threads, quick=args.quick)
    record = measure(setting, args.sample, lambda data: _write(args.out, data))
    print(path_report.tables(record))


def _write(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
