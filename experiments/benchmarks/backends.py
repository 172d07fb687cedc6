"""What one visit costs on each backend: the residual stream of every layer read or edited, in prefill and decoding.

``python -m experiments.benchmarks.backends --out experiments/benchmarks/backends.json``
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

import interp as ip
from experiments.benchmarks.setting import Setting
from experiments.machine import describe, versions
from experiments.timing import timed

Entered = Callable[[], AbstractContextManager[Callable[[], Any]]]
NEW = 16
"""Tokens that are generated."""


class Backends:
    """One model on every backend, and what is timed of each."""

    def __init__(self, setting: Setting, tokens: int, compiled: bool) -> None:
        from nnsight import NNsight

        bare = setting.model()
        self.setting, self.module, self.native = setting, bare, ip.wrap(bare)
        self.bridge = ip.wrap(setting.bridge(bare))
        self.nnsight = ip.wrap(NNsight(copy.deepcopy(bare)))
        self.ids = setting.ids(1, tokens).to(setting.device)
        self.compiled = compiled
        self.places = [ip.site("resid_post", layer=layer) for layer in range(setting.layers)]
        vector = torch.full((setting.width,), 1e-3, device=self.native.device, dtype=self.native.dtype)
        self.edits = ip.Plan(tuple(ip.steer(place, vector) for place in self.places))

    def prefill(self) -> dict[str, dict[str, Entered]]:
        """Forward passes of a prompt: for each backend its own without a visit, one that reads, and one that edits."""
        found: dict[str, dict[str, Entered]] = {
            "native": self._runs(self.native, self._bare(self.module)),
            "native, held": {"none": plain(self._bare(self.module)), "edit": self._held(self.native)},
            "TransformerBridge": self._runs(self.bridge, self._bare(self.bridge.module)),
            "nnsight": self._runs(self.nnsight, self._bare(self.nnsight.module)),
        }
        if self.compiled:
            reads, edits = self.native.compile(capture=self.places), self.native.compile(self.edits)
            none, inputs = self.native.compile(), self.native.inputs(self.ids)
            found["compiled"] = {
                "none": plain(lambda: none(inputs)),
                "read": plain(lambda: reads(inputs)),
                "edit": plain(lambda: edits(inputs)),
            }
        return found

    def decoding(self) -> dict[str, dict[str, Entered]]:
        """Generation of `NEW` tokens with a cache, with and without a plan that is held."""
        models = {"native": self.native, "TransformerBridge": self.bridge, "nnsight": self.nnsight}
        return {
            name: {
                "none": plain(self._generating(model.module)),
                "edit": self._held(model, self._generating(model.module)),
            }
            for name, model in models.items()
        }

    def _runs(self, model: ip.Model, bare: Callable[[], Any]) -> dict[str, Entered]:
        inputs = model.inputs(self.ids)
        return {
            "bare": plain(bare),
            "none": plain(lambda: model.run(inputs)),
            "read": plain(lambda: model.run(inputs, capture=self.places)),
            "edit": plain(lambda: model.run(inputs, self.edits)),
        }

    def _bare(self, module: Any) -> Callable[[], Any]:
        @torch.no_grad()
        def bare() -> Any:
            return module(input_ids=self.ids, use_cache=False).logits

        return bare

    def _generating(self, module: Any) -> Callable[[], Any]:
        options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        return lambda: module.generate(self.ids, **options)

    def _held(self, model: ip.Model, run: Callable[[], Any] | None = None) -> Entered:
        call = self._bare(model.module) if run is None else run

        @contextmanager
        def enter() -> Iterator[Callable[[], Any]]:
            with model.apply(self.edits):
                yield call

        return enter


def plain(run: Callable[[], Any]) -> Entered:
    """Something that is timed as it is."""
    return lambda: nullcontext(run)


def measured(setting: Setting, variants: dict[str, dict[str, Entered]], visits: int, repetitions: int) -> Any:
    """Least seconds of each, in an order shuffled anew in each repetition, and microseconds a visit over none.

    The first two repetitions are warm-up and do not count.
    """
    order = [(name, kind) for name, kinds in variants.items() for kind in kinds]
    seconds: dict[tuple[str, str], list[float]] = {each: [] for each in order}
    shuffle = random.Random(setting.seed).shuffle
    for repetition in range(repetitions + 2):
        shuffle(order)
        for name, kind in order:
            with variants[name][kind]() as run:
                taken, _ = timed(run, setting.device)
            if repetition > 1:
                seconds[name, kind].append(taken)
    least = {each: min(times) for each, times in seconds.items()}
    return {
        name: {
            "seconds": {kind: least[name, kind] for kind in kinds},
            "microseconds_a_visit": {
                kind: 1e6 * (least[name, kind] - least[name, "none"]) / visits
                for kind in kinds
                if kind in ("read", "edit")
            },
        }
        for name, kinds in variants.items()
    }


def measure(setting: Setting, tokens: int, repetitions: int, compiled: bool) -> dict[str, Any]:
    """All of it, as data."""
    backends = Backends(setting, tokens, compiled)
    return {
        "setting": {"layers": setting.layers, "width": setting.width, "tokens": tokens, "new_tokens": NEW},
        "machine": describe(setting.device),
        "versions": versions("transformers", "transformer-lens", "nnsight"),
        "repetitions": repetitions,
        "prefill": measured(setting, backends.prefill(), setting.layers, repetitions),
        "decoding": measured(setting, backends.decoding(), setting.layers * NEW, max(3, repetitions // 3)),
    }


def tables(record: dict[str, Any]) -> str:
    """The record as the table of the README."""
    lines = [
        "| backend | prefill, without a visit | a read | an edit | decoding, a token | an edit |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in record["prefill"].items():
        each, decoded = row["microseconds_a_visit"], record["decoding"].get(name)
        cells = [f"{1e3 * row['seconds']['none']:.1f} ms"]
        cells += [f"{each[kind]:.0f} µs" if kind in each else "" for kind in ("read", "edit")]
        if decoded is None:
            cells += ["", ""]
        else:
            cells.append(f"{1e3 * decoded['seconds']['none'] / record['setting']['new_tokens']:.1f} ms")
            cells.append(f"{decoded['microseconds_a_visit']['edit']:.0f} µs")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tiny model, a few repetitions, nothing compiled")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    size = (2, 32, 2) if args.quick else (6, 256, 4)
    setting = Setting(layers=size[0], width=size[1], heads=size[2], vocabulary=256, device=args.device)
    found = measure(setting, 8 if args.quick else 32, 3 if args.quick else 12, compiled=not args.quick)
    text = json.dumps(found, indent=1)
    if args.out is not None:
        args.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
