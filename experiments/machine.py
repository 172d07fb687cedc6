"""Where it was measured: processor, software and commit."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def describe(device: str) -> dict[str, Any]:
    """Processor, threads and torch build, as JSON data."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "system": platform.platform(),
        "torch_build": torch.__config__.show(),
    }


def versions(*more: str) -> dict[str, str]:
    """Versions of what was compared, of what is installed."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "transformer-lens", "numpy", *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write(path: Path, found: dict[str, Any], device: str = "cpu") -> None:
    """Write results as JSON, with where they were measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {**found, "machine": describe(device), "versions": versions(), "commit": commit()}
    path.write_text(json.dumps(told, indent=1) + "\n")


def commit() -> str:
    """The commit of this checkout, marked where files differ from it; empty without git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return found.stdout.strip()
