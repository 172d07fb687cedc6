"""What is measured: each part is a function that gives rows, what came out of one measurement each."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

import interp as ip
from experiments.benchmarks import callbacks as training
from experiments.benchmarks import paths, sides
from experiments.benchmarks.gpu import card
from experiments.benchmarks.gpu.runner import Bench, Row
from experiments.benchmarks.memory import forget_peak, held, peak
from experiments.benchmarks.overhead import forward_overhead
from experiments.benchmarks.patching import Models, measure_sweep
from experiments.benchmarks.setting import EDGE_TOKENS, Setting
from experiments.benchmarks.work import prompt_operations
from experiments.timing import interleaved, ratio

DTYPES = ("float32", "bfloat16")
_ENDLESS: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": None}


def peaks(bench: Bench) -> Iterator[Row]:
    """What products and copies reach here, which later rows are compared with."""
    bench.peaks.update(card.peaks(bench.device, *((256, 8) if bench.quick else (8192, 1024))))
    yield {"what": "peaks", **bench.peaks}


def forwards(bench: Bench) -> Iterator[Row]:
    """Forward passes under small plans beside the bare model's."""
    for dtype in DTYPES:
        setting = replace(bench.setting, dtype=dtype)
        model = ip.wrap(setting.model())
        for batch, tokens, repetitions in setting.forwards:
            found = forward_overhead(setting, model, batch, tokens, repetitions)
            for name, over in found["over_bare"].items():
                yield {
                    "what": f"{batch} × {tokens} tokens, {name}",
                    "dtype": dtype,
                    "seconds": found["seconds"][name],
                    "over_bare": over,
                    "operations": batch * prompt_operations(setting, tokens),
                }
        del model


def sweeps(bench: Bench) -> Iterator[Row]:
    """Activation patching, ours and what a user would write instead."""
    for dtype in DTYPES:
        setting = replace(bench.setting, dtype=dtype)
        bare = setting.model()
        bridge = setting.bridge(bare) if dtype == "float32" and find_spec("transformer_lens") else None
        models = Models(ip.wrap(bare), bridge, bare)
        for tokens in setting.lengths:
            for site in ("resid_pre", "z"):
                task = setting.task(site, tokens, 0)
                found = measure_sweep(setting, models, task, batched=True)
                ours = statistics.median(found["seconds"]["ours"])
                middle = {name: statistics.median(each) for name, each in found["seconds"].items()}
                yield {
                    "what": f"{site}, {tokens} tokens, {len(task.cells)} cells",
                    "dtype": dtype,
                    "seconds": ours,
                    "times_ours": {name: each / ours for name, each in middle.items() if name != "ours"},
                    "difference": max(found["largest_difference"].values()),
                    "of": found["largest_effect"],
                    "operations": found["operations"],
                    "forwards": found["forwards"],
                    "percent_of_bound": 100 / found["over_bound"]["ratio"],
                    "peak_bytes": _peak(bench.device, sides.ours(models.wrapped, task)),
                }
        del models, bare, bridge


def masks(bench: Bench) -> Iterator[Row]:
    """Sweeps inside attention: patterns of heads, and keys that nobody may attend to."""
    short, long = (bench.setting.lengths[i] for i in (0, -1))
    for dtype in DTYPES:
        setting = replace(bench.setting, dtype=dtype)
        model = ip.wrap(setting.model())
        task = setting.task("z", short, 0)
        clean, corrupt = model.inputs(task.clean), model.inputs(task.corrupt)
        prompt = model.inputs(setting.task("z", long, 0).clean)
        patterns = partial(ip.sweep, model, clean, corrupt, ip.grid("pattern", layer="all", head="all"))
        keys = ip.grid("scores", layer="all", key_pos="all")
        knocked = partial(ip.sweep, model, prompt, None, keys, intervention=ip.knockout)
        yield _against(f"patterns, {short} tokens", dtype, patterns, bench, "batched")
        yield _against(f"key knock-outs, {long} tokens", dtype, knocked, bench, "batched")
        del model


def edges(bench: Bench) -> Iterator[Row]:
    """Exact effects of the edges into the last two layers, and scores of all, beside hooks."""
    setting = bench.setting
    model = ip.wrap(setting.model())
    task = setting.task("resid_pre", EDGE_TOKENS, 0)
    late = [r.name for r in ip.paths.Graph.of(model).readers if (r.layer or 0) >= setting.layers - 2]
    found = paths.measure_sweep("GPT-2 small", setting, model, task, 8 if bench.quick else 100, readers=late)
    yield {
        "what": f"{found['edges']} edges into the last two layers, {task.tokens} tokens",
        "dtype": "float32",
        "seconds": found["seconds"],
        "times_ours": {"loop": found["over_ours"]},
        "difference": found["largest_difference"],
        "of": found["largest_effect"],
        "forwards": found["forward_equivalents"],
        "operations": found["forward_equivalents"] * prompt_operations(setting, task.tokens),
    }
    for method in paths.METHODS:
        scores = paths.measure_scores("GPT-2 small", setting, model, task, method)
        yield {
            "what": f"{method} of {scores['edges']} edges",
            "dtype": "float32",
            "seconds": statistics.median(scores["seconds"]["ours"]),
            "times_ours": {"hooks": scores["over_ours"]["ratio"]},
            "difference": scores["largest_difference"],
            "of": scores["largest_score"],
        }


def decoding(bench: Bench) -> Iterator[Row]:
    """Decoding under a plan, every step a replay of one graph, beside plain decoding that is replayed too."""
    setting = bench.setting
    model = ip.wrap(setting.model())
    vector = torch.linspace(-1.0, 1.0, setting.width).cos().to(model.device, model.dtype)
    sites = [ip.site("resid_post", layer=layer, pos="new") for layer in range(setting.layers)]
    plan = ip.Plan(tuple(ip.steer(place, vector, 0.1) for place in sites))
    inputs, new = model.inputs(setting.ids(1, 16)), 4 if bench.quick else 64
    graph: dict[str, Any] = {"backend": "eager"} if bench.quick else {"mode": "reduce-overhead"}
    fast = model.compile(**graph)

    def replayed(todo: ip.Plan) -> Any:
        return fast.generate(inputs, todo, max_new_tokens=new, eos_token_id=None)

    def called() -> Any:
        return model.generate(inputs, plan, logits=True, max_new_tokens=new, do_sample=False, **_ENDLESS)

    runs = {"plain": partial(replayed, ip.Plan()), "held": partial(replayed, plan), "apply": called}
    for name in ("plain", "held"):  # made, recorded
        _ = runs[name](), runs[name]()
    seconds, found = interleaved(runs, 1 if bench.quick else 7, bench.device)
    middle = {name: statistics.median(each) for name, each in seconds.items()}
    yield {
        "what": f"decoding {new} tokens, {len(plan)} edits a token, replayed",
        "dtype": "float32",
        "seconds": middle["held"],
        "over_bare": ratio(seconds["held"], seconds["plain"]),
        "times_ours": {"generate() under apply": middle["apply"] / middle["held"]},
        "difference": float((found["held"].logits.float() - found["apply"].logits.float()).abs().max()),
        "of": float((found["held"].logits - found["plain"].logits).abs().max()),
    }


def callbacks(bench: Bench) -> Iterator[Row]:
    """A probe and a clamp in a training loop."""
    setting = training.Training(device=bench.device, repetitions=3)
    if bench.quick:
        setting = replace(setting, steps=4, every=2, repetitions=1)
    found = training.measure(setting)
    for name, over in found["over_bare"].items():
        yield {
            "what": f"training, {name}",
            "dtype": "float32",
            "seconds": found["seconds"][name],
            "over_bare": over,
            "steps_a_probe": found["steps_a_probe"].get(name),
            "difference": found["largest_difference_of_scores"],
            "of": found["scores"][1],
        }


def _against(what: str, dtype: str, sweep: Callable[..., ip.Result], bench: Bench, *others: str) -> Row:
    """A sweep by the executor that is the default beside others."""

    def run(executor: str) -> np.ndarray:
        return sweep(metric=paths.metric(), executor=executor, progress=False).effect.flatten()

    runs = {name: partial(run, name) for name in ("shared", *others)}
    used = sweep(metric=paths.metric(), progress=False).config["executor"]
    seconds, effects = interleaved(runs, 1 if bench.quick else 2, bench.device)
    ours = statistics.median(seconds["shared"])
    return {
        "what": f"{what}, {effects['shared'].size} cells",
        "dtype": dtype,
        "seconds": ours,
        "executor": used,
        "times_ours": {name: statistics.median(seconds[name]) / ours for name in others},
        "difference": max(float(np.abs(effects[name] - effects["shared"]).max()) for name in others),
        "of": float(np.abs(effects["shared"]).max()),
        "peak_bytes": _peak(bench.device, runs["shared"]),
    }


def _peak(device: str, run: Callable[[], Any]) -> int:
    """Bytes that a run takes at most beyond what is held before it."""
    before = held(device)
    forget_peak(device)
    run()
    return peak(device) - before


def quick(setting: Setting) -> Setting:
    """Sizes at which every part takes a second on a CPU."""
    small = replace(setting.tiny(), lengths=(6, 10), whole=6, sample=2, repetitions=1, vocabulary=128, width=32)
    return replace(small, forwards=((2, 16, 2),))
