"""What one visit costs on each backend: the residual stream of every layer read or edited, in prefill and decoding."""

from __future__ import annotations

import copy
import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import interp as ip
from experiments.benchmarks.by_hand import ByHand, Entered, plain
from experiments.benchmarks.setting import Setting
from experiments.tables import table
from experiments.timing import timed

NEW = 16
"""Tokens that are generated."""
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


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
        self.by_hand = ByHand(setting, bare, self.ids, vector, GREEDY)

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
        return found | self.by_hand.prefill()

    def decoding(self) -> dict[str, dict[str, Entered]]:
        """Generation of `NEW` tokens with a cache: without a plan, keeping every layer, under a plan that is held."""
        models = {"native": self.native, "TransformerBridge": self.bridge, "nnsight": self.nnsight}
        found: dict[str, dict[str, Entered]] = {
            name: {
                "none": plain(self._generating(model.module)),
                "read": plain(self._keeping(model)),
                "edit": self._held(model, self._generating(model.module)),
            }
            for name, model in models.items()
        }
        if self.compiled:
            none, edits, inputs = self.native.compile(), self.native.compile(self.edits), self.native.inputs(self.ids)
            found["compiled"] = {
                "none": plain(lambda: none.generate(inputs, max_new_tokens=NEW, eos_token_id=None)),
                "edit": plain(lambda: edits.generate(inputs, max_new_tokens=NEW, eos_token_id=None)),
            }
        return found | self.by_hand.decoding()

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
        return lambda: module.generate(self.ids, **GREEDY)

    def _keeping(self, model: ip.Model) -> Callable[[], Any]:
        inputs = model.inputs(self.ids)
        return lambda: model.generate(inputs, capture=self.places, **GREEDY)

    def _held(self, model: ip.Model, run: Callable[[], Any] | None = None) -> Entered:
        call = self._bare(model.module) if run is None else run

        @contextmanager
        def enter() -> Iterator[Callable[[], Any]]:
            with model.apply(self.edits):
                yield call

        return enter


def measured(setting: Setting, variants: dict[str, dict[str, Entered]], visits: int, repetitions: int) -> Any:
    """Seconds of each, the least and the median, and microseconds that the least has over none, by visits.

    The order is shuffled anew in each repetition.

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
            "median_seconds": {kind: statistics.median(seconds[name, kind]) for kind in kinds},
            "microseconds_a_visit": {
                kind: 1e6 * (least[name, kind] - least[name, "none"]) / visits
                for kind in kinds
                if kind in ("read", "edit")
            },
        }
        for name, kinds in variants.items()
    }


def measure(setting: Setting, tokens: int, repetitions: int, compiled: bool) -> Iterator[tuple[str, Any]]:
    """What is measured, one part after another, by its name."""
    backends = Backends(setting, tokens, compiled)
    yield "prefill", measured(setting, backends.prefill(), setting.layers, repetitions)
    visits = setting.layers * NEW
    yield "decoding", measured(setting, backends.decoding(), visits, max(3, repetitions // 3))


def tables(record: dict[str, Any]) -> str:
    """The record as the table of the README."""
    setting, machine = record["setting"], record["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    parts = {"prefill": record["prefill"], "decoding": record.get("decoding", {})}
    bare = {part: rows["native"]["seconds"]["bare" if part == "prefill" else "none"] for part, rows in parts.items()}
    head = ["", "prefill", "a read", "an edit", "decoding, a token", "a read", "an edit"]
    lines = [["bare model", _ms(bare["prefill"]), "", "", _ms(bare["decoding"] / setting["new_tokens"]), "", ""]]
    for name in parts["prefill"]:
        cells = [name]
        for part, rows in parts.items():
            cells += _cells(rows.get(name), bare[part], setting["new_tokens"] if part == "decoding" else 1)
        lines.append(cells)
    return (
        f"Measured on {where}; {versions}; commit `{record['commit'][:12]}`; {record['took_seconds']:.0f} s in all.\n\n"
        f"A GPT-2 of {setting['layers']} layers and width {setting['width']} with random weights, a prompt of "
        f"{setting['tokens']} tokens, {setting['new_tokens']} new ones; the residual stream after each layer.\n\n"
        + table(head, lines)
        + "\n\nIn brackets: the whole call over the bare model's."
    )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


def _cells(row: dict[str, Any] | None, bare: float, tokens: int) -> list[str]:
    """Of one backend: what a call takes without a visit, and what a read and an edit add to it."""
    if row is None:
        return ["", "", ""]
    seconds, visits = row["seconds"], row["microseconds_a_visit"]
    cells = [f"{_ms(seconds['none'] / tokens)} ({seconds['none'] / bare:.2f})"]
    for kind in ("read", "edit"):
        cells.append(f"{visits[kind]:.0f} µs ({seconds[kind] / bare:.2f})" if kind in visits else "")
    return cells
