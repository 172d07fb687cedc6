"""The card: what it is, what its data sheet says, and what a matrix product and a copy reach on it."""

from __future__ import annotations

import platform
import subprocess
from importlib.util import find_spec
from typing import Any

import torch

from experiments.timing import timed

NOMINAL: dict[str, dict[str, float]] = {
    "NVIDIA H100 80GB HBM3": {"float32": 67, "tf32": 495, "bfloat16": 989, "bandwidth": 3.35},
    "NVIDIA H100 PCIe": {"float32": 51, "tf32": 378, "bfloat16": 756, "bandwidth": 2.0},
    "NVIDIA H100 NVL": {"float32": 60, "tf32": 418, "bfloat16": 835, "bandwidth": 3.9},
    "NVIDIA H200": {"float32": 67, "tf32": 495, "bfloat16": 989, "bandwidth": 4.8},
    "NVIDIA A100-SXM4-80GB": {"float32": 19.5, "tf32": 156, "bfloat16": 312, "bandwidth": 2.04},
    "NVIDIA A100-SXM4-40GB": {"float32": 19.5, "tf32": 156, "bfloat16": 312, "bandwidth": 1.56},
    "NVIDIA A100 80GB PCIe": {"float32": 19.5, "tf32": 156, "bfloat16": 312, "bandwidth": 1.94},
    "NVIDIA L40S": {"float32": 91.6, "tf32": 183, "bfloat16": 362, "bandwidth": 0.864},
}
"""TFLOP/s of dense products and TB/s of memory, as the data sheets have them, by the name that the driver gives."""
OPTIONAL = {
    "transformer_lens": "the rows of TransformerLens",
    "nnsight": "its tests",
    "pandas": "data frames of results",
    "hypothesis": "tests of random plans",
    "scipy": "tests of statistics against it",
    "pytest": "the tests",
}
"""What a run does without where it is not installed, by module."""


def describe(device: str) -> dict[str, Any]:
    """Name, memory, driver and CUDA of a card, as JSON data; of a CPU its name."""
    if not device.startswith("cuda"):
        return {"name": platform.processor() or platform.machine(), "nominal": None}
    found = torch.cuda.get_device_properties(torch.device(device))
    return {
        "name": found.name,
        "memory_bytes": found.total_memory,
        "multiprocessors": found.multi_processor_count,
        "capability": f"{found.major}.{found.minor}",
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nominal": NOMINAL.get(found.name),
    }


def missing() -> dict[str, str]:
    """What is not installed, and what is left out for it."""
    return {name: what for name, what in OPTIONAL.items() if find_spec(name) is None}


def peaks(device: str, size: int, megabytes: int) -> dict[str, float]:
    """What the card reaches at its best of several tries.

    Args:
        device: where.
        size: rows and columns of the matrices.
        megabytes: of the tensor that is copied.

    Returns:
        TFLOP/s of a product in ``float32`` (without TF32), ``tf32`` (on CUDA) and ``bfloat16``, and ``bandwidth`` in
        TB/s, bytes that are read and written.
    """
    found = {}
    precision = torch.get_float32_matmul_precision()
    try:
        for name in ("float32", "tf32", "bfloat16") if device.startswith("cuda") else ("float32", "bfloat16"):
            torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
            dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
            x, y = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            found[name] = 2 * size**3 / _best(lambda x=x, y=y: torch.mm(x, y), device) / 1e12
    finally:
        torch.set_float32_matmul_precision(precision)
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    found["bandwidth"] = 2 * source.numel() * 4 / _best(lambda: target.copy_(source), device) / 1e12
    return found


def _best(run: Any, device: str, tries: int = 5, repeats: int = 4) -> float:
    """Seconds of one call, at the best of some tries after a warm-up."""

    def several() -> None:
        for _ in range(repeats):
            run()

    several()
    return min(timed(several, device)[0] for _ in range(tries)) / repeats


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (found.stdout.splitlines() or [None])[0] if found.returncode == 0 else None
