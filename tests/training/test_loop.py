"""Callbacks on a plain loop: what they do at which step, and that they leave no trace."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import interp as ip
from hooks.errors import MetricError, ModelError, PlanError, ResultError, ShapeError, UnfiredError
from interp import training as tr
from interp.training.records import plain, scalars
from interp.training.schedules import due, during, level
from tests import zoo


def fresh(family: str = "gpt2", dropout: float = 0.2) -> ip.Model:
    model = ip.wrap(zoo.make(family, dtype=torch.float32))
    for module in model.module.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    model.module.train()
    return model


def batch(step: int, rows: int = 4) -> Tensor:
    return torch.randint(1, zoo.VOCAB, (rows, 6), generator=torch.Generator().manual_seed(step))


def loss_of(model: ip.Model, ids: Tensor) -> Tensor:
    out = model.module(input_ids=ids)
    logits = out if isinstance(out, Tensor) else out.logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(
    monitor: tr.Monitor, steps: int, optimizer: torch.optim.Optimizer | None = None, parts: int = 1
) -> torch.optim.Optimizer:
    """Train up to `steps` steps in all, each on a batch of its own, in `parts` passes."""
    model = monitor.model
    optimizer = optimizer or torch.optim.AdamW(model.module.parameters(), lr=1e-2)
    while monitor.steps < steps:
        with monitor.step() as step:
            for part in batch(monitor.steps).chunk(parts):
                loss = loss_of(model, part)
                (loss / parts).backward()
                step.loss(loss)
            optimizer.step()
            optimizer.zero_grad()
    return optimizer


def sgd(model: ip.Model) -> torch.optim.Optimizer:
    """An optimizer for runs that agree to rounding: Adam would make steps of gradients that are all rounding."""
    return torch.optim.SGD(model.module.parameters(), lr=1e-2)


def weights(model: ip.Model) -> dict[str, Tensor]:
    return {name: w.clone() for name, w in model.module.state_dict().items()}


def identical(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in one)


def nosy(model: ip.Model) -> dict[str, Any]:
    """A measure that does everything a measure may: draws, gradients, runs under plans, sweeps."""
    assert not any(m.training for m in model.module.modules())
    random.random(), np.random.rand(3), torch.rand(3)
    x = tr.repeated_tokens(model, 2, 5)
    loss_of(model, x.ids).backward()
    assert all(p.grad is not None for p in model.module.parameters())
    effect = ip.sweep(model, x, model.inputs(x.ids.flip(0)), ip.grid("z", layer="all"), metric=ip.logit(3)).effect
    return {"prefix": tr.prefix_matching(model, x), "effect": effect.mean(-1), "loss": float(loss_of(model, x.ids))}


# Probes


def two_prompts(model: ip.Model) -> tuple[ip.Inputs, ip.Inputs]:
    x = tr.repeated_tokens(model, 2, 4)
    return x, model.inputs(x.ids.flip(0))


def sweep_of_heads(model: ip.Model) -> Any:
    return ip.sweep(model, *two_prompts(model), ip.grid("z", layer="all", head="all"), metric=ip.logit(3))


def worlds_under_a_plan(model: ip.Model) -> Tensor:
    x, _ = two_prompts(model)
    return model.run(ip.World(x, tr.previous_token(0, 1) + ip.scale(ip.site("z", 1), 0.5))).logits[:, -1, 3]


MEASURES = {
    "sweep": lambda m: sweep_of_heads(m).effect,
    "metric": lambda m: tr.under(m, two_prompts(m)[0], ip.cross_entropy(), tr.previous_token(0, 1)),
    "attention": lambda m: tr.attention(m, two_prompts(m)[0], 1, 5, [1, 2]),
    "edges": lambda m: ip.paths.edge_sweep(m, *two_prompts(m), metric=ip.logit(3)).effect,
    "path": lambda m: (
        ip.paths.path_patch(
            m, *two_prompts(m), "input->a0.h1<v>->m1->logits", semantics="frozen", metric=ip.logit(3)
        ).effect
    ),
    "attribution": lambda m: ip.attribution(m, *two_prompts(m), ip.grid("z", layer="all"), metric=ip.logit(3)).effect,
    "lens": lambda m: ip.logit_lens(m, two_prompts(m)[0], ip.logit(3)).effect,
    "world": worlds_under_a_plan,
    "copying": lambda m: tr.copying(m, two_prompts(m)[0]),
    "heads": lambda m: tr.heads_alone(m, two_prompts(m)[0], 1, ip.cross_entropy(), plan=tr.previous_token(0, 1)),
}


@pytest.mark.parametrize("cast", [False, True], ids=["float32", "bfloat16 around the step"])
@pytest.mark.parametrize("name", MEASURES)
def test_any_measure_leaves_no_trace(name, cast):
    """Weights, gradients that are kept from step to step, modes and random state, with dropout and under a clamp."""

    def drawing(model: ip.Model) -> Any:
        random.random(), np.random.rand(3), torch.rand(3)
        return MEASURES[name](model)

    ends = []
    for probes in ([], [tr.Probe(drawing, name="found")]):
        model, found = fresh(), []
        callbacks = [tr.Clamp(tr.previous_token(0, 1), strength=0.5), *probes]
        monitor = tr.Monitor(model, callbacks, logger=lambda numbers, step, to=found: to.append(numbers))
        optimizer = torch.optim.AdamW(model.module.parameters(), lr=1e-2)
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast), monitor.step():
                loss_of(model, batch(monitor.steps)).backward()  # never zeroed: they accumulate
                optimizer.step()
        gradients = {name: p.grad.clone() for name, p in model.module.named_parameters()}
        modes = [m.training for m in model.module.modules()]
        ends.append((weights(model), gradients, modes, torch.rand(3).tolist(), np.random.rand(), random.random()))
    assert identical(ends[0][0], ends[1][0]) and identical(ends[0][1], ends[1][1]) and ends[0][2:] == ends[1][2:]
    measured = [[v for key, v in numbers.items() if key.startswith("found")] for numbers in found]
    assert len(measured) == 3 and any(abs(v) > 1e-4 for v in measured[0]) and measured[0] != measured[2]


@pytest.mark.parametrize("family", ["gpt2", "small_rms_rotary_gqa"])
def test_a_run_with_probes_is_the_run_without_bit_for_bit(family, tmp_path):
    runs = []
    for callbacks in ([], [tr.Probe(nosy), tr.Checkpoints(tmp_path, 2), tr.PhaseChange(1.0)]):
        torch.manual_seed(0)
        monitor = tr.Monitor(fresh(family), callbacks, log=tmp_path / "log.jsonl")
        train(monitor, 4)
        runs.append((weights(monitor.model), torch.rand(4)))
    assert identical(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert not identical(runs[0][0], weights(fresh(family)))
    records = list(tr.JsonLines(tmp_path / "log.jsonl").read())
    assert [r["step"] for r in records if "nosy" in r] == [0, 1, 2, 3, 4]
    assert np.array(records[0]["nosy"]["prefix"]).shape == (len(monitor.model.architecture.blocks), 4)


def test_untouched_restores_everything():
    model = fresh()
    module = model.module
    module.transformer.h[0].eval()
    loss_of(model, batch(0)).backward()
    gradients = [(p.grad, p.grad.clone()) for p in module.parameters()]
    modes = [m.training for m in module.modules()]
    with pytest.raises(KeyboardInterrupt), tr.untouched(module):  # noqa: PT012
        nosy(model)
        raise KeyboardInterrupt
    assert [m.training for m in module.modules()] == modes and len(set(modes)) == 2
    assert all(p.grad is g and torch.equal(g, c) for p, (g, c) in zip(module.parameters(), gradients, strict=True))
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    tr.probe(model, nosy)
    assert random.getstate() == state[0] and np.random.get_state()[1].tolist() == state[1]
    assert torch.equal(torch.get_rng_state(), state[2])


def test_what_is_measured_does_not_depend_on_mixed_precision_around_it():
    model = fresh()
    with torch.autocast("cpu", torch.bfloat16):
        inside = tr.probe(model, lambda m: sweep_of_heads(m).effect)
        assert torch.is_autocast_enabled("cpu")
    assert inside == tr.probe(model, lambda m: sweep_of_heads(m).effect)
    assert np.abs(inside).max() > 1e-4


def test_a_measure_that_changes_the_model_is_caught():
    model = fresh()

    def meddling(model: ip.Model) -> float:
        with torch.no_grad():
            model.module.lm_head.weight.add_(1.0)
        return 0.0

    with pytest.raises(ModelError, match=r"wte\.weight"):
        tr.probe(model, meddling)
    with pytest.raises(ResultError, match="object"):
        tr.probe(model, lambda model: object())
    with pytest.raises(ResultError, match="complex"):
        tr.probe(model, lambda model: torch.ones(2) * 1j)
    with pytest.raises(ResultError, match="give the effect"):
        tr.probe(model, sweep_of_heads)


# Clamps


def test_a_clamp_is_in_force_in_its_steps_and_nowhere_else():
    model, seen = fresh(dropout=0.0), []
    clamp = tr.Clamp(tr.previous_token(0, 1), when=(2, 4))

    def strength(model: ip.Model) -> float:
        return float(tr.previous_token_strength(model, model.inputs(batch(0)))[0, 1])

    probe = tr.Probe(strength)
    monitor = tr.Monitor(model, [clamp, probe])
    optimizer = torch.optim.SGD(model.module.parameters(), lr=0.0)
    for _ in range(5):
        with monitor.step():
            seen.append(float(tr.previous_token_strength(model, model.inputs(batch(0)))[0, 1]))
            loss_of(model, batch(1))
            optimizer.step()
        assert strength(model) < 0.9
    assert [s == 1.0 for s in seen] == [False, False, True, True, False]
    assert clamp.steps == 2 and clamp.audit is not None and clamp.audit[0].status == "fired"
    monitor.finish()


def test_training_under_a_clamp_is_training_a_clamped_network():
    """Step by step against runs with gradients, in which the plan is given each time."""
    one, two = fresh(dropout=0.0), fresh(dropout=0.0)
    knots = [(1, 0.0), (3, 1.0)]
    plan = tr.previous_token(0, 1)
    train(tr.Monitor(one, [tr.Clamp(plan, strength=knots)]), 5, sgd(one))
    optimizer = sgd(two)
    for step in range(5):
        s = [0.0, 0.0, 0.5, 1.0, 1.0][step]
        ids = batch(step)
        logits = two.run(two.inputs(ids), plan.strength(s), grad=True).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(one.module.parameters(), two.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-4)
    bare = fresh(dropout=0.0)
    train(tr.Monitor(bare, []), 5, sgd(bare))
    gaps = [float((a - b).abs().max()) for a, b in zip(weights(one).values(), weights(bare).values(), strict=True)]
    assert max(gaps) > 1e-3


def test_a_clamp_that_depends_on_the_batch_and_its_strength():
    model = fresh(dropout=0.0)
    wanted = []

    def plan(inputs: ip.Inputs) -> ip.Intervention:
        wanted.append(len(inputs))
        return tr.match_pattern(1, 0, inputs.lengths - 1, inputs.ids[:, 0] % 5)

    clamp = tr.Clamp(plan, strength=lambda step: 0.5 if step else 1.0, name="match")
    train(tr.Monitor(model, [clamp]), 2, parts=2)
    assert wanted == [2, 2, 2, 2] and clamp.audit is not None and [e.calls for e in clamp.audit] == [2]


def test_clamps_compose_in_order():
    model = fresh(dropout=0.0)
    clamps = [
        tr.Clamp(tr.previous_token(0, 1), name="one"),
        tr.Clamp(ip.scale(ip.site("pattern", 0, head=1), 0.5), (1, None), name="two"),
    ]
    monitor = tr.Monitor(model, clamps)
    place = ip.site("pattern", 0, head=1, pos=-1)
    found = []
    for _ in range(2):
        with monitor.step():
            found.append(float(model.run(model.inputs(batch(0)), capture=place).tape[place].sum(-1).max()))
    assert found == [1.0, 0.5]


def test_a_clamp_that_never_fires_raises():
    never = tr.Monitor(fresh(), [tr.Clamp(tr.previous_token(0, 1))])
    with pytest.raises(UnfiredError, match="attend_back"), never.step():
        pass
    assert never.steps == 0 and not never.model.holds
    late = tr.Monitor(fresh(), [tr.Clamp(tr.previous_token(0, 1), range(10, 20), name="late")])
    train(late, 2)
    with pytest.raises(UnfiredError, match="late"):
        late.finish()


def test_what_is_raised_in_a_step_is_what_comes_out():
    model = fresh()
    before = weights(model)
    monitor = tr.Monitor(model, [tr.Clamp(tr.previous_token(0, 1))])
    with pytest.raises(ZeroDivisionError), monitor.step():
        raise ZeroDivisionError
    assert not model.holds and monitor.steps == 0 and identical(before, weights(model))
    assert monitor.callbacks[0].steps == 0  # type: ignore[attr-defined]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    train(monitor, 1)
    assert monitor.steps == 1


# Accumulation, checkpointing, mixed precision


@pytest.mark.parametrize("parts", [2, 4])
def test_a_step_is_an_update_whatever_the_accumulation(parts, tmp_path):
    found = []
    for n in (1, parts):
        clamp = tr.Clamp(tr.previous_token(0, 1), (1, 3))
        monitor = tr.Monitor(fresh(dropout=0.0), [clamp, tr.PhaseChange(100.0, smooth=2)], log=tmp_path / f"{n}.jsonl")
        train(monitor, 4, sgd(monitor.model), parts=n)
        assert clamp.audit is not None and clamp.audit[0].calls == n
        found.append(weights(monitor.model))
    for name, w in found[0].items():
        torch.testing.assert_close(w, found[1][name], rtol=0.0, atol=1e-4)
    one, many = (list(tr.JsonLines(tmp_path / f"{n}.jsonl").read()) for n in (1, parts))
    losses = [[r["loss"] for r in records if "loss" in r] for records in (one, many)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 4
    one, many = ([r for r in records if "loss" not in r] for records in (one, many))
    assert one == many and [r["step"] for r in one] == [0, 1, 1, 3]


def test_the_loss_of_each_step_is_logged(tmp_path):
    monitor, told = tr.Monitor(fresh(), [], log=tmp_path / "log.jsonl"), []
    for number in range(3):
        with monitor.step() as step:
            told.append((torch.tensor(1.5 + number), 2.5 + number))
            for loss in told[-1]:
                step.loss(loss)
    records = list(tr.JsonLines(tmp_path / "log.jsonl").read())
    assert records == [{"step": n, "loss": 2.0 + n} for n in range(3)]
    own = tr.Monitor(fresh(), [tr.Probe(lambda model: 7.0, name="loss")], log=tmp_path / "own.jsonl")
    with own.step() as step:
        step.loss(1.0)
    assert list(tr.JsonLines(tmp_path / "own.jsonl").read()) == [{"step": n, "loss": 7.0} for n in range(2)]


def test_checkpointing_and_autocast_in_a_loop():
    model = fresh(dropout=0.1)
    model.module.gradient_checkpointing_enable({"use_reentrant": False})
    plan = tr.previous_token(0, 1) + tr.preserving("pattern", tr.ablate_heads(0, 2), 1)
    clamp = tr.Clamp(plan, strength=0.9)
    monitor = tr.Monitor(model, [clamp, tr.Probe(nosy, 2)])
    optimizer = torch.optim.AdamW(model.module.parameters(), lr=1e-3)
    before = weights(model)
    for _ in range(3):
        with monitor.step() as step:
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, batch(monitor.steps))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step.loss(loss)
        assert clamp.audit is not None and [(e.calls, e.status) for e in clamp.audit] == [(1, "fired")] * 3
    after = weights(model)
    assert not identical(before, after) and all(bool(w.isfinite().all()) for w in after.values())


def test_a_clamp_with_two_worlds_trains_in_mixed_precision():
    """What is read without gradients leaves no cast weight behind that the pass with gradients would take."""
    plan, found = tr.preserving("pattern", tr.ablate_heads(0, 2), 1), []
    for cast in (False, True):
        model = fresh(dropout=0.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast), model.apply(plan):
            loss_of(model, batch(0)).backward()
        found.append({name: p.grad for name, p in model.module.named_parameters()})
    for name, gradient in found[0].items():
        assert float((found[1][name] - gradient).norm() / gradient.norm()) < 0.1
        assert float(gradient.norm()) > 1e-3


def test_a_step_that_pauses_goes_on_where_it_was():
    model = fresh(dropout=0.0)
    clamp, watch = tr.Clamp(tr.previous_token(0, 1)), tr.PhaseChange(2.5)
    monitor = tr.Monitor(model, [clamp, watch])
    monitor.enter()
    loss_of(model, batch(0))
    monitor.loss(1.0)
    monitor.pause()
    assert not model.holds
    monitor.enter()
    loss_of(model, batch(0))
    monitor.loss(3.0)
    monitor.leave()
    assert (monitor.steps, clamp.steps, watch.step) == (1, 1, 0) and list(watch.drop.recent) == [2.0]


# Resuming


def build(folder) -> tr.Monitor:
    model = fresh(dropout=0.1)
    callbacks = [
        tr.Clamp(tr.previous_token(0, 1), [(1, 3), (4, 8)], strength=[(0, 0.2), (6, 1.0)]),
        tr.Probe(lambda m: tr.previous_token_strength(m, m.inputs(batch(99))), 3, name="previous"),
        tr.Checkpoints(folder / "weights", [0, 4, 9]),
        tr.PhaseChange(0.99, plateau=(0, 5), smooth=2),
    ]
    return tr.Monitor(model, callbacks, log=folder / "log.jsonl")


@pytest.mark.parametrize("stop", [1, 4, 5, 6])
def test_resuming_in_the_middle_of_a_schedule(tmp_path, stop):
    whole = build(tmp_path / "whole")
    torch.manual_seed(5)
    train(whole, 9)
    whole.finish()

    first = build(tmp_path / "parts")
    torch.manual_seed(5)
    optimizer = train(first, stop)
    saved = json.loads(json.dumps(first.state_dict()))
    state, draws, kept = deepcopy(optimizer.state_dict()), torch.get_rng_state(), weights(first.model)
    train(first, stop + 2, optimizer)  # goes on, and is lost

    second = build(tmp_path / "parts")
    second.model.module.load_state_dict(kept)
    optimizer = torch.optim.AdamW(second.model.module.parameters(), lr=1e-2)
    optimizer.load_state_dict(state)
    second.load_state_dict(saved)
    with open(tmp_path / "parts" / "log.jsonl", "a") as file:
        file.write(json.dumps({"step": stop + 1, "lost": 1}) + "\n" + '{"step": 9, "ha')
    torch.set_rng_state(draws)
    train(second, 9, optimizer)
    second.finish()
    assert identical(weights(second.model), weights(whole.model))
    assert list(tr.JsonLines(tmp_path / "parts/log.jsonl").read()) == list(
        tr.JsonLines(tmp_path / "whole/log.jsonl").read()
    )
    assert second.callbacks[3].step == whole.callbacks[3].step is not None
    assert second.state_dict() == whole.state_dict()
    assert second.callbacks[2].steps() == [0, 4, 9]
    assert identical(second.callbacks[2].load(9), weights(second.model))


def test_a_resumed_run_has_the_same_callbacks(tmp_path):
    monitor = build(tmp_path)
    other = tr.Monitor(monitor.model, [tr.Probe(nosy)])
    with pytest.raises(ModelError, match="Clamp"):
        other.load_state_dict(monitor.state_dict())
    renamed = tr.Monitor(monitor.model, [tr.Probe(nosy, name="other")])
    with pytest.raises(ModelError, match="Probe 'other'"):
        renamed.load_state_dict(other.state_dict())
    with pytest.raises(ModelError, match="between"), monitor.step():
        monitor.load_state_dict(monitor.state_dict())
    with pytest.raises(ModelError, match="nest"), monitor.step():
        monitor.enter()


def test_resuming_what_was_saved_before_the_first_step(tmp_path):
    first = tr.Monitor(fresh(), [tr.Probe(nosy)], log=tmp_path / "log.jsonl")
    first.start()
    second = tr.Monitor(first.model, [tr.Probe(nosy)], log=tmp_path / "log.jsonl")
    second.load_state_dict(first.state_dict())
    train(second, 1)
    # What was measured before the first step, its loss, and what was measured after it.
    assert [r["step"] for r in tr.JsonLines(tmp_path / "log.jsonl").read()] == [0, 0, 1]


def test_checkpoints(tmp_path):
    model = fresh()
    saved = tr.Checkpoints(tmp_path, 2)
    train(tr.Monitor(model, [saved]), 4)
    assert saved.steps() == [0, 2, 4] and identical(saved.load(4), weights(model))
    with tr.graft(model, saved.load(0), upto=2):
        loss_of(model, batch(0))
    with pytest.raises(ResultError, match=r"\[0, 2, 4\]"):
        saved.load(3)


# Files and schedules


def test_json_lines(tmp_path):
    log = tr.JsonLines(tmp_path / "new" / "log.jsonl")
    assert list(log.read()) == []
    for step in range(3):
        log.write(step, {"x": step / 3, "y": [1, None, float("inf")]})
    records = list(log.read())
    assert [r["step"] for r in records] == [0, 1, 2] and records[1]["x"] == 1 / 3 and records[2]["y"][2] == float("inf")
    log.start(2, lines=2)
    assert list(log.read()) == records[:2] and log.lines == 2
    log.start(0, lines=1)
    assert list(log.read()) == records[:1]
    log.start(0)
    for record in records:
        log.write(record["step"], record)
    log.start(1)
    assert list(log.read()) == records[:2]
    log.start(0)
    assert list(log.read()) == []
    log.path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ResultError, match=":2 is not"):
        log.start(1)
    assert log.path.read_text().count("\n") == 3


def test_plain_data_and_scalars():
    value = {"a": torch.ones(2), "b": (np.float64(2.0), np.arange(2)), 3: None, "c": True}
    assert plain(value) == {"a": [1.0, 1.0], "b": [2.0, [0, 1]], "3": None, "c": True}
    assert scalars(plain(value)) == {"a/0": 1.0, "a/1": 1.0, "b/0": 2.0, "b/1/0": 0, "b/1/1": 1, "c": True}


def test_a_logger_gets_numbers_by_name():
    got = []
    model = fresh()
    callbacks = [tr.Clamp(tr.previous_token(0, 1)), tr.Probe(lambda m: torch.arange(2), 2, name="two")]
    train(tr.Monitor(model, callbacks, logger=lambda numbers, step: got.append((step, numbers))), 3)
    assert got == [(0, {"clamp": 1.0, "two/0": 0, "two/1": 1}), (2, {"two/0": 0, "two/1": 1})]


@pytest.mark.parametrize(
    ("when", "steps"),
    [
        (None, [0, 1, 2, 3, 4, 5]),
        (range(1, 6, 2), [1, 3, 5]),
        ((2, 4), [2, 3]),
        ((3, None), [3, 4, 5]),
        ([(0, 1), (4, None)], [0, 4, 5]),
        (lambda step: step == 5, [5]),
    ],
)
def test_when(when, steps):
    assert [s for s in range(6) if during(when)(s)] == steps


@pytest.mark.parametrize(("every", "steps"), [(2, [0, 2, 4]), ([1, 5], [1, 5]), (lambda s: s > 3, [4, 5])])
def test_every(every, steps):
    assert [s for s in range(6) if due(every)(s)] == steps


def test_level():
    assert level(0.5)(7) == 0.5 and level(lambda s: np.float32(s / 4))(3) == 0.75
    for given in (lambda s: s / 2, lambda s: -0.1, lambda s: None, lambda s: float("nan")):
        with pytest.raises(PlanError, match="at step 3"):
            level(given)(3)
    assert [level([(2, 0.0), (4, 1.0), (5, 0.5)])(s) for s in range(7)] == [0, 0, 0, 0.5, 1, 0.5, 0.5]
    # Before its first knot it stays at that one's value, whatever that is.
    assert [level([(2, 0.5), (4, 1.0)])(s) for s in range(6)] == [0.5, 0.5, 0.5, 0.75, 1, 1]
    assert [level([(3, 0.25)])(s) for s in (0, 3, 9)] == [0.25] * 3


@pytest.mark.parametrize(
    "make",
    [
        lambda: tr.Clamp(tr.previous_token(0, 0), when="always"),
        lambda: tr.Clamp(tr.previous_token(0, 0), when=(4, 2)),
        lambda: tr.Clamp(tr.previous_token(0, 0), when=[]),
        lambda: tr.Clamp(tr.previous_token(0, 0), when=5),
        lambda: tr.Clamp(tr.previous_token(0, 0), strength="half"),
        lambda: tr.Clamp(tr.previous_token(0, 0), strength=[(4, 1.0), (2, 0.0)]),
        lambda: tr.Clamp(tr.previous_token(0, 0), strength=[]),
        lambda: tr.Clamp(tr.previous_token(0, 0), strength=1.5),
        lambda: tr.Clamp(tr.previous_token(0, 0), strength=float("nan")),
        lambda: tr.Clamp(tr.previous_token(0, 0), strength=[(0, 0.0), (2, 2.0)]),
        lambda: tr.Clamp(tr.previous_token(0, 0), strength=[(0, "a"), (2, "b")]),
        lambda: tr.Probe(nosy, every=0),
        lambda: tr.Probe(nosy, every="epoch"),
        lambda: tr.Checkpoints("x", []),
        lambda: tr.Clamp("zero"),
        lambda: tr.Clamp(tr.Clamp),  # type: ignore[arg-type]
        lambda: tr.Clamp(None),  # type: ignore[arg-type]
        lambda: tr.Clamp(ip.Plan()),
    ],
)
def test_unknown_schedules_and_plans(make):
    with pytest.raises(PlanError):
        make()


def test_wrong_arguments_of_a_monitor_are_told():
    model = fresh()
    with pytest.raises(MetricError, match="function of the wrapped model"):
        tr.Probe(5)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="wrapped model"):
        tr.Monitor(model.module, [])  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="are a list"):
        tr.Monitor(model, tr.Probe(nosy))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="under 'step'"):
        tr.Monitor(model, [tr.Probe(nosy, name="step")])
    monitor = tr.Monitor(model, [])
    with pytest.raises(ModelError, match="none has begun"):
        monitor.loss(1.0)
    for bad in (torch.ones(3), "1", None):
        with pytest.raises(MetricError, match="one number"), monitor.step() as step:
            step.loss(bad)  # type: ignore[arg-type]
    assert monitor.steps == 0 and not monitor.losses


def test_what_is_no_callback_and_names_given_twice():
    with pytest.raises(ModelError, match="callback"):
        tr.Monitor(fresh(), [nosy])
    with pytest.raises(ModelError, match="name="):
        tr.Monitor(fresh(), [tr.Clamp(tr.previous_token(0, 0)), tr.Clamp(tr.previous_token(1, 0))])
    clamp = tr.Clamp(tr.match_pattern(0, 0, [3, 3, 3], 1))
    with pytest.raises(ShapeError, match="3 rows"):
        train(tr.Monitor(fresh(), [clamp]), 1)
