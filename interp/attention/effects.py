"""What attention causes: the answer under the model's attention minus the answer under do(attention = a*)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hooks import Inputs, Intervention, Model, PlanError, Site, counterfactual
from interp.attention.counterfactuals import layers_of
from interp.grids import grid
from interp.metrics import Metric
from interp.results import Result
from interp.sweeps import sweep

BY = ("all", "layer", "head")


def attention_effect(
    model: Model,
    inputs: Inputs,
    *,
    metric: Metric | Sequence[Metric],
    do: str = "random",
    by: str = "layer",
    stack: str | None = None,
    queries: Any = None,
    keys: Any = None,
    samples: int = 1,
    seed: int = 0,
    executor: str = "auto",
    budget: int | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Result:
    """The causal effect of attention on an answer, E over a* of M(A) - M(do(A = a*)) (Zhou et al. 2025, equation 8).

    Positive where attention speaks for what the metric measures. What follows the intervention is computed under it.

    Args:
        model: the wrapped model.
        inputs: prompts, with images where the model takes them.
        metric: what is measured; several make a first axis.
        do: the form of counterfactual attention; see `interp.counterfactual`.
        by: ``"layer"``, ``"head"`` (of every layer), or ``"all"`` layers at once.
        stack: ``"vision"`` for the image encoder; None for the language model.
        queries, keys: positions, as of a site; ``keys="image"`` is the attention to the image alone.
        samples: draws of a* that are averaged, for the forms that draw.
        seed: of the first; the others have the next ones.
        executor, budget, progress: as in `interp.sweep`.
        path: a folder that keeps a sweep for each draw, from which an interrupted one goes on.

    Returns:
        A `Result` with axes [metric?, layer?, head?, row]; `ci()` is over rows.

    Raises:
        PlanError: an unknown form or `by`, or no draw.
        SiteError: the model has no such stack or positions.
    """
    if by not in BY:
        raise PlanError(f"by is one of {', '.join(BY)}, not {by!r}")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise PlanError(f"samples is how many counterfactuals are averaged, 1 or more, not {samples!r}")
    layers_of(model, stack)
    where = {name: value for name, value in (("pos", queries), ("key_pos", keys)) if value is not None}
    count = samples if do in ("random", "shuffled") else 1
    found = []
    for n in range(count):
        factory = partial(_do, form=do, stack=stack, seed=seed + n, where=tuple(where.items()))
        kept = None if path is None else Path(path) / f"draw_{n}"
        found.append(
            sweep(
                model, inputs, None, grid("pattern", **_axes(model, by, stack)), metric=metric,
                intervention=factory, executor=executor, budget=budget, path=kept, progress=progress,
            )
        )  # fmt: skip
    effect = -np.mean([one.effect for one in found], axis=0)
    status = np.min([one.status for one in found], axis=0)
    config = found[0].config | {"do": do, "by": by, "samples": count, "stack": stack or "language", "seed": seed}
    return replace(found[0], effect=effect, status=status, config=config)


def _axes(model: Model, by: str, stack: str | None) -> dict[str, Any]:
    layers = tuple(range(layers_of(model, stack)))
    heads = tuple(range(model.sizes["pattern", 0, stack]["head"]))
    return {"layer": {"all": layers} if by == "all" else layers} | ({"head": heads} if by == "head" else {})


def _do(place: Site, form: str, stack: str | None, seed: int, where: tuple[tuple[str, Any], ...]) -> Intervention:
    # A grid goes through the layers of the language model; where it is another stack, its numbers are that one's.
    return counterfactual(replace(place.at(**dict(where)), stack=stack), form, seed=seed)
