"""What plans cost: the wrapped model's time over the bare model's, and of one visit on each backend.

``python -m experiments.benchmarks.overhead --out experiments/benchmarks/overhead.json``, and the same with
``--write-readme`` to put its table into the README.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

import interp as ip
from experiments.benchmarks import backends
from experiments.benchmarks.setting import Setting
from experiments.machine import commit, describe, versions
from experiments.tables import written
from experiments.timing import ratio, timed

Entered = Callable[[], AbstractContextManager[Callable[[], Any]]]
HERE = Path(__file__).resolve().parent


def forward_overhead(setting: Setting, model: ip.Model, batch: int, tokens: int, repetitions: int) -> dict[str, Any]:
    """Forward passes under small plans beside the bare model's, in an order shuffled anew in each repetition.

    The bare model is measured twice: how far the two differ is noise. Under ``apply``, the plan is placed and taken
    away outside the timed part, since it is held over many calls. The first repetition is a warm-up and does not count.
    """
    ids = setting.ids(batch, tokens)
    inputs, on_device = model.inputs(ids), ids.to(setting.device)
    vector = torch.randn(setting.width, generator=torch.Generator().manual_seed(setting.seed))
    vector = vector.to(model.device, model.dtype)
    residuals = [ip.site("resid_post", layer=layer) for layer in range(setting.layers)]
    steering = ip.steer(ip.site("resid_post", layer=setting.layers // 2), vector)

    def bare() -> Any:
        with torch.no_grad():
            return model.module(input_ids=on_device, use_cache=False).logits

    def plain(run: Callable[[], Any]) -> Entered:
        return lambda: nullcontext(run)

    def applied(plan: Any) -> Entered:
        @contextmanager
        def enter() -> Iterator[Callable[[], Any]]:
            with model.apply(plan):
                yield bare

        return enter

    variants: dict[str, Entered] = {
        "bare": plain(bare),
        "bare again": plain(bare),
        "run, no plan": plain(lambda: model.run(inputs)),
        f"run, {setting.layers} captures": plain(lambda: model.run(inputs, capture=residuals)),
        "run, steering": plain(lambda: model.run(inputs, steering)),
        "apply, empty plan": applied(ip.Plan(())),
        "apply, steering": applied(steering),
    }
    order, shuffle = list(variants), random.Random(setting.seed).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repetition in range(repetitions + 1):
        shuffle(order)
        for name in order:
            with variants[name]() as run:
                taken, _ = timed(run, setting.device)
            if repetition:
                seconds[name].append(taken)
    ratios = {name: ratio(each, seconds["bare"]) for name, each in seconds.items() if name != "bare"}
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {"batch": batch, "tokens": tokens, "repetitions": repetitions, "seconds": medians, "over_bare": ratios}


def main(argv: list[str] | None = None) -> None:
    """Measure, and write after each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tiny model, a few repetitions, nothing compiled")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write-readme", action="store_true", help="measure nothing; put the table in README.md")
    args = parser.parse_args(argv)
    if args.write_readme:
        written(args.out or HERE / "overhead.json", HERE / "README.md", backends.tables)
        return
    began = time.perf_counter()
    layers, width, heads = (2, 32, 2) if args.quick else (6, 256, 4)
    tokens, repetitions = (8, 3) if args.quick else (32, 40)
    setting = Setting(layers=layers, width=width, heads=heads, vocabulary=256, device=args.device, quick=args.quick)
    record: dict[str, Any] = {
        "setting": {"layers": layers, "width": width, "tokens": tokens, "new_tokens": backends.NEW},
        "machine": describe(args.device),
        "versions": versions("transformers", "transformer-lens", "nnsight"),
        "commit": commit(),
        "repetitions": repetitions,
    }

    def save(name: str, found: Any) -> None:
        record[name] = found
        record["took_seconds"] = time.perf_counter() - began
        if args.out is not None:
            args.out.write_text(json.dumps(record, indent=1) + "\n")

    save("forward", forward_overhead(setting, ip.wrap(setting.model()), 1, tokens, repetitions))
    for name, found in backends.measure(setting, tokens, repetitions, compiled=not args.quick):
        save(name, found)
    print(backends.tables(record))


if __name__ == "__main__":
    main()
