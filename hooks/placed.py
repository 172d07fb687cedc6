"""What a program indexes by, brought to a device at once: how many interventions there are does not matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .plan.context import Context
from .plan.region import Entries, Region
from .program import Here, Program, Step


def place(indices: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The same tensors on a device, in one transfer for each dtype."""
    if device.type == "cpu":
        return list(indices)
    placed: list[Tensor] = list(indices)
    for dtype in {index.dtype for index in indices}:
        mine = [number for number, index in enumerate(indices) if index.dtype == dtype]
        whole = torch.cat([indices[number].flatten() for number in mine]).to(device)
        for number, part in zip(mine, whole.split([indices[number].numel() for number in mine]), strict=True):
            placed[number] = part.view(indices[number].shape)
    return placed


def placed(program: Program, device: torch.device) -> Program:
    """A program whose regions and contexts are on a device; the values that it reads are where they were."""
    if device.type == "cpu":
        return program
    found: dict[int, Tensor] = {}

    def note(x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            found.setdefault(id(x), x)
        return x

    def everywhere(on: Callable[[Tensor], Tensor]) -> Program:
        steps = {key: tuple(_step(step, on) for step in mine) for key, mine in program.steps.items()}
        return replace(program, steps=steps)

    everywhere(note)
    there = dict(zip(found, place(list(found.values()), device), strict=True))
    return everywhere(lambda x: there.get(id(x), x))


def _step(step: Step, on: Callable[[Tensor], Tensor]) -> Step:
    reads = tuple(replace(read, region=_region(read.region, on)) if isinstance(read, Here) else read
                  for read in step.reads)  # fmt: skip
    return replace(step, region=_region(step.region, on), ctx=_context(step.ctx, on), reads=reads)


def _region(region: Region | Entries, on: Callable[[Tensor], Tensor]) -> Any:
    # Columns stay where they are: they say on the CPU which tokens these are.
    steps = tuple((axis, on(index)) for axis, index in region.steps)
    return replace(region, steps=steps, valid=None if region.valid is None else on(region.valid))


def _context(ctx: Context, on: Callable[[Tensor], Tensor]) -> Context:
    return replace(
        ctx,
        row=on(ctx.row),
        pos=on(ctx.pos),
        key_pos=None if ctx.key_pos is None else on(ctx.key_pos),
        dim=None if ctx.dim is None else on(ctx.dim),
        window=on(ctx.window) if isinstance(ctx.window, Tensor) else ctx.window,
    )
