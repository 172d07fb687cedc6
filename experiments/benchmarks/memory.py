"""The memory that each side of a sweep takes at most."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import interp as ip
from experiments.benchmarks import sides
from experiments.benchmarks.setting import Setting

SIDES = ("ours", "transformer_lens", "hook_loop")
FEW = 4
"""Cells of the other sides, which run one after another: more of them take no more memory."""


def peak_memory(setting: Setting, side: str) -> list[dict[str, Any]]:
    """Bytes that each sweep of a side takes at most beyond what its process, one of its own, held before.

    Clean values are part of it on every side. On a GPU it is the GPU's memory that is counted.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peaks, setting, side).result()


def _peaks(setting: Setting, side: str) -> list[dict[str, Any]]:
    torch.set_num_threads(setting.threads)
    model = setting.model()
    prepare: Callable[..., sides.Run]
    if side == "ours":
        prepare = partial(sides.ours, ip.wrap(model))
    elif side == "transformer_lens":
        prepare = partial(sides.transformer_lens, setting.bridge(model))
    else:
        prepare = partial(sides.hook_loop, model)
    # What a first sweep loads (the interpreter's modules, torch's) belongs to none that is measured.
    first = setting.task("z", 2, 0)
    (prepare(first) if side == "ours" else prepare(first, first.cells[:FEW]))()
    rows = []
    before = held(setting.device)
    for tokens in sorted(setting.lengths):  # from small to large: what an allocator holds back hides no later peak
        for site in ("z", "resid_pre"):
            task = setting.task(site, tokens, setting.shared[0])
            forget_peak(setting.device)
            (prepare(task) if side == "ours" else prepare(task, task.cells[:FEW]))()
            rows.append({"side": side, "site": site, "tokens": tokens, "bytes": peak(setting.device) - before})
    return rows


def held(device: str) -> int:
    """Bytes held now."""
    return torch.cuda.memory_allocated() if device.startswith("cuda") else _status("VmRSS")


def peak(device: str) -> int:
    """Bytes held at most since `forget_peak`."""
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else _status("VmHWM")


def forget_peak(device: str) -> None:
    """Start a new high-water mark."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    else:
        # Linux's own high-water mark: `ru_maxrss` cannot be trusted, a new process starts with its parent's.
        Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])
