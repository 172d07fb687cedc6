"""What one visit costs on each backend: the residual stream of every layer read or edited, in prefill and decoding."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

import interp as ip
from experiments.benchmarks.setting import Setting
from experiments.timing import timed

Entered = Callable[[], AbstractContextManager[Callable[[], Any]]]
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
        return found

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


def measure(setting: Setting, tokens: int, repetitions: int, compiled: bool) -> Iterator[tuple[str, Any]]:
    """What is measured, one part after another, by its name."""
    backends = Backends(setting, tokens, compiled)
    yield "prefill", measured(setting, backends.prefill(), setting.layers, repetitions)
    visits = setting.layers * NEW
    yield "decoding", measured(setting, backends.decoding(), visits, max(3, repetitions // 3))


def tables(record: dict[str, Any]) -> str:
    """The record as the table of the README."""
    lines = [
        "| backend | prefill, without a visit | a read | an edit | decoding, a token | a read | an edit |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in record["prefill"].items():
        each, decoded = row["microseconds_a_visit"], record["decoding"].get(name)
        cells = [f"{1e3 * row['seconds']['none']:.1f} ms"]
        cells += [f"{each[kind]:.0f} µs" if kind in each else "" for kind in ("read", "edit")]
        if decoded is None:
            cells += ["", "", ""]
        else:
            visits = decoded["microseconds_a_visit"]
            cells.append(f"{1e3 * decoded['seconds']['none'] / record['setting']['new_tokens']:.1f} ms")
            cells += [f"{visits[kind]:.0f} µs" if kind in visits else "" for kind in ("read", "edit")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
