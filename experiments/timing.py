"""Clocks: interleaved repetitions, ratios, and the products that show how fast this machine multiplies."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch


def timed(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds that a call takes until the device is done, and what it returns."""
    _wait(device)
    start = time.perf_counter()
    output = run()
    _wait(device)
    return time.perf_counter() - start, output


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def interleaved(
    runs: Mapping[str, Callable[[], Any]], repetitions: int, device: str
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Run each in turn, `repetitions` times over, so that a slow spell of the machine falls on all.

    Returns:
        seconds of each run, and what each returned last.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    outputs = {}
    for _ in range(repetitions):
        for name, run in runs.items():
            taken, outputs[name] = timed(run, device)
            seconds[name].append(taken)
    return seconds, outputs


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Ratio of the medians of two interleaved series, with the spread of the ratios of single repetitions."""
    each = np.divide(over, under)
    low, high = np.quantile(each, [0.25, 0.75])
    return {
        "ratio": statistics.median(over) / statistics.median(under),
        "min": float(each.min()),
        "lower_quartile": float(low),
        "upper_quartile": float(high),
        "max": float(each.max()),
    }


def block_products(
    width: int, rows: int, blocks: int, device: str, dtype: str = "float32"
) -> tuple[Callable[[], None], int]:
    """The matrix products of transformer blocks on `rows` tokens, and nothing else.

    Those of width x width (queries, keys, values, output: four), and the two of the MLP, four times as wide.

    Returns:
        a function that computes them, and how many floating-point operations they are.
    """
    shapes = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
    of = {"device": device, "dtype": getattr(torch, dtype)}
    pairs = [(torch.randn(rows, inner, **of), torch.randn(inner, outer, **of)) for inner, outer in shapes]

    def run() -> None:
        for _ in range(blocks):
            for x, weight in pairs:
                torch.mm(x, weight)

    return run, blocks * sum(2 * rows * inner * outer for inner, outer in shapes)
