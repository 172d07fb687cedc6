"""A monitor inside Hugging Face's Trainer, and inside a trainer with Lightning's hooks."""

from __future__ import annotations

import json
import sys
import types
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import interp as ip
from hooks.errors import ModelError, UnfiredError
from interp import training as tr
from tests import zoo

pytest.importorskip("accelerate")


def model_of(seed: int = 0) -> ip.Model:
    model = ip.wrap(zoo.make("gpt2", seed, dtype=torch.float32))
    for module in model.module.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    return model


def rows(n: int = 60) -> list[dict[str, Tensor]]:
    ids = torch.randint(1, zoo.VOCAB, (n, 6), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def strength(model: ip.Model) -> float:
    return float(tr.previous_token_strength(model, tr.repeated_tokens(model, 2, 6))[0, 1])


def trainer_of(model: ip.Model, folder: Path, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    chosen = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    } | options
    data = rows()
    return Trainer(
        model=model.module,
        args=TrainingArguments(output_dir=str(folder), **chosen),
        train_dataset=data,
        eval_dataset=data[:4],
    )


def callbacks(folder: Path, when: Any = (1, 5)) -> list[tr.Callback]:
    return [
        tr.Clamp(tr.previous_token(0, 1), when, strength=[(0, 0.5), (4, 1.0)]),
        tr.Probe(strength, 2),
        tr.Probe(lambda model: tr.prefix_matching(model, tr.repeated_tokens(model, 2, 6)), 3, name="prefix"),
        tr.Checkpoints(folder / "weights", [0, 6]),
        tr.PhaseChange(100.0, smooth=2),
    ]


def weights(model: ip.Model) -> dict[str, Tensor]:
    return {name: w.clone() for name, w in model.module.state_dict().items()}


def identical(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in one)


def run(folder: Path, watched: bool, clamped: bool = False, **options: Any) -> tuple[ip.Model, tr.Monitor, Any]:
    model = model_of()
    trainer = trainer_of(model, folder, **options)
    chosen = [c for c in callbacks(folder) if clamped or not isinstance(c, tr.Clamp)]
    monitor = tr.Monitor(model, chosen if watched else [], log=folder / "log.jsonl")
    if watched:
        trainer.add_callback(tr.trainer_callback(monitor, trainer))
    trainer.train()
    return model, monitor, trainer


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}, {"bf16": True}],
    ids=["plain", "accumulation", "checkpointing", "bf16"],
)
def test_a_trainer_run_with_probes_is_the_run_without_bit_for_bit(tmp_path, options):
    bare, _, plain = run(tmp_path / "bare", watched=False, **options)
    probed, monitor, trainer = run(tmp_path / "probed", watched=True, **options)
    assert identical(weights(bare), weights(probed)) and not identical(weights(bare), weights(model_of()))
    losses = [[(h["step"], h["loss"]) for h in t.state.log_history if "loss" in h] for t in (plain, trainer)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    records = list(tr.JsonLines(tmp_path / "probed/log.jsonl").read())
    assert [r["step"] for r in records if "strength" in r] == [0, 2, 4, 6]
    assert [r["step"] for r in records if "prefix" in r] == [0, 3, 6] and monitor.steps == 6
    history = [h for h in trainer.state.log_history if "strength" in h]
    assert [h["step"] for h in history] == [0, 2, 4, 6]
    assert [h["strength"] for h in history] == [r["strength"] for r in records if "strength" in r]
    assert any("prefix/1/3" in h for h in trainer.state.log_history)
    clamped, _, _ = run(tmp_path / "clamped", watched=True, clamped=True, **options)
    assert not identical(weights(bare), weights(clamped))


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"bf16": True}])
def test_a_clamp_is_counted_by_optimizer_steps(tmp_path, options):
    model = model_of()
    trainer = trainer_of(model, tmp_path, gradient_accumulation_steps=3, eval_strategy="steps", eval_steps=2, **options)
    seen: list[tuple[bool, bool, int]] = []
    clamp = tr.Clamp(tr.previous_token(0, 1), (2, 4))

    def note(module: nn.Module, *_: Any) -> None:
        seen.append((module.training, model.holds, trainer.state.global_step))

    model.module.register_forward_hook(note)
    trainer.add_callback(tr.trainer_callback(tr.Monitor(model, [clamp]), trainer))
    trainer.train()
    assert [held for training, held, _ in seen if not training] == [False] * 3
    assert [held for training, held, step in seen if training] == [
        2 <= step < 4 for training, _, step in seen if training
    ]
    assert len([1 for training, _, _ in seen if training]) == 18
    assert clamp.steps == 2 and clamp.audit is not None and clamp.audit[0].calls == 3
    assert [(h["step"], h["clamp"]) for h in trainer.state.log_history if "clamp" in h] == [(0, 0.0), (2, 1.0), (4, 0)]


@pytest.mark.parametrize("stop", [2, 4])
def test_a_trainer_that_resumes_in_the_middle_of_a_schedule(tmp_path, stop):
    saving = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole, watch, _ = run(tmp_path / "whole", watched=True, clamped=True, **saving)
    half = model_of()
    trainer = trainer_of(half, tmp_path / "half", **saving)
    trainer.add_callback(
        tr.trainer_callback(tr.Monitor(half, callbacks(tmp_path / "half"), log=tmp_path / "half/log.jsonl"), trainer)
    )
    trainer.train()
    again = model_of(seed=7)
    trainer = trainer_of(again, tmp_path / "half", **saving)
    monitor = tr.Monitor(again, callbacks(tmp_path / "half"), log=tmp_path / "half/log.jsonl")
    trainer.add_callback(tr.trainer_callback(monitor, trainer))
    trainer.train(resume_from_checkpoint=str(tmp_path / f"half/checkpoint-{stop}"))
    assert identical(weights(again), weights(whole))
    logs = [list(tr.JsonLines(tmp_path / name / "log.jsonl").read()) for name in ("whole", "half")]
    assert logs[0] == logs[1] and monitor.state_dict() == watch.state_dict()
    assert monitor.callbacks[4].step == watch.callbacks[4].step == 1


def test_losses_reach_the_phase_change(tmp_path):
    _, monitor, trainer = run(tmp_path, watched=True)
    losses = [(h["step"] - 1, h["loss"]) for h in trainer.state.log_history if "loss" in h]
    steps, values = zip(*losses, strict=True)
    assert list(steps) == [0, 1, 2, 3, 4, 5]
    assert monitor.callbacks[-1].step == tr.phase_change(values, 100.0, smooth=2, steps=steps)


def test_a_trainer_that_does_not_fit(tmp_path):
    model, other = model_of(), model_of()
    trainer = trainer_of(model, tmp_path)
    trainer.add_callback(tr.trainer_callback(tr.Monitor(other, []), trainer))
    with pytest.raises(ModelError, match="no part"):
        trainer.train()
    trainer = trainer_of(model, tmp_path, max_steps=2)
    trainer.add_callback(tr.trainer_callback(tr.Monitor(model, [tr.Clamp(tr.previous_token(0, 1), (50, 60))])))
    with pytest.raises(UnfiredError, match="never was in force"):
        trainer.train()
    trainer = trainer_of(model, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer = trainer_of(model, tmp_path, max_steps=3)
    late = tr.Monitor(model, [])
    trainer.add_callback(tr.trainer_callback(late, trainer))
    with pytest.raises(ModelError, match="no state"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("given", [True, False])
def test_a_trainer_that_raises_leaves_no_clamp_on_the_model(tmp_path, given):
    model = model_of()
    trainer = trainer_of(model, tmp_path)
    monitor = tr.Monitor(model, [tr.Clamp(tr.previous_token(0, 1))])
    trainer.add_callback(tr.trainer_callback(monitor, trainer if given else None))
    handle = model.module.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert model.holds is not given  # callbacks are not told: without the trainer this is left to the user
    if given:
        handle.remove()
        trainer.train()  # nothing was trained, so it may begin again
        assert monitor.steps == 6
    monitor.abandon()
    assert not model.holds


def test_measures_are_in_full_precision_whatever_the_trainer_runs(tmp_path):
    """Edges add up to what is read only to the precision of the arithmetic, so their sweep would raise."""

    def edges(model: ip.Model) -> Any:
        x = tr.repeated_tokens(model, 2, 4)
        return ip.paths.edge_sweep(model, x, model.inputs(x.ids.flip(0)), metric=ip.logit(3)).effect

    found: dict[Any, Any] = {}
    for bf16 in (False, True):
        model = model_of()
        trainer = trainer_of(model, tmp_path, bf16=bf16, max_steps=1)
        monitor = tr.Monitor(model, [tr.Probe(edges)], logger=lambda n, step, to=bf16: found.setdefault((to, step), n))
        trainer.add_callback(tr.trainer_callback(monitor))
        trainer.train()
    assert found[False, 0] == found[True, 0] and max(map(abs, found[True, 0].values())) > 1e-4
    assert found[False, 1] != found[True, 1]


def test_a_probe_called_loss_is_no_training_loss(tmp_path):
    model = model_of()
    trainer = trainer_of(model, tmp_path)
    watch = tr.PhaseChange(0.5)
    monitor = tr.Monitor(model, [tr.Probe(lambda m: 0.25, name="loss"), watch])
    trainer.add_callback(tr.trainer_callback(monitor, trainer))
    trainer.train()
    assert [h["loss"] for h in trainer.state.log_history if "loss" in h].count(0.25) == 7
    assert watch.step is None and len(watch.drop.recent) == 1


# Lightning


@pytest.fixture
def lightning(monkeypatch):
    """What Lightning's callbacks derive from, where Lightning itself is not installed."""
    try:
        import lightning.pytorch  # noqa: F401
    except ImportError:
        for name in ("lightning", "lightning.pytorch", "lightning.pytorch.callbacks"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["lightning.pytorch.callbacks"].Callback = type("Callback", (), {})  # type: ignore[attr-defined]


class Fit:
    """The order in which Lightning calls a callback's hooks, with accumulation and a validation in between."""

    def __init__(self, callback: Any, accumulate: int = 1) -> None:
        self.callback, self.accumulate, self.global_step = callback, accumulate, 0
        self.loggers = [self]
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, numbers: dict[str, float], step: int) -> None:
        self.logged.append((step, numbers))

    def fit(self, module: nn.Module, model: ip.Model, steps: int, validate: int | None = None) -> list[bool]:
        optimizer = self.optimizer = getattr(self, "optimizer", torch.optim.AdamW(module.parameters(), lr=1e-2))
        held, data, index = [], rows(), self.global_step * self.accumulate
        self.callback.on_train_start(self, module)
        module.train()
        while self.global_step < steps:
            batch = torch.stack([r["input_ids"] for r in data[index % 16 : index % 16 + 4]])
            self.callback.on_train_batch_start(self, module, batch, index)
            torch.manual_seed(index)
            loss = model.module(input_ids=batch, labels=batch).loss
            held.append(model.holds)
            (loss / self.accumulate).backward()
            index += 1
            if index % self.accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                self.global_step += 1
            self.callback.on_train_batch_end(self, module, {"loss": loss.detach()}, batch, index - 1)
            if validate and index % validate == 0:
                self.callback.on_validation_start(self, module)
                assert not model.holds
        self.callback.on_train_end(self, module)
        return held


@pytest.mark.parametrize("accumulate", [1, 3])
def test_lightning_hooks(lightning, tmp_path, accumulate):
    model = model_of()
    module = nn.ModuleDict({"net": model.module})
    clamp = tr.Clamp(tr.previous_token(0, 1), (1, 3))
    monitor = tr.Monitor(model, [clamp, tr.Probe(strength, 2), tr.PhaseChange(100.0)], log=tmp_path / "log.jsonl")
    fit = Fit(tr.lightning_callback(monitor), accumulate)
    held = fit.fit(module, model, 4)
    assert held == [1 <= i // accumulate < 3 for i in range(4 * accumulate)]
    assert clamp.audit is not None and clamp.audit[0].calls == accumulate and monitor.steps == 4
    assert [step for step, numbers in fit.logged if "strength" in numbers] == [0, 2, 4]
    assert monitor.callbacks[2].step == 0 and not model.holds
    saved = fit.callback.state_dict()
    again = tr.Monitor(model, [tr.Clamp(tr.previous_token(0, 1), (1, 6)), tr.Probe(strength, 2), tr.PhaseChange(100.0)])
    other = Fit(tr.lightning_callback(again), accumulate)
    other.callback.load_state_dict(saved)
    other.global_step = 4
    assert other.fit(module, model, 7) == [i // accumulate < 2 for i in range(3 * accumulate)]


def test_lightning_resumes_in_the_middle_of_a_schedule(lightning, tmp_path):
    def begin(folder: Path, seed: int = 0) -> tuple[ip.Model, tr.Monitor, Fit]:
        model = model_of(seed)
        monitor = tr.Monitor(model, callbacks(folder), log=folder / "log.jsonl")
        return model, monitor, Fit(tr.lightning_callback(monitor), 2)

    whole, watch, fit = begin(tmp_path / "whole")
    fit.fit(whole.module, whole, 6)
    half, _, first = begin(tmp_path / "half")
    first.fit(half.module, half, 3)
    saved, state = first.callback.state_dict(), deepcopy(first.optimizer.state_dict())
    kept = weights(half)
    first.fit(half.module, half, 5)  # goes on, and is lost
    again, monitor, second = begin(tmp_path / "half", seed=7)
    again.module.load_state_dict(kept)
    second.optimizer = torch.optim.AdamW(again.module.parameters(), lr=1e-2)
    second.optimizer.load_state_dict(state)
    second.callback.load_state_dict(json.loads(json.dumps(saved)))
    second.global_step = 3
    second.fit(again.module, again, 6)
    assert identical(weights(again), weights(whole)) and monitor.state_dict() == watch.state_dict()
    logs = [list(tr.JsonLines(tmp_path / name / "log.jsonl").read()) for name in ("whole", "half")]
    assert logs[0] == logs[1] and [r["clamp"] for r in logs[0] if "clamp" in r] == [0, 0.625, 0.75, 0.875, 1, 0]


def test_lightning_validates_without_clamps_and_stops_cleanly(lightning):
    model = model_of()
    monitor = tr.Monitor(model, [tr.Clamp(tr.previous_token(0, 1))])
    fit = Fit(tr.lightning_callback(monitor), 2)
    assert all(fit.fit(model.module, model, 4, validate=3)) and monitor.callbacks[0].steps == 4
    losses = []
    for validate in (None, 3):  # in the middle of every other step
        model = model_of()
        monitor = tr.Monitor(model, [tr.PhaseChange(0.0, smooth=9)])
        Fit(tr.lightning_callback(monitor), 2).fit(model.module, model, 4, validate=validate)
        losses.append(list(monitor.callbacks[0].drop.recent))
    assert losses[0] == losses[1] and len(losses[0]) == 4
    monitor = tr.Monitor(model, [tr.Clamp(tr.previous_token(0, 1))])
    callback = tr.lightning_callback(monitor)
    callback.on_train_start(Fit(callback), model.module)
    callback.on_train_batch_start(Fit(callback), model.module, None, 0)
    assert model.holds
    callback.on_exception(Fit(callback), model.module, ZeroDivisionError())
    assert not model.holds
    with pytest.raises(ModelError, match="no part"):
        tr.lightning_callback(tr.Monitor(model_of(), [])).on_train_start(fit, model.module)
