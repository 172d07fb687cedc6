"""Sweeps inside attention: edges forbidden, spans suppressed, patterns of heads patched.

Each is measured in turn with what it is compared with: bare matrix products, whose time is the bound; the model's own
forward pass, and a loop that gives it a 4-D mask; the sweep of `z` over the same heads.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from torch import Tensor

import interp as ip
from experiments.benchmarks.memory import forget_peak, held, peak
from experiments.benchmarks.setting import ANSWER, FOIL, Setting
from experiments.timing import block_products, interleaved, ratio

LONG, SPANS, WIDTH = 1000, 8, 25
"""Tokens of the long text, spans of it that are suppressed, one a world, and tokens of each."""
MATMUL_ROWS = {"cpu": 512, "cuda": 4096}


def measure(setting: Setting, model: ip.Model) -> Iterator[dict[str, Any]]:
    """One row of JSON data after another."""
    yield knockouts(setting, model)
    for tokens in setting.lengths:
        yield patterns(setting, model, tokens)
    yield spans(setting, model)


def knockouts(setting: Setting, model: ip.Model) -> dict[str, Any]:
    """Forbid the last token's attention to each key in each layer: one world a key and layer."""
    tokens = max(setting.lengths)
    inputs = model.inputs(setting.ids(1, tokens))
    grid = ip.grid("scores", layer="all", pos=-1, key_pos="all")
    metric = ip.logit_diff(ANSWER, FOIL)

    def ours() -> np.ndarray:
        found = ip.sweep(model, inputs, None, grid, metric=metric, intervention=ip.knockout, progress=False)
        return found.effect.flatten()

    ours()
    rows = MATMUL_ROWS[torch.device(setting.device).type]
    products, product_operations = block_products(setting.width, rows, setting.layers, setting.device, setting.dtype)
    seconds, effects = interleaved({"ours": ours, "products": products}, setting.repetitions, setting.device)
    # The base; then one token a cell: its output projection and MLP in its layer, all of every block above.
    above = sum(9 + 12 * (setting.layers - 1 - layer) for layer in range(setting.layers))
    operations = 2 * setting.width**2 * (12 * setting.layers * tokens + tokens * above)
    bound = [s * operations / product_operations for s in seconds.pop("products")]
    chosen = [(setting.layers // 2, key) for key in range(0, tokens, max(1, tokens // setting.sample))]
    loop = np.array([_one_by_one(model, inputs.ids, layer, key) for layer, key in chosen])
    mine = effects["ours"].reshape(setting.layers, tokens)[tuple(zip(*chosen, strict=True))]
    return {
        "what": "key knock-outs", "tokens": tokens, "cells": setting.layers * tokens, "seconds": seconds,
        "bound_seconds": statistics.median(bound), "over_bound": ratio(seconds["ours"], bound),
        "largest_effect": float(np.abs(effects["ours"]).max()),
        "largest_difference": float(np.abs(loop - mine).max()),
    }  # fmt: skip


def _one_by_one(model: ip.Model, ids: Tensor, layer: int, key: int) -> float:
    """The effect of one edge, by the model itself with a mask of that layer's own."""
    module: Any = model.module
    tokens = ids.shape[1]
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None].to(model.device)
    cut = mask.clone()
    cut[..., -1, key] = False

    def narrowed(_module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "attention_mask": cut}

    def measured() -> float:
        with torch.no_grad():
            logits = module(input_ids=ids.to(model.device), attention_mask=mask, use_cache=False).logits[0, -1]
        return float(logits[ANSWER] - logits[FOIL])

    plain = measured()
    handle = model.architecture.blocks[layer].attention.module.register_forward_pre_hook(narrowed, with_kwargs=True)
    try:
        return measured() - plain
    finally:
        handle.remove()


def patterns(setting: Setting, model: ip.Model, tokens: int) -> dict[str, Any]:
    """Patch the pattern of every head, beside the same sweep of `z`."""
    task = setting.task("z", tokens, 0)
    clean, corrupt = model.inputs(task.clean), model.inputs(task.corrupt)

    def sweep(site: str, executor: str = "auto", layers: Any = "all") -> np.ndarray:
        grid = ip.grid(site, layer=layers, head="all")
        metric = ip.logit_diff(ANSWER, FOIL)
        return ip.sweep(model, clean, corrupt, grid, metric=metric, executor=executor, progress=False).effect

    runs: dict[str, Callable[[], np.ndarray]] = {"pattern": partial(sweep, "pattern"), "z": partial(sweep, "z")}
    for run in runs.values():
        run()
    seconds, effects = interleaved(runs, setting.repetitions, setting.device)
    middle = [setting.layers // 2]
    oracle = sweep("pattern", "sequential", middle)
    return {
        "what": "patterns of heads", "tokens": tokens, "cells": len(task.cells), "seconds": seconds,
        "over_z": ratio(seconds["pattern"], seconds["z"]),
        "largest_effect": float(np.abs(effects["pattern"]).max()),
        "largest_difference": float(np.abs(oracle - effects["pattern"][middle]).max()),
    }  # fmt: skip


class Suppression:
    """Worlds in which no later token attends to a span of a text, in any layer."""

    def __init__(self, setting: Setting, model: ip.Model) -> None:
        self.model = model
        tokens, self.width = (60, 3) if setting.quick else (LONG, WIDTH)
        self.starts = [tokens // 10 * i for i in range(SPANS)]
        self.inputs = model.inputs(setting.ids(1, tokens))

    def ours(self) -> np.ndarray:
        """The last logits in every world, all of them in one run."""
        worlds = [ip.World(self.inputs, self.plan(start)) for start in self.starts]
        reads = [ip.site("logits", pos=-1)]
        found = {o.index: o.values[0] for o in ip.run_worlds(self.model, worlds, reads)}
        return torch.cat([found[i][:, 0] for i in range(len(worlds))]).double().cpu().numpy()

    def plan(self, start: int) -> ip.Plan:
        stop = start + self.width
        return ip.Plan(
            tuple(
                ip.knockout(ip.site("scores", layer=layer, pos=slice(stop, None), key_pos=slice(start, stop)))
                for layer in range(self.model.n_layers)
            )
        )

    def loop(self) -> np.ndarray:
        """The same by the model itself, with a 4-D mask for each world."""
        module: Any = self.model.module
        ids = self.inputs.ids.to(self.model.device)
        tokens, found = ids.shape[1], []
        for start in self.starts:
            stop = start + self.width
            mask = torch.ones(tokens, tokens, dtype=torch.bool, device=ids.device).tril()
            mask[stop:, start:stop] = False
            with torch.no_grad():
                out = module(input_ids=ids, attention_mask=mask[None, None], use_cache=False, logits_to_keep=1)
            found.append(out.logits[:, -1])
        return torch.cat(found).double().cpu().numpy()

    def forward(self) -> np.ndarray:
        """One plain forward pass over the text, all logits."""
        with torch.no_grad():
            out: Any = self.model.module(input_ids=self.inputs.ids.to(self.model.device), use_cache=False)
        return out.logits[:, -1].double().cpu().numpy()


def spans(setting: Setting, model: ip.Model) -> dict[str, Any]:
    """Suppress spans of a long text for all later tokens in all layers."""
    case = Suppression(setting, model)
    runs: dict[str, Callable[[], np.ndarray]] = {"ours": case.ours, "loop": case.loop, "forward": case.forward}
    for run in runs.values():
        run()
    seconds, logits = interleaved(runs, setting.repetitions, setting.device)
    each = {name: [s / SPANS for s in seconds[name]] for name in ("ours", "loop")}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        memory = {name: pool.submit(_peak, setting, name).result() for name in ("forward", "ours", "loop")}
    return {
        "what": "spans suppressed", "tokens": case.inputs.width, "cells": SPANS, "seconds": seconds, "memory": memory,
        "forwards_a_span": {name: ratio(found, seconds["forward"]) for name, found in each.items()},
        "largest_effect": float(np.abs(logits["ours"] - logits["forward"]).max()),
        "largest_difference": float(np.abs(logits["ours"] - logits["loop"]).max()),
    }  # fmt: skip


def _peak(setting: Setting, name: str) -> int:
    """Bytes that a side takes at most beyond what its process held before."""
    torch.set_num_threads(setting.threads)
    case = Suppression(setting, ip.wrap(setting.model()))
    case.model.run(case.model.inputs(setting.ids(1, 2)))
    before = held(setting.device)
    forget_peak(setting.device)
    getattr(case, name)()
    return peak(setting.device) - before
