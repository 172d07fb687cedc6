"""Any members' program as an ensemble: rates, checkpoints, and what is refused; here, each fits a line to noise."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hooks.errors import ModelError, ResultError, ShapeError
from hooks.random import normal
from interp.training.ensemble import Ensemble, Program, from_modules

ROWS, WIDTH, RATE = 5, 3, 1e-2


@dataclass(frozen=True)
class Member:
    """Where it starts and what it sees; `held` holds its first weight in place."""

    seed: int
    held: bool = False


MEMBERS = [Member(seed, bool(seed % 2)) for seed in range(4)]


def build(members: Sequence[Member]) -> Program:
    seeds = torch.tensor([member.seed for member in members])[:, None, None]
    constants = {"seed": seeds, "held": torch.tensor([[member.held, False, False] for member in members])}
    params = {"w": normal(seeds[..., 0], torch.arange(WIDTH)), "b": torch.zeros(len(members), dtype=torch.float64)}

    def loss(params: dict[str, Tensor], constants: dict[str, Tensor], step: Tensor) -> Tensor:
        drawn = normal(constants["seed"], step, torch.arange(ROWS)[:, None], torch.arange(WIDTH + 1))
        weights = torch.where(constants["held"], params["w"].detach(), params["w"])
        found = (drawn[..., :WIDTH] @ weights[..., None])[..., 0] + params["b"][:, None]
        return (found - 1 - drawn[..., WIDTH]).square().mean(1)

    return Program(params, constants, loss)


def ensemble(members: Sequence[Member], **options) -> Ensemble:
    return Ensemble(build, members, rate=options.pop("rate", RATE), **options)


def alone(member: Member, steps: int) -> list[float]:
    """Losses of a run of its own with torch's Adam."""
    program = build([member])
    params = {name: value.requires_grad_() for name, value in program.params.items()}
    optimizer = torch.optim.Adam(params.values(), RATE)
    found = []
    for step in range(steps):
        loss = program.loss(params, program.constants, torch.tensor(step))[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_members_train_as_separate_runs():
    found = ensemble(MEMBERS).train(6)
    for index, member in enumerate(MEMBERS):
        torch.testing.assert_close(found[:, index].tolist(), alone(member, 6), rtol=0, atol=1e-12)
    assert (found[0] - found[-1]).abs().min() > 1e-3


def test_each_member_may_have_its_own_rate():
    both = ensemble([MEMBERS[0], MEMBERS[0]], rate=[1e-2, 1e-4]).train(4)
    torch.testing.assert_close(both[:, 0], ensemble(MEMBERS[:1], rate=1e-2).train(4)[:, 0], rtol=0, atol=1e-10)
    torch.testing.assert_close(both[:, 1], ensemble(MEMBERS[:1], rate=1e-4).train(4)[:, 0], rtol=0, atol=1e-10)
    assert (both[-1, 0] - both[-1, 1]).abs() > 1e-4


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


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(ModelError, match="at least one member"):
        ensemble([])
    with pytest.raises(ModelError, match="positive"):
        ensemble(MEMBERS[:1], rate=0.0)
    with pytest.raises(ShapeError, match="one a member"):
        ensemble(MEMBERS[:2], rate=[1.0])
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


def test_some_members_go_on_without_the_rest():
    """Their steps are those that they would have taken together, and what they leave behind stays as it was."""
    whole, part = ensemble(MEMBERS), ensemble([MEMBERS[3], MEMBERS[1]])
    whole.train(3)
    part.take_over(whole, [3, 1], [0, 1])
    kept = {name: value.clone() for name, value in whole.params.items()}
    found = part.train(4)
    torch.testing.assert_close(found, ensemble(MEMBERS).train(7)[3:, [3, 1]], rtol=0, atol=1e-12)
    assert part.step == 7 and all(torch.equal(whole.params[name], value) for name, value in kept.items())
    whole.take_over(part, [0, 1], [3, 1])
    assert whole.step == 7
    for name, value in whole.params.items():
        assert torch.equal(value[[0, 2]], kept[name][[0, 2]]) and torch.equal(value[[3, 1]], part.params[name])
        assert not torch.equal(value[[3, 1]], kept[name][[3, 1]])
    for theirs, mine in (([0, 1], [0]), ([0, 0], [0, 1]), ([0, 4], [0, 1]), ([-1], [0]), ([0], [2])):
        with pytest.raises(ShapeError, match="cannot become"):
            part.take_over(whole, theirs, mine)
    other = Ensemble(lambda members: Program({"w": torch.zeros(2, 5)}, {}, lambda p, c, s: p["w"].sum(1)), MEMBERS[:2])
    with pytest.raises(ShapeError, match=r"other parameters: \['b', 'w'\]"):
        other.take_over(whole, [0], [0])
