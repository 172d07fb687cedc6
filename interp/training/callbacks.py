"""What can be hung on a training loop: clamps, probes, checkpoints, and the watch for a phase change.

A callback is told three things, by number of optimizer steps: it is *in* a step (`during`), the model is *at* a step,
between two updates (`at`), and what loss a step had (`loss`). What it returns is logged. See `Monitor` for plain loops,
and `trainer_callback` and `lightning_callback` for Hugging Face's and Lightning's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from hooks import (
    Audit,
    Inputs,
    Intervention,
    MetricError,
    Model,
    Plan,
    PlanError,
    ResultError,
    UnfiredError,
    as_plan,
    write_all,
)
from interp.training.phase import Drop
from interp.training.records import plain
from interp.training.schedules import Every, Level, When, due, during, level
from interp.training.untouched import untouched

PlanOrFunction = Plan | Intervention | Callable[[Inputs], Any]


class Callback:
    """A callback that does nothing; the others override what they need."""

    name = "callback"

    def during(self, model: Model, step: int) -> AbstractContextManager[Any]:
        """What is in force in the forward and backward passes and the update that follow `step` updates."""
        return nullcontext()

    def at(self, model: Model, step: int) -> dict[str, Any]:
        """What to log of the model after `step` updates."""
        return {}

    def loss(self, model: Model, step: int, value: float) -> dict[str, Any]:
        """What to log, given the loss of the model after `step` updates."""
        return {}

    def finish(self) -> None:
        """Training is over."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""


class Clamp(Callback):
    """A plan in force during training steps; the model is bare between them, for probes and evaluation.

    Args:
        plan: a plan, or a function from the `Inputs` of each forward pass to one (for positions that depend on the
            batch).
        when: the steps in which it is in force; see `interp.training.schedules.When`.
        strength: from 0 (not in force) to 1, which may change with the step; see `interp.training.schedules.Level`.
        name: what the log calls it; its strength is logged when that changes.

    Raises:
        PlanError: unknown schedules, an empty plan, or, in a step, a strength that is not from 0 to 1.
        UnfiredError: after a step in which an intervention never fired, and at the end of a training in which the
            clamp never was in force.
    """

    def __init__(self, plan: PlanOrFunction, when: When = None, *, strength: Level = 1.0, name: str = "clamp") -> None:
        if isinstance(plan, type):
            raise PlanError(f"the plan of the clamp {name!r} is the class {plan.__name__}: give one of its instances")
        self.plan = plan if callable(plan) and not isinstance(plan, (Plan, Intervention)) else as_plan(plan)
        if isinstance(self.plan, Plan) and not len(self.plan):
            raise PlanError(f"the plan of the clamp {name!r} is empty: it would hold nothing")
        self.when, self.strength, self.name = during(when), level(strength), name
        self.steps, self.logged = 0, None
        self.audit: Audit | None = None

    def level(self, step: int) -> float:
        """Its strength in a step; 0 where it is not in force."""
        return self.strength(step) if self.when(step) else 0.0

    def during(self, model: Model, step: int) -> AbstractContextManager[Any]:
        s = self.level(step)
        if s == 0.0:
            return nullcontext()
        return _Keeping(model.apply(at_strength(self.plan, s), seed=step), self)

    def at(self, model: Model, step: int) -> dict[str, Any]:
        s = self.level(step)
        if s == self.logged:
            return {}
        self.logged = s
        return {self.name: s}

    def finish(self) -> None:
        if not self.steps:
            raise UnfiredError(
                f"the clamp {self.name!r} never was in force: its schedule names no step that was trained"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "logged": self.logged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.logged = state["steps"], state["logged"]


class _Keeping(AbstractContextManager):
    """A plan's context that leaves its audit with the clamp, which counts the steps that came to their end."""

    def __init__(self, held: AbstractContextManager[Audit], clamp: Clamp) -> None:
        self.held, self.clamp = held, clamp

    def __enter__(self) -> Audit:
        self.clamp.audit = self.held.__enter__()
        return self.clamp.audit

    def __exit__(self, *error: Any) -> bool | None:
        caught = self.held.__exit__(*error)
        if error[0] is None:
            self.clamp.steps += 1
        return caught


def at_strength(plan: PlanOrFunction, s: float) -> PlanOrFunction:
    """A plan, or a function that gives one, at strength s; as it is at 1."""
    if s == 1.0:
        return plan
    if isinstance(plan, (Plan, Intervention)):
        return plan.strength(s)
    return lambda inputs: as_plan(plan(inputs)).strength(s)


def probe(model: Model, measure: Callable[[Model], Any]) -> Any:
    """What a measure gives of the model as it is, as plain data; it leaves no trace (see `untouched`)."""
    with untouched(model.module):
        return plain(measure(model))


class Probe(Callback):
    """A measure taken in the course of training, which leaves no trace in it.

    Args:
        measure: from the wrapped model to numbers, a tensor, or a mapping of those: a metric or a sweep on fixed
            inputs, an attention score, the effect of a path, the loss under a plan.
        every: the steps at which it is taken, from 0 (before the first update) on; see
            `interp.training.schedules.Every`.
        name: what the log calls it, default the function's name.

    Raises:
        PlanError: an unknown schedule.
        MetricError: the measure is not a function.
    """

    def __init__(self, measure: Callable[[Model], Any], every: Every = 1, *, name: str | None = None) -> None:
        if not callable(measure):
            raise MetricError(f"a probe's measure is a function of the wrapped model, not {measure!r}")
        self.measure, self.due = measure, due(every)
        self.name = name or getattr(measure, "__name__", "probe")

    def at(self, model: Model, step: int) -> dict[str, Any]:
        return {self.name: probe(model, self.measure)} if self.due(step) else {}


def save_weights(model: Model, path: str | os.PathLike[str], step: int) -> None:
    """Write a model's state dict as safetensors; weights that are shared are written under each of their names."""
    weights = {name: w.detach().cpu().contiguous().clone() for name, w in model.module.state_dict().items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_all({Path(path): save(weights, metadata={"step": str(step)})})


class Checkpoints(Callback):
    """The weights at some steps, each in a file ``step-00001000.safetensors``.

    Args:
        folder: where; a file that is there is replaced when its step comes, and others stay.
        every: the steps, from 0 (before the first update) on; see `interp.training.schedules.Every`.
    """

    name = "checkpoints"

    def __init__(self, folder: str | os.PathLike[str], every: Every) -> None:
        self.folder, self.due = Path(folder), due(every)

    def at(self, model: Model, step: int) -> dict[str, Any]:
        if self.due(step):
            save_weights(model, self.path(step), step)
        return {}

    def path(self, step: int) -> Path:
        """The file of a step."""
        return self.folder / f"step-{step:08d}.safetensors"

    def steps(self) -> list[int]:
        """The steps that are saved in the folder, by whichever run, ascending."""
        return sorted(int(path.stem.removeprefix("step-")) for path in self.folder.glob("step-*.safetensors"))

    def load(self, step: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The state dict of a step.

        Raises:
            ResultError: there is none.
        """
        if not self.path(step).exists():
            raise ResultError(f"no checkpoint of step {step} in {self.folder}; there are {self.steps()}")
        return load_file(self.path(step), device=str(device))


class PhaseChange(Callback):
    """The first step at which a smoothed training loss is below a threshold, found as it happens; see `phase_change`.

    Args:
        threshold: in the loss's unit; with a plateau, a share of its height.
        plateau: ``(start, stop)``, the steps whose mean loss is the plateau's height.
        smooth: observations that the mean is over.
        name: what the log calls it.

    Attributes:
        step: where it was, or None.
    """

    def __init__(
        self,
        threshold: float,
        *,
        plateau: tuple[int, int] | None = None,
        smooth: int = 1,
        name: str = "phase_change",
    ) -> None:
        self.drop, self.name = Drop(threshold, plateau, smooth), name

    @property
    def step(self) -> int | None:
        return self.drop.step

    def loss(self, model: Model, step: int, value: float) -> dict[str, Any]:
        return {self.name: step} if self.drop.see(step, value) else {}

    def state_dict(self) -> dict[str, Any]:
        return self.drop.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drop.load_state_dict(state)
