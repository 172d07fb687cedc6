"""Members of the induction study against separate eager runs, step by step, for every treatment, in float64."""

import math
from dataclasses import replace

import pytest
import torch

from experiments.induction_formation.by_hand import logits_under
from experiments.induction_formation.members import (
    Graft,
    Member,
    constants_of,
    evaluate,
    initial_params,
    previous_token_strengths,
    program,
    strengths,
)
from experiments.induction_formation.module import InductionModel
from experiments.induction_formation.network import Shape, forward, losses
from experiments.induction_formation.task import Batch, Task, draw, every_sequence, exemplars, source
from experiments.induction_formation.treatments import Treatment, only_head
from hooks.errors import InputsError, ModelError, PlanError, ShapeError
from interp.training.ensemble import Ensemble, from_modules
from tests.experiments.induction import MEMBERS, RATE, ROWS, SHAPE, TABLE, TASK, TREATMENTS, ensemble


def alone(member: Member, steps: int, params=None, frozen=()) -> tuple[list[float], InductionModel]:
    """Losses of an eager run of the module with torch's Adam."""
    params = params or {name: value[0] for name, value in initial_params([member], SHAPE, torch.float64).items()}
    model = InductionModel.of(params, TABLE, member.task.n_labels, SHAPE)
    model.requires_grad_(True)
    for name, value in model.named_parameters():
        value.requires_grad_(not name.startswith(tuple(frozen)))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=RATE)
    where, found = source([member.task], [member.seed]), []
    for step in range(steps):
        batch = Batch(*(value[0] for value in draw(where, step, ROWS)))
        loss = torch.nn.functional.cross_entropy(logits_under(model, batch, member.treatment), batch.answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found, model


def test_the_module_without_a_treatment_is_its_own_forward_pass():
    model = InductionModel.of(
        {n: v[0] for n, v in initial_params(MEMBERS[:1], SHAPE, torch.float64).items()}, TABLE, shape=SHAPE
    )
    batch = Batch(*(value[0] for value in draw(source([TASK], [0]), 0, ROWS)))
    torch.testing.assert_close(
        model(batch.ids(TASK.n_exemplars))[:, -1], logits_under(model, batch, Treatment()), rtol=0, atol=1e-12
    )


def test_members_with_mixed_treatments_train_as_separate_eager_runs():
    together = ensemble(MEMBERS)
    found = together.train(6)
    for index, member in enumerate(MEMBERS):
        expected, model = alone(member, 6)
        torch.testing.assert_close(found[:, index].tolist(), expected, rtol=0, atol=1e-10)
        trained = InductionModel.of(together.member(index), TABLE, shape=SHAPE).state_dict()
        # Parameters that a treatment cuts off have gradients of rounding size, which Adam divides by their own size.
        reached = {name for name, value in model.named_parameters() if value.grad is not None}
        for name in reached:
            if model.get_parameter(name).grad.abs().max() > 1e-9:
                torch.testing.assert_close(trained[name], model.state_dict()[name], rtol=0, atol=1e-8)
    assert (found[0] - found[-1]).abs().min() > 1e-4


@pytest.mark.parametrize("name", TREATMENTS)
def test_a_treatment_alone_trains_as_in_the_mix(name):
    member = MEMBERS[list(TREATMENTS).index(name)]
    found = ensemble([member]).train(4)[:, 0]
    torch.testing.assert_close(found.tolist(), alone(member, 4)[0], rtol=0, atol=1e-10)
    if name != "none":
        free = ensemble([Member(member.seed, Treatment(), TASK)]).train(4)[:, 0]
        assert (found - free).abs().max() > 1e-4


@pytest.mark.parametrize("name", TREATMENTS)
def test_gradients_are_those_of_finite_differences(name):
    # What is preserved as a constant has no gradient, which a difference of losses cannot know.
    member = Member(3, replace(TREATMENTS[name], stop_gradient=False), TASK)
    run = ensemble([member])
    generator = torch.Generator().manual_seed(0)
    step = torch.tensor(0)

    def loss(params):
        return run.loss(params, run.constants, step)[0]

    gradients = torch.func.grad(loss)(run.params)
    moving = 0
    for key, value in run.params.items():
        way = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        size = 1e-5  # label embeddings are small, so what follows them curves: a fourth-order difference
        near, far = (
            (loss({**run.params, key: value + k * size * way}) - loss({**run.params, key: value - k * size * way}))
            / (2 * k * size)
            for k in (1, 2)
        )
        slope = (4 * near - far) / 3
        assert abs(float(slope - (gradients[key] * way).sum())) < 1e-8
        moving += abs(float(slope)) > 1e-4
    assert moving >= 3


def test_more_tokens_than_exemplars_are_embedded_once_each():
    run = ensemble(MEMBERS[:3])
    batch = draw(run.constants, 0, 11)
    whole = forward(run.params, batch, run.constants, SHAPE).logits
    parts = [Batch(*pieces) for pieces in zip(*(value.split((5, 5, 1), dim=-1) for value in batch), strict=True)]
    assert 2 * 11 > len(TABLE) > 2 * 5
    apart = torch.cat([forward(run.params, part, run.constants, SHAPE).logits for part in parts], -1)
    torch.testing.assert_close(whole, apart, rtol=0, atol=1e-12)


def test_tasks_of_several_sizes_train_together():
    sizes = [Task(n_classes=c, n_labels=n, largest=8, held_out_classes=4) for c, n in ((6, 5), (8, 5), (6, 7))]
    members = [Member(seed, Treatment(), task) for seed, task in enumerate(sizes)]
    found = ensemble(members).train(5)
    for index, member in enumerate(members):
        torch.testing.assert_close(found[:, index].tolist(), alone(member, 5)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("first", [True, False])
def test_a_graft_is_taken_over_and_stays(first):
    donor = {name: value[0] for name, value in initial_params([Member(99, task=TASK)], SHAPE, torch.float64).items()}
    members = [Member(0, task=TASK), Member(0, task=TASK)]
    run = ensemble(members, grafts={1: Graft(donor, first)})
    start = run.member(1)
    found = run.train(4)
    frozen = ("embed", "blocks.0") if first else ("blocks.1", "ln_final", "unembed")
    expected, _ = alone(members[1], 4, start, frozen)
    torch.testing.assert_close(found[:, 1].tolist(), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(found[:, 0].tolist(), alone(members[0], 4)[0], rtol=0, atol=1e-10)
    after, key = run.member(1), "qkv0" if first else "kv1"
    assert torch.equal(after[key], donor[key])
    other = "kv1" if first else "qkv0"
    assert not torch.equal(after[other], start[other])


def test_any_module_trains_by_vmap_as_the_written_program():
    members = MEMBERS[:3]
    params = initial_params(members, SHAPE, torch.float64)
    modules = [InductionModel.of({n: v[i] for n, v in params.items()}, TABLE, shape=SHAPE) for i in range(3)]
    where = source([TASK] * 3, [m.seed for m in members])

    def loss(call, given, step):
        batch = draw({name: value[None] for name, value in given.items()}, step, ROWS)
        return torch.nn.functional.cross_entropy(call(batch.ids(TASK.n_exemplars)[0])[:, -1], batch.answer[0])

    plain = Ensemble(lambda _: from_modules(modules, loss, where), members, rate=RATE)
    free = [Member(m.seed, Treatment(), TASK) for m in members]
    torch.testing.assert_close(plain.train(4), ensemble(free).train(4), rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.full
def test_compiled_training_is_eager_training(monkeypatch):
    """Traced and differentiated ahead of time; what a compiler makes of that takes minutes, and is the benchmark's."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, options, **told: compiled(fn, backend="aot_eager", **told))
    members = [MEMBERS[i] for i in (0, 5, 8, 13)]
    found = ensemble(members, compile=True).train(4)
    torch.testing.assert_close(found, ensemble(members).train(4), rtol=0, atol=1e-10)


@pytest.mark.gpu
def test_a_replayed_step_is_an_eager_one():
    members = [MEMBERS[i] for i in (0, 5, 8, 13)]
    run = ensemble(members, compile=True, device="cuda")
    found = torch.cat((run.train(6), run.train(2)))  # three steps run plainly, the rest are replayed
    torch.testing.assert_close(found.cpu(), ensemble(members).train(8), rtol=0, atol=1e-9)
    assert run.step == 8


def test_strengths_are_what_the_pattern_says():
    members = [Member(0, Treatment(match=2, sharpness=0.8, previous_token=(1,)), TASK)]
    constants = constants_of(members, TABLE, SHAPE, torch.float64)
    batch = Batch(*(value[None] for value in every_sequence(TASK)))
    assert batch.classes.shape[-1] == 6 * 5 * 16 * 2
    measured, output = evaluate(initial_params(members, SHAPE, torch.float64), constants, SHAPE, batch)
    found = strengths(output, batch)[0]
    assert float(found[2]) == pytest.approx(0.6, abs=1e-12)
    assert found[[0, 1, 3]].abs().max() < 0.2
    assert float(previous_token_strengths(output)[0, 1]) == 1
    torch.testing.assert_close(measured["loss"], losses(output.logits, batch.answer).mean(1))
    right = output.logits[0].T[torch.arange(960), batch.answer[0]]
    assert float(measured["probability"]) == pytest.approx(float((right - output.logits[0].logsumexp(0)).exp().mean()))
    assert float(measured["context_loss"]) <= float(measured["loss"])


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(ModelError, match="16 does not divide into 3 heads"):
        Shape(d_model=16, n_heads=3)
    with pytest.raises(InputsError, match="at least one sequence"):
        program(TABLE, shape=SHAPE, batch=0)
    donor = {name: value[0] for name, value in initial_params([Member(9, task=TASK)], SHAPE).items()}
    for index, params, words in (
        (-1, donor, "member -1"),
        (0, {}, "nothing"),
        (0, donor | {"qkv0": torch.ones(1)}, "qkv0"),
    ):
        with pytest.raises(ShapeError, match=words):
            ensemble(MEMBERS[:1], grafts={index: Graft(params, first=True)})
    with pytest.raises(ShapeError, match="1 treatments for 3 members"):
        constants_of(MEMBERS[:3], TABLE, SHAPE, treatments=[Treatment(match=0)])
    with pytest.raises(PlanError, match="no head 9"):
        only_head(9)
    with pytest.raises(ShapeError, match="exemplars must be"):
        constants_of(MEMBERS[:1], TABLE[:-1], SHAPE)
    for bad in (
        {"sharpness": 1.5},
        {"preserve": ("x",)},
        {"preserve": ("q",)},
        {"previous_token": (1,), "no_previous_token": (1,)},
        {"temperature_last": ((0, 0.0),)},
        {"temperature_last": ((0, math.nan),)},
        {"temperature_last": ((0, 2.0), (0, 3.0))},
        {"temperature_first": (0, 2.0)},
        {"previous_token": 1},
        {"sharpness": 0.5},
        {"labels_only": True},
        {"first_layer": True, "ablate_first": (0,), "preserve": ("q",)},
        {"first_layer": True, "previous_token": (0,)},
        {"first_layer": True, "no_previous_token": (0,)},
        {"first_layer": True, "temperature_first": ((0, 2.0),)},
    ):
        with pytest.raises(PlanError):
            Treatment(**bad)


def test_members_of_several_tables_train_as_each_on_its_own():
    """Also where a batch holds more tokens than there are exemplars, so that each of those is embedded once."""
    tables = torch.stack([exemplars(TASK, 12, seed=seed, cosine=0.5 * seed) for seed in (0, 1)])
    members = [Member(0, task=TASK, table=1), Member(0, task=TASK), Member(2, task=TASK, table=1, batches=0)]
    for rows in (ROWS, 11):
        build = program(tables, shape=SHAPE, batch=rows, dtype=torch.float64)
        found = Ensemble(build, members, rate=RATE).train(4)
        for index, member in enumerate(members):
            own = program(tables[member.table], shape=SHAPE, batch=rows, dtype=torch.float64)
            expected = Ensemble(own, [replace(member, table=0)], rate=RATE).train(4)
            torch.testing.assert_close(found[:, index], expected[:, 0], rtol=0, atol=1e-10)
        assert (found[:, 0] - found[:, 1]).abs().min() > 1e-4
    with pytest.raises(ShapeError, match=r"tables of exemplars \[2\]; there are 2"):
        Ensemble(build, [Member(task=TASK, table=2)])


def test_initialisation_and_batches_have_seeds_of_their_own():
    start, data = ensemble([Member(3, task=TASK, batches=8)]), ensemble([Member(3, task=TASK)])
    assert all(torch.equal(value, data.params[name]) for name, value in start.params.items())
    where = {"pairs": start.constants["pairs"], "span": start.constants["span"], "seed": torch.tensor([8])}
    assert torch.equal(draw(start.constants, 0, 9).classes, draw(where, 0, 9).classes)
    assert not torch.equal(draw(data.constants, 0, 9).classes, draw(where, 0, 9).classes)


def test_more_rows_for_labels_than_any_member_has_change_nothing():
    members = MEMBERS[:3]
    wide = Ensemble(program(TABLE, shape=SHAPE, batch=ROWS, dtype=torch.float64, labels=9), members, rate=RATE)
    assert wide.params["label"].shape[1] == 9
    torch.testing.assert_close(wide.train(4), ensemble(members).train(4), rtol=0, atol=1e-12)
