"""Activation patching beside TransformerLens and a loop over hooks, and the cost of a plan on a forward pass.

python -m experiments.benchmarks.patching --out experiments/benchmarks/patching.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import interp as ip
from experiments import machine
from experiments.benchmarks import inside, report, sides
from experiments.benchmarks.memory import SIDES, peak_memory
from experiments.benchmarks.overhead import forward_overhead
from experiments.benchmarks.setting import Setting, Task
from experiments.benchmarks.work import forward_operations, sweep_operations
from experiments.timing import block_products, interleaved, ratio, timed

MATMUL_ROWS = {"cpu": 512, "cuda": 4096}
"""Tokens that go through a block's products at a time, about as many as the library lets through."""


@dataclass(frozen=True, eq=False)
class Models:
    """One model three times: wrapped by the library, as a bridge of a copy (None without that side), and as it is."""

    wrapped: ip.Model
    bridge: Any
    bare: Any


def measure_sweep(setting: Setting, models: Models, task: Task, batched: bool = False) -> dict[str, Any]:
    """Time a sweep on every side, and bare matrix products for the bound, and compare the effects that come out.

    The executor `batched` runs where the other sides run every cell, or where it is asked for.
    """
    others = {"hook_loop": partial(sides.hook_loop, models.bare, task)}
    if models.bridge is not None:
        others = {"transformer_lens": partial(sides.transformer_lens, models.bridge, task), **others}
    for warm_up in (sides.ours(models.wrapped, task, layers=(0,)), *(side(task.cells[:2]) for side in others.values())):
        warm_up()
    rows = MATMUL_ROWS[torch.device(setting.device).type]
    products, product_operations = block_products(setting.width, rows, setting.layers, setting.device, setting.dtype)
    runs = {"ours": sides.ours(models.wrapped, task), **{name: side(task.sampled) for name, side in others.items()}}
    seconds, effects = interleaved({**runs, "products": products}, setting.repetitions, setting.device)
    operations = sweep_operations(setting, task)
    bound = [s * operations / product_operations for s in seconds.pop("products")]
    for name in others:
        seconds[name] = [s * task.scale for s in seconds[name]]
    places = [task.cells.index(cell) for cell in task.sampled]
    if batched or task.sampled == task.cells:
        took, every = timed(sides.ours(models.wrapped, task, executor="batched"), setting.device)
        seconds["batched"], effects["batched"] = [took], every[places]
    compared = effects["ours"][places]
    differing = [name for name in effects if name not in ("ours", "products")]
    return {
        "site": task.site,
        "tokens": task.tokens,
        "shared": task.shared,
        "cells": len(task.cells),
        "sampled": None if task.sampled == task.cells else task.sampled,
        "seconds": seconds,
        "over_ours": {name: ratio(seconds[name], seconds["ours"]) for name in others},
        "largest_difference": {name: float(np.abs(effects[name] - compared).max()) for name in differing},
        "largest_effect": float(np.abs(effects["ours"]).max()),
        "operations": operations,
        "forwards": operations / forward_operations(setting, task.tokens),
        "bound_seconds": statistics.median(bound),
        "over_bound": ratio(seconds["ours"], bound),
    }


def measure(setting: Setting, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Everything, as JSON data; `save` is given what there is after each part, so that a run cut off loses little."""
    start = time.perf_counter()
    torch.set_num_threads(setting.threads)
    bare = setting.model()
    models = Models(ip.wrap(bare), setting.bridge(bare), bare)
    record: dict[str, Any] = {
        "setting": asdict(setting),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "machine": machine.describe(setting.device),
        "forwards": [],
        "sweeps": [],
        "inside": [],
        "memory": [],
    }

    def done(what: str) -> None:
        record["took_seconds"] = time.perf_counter() - start
        save(record)
        print(f"{record['took_seconds']:4.0f} s  {what}", flush=True)

    for size in setting.forwards:
        record["forwards"].append(forward_overhead(setting, models.wrapped, *size))
        done(report.forward_line(record["forwards"][-1]))
    for tokens in setting.lengths:
        for shared in setting.shared:
            for site in ("resid_pre", "z"):
                record["sweeps"].append(measure_sweep(setting, models, setting.task(site, tokens, shared)))
                done(report.sweep_line(record["sweeps"][-1]))
    for row in inside.measure(setting, models.wrapped):
        record["inside"].append(row)
        done(f"{row['what']}, {row['tokens']} tokens")
    del models, bare
    for side in SIDES:
        record["memory"] += peak_memory(setting, side)
        done(f"memory of {side}")
    return record


def measure_inside(setting: Setting, known: dict[str, Any], save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The sweeps inside attention alone, beside what is known of the rest; each says what it was measured at."""
    torch.set_num_threads(setting.threads)
    rows: list[dict[str, Any]] = []
    for row in inside.measure(setting, ip.wrap(setting.model())):
        rows.append(row | {"commit": machine.commit(), "versions": machine.versions()})
        save(known | {"inside": rows})
        print(f"{row['what']}, {row['tokens']} tokens", flush=True)
    return known | {"inside": rows}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, save and print; or bring the README up to date with what was saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file that is written")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--inside", action="store_true", help="only the sweeps inside attention, into a file that has the rest"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that everything runs")
    parser.add_argument(
        "--write-readme", action="store_true", help="measure nothing; put the tables of --out in README.md"
    )
    args = parser.parse_args(argv)
    if args.write_readme:
        report.write_readme(args.out, Path(__file__).parent / "README.md")
        return
    setting = Setting(device=args.device, threads=args.threads)
    setting = setting.tiny() if args.quick else setting
    save = partial(_write, args.out)
    known = json.loads(args.out.read_text()) if args.inside else None
    record = measure(setting, save) if known is None else measure_inside(setting, known, save)
    print(report.tables(record))


def _write(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
