"""The same sweep done three ways: with this library, with `transformer_lens.patching`, and with a loop over hooks.

Each function prepares a sweep and returns a function that runs it and gives the effects, float64 [cells], each
metric(patched) - metric(corrupt). The other two sides get their clean values and the corrupt run's metric in the
preparation, which is not timed; ours runs the clean and the corrupt prompt within the sweep.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stderr
from typing import Any

import numpy as np
import torch
from torch import Tensor

import interp as ip
from experiments.benchmarks.setting import ANSWER, FOIL, Cell, Task

Run = Callable[[], np.ndarray]


def ours(model: ip.Model, task: Task, layers: Any = "all", executor: str = "shared") -> Run:
    """`interp.sweep` over the whole grid, or over some layers of it."""
    clean, corrupt = model.inputs(task.clean), model.inputs(task.corrupt)
    grid = ip.grid(task.site, layer=layers, **{task.axis: "all"})
    metric = ip.logit_diff(ANSWER, FOIL)

    def run() -> np.ndarray:
        result = ip.sweep(model, clean, corrupt, grid, metric=metric, executor=executor, progress=False)
        return result.effect.flatten()

    return run


def transformer_lens(bridge: Any, task: Task, cells: Sequence[Cell]) -> Run:
    """`transformer_lens.patching` over the given cells."""
    import pandas as pd
    from transformer_lens import patching

    hook, sweep = {
        "resid_pre": ("hook_resid_pre", patching.get_act_patch_resid_pre),
        "z": ("hook_z", patching.get_act_patch_attn_head_out_all_pos),
    }[task.site]
    clean, corrupt = task.clean.to(bridge.cfg.device), task.corrupt.to(bridge.cfg.device)
    table = pd.DataFrame(cells, columns=["layer", task.axis])

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, ANSWER] - logits[0, -1, FOIL]

    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean, names_filter=lambda name: name.endswith(hook))
        base = metric(bridge(corrupt)).double()

    def run() -> np.ndarray:
        with torch.no_grad(), redirect_stderr(io.StringIO()):  # its progress bar
            values = sweep(bridge, corrupt, cache, metric, index_axis_names=None, index_df=table)
        return (values.double() - base).cpu().numpy()

    return run


def hook_loop(model: Any, task: Task, cells: Sequence[Cell]) -> Run:
    """What a careful user writes: one forward of the Hugging Face model a cell, logits at the last position only."""
    blocks = model.transformer.h
    clean, corrupt = task.clean.to(model.device), task.corrupt.to(model.device)
    head_width = model.config.n_embd // model.config.n_head
    if task.site == "resid_pre":
        modules = list(blocks)
        parts = {i: (slice(None), i) for i in range(task.tokens)}
    else:  # what the output projection reads is every head's z, side by side
        modules = [block.attn.c_proj for block in blocks]
        parts = {i: (..., slice(i * head_width, (i + 1) * head_width)) for i in range(model.config.n_head)}

    def metric(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]
        return logits[ANSWER] - logits[FOIL]

    stored: dict[Any, Tensor] = {}

    def store(module: Any, args: tuple) -> None:
        stored[module] = args[0].clone()

    with torch.no_grad(), ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(store).remove)
        metric(clean)
    with torch.no_grad():
        base = metric(corrupt).double()

    def run() -> np.ndarray:
        values = []
        with torch.no_grad():
            for layer, index in cells:

                def patch(module: Any, args: tuple, part: Any = parts[index]) -> tuple:
                    x = args[0].clone()
                    x[part] = stored[module][part]
                    return (x, *args[1:])

                handle = modules[layer].register_forward_pre_hook(patch)
                values.append(metric(corrupt))
                handle.remove()
        return (torch.stack(values).double() - base).cpu().numpy()

    return run
