"""A `Monitor` inside the trainers that people use: Hugging Face's and Lightning's, each imported on use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from torch import Tensor, nn

from hooks import ModelError
from interp.training.monitor import Monitor


def trainer_callback(monitor: Monitor, trainer: Any = None) -> Any:
    """A `transformers.TrainerCallback` that drives a monitor::

        trainer.add_callback(trainer_callback(monitor, trainer))

    Steps are the trainer's optimizer steps, whatever the accumulation; clamps are off while it evaluates. Losses are
    those that the trainer logs (``logging_steps=1`` for every step), which `PhaseChange` counts as its observations.
    The monitor's state is saved in the trainer's checkpoints, and taken up when it resumes from one.

    Args:
        monitor: of the model that is trained.
        trainer: where numbers are logged too (`Trainer.log`), so that they reach its history and its loggers. It also
            takes the clamps off the model when its `train` raises, which callbacks are not told; without it, that is
            left to `Monitor.abandon`.

    Raises:
        ModelError: in training, where the trainer's model is another one.
    """
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    class MonitorCallback(TrainerCallback, ExportableState):
        own = False
        """Whether what is logged at the moment is the monitor's."""

        def say(self, numbers: Mapping[str, float], step: int) -> None:
            # Whatever is logged takes back the trainer's intention to log its own loss in this step.
            intended, self.own = trainer.control.should_log, True
            try:
                trainer.log(dict(numbers))
            finally:
                trainer.control.should_log, self.own = intended, False

        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {"saved": monitor.state_dict()}}

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            monitor.abandon()  # an earlier training may have ended in the middle of a step
            _require_part(monitor, kwargs.get("model"))
            saved = (state.stateful_callbacks or {}).get(type(self).__name__)
            if state.global_step:
                if not isinstance(saved, dict):
                    raise ModelError("the checkpoint holds no state of one monitor: it was saved by another training")
                monitor.load_state_dict(saved["attributes"]["saved"])
            _require_step(monitor, state.global_step)
            monitor.start()

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            monitor.enter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            monitor.leave()
            _require_step(monitor, state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs and state.global_step and not self.own:
                # What is logged after a step is the loss of the forward passes before its update.
                monitor.observe(state.global_step - 1, float(logs["loss"]))

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            monitor.abandon()
            monitor.finish()

    callback = MonitorCallback()
    if trainer is not None:
        trainer.train = _abandoning(monitor, trainer.train)
        if monitor.logger is None:
            monitor.logger = callback.say
    return callback


def lightning_callback(monitor: Monitor) -> Any:
    """A `lightning.pytorch.Callback` that drives a monitor: ``Trainer(callbacks=[lightning_callback(monitor)])``.

    Steps are the trainer's ``global_step`` (optimizer steps); the loss of a step is the mean over its batches of what
    ``training_step`` returns. Numbers go to the trainer's loggers, and the monitor's state into its checkpoints.

    Args:
        monitor: of the model that is trained, which is the module or a part of it.

    Raises:
        ModelError: in training, where the model is no part of the module, or where a batch is more than one optimizer
            step (several optimizers that are stepped by hand).
    """
    try:
        from lightning.pytorch.callbacks import Callback  # type: ignore[import-not-found]
    except ImportError:
        from pytorch_lightning.callbacks import Callback  # type: ignore[import-not-found]

    class MonitorCallback(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            _require_part(monitor, pl_module)
            _require_step(monitor, trainer.global_step)
            if monitor.logger is None and getattr(trainer, "loggers", None):
                monitor.logger = lambda numbers, step: [
                    one.log_metrics(dict(numbers), step=step) for one in trainer.loggers
                ]
            monitor.start()

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if monitor.open is None:
                monitor.enter()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
            if isinstance(loss, Tensor):
                monitor.loss(loss)
            if trainer.global_step > monitor.steps:
                monitor.leave()
                _require_step(monitor, trainer.global_step)

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            monitor.abandon()

        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            # Between two batches of one step no clamp may reach the validation; the next batch takes it up again.
            monitor.pause()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            monitor.abandon()
            monitor.finish()

        def state_dict(self) -> dict[str, Any]:
            return monitor.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            monitor.load_state_dict(state_dict)

    return MonitorCallback()


def _abandoning(monitor: Monitor, train: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(train)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return train(*args, **kwargs)
        except BaseException:
            monitor.abandon()
            raise

    return guarded


def _require_part(monitor: Monitor, module: nn.Module | None) -> None:
    if module is None or all(part is not monitor.model.module for part in module.modules()):
        raise ModelError(
            f"the monitor watches a {type(monitor.model.module).__name__} that is no part of the "
            f"{type(module).__name__} that is trained: wrap the same object"
        )


def _require_step(monitor: Monitor, step: int) -> None:
    if monitor.steps != step:
        raise ModelError(
            f"the trainer is at step {step} and the monitor at {monitor.steps}: a monitor follows one training, update "
            "by update, from its start or from a checkpoint with its state"
        )
