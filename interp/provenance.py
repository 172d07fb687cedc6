"""Where a result comes from: what it was computed of and with."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hooks import Inputs, Model, Plan, World, digest_of, fingerprint, joined, structure
from interp.axes import Axis
from interp.grids import Factory
from interp.metrics import Bound, Metric
from interp.streaming import weights_digest
from interp.version import __version__


def describe_run(
    model: Model,
    grid: Any,
    intervention: Factory | None,
    corrupt: Inputs | None,
    direction: str,
    seed: int,
    *,
    inputs: Inputs | None = None,
    source: World | None = None,
    plans: Sequence[Plan] = (),
) -> dict[str, Any]:
    """What a result says of how it was made.

    Args:
        model, grid, intervention, corrupt, direction, seed: of the call.
        inputs: the run that is edited, and `source` the one that values are taken from.
        plans: what was done in each cell.
    """
    told: dict[str, Any] = {}
    if inputs is not None:
        told["inputs"] = {"base": told_of(inputs)} | ({} if source is None else {"source": told_of(source.inputs)})
    if plans:
        # The first as it prints, and what tells all of them from those of another sweep.
        told["plan"] = {"first": str(plans[0]), "cells": len(plans)}
    path = getattr(getattr(model.module, "config", None), "_name_or_path", "")
    return {
        "model": repr(model),
        **({"path": str(path)} if path else {}),
        **told,
        "grid": str(grid),
        "intervention": "patch" if intervention is None else name_of(intervention),
        "direction": direction if corrupt is not None else "ablation",
        "seed": seed,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "versions": versions(),
    }


def told_of(inputs: Inputs) -> dict[str, Any]:
    """What a result says of prompts: how many, how long, the first of them, and a digest of all."""
    lengths = inputs.lengths
    return {
        "rows": len(inputs),
        "tokens": [int(lengths.min()), int(lengths.max())],
        "first": joined(inputs.labels(0)) if inputs.pixels is None else repr(inputs),
        "digest": fingerprint(inputs),
    }


def name_of(factory: Any) -> str:
    """What an intervention is called: its function's name."""
    inner = getattr(factory, "func", factory)
    return getattr(inner, "__name__", type(inner).__name__)


def versions() -> dict[str, str]:
    """Versions of what the numbers were computed with, and the commit of the working directory where there is one."""
    found = {"interp": __version__, "python": platform.python_version(), "torch": torch.__version__}
    if "transformers" in sys.modules:
        found["transformers"] = sys.modules["transformers"].__version__
    here = Path(__file__).parents[1]
    if not (here / ".git").exists():  # installed: a repository around it would be somebody else's
        return found
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, cwd=here, check=False
        )
        if answer.returncode == 0:
            found["commit"] = answer.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return found


def sweep_identity(
    model: Model,
    base: Inputs,
    source: World | None,
    axes: Sequence[Axis],
    worlds: Sequence[World],
    metrics: Sequence[Metric],
    bound: Sequence[Bound],
    several: bool,
    direction: str,
    seed: int,
    executor: str,
) -> dict[str, str]:
    """Digests of all that a sweep's result depends on, by name: two are the same sweep where they are equal."""
    plans = fingerprint(tuple(fingerprint(_local(w.plan, source)) for w in worlds))
    measured = [metric_identity(m, b) for m, b in zip(metrics, bound, strict=True)]
    held = [model.held_on(base)[0]] if source is None else [model.held_on(base)[0], source.plan]
    around = {"held": digest_of([fingerprint(plan) for plan in held])} if any(map(len, held)) else {}
    return {
        **around,
        **model_identity(model),
        "inputs": fingerprint(base),
        "source": "" if source is None else fingerprint(World(source.inputs)),
        "grid": digest_of([(axis.name, axis.values, axis.labels) for axis in axes]),
        "plan": plans,
        "direction": direction,
        "metrics": digest_of((several, measured)),
        "seed": str(seed),
        "executor": executor,
    }


def model_identity(model: Model) -> dict[str, str]:
    """Digests of a model: its weights, and what it computes with them, hooks of the user's on it included."""
    with model.suspended():
        return {"weights": weights_digest(model), "model": digest_of((repr(model), structure(model.module)))}


def metric_identity(metric: Metric, bound: Bound) -> str:
    """A digest of a metric on given inputs: its function, what that closes over, what it reads and compares with."""
    compared = "" if metric.reference is None else fingerprint(metric.reference)
    return digest_of((metric.name, metric.stated, metric.bind, bound.fn, fingerprint(bound.reads), compared))


def _local(plan: Plan, source: World | None) -> Plan:
    """The plan with the sweep's own source left out: it is known by its own digest, once instead of in every cell."""
    out = []
    for item in plan:
        reads = tuple(
            replace(r, source=torch.zeros(0)) if source is not None and r.source is source else r for r in item.reads
        )
        out.append(replace(item, reads=reads))
    return Plan(tuple(out))
