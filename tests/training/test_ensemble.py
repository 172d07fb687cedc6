"""An ensemble against separate eager runs of the plain module, step by step, for every clamp, in float64."""

import json
import math
from dataclasses import replace

import pytest
import torch

import interp as ip
from hooks.errors import InputsError, ModelError, PlanError, ResultError, ShapeError
from interp.training.ensemble import Ensemble, Program, from_modules
from interp.training.induction import (
    Graft,
    Member,
    conditions,
    evaluate,
    initial_params,
    previous_token_strengths,
    program,
    strengths,
)
from interp.training.induction_clamps import Clamp, only_head, stack
from interp.training.induction_model import Shape, forward, losses
from interp.training.induction_module import InductionModel
from interp.training.induction_plans import plan_of
from interp.training.induction_task import Batch, Task, draw, every_sequence, exemplars, source

SHAPE = Shape(d_input=12, d_model=16, n_heads=4)
TASK = Task(n_classes=6, largest=8, held_out_classes=4)
TABLE = exemplars(TASK, 12)
ROWS, RATE = 5, 1e-2

CLAMPS = {
    "none": Clamp(),
    "previous token": Clamp(previous_token=(1,)),
    "previous token, two heads": Clamp(previous_token=(0, 2)),
    "no previous token": Clamp(no_previous_token=(0, 1, 2, 3)),
    "no previous token at labels": Clamp(no_previous_token=(0, 3), labels_only=True),
    "first layer": only_head(2, 4, first_layer=True),
    "match": only_head(1, 4, match=1),
    "match, blunt": Clamp(match=0, sharpness=0.7),
    "copy": Clamp(copy=3),
    "first layer and copy": only_head(0, 4, first_layer=True, copy=0),
    "first layer, match and copy": only_head(0, 4, first_layer=True, match=0, copy=0),
    "ablate first": Clamp(ablate_first=(0, 2)),
    "ablate last": Clamp(ablate_last=(1, 2)),
    "pattern-preserving": Clamp(ablate_first=(0, 1), preserve=("q", "k")),
    "pattern-preserving, gradients through both": Clamp(ablate_first=(0, 1), preserve=("q", "k"), stop_gradient=False),
    "value-preserving": Clamp(ablate_first=(0, 1), preserve=("v",)),
    "direct path": Clamp(ablate_first=(0, 1, 2, 3), preserve=("q", "k", "v")),
    "temperature": Clamp(temperature_first=((0, 0.5),), temperature_last=((3, 2.0), (1, 0.3))),
    "many": Clamp((1,), (0,), match=2, sharpness=0.9, ablate_first=(3,), preserve=("v",), temperature_last=((2, 3.0),)),
}
MEMBERS = [Member(seed, clamp, TASK) for seed, clamp in enumerate(CLAMPS.values())]


def ensemble(members, **options) -> Ensemble:
    grafts = options.pop("grafts", None)
    build = program(TABLE, shape=SHAPE, batch=ROWS, dtype=torch.float64, grafts=grafts)
    return Ensemble(build, members, rate=options.pop("rate", RATE), **options)


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
        loss = torch.nn.functional.cross_entropy(model.clamped(batch, member.clamp), batch.answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found, model


def test_the_module_without_a_clamp_is_its_own_forward_pass():
    model = InductionModel.of(
        {n: v[0] for n, v in initial_params(MEMBERS[:1], SHAPE, torch.float64).items()}, TABLE, shape=SHAPE
    )
    batch = Batch(*(value[0] for value in draw(source([TASK], [0]), 0, ROWS)))
    torch.testing.assert_close(
        model(batch.ids(TASK.n_exemplars))[:, -1], model.clamped(batch, Clamp()), rtol=0, atol=1e-12
    )


def test_members_with_mixed_clamps_train_as_separate_eager_runs():
    together = ensemble(MEMBERS)
    found = together.train(6)
    for index, member in enumerate(MEMBERS):
        expected, model = alone(member, 6)
        torch.testing.assert_close(found[:, index].tolist(), expected, rtol=0, atol=1e-10)
        trained = InductionModel.of(together.member(index), TABLE, shape=SHAPE).state_dict()
        # Parameters a clamp cuts off have gradients of rounding size, which Adam divides by their own size.
        reached = {name for name, value in model.named_parameters() if value.grad is not None}
        for name in reached:
            if model.get_parameter(name).grad.abs().max() > 1e-9:
                torch.testing.assert_close(trained[name], model.state_dict()[name], rtol=0, atol=1e-8)
    assert (found[0] - found[-1]).abs().min() > 1e-4


@pytest.mark.parametrize("name", CLAMPS)
def test_a_clamp_alone_trains_as_in_the_mix(name):
    member = MEMBERS[list(CLAMPS).index(name)]
    found = ensemble([member]).train(4)[:, 0]
    torch.testing.assert_close(found.tolist(), alone(member, 4)[0], rtol=0, atol=1e-10)
    if name != "none":
        free = ensemble([Member(member.seed, Clamp(), TASK)]).train(4)[:, 0]
        assert (found - free).abs().max() > 1e-4


@pytest.mark.parametrize("name", CLAMPS)
def test_gradients_are_those_of_finite_differences(name):
    # What is preserved as a constant has no gradient, which a difference of losses cannot know.
    clamp = replace(CLAMPS[name], stop_gradient=False)
    member = Member(3, clamp, TASK)
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


@pytest.mark.parametrize("name", CLAMPS)
def test_clamps_equal_plans_of_the_engine(name):
    clamp = CLAMPS[name]
    member = Member(5, clamp, TASK)
    run = ensemble([member])
    step = torch.tensor(0)
    batch = Batch(*(value[0] for value in draw(run.constants, 0, ROWS)))
    module = InductionModel.of(run.member(0), TABLE, shape=SHAPE)
    module.requires_grad_(True)
    model = ip.wrap(module)
    ids = batch.ids(TASK.n_exemplars)
    free = module(ids)[:, -1].detach()
    with model.apply(plan_of(clamp, batch)):
        logits = module(ids)[:, -1]
        torch.nn.functional.cross_entropy(logits, batch.answer).backward()
    found = forward(run.params, Batch(*(v[None] for v in batch)), run.constants, SHAPE).logits[0].T
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-10)
    assert name == "none" or (found - free).abs().max() > 1e-3
    gradients = torch.func.grad(lambda params: run.loss(params, run.constants, step)[0])(run.params)
    expected = InductionModel.of({n: g[0] for n, g in gradients.items()}, TABLE, shape=SHAPE).state_dict()
    for key, value in module.named_parameters():
        own = torch.zeros_like(value) if value.grad is None else value.grad
        torch.testing.assert_close(own, expected[key], rtol=0, atol=1e-10)


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
    members = [Member(seed, Clamp(), task) for seed, task in enumerate(sizes)]
    found = ensemble(members).train(5)
    for index, member in enumerate(members):
        torch.testing.assert_close(found[:, index].tolist(), alone(member, 5)[0], rtol=0, atol=1e-10)


def test_each_member_may_have_its_own_rate():
    both = ensemble([MEMBERS[0], MEMBERS[0]], rate=[1e-2, 1e-4]).train(4)
    torch.testing.assert_close(both[:, 0], ensemble(MEMBERS[:1], rate=1e-2).train(4)[:, 0], rtol=0, atol=1e-10)
    torch.testing.assert_close(both[:, 1], ensemble(MEMBERS[:1], rate=1e-4).train(4)[:, 0], rtol=0, atol=1e-10)
    assert (both[-1, 0] - both[-1, 1]).abs() > 1e-4


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
    free = [Member(m.seed, Clamp(), TASK) for m in members]
    torch.testing.assert_close(plain.train(4), ensemble(free).train(4), rtol=0, atol=1e-10)


def test_modules_that_do_not_stack_are_refused():
    def loss(call, given, step):
        return call(torch.ones(1, 2)).sum()

    frozen = torch.nn.Linear(2, 1)
    frozen.weight.requires_grad_(False)
    bare, wide = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(3, 1)
    for other, words in ((bare, r"\['bias'\]"), (wide, "'weight'"), (frozen, r"frozen: \['weight'\]")):
        for modules in ([torch.nn.Linear(2, 1), other], [other, torch.nn.Linear(2, 1)]):
            with pytest.raises(ModelError, match=words):
                from_modules(modules, loss)
    with pytest.raises(ShapeError, match="'x' must have a leading axis of 2"):
        from_modules([torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)], loss, {"x": torch.ones(3)})
    vector = from_modules([torch.nn.Linear(2, 1)], lambda call, given, step: call(torch.ones(3, 2))[:, 0])
    with pytest.raises(ShapeError, match=r"\[1, 3\]"):
        Ensemble(lambda _: vector, [0]).train(1)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    whole = ensemble(MEMBERS[:4])
    expected = whole.train(7)
    cut = ensemble(MEMBERS[:4])
    first = cut.train(3)
    cut.save(tmp_path / "at", note={"kept": [1, 2]})
    again = ensemble(MEMBERS[:4])
    assert again.load(tmp_path / "at") == {"kept": [1, 2]}
    assert again.step == 3
    assert torch.equal(torch.cat((first, again.train(4))), expected)
    for name, value in whole.params.items():
        assert torch.equal(value, again.params[name])


def test_a_checkpoint_of_something_else_is_refused_and_changes_nothing(tmp_path):
    run = ensemble(MEMBERS[:2])
    run.train(1)
    run.save(tmp_path / "a")
    other = ensemble(MEMBERS[1:3])
    before = other.member(0)
    with pytest.raises(ResultError, match="another ensemble: its members"):
        other.load(tmp_path / "a")
    with pytest.raises(ResultError, match="its rates"):
        ensemble(MEMBERS[:2], rate=1e-3).load(tmp_path / "a")
    run.train(1)
    run.save(tmp_path / "b")
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "b.safetensors").read_bytes())
    with pytest.raises(ResultError, match="checksum"):
        ensemble(MEMBERS[:2]).load(tmp_path / "a")
    record = json.loads((tmp_path / "b.json").read_text())
    (tmp_path / "b.json").write_text(json.dumps(record | {"schema": "x"}))
    with pytest.raises(ResultError, match="not a checkpoint"):
        run.load(tmp_path / "b")
    with pytest.raises(ResultError, match=r"none\.json is missing"):
        run.load(tmp_path / "none")
    assert all(torch.equal(value, other.member(0)[name]) for name, value in before.items())


@pytest.mark.slow
def test_compiled_training_is_eager_training():
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
    members = [Member(0, Clamp(match=2, sharpness=0.8, previous_token=(1,)), TASK)]
    constants = conditions(members, TABLE, SHAPE, torch.float64)
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
    with pytest.raises(ModelError, match="at least one member"):
        ensemble([])
    with pytest.raises(ModelError, match="positive"):
        ensemble(MEMBERS[:1], rate=0.0)
    with pytest.raises(ShapeError, match="one a member"):
        ensemble(MEMBERS[:2], rate=[1.0])
    with pytest.raises(ModelError, match="16 does not divide into 3 heads"):
        Shape(d_model=16, n_heads=3)
    with pytest.raises(ShapeError, match="leading axis of 2 members"):
        Ensemble(lambda m: Program({"w": torch.zeros(3)}, {}, lambda p, c, s: p["w"]), [0, 1])
    for given in ({"rate": math.nan}, {"rate": math.inf}, {"betas": (1.0, 0.9)}, {"eps": -1.0}):
        with pytest.raises(ModelError):
            ensemble(MEMBERS[:1], **given)
    with pytest.raises(ModelError, match="not negative"):
        ensemble(MEMBERS[:1]).train(-1)
    with pytest.raises(ModelError, match="gives a Program"):
        Ensemble(lambda m: Program({}, {}, lambda p, c, s: torch.zeros(1)), [0])
    with pytest.raises(ModelError, match="belongs to the constants"):
        Ensemble(lambda m: Program({"w": torch.zeros(1, dtype=torch.int64)}, {}, lambda p, c, s: p["w"]), [0])
    mixed = Ensemble(lambda m: Program({"w": torch.ones(2, 3)}, {}, lambda p, c, s: p["w"].mean()), [0, 1])
    with pytest.raises(ShapeError, match="one a member"):
        mixed.train(1)
    assert torch.equal(mixed.params["w"], torch.ones(2, 3)) and mixed.step == 0
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
    with pytest.raises(ShapeError, match="1 clamps for 3 members"):
        conditions(MEMBERS[:3], TABLE, SHAPE, clamps=[Clamp(match=0)])
    with pytest.raises(PlanError, match="no head 9"):
        only_head(9)
    with pytest.raises(ShapeError, match="exemplars must be"):
        conditions(MEMBERS[:1], TABLE[:-1], SHAPE)
    with pytest.raises(PlanError, match=r"heads \[7\]"):
        stack([Clamp(match=7)], 4)
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
    ):
        with pytest.raises(PlanError):
            Clamp(**bad)
