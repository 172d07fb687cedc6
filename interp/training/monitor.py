"""Callbacks on a plain training loop: two lines."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Real
from typing import Any

from torch import Tensor

from hooks import MetricError, Model, ModelError
from interp.training.callbacks import Callback, Clamp, PhaseChange, Probe
from interp.training.records import JsonLines, scalars

Log = Callable[[dict[str, float], int], Any]


class Monitor:
    """Callbacks, the count of optimizer steps, and where what they find is logged.

    ::

        monitor = Monitor(model, [Clamp(plan), Probe(measure, every=100)], log="run.jsonl")
        for batch in batches:
            with monitor.step() as step:
                loss = loss_of(batch)
                loss.backward(); optimizer.step(); optimizer.zero_grad()
                step.loss(loss)
        monitor.finish()

    A step is one update of the optimizer, whatever number of forward and backward passes it has. To resume, save
    `state_dict` with the optimizer's, between two steps, and load both.

    Args:
        model: the wrapped model that is trained.
        callbacks: in the order in which they act; clamps that come later see what earlier ones did.
        log: a JSON-lines file, in which a line is written wherever there is something to log: what callbacks found, and
            under "loss" the loss of each step that `loss` is told (unless a callback has that name). A run that starts
            at step 0 writes it anew; one that is resumed drops the lines after the step at which it resumes.
        logger: a function of the numbers by name and the step, as trainers' loggers are.

    Raises:
        ModelError: no wrapped model, what is not a callback, or a name that is taken.
    """

    def __init__(
        self,
        model: Model,
        callbacks: Sequence[Callback],
        *,
        log: str | os.PathLike[str] | None = None,
        logger: Log | None = None,
    ) -> None:
        if not isinstance(model, Model):
            raise ModelError(
                f"a monitor watches a wrapped model, from ip.wrap or ip.load, not a {type(model).__name__}"
            )
        if not isinstance(callbacks, Sequence):
            raise ModelError(f"callbacks are a list, not a {type(callbacks).__name__}")
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise ModelError(f"a callback is a Clamp, a Probe, ... or another Callback, not {callback!r}")
        named = [c.name for c in callbacks if isinstance(c, (Clamp, Probe, PhaseChange))]
        twice = next((name for name in named if named.count(name) > 1), None)
        if twice is not None:
            raise ModelError(f"two callbacks would log under {twice!r}: give each a name=")
        if "step" in named:
            raise ModelError("every line of the log has its step under 'step': give the callback another name=")
        self.model, self.callbacks, self.logger = model, tuple(callbacks), logger
        self.file = None if log is None else JsonLines(log)
        self.steps, self.lines = 0, None
        self.started, self.seen, self.own_loss = False, -1, "loss" in named
        self.open: ExitStack | None = None
        self.losses: list[Tensor | float] = []

    @contextmanager
    def step(self) -> Iterator[Monitor]:
        """One optimizer step: everything from its first forward pass to the update.

        Raises:
            UnfiredError: a clamp that was in force and never fired.
        """
        self.enter()
        try:
            yield self
        except BaseException:
            self.abandon()
            raise
        self.leave()

    def loss(self, value: Tensor | float) -> None:
        """Say the loss of the step, or of each of its passes, whose mean is taken.

        Raises:
            ModelError: no step is under way.
            MetricError: it is not one number.
        """
        if self.open is None:
            raise ModelError("a loss is of a step, and none has begun: say it inside `with monitor.step()`")
        if (value.numel() != 1) if isinstance(value, Tensor) else not isinstance(value, Real):
            got = list(value.shape) if isinstance(value, Tensor) else repr(value)
            raise MetricError(f"a loss is one number, got {got}: take the mean")
        self.losses.append(value.detach() if isinstance(value, Tensor) else value)

    def start(self) -> None:
        """Training begins, or goes on, at the present step; `enter` does this by itself."""
        if self.started:
            return
        self.started = True
        if self.file is not None:
            self.file.start(self.steps, self.lines)
        self.look()

    def enter(self) -> None:
        """A step begins, or goes on after a `pause`."""
        self.start()
        if self.open is not None:
            raise ModelError(f"step {self.steps} has begun already: steps do not nest")
        with ExitStack() as stack:
            for callback in self.callbacks:
                stack.enter_context(callback.during(self.model, self.steps))
            self.open = stack.pop_all()

    def leave(self) -> None:
        """A step, the optimizer's update included, is done."""
        stack, self.open = self.open, None
        if stack is None:
            raise ModelError("no step has begun")
        losses, self.losses = self.losses, []
        stack.close()
        if losses:
            self.observe(self.steps, math.fsum(float(x) for x in losses) / len(losses))
        self.steps += 1
        self.look()

    def abandon(self) -> None:
        """A step was interrupted: take its clamps off the model, and do not count it."""
        self.pause()
        self.losses = []

    def pause(self) -> None:
        """Take the clamps off the model in the middle of a step, as for a validation; `enter` takes it up again."""
        stack, self.open = self.open, None
        if stack is not None:
            # As if something had been raised inside: what did not fire may not have had its turn.
            stack.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)

    def observe(self, step: int, loss: float) -> None:
        """Log the loss of the model after `step` updates, and tell the callbacks."""
        if self.file is not None and not self.own_loss:
            self.file.write(step, {"loss": loss})
        for callback in self.callbacks:
            self.write(step, callback.loss(self.model, step, loss))

    def look(self) -> None:
        """Let the callbacks look at the model as it is, once a step."""
        if self.seen == self.steps:
            return
        self.seen = self.steps
        found: dict[str, Any] = {}
        for callback in self.callbacks:
            found |= callback.at(self.model, self.steps)
        self.write(self.steps, found)

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Log a record, where there is anything in it."""
        if not record:
            return
        if self.file is not None:
            self.file.write(step, record)
        numbers = scalars(record)
        if self.logger is not None and numbers:
            self.logger(numbers, step)

    def finish(self) -> None:
        """Training is over.

        Raises:
            UnfiredError: a clamp that never was in force.
        """
        self.start()
        for callback in self.callbacks:
            callback.finish()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain data (JSON)."""
        states = [{"type": type(c).__name__, "name": c.name, "state": c.state_dict()} for c in self.callbacks]
        lines = None if self.file is None else self.file.lines
        return {"steps": self.steps, "seen": self.seen, "lines": lines, "callbacks": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave, with the same callbacks in the same order.

        Raises:
            ModelError: they are others, or a step is under way.
        """
        if self.open is not None:
            raise ModelError("a run is resumed between two steps")
        given = [f"{s['type']} {s['name']!r}" for s in state["callbacks"]]
        mine = [f"{type(c).__name__} {c.name!r}" for c in self.callbacks]
        if given != mine:
            raise ModelError(f"the saved run had the callbacks {given}, this one has {mine}")
        self.steps, self.seen, self.lines, self.started = state["steps"], state["seen"], state["lines"], False
        for callback, saved in zip(self.callbacks, state["callbacks"], strict=True):
            callback.load_state_dict(saved["state"])
