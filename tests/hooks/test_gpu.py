"""The engine on a GPU: the same numbers as on a CPU, nothing mixed between devices, nothing waited for."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import Tensor

import hooks as hk
from hooks import Inputs, Model, Plan, ShapeError, Site, World, patch, program, site
from hooks.backends import native
from hooks.budget import CPU_BUDGET, default_budget
from tests import zoo
from tests.devices import PRETENDED, TOLERANCE, device, elsewhere, model_on, near, placed

__all__ = ["device"]
FAMILIES = ["gpt2", "gemma2"] if PRETENDED else ["gpt2", "llama", "gemma2", "neox", "small_qk_norm"]
READS = [site("logits", pos=-1), site("resid_post", 0), site("pattern", 1, head=1), site("z", 1)]


def batch(model: Model, seed: int = 1, side: str = "left") -> Inputs:
    return model.inputs(*zoo.random_inputs(zoo.VOCAB, [6, 4, 5], side, seed))


def worlds(model: Model, x: Inputs, other: Inputs) -> list[World]:
    """Edits of every kind: of values and of attention, by other worlds, by numbers, at random, on some rows."""
    source, last = World(other), model.n_layers - 1
    vector = torch.linspace(-1, 1, model.architecture.width, dtype=torch.float64).to(model.device, model.dtype)
    pattern = torch.eye(6, dtype=torch.float64)
    full = World(model.inputs(*zoo.random_inputs(zoo.VOCAB, [6, 6, 6], "right", 7)))
    plans = [
        patch(site("resid_pre", 1, pos=-1), source),
        patch(site("z", 0, head=1), source).strength(0.4),
        patch(site("pattern", last, head=0), source),
        patch(site("attn_out", 0), source).where(x.mask & (x.positions != 1)),
        hk.steer(site("resid_post", 0, pos=(1, 2)), vector, scale=2.0).where(torch.tensor([True, False, True])),
        hk.steer(site("resid_post", 0, pos=torch.tensor([2, 1, 0])), vector).strength(torch.tensor([0.5, 1.0, 0.2])),
        hk.zero(site("attn_out", 0, pos=slice(1, 3))),
        hk.scale(site("k", 0, head=0, dim=(1, 2)), 0.5),
        hk.mean(site("z", 1, head=0), full),
        hk.resample(site("resid_pre", 1), full),
        hk.noise(site("q", last), 0.5),
        hk.project_out(site("resid_pre", last), vector),
        hk.interchange(site("resid_post", 0), vector, source),
        hk.knockout(site("scores", 0, head=1, pos=3, key_pos=(0, 2))),
        hk.Intervention(site("pattern", 1, head=0), hk.Attend(pattern)),
        hk.Intervention(site("pattern", 0, head=1), hk.AttendBack(1)),
        hk.freeze(site("attn_out", last)) + hk.scale(site("resid_pre", 0, pos=1), 2.0),
        hk.zero(site("embed", pos=-1)),
    ]
    return [World(x), *(World(x, hk.as_plan(plan)) for plan in plans)]


def values(model: Model, made: list[World], reads: list[Site], executor: str, **options: float) -> list[list[Tensor]]:
    pieces: dict[int, list[hk.Outcome]] = {}
    for outcome in hk.run_worlds(model, made, reads, executor=executor, seed=3, **options):
        assert all(value.device == model.device for value in outcome.values)
        pieces.setdefault(outcome.index, []).append(outcome)
    found = []
    for index in range(len(made)):
        ordered = sorted(pieces[index], key=lambda outcome: outcome.rows.start)
        whole = [torch.cat([outcome.values[i] for outcome in ordered]) for i in range(len(reads))]
        found.append([_real(place, value, made[0].inputs) for place, value in zip(reads, whole, strict=True)])
    return found


def _real(place: Site, value: Tensor, x: Inputs) -> Tensor:
    """A read with zeros at padding, of which nothing is promised."""
    if place.pos is not None:
        return value
    shape = [len(x), *(x.width if axis == "pos" else 1 for axis in place.axes[1:])]
    return torch.where(x.mask.reshape(shape).to(value.device), value, 0)


def agree(one: list[list[Tensor]], two: list[list[Tensor]], tolerance: float) -> None:
    for mine, theirs in zip(one, two, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            near(a, b, tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_executors_agree_with_the_cpu(device, family):
    here, there = model_on(torch.device("cpu"), family), model_on(device, family)
    reads = [place for place in READS if place.key in here.sizes]
    expected = values(here, worlds(here, batch(here), batch(here, 2)), reads, "sequential")
    moved = [max(float((a - b).abs().max()) for a, b in zip(world, expected[0], strict=True)) for world in expected[1:]]
    assert min(moved) > 1e-3
    made = worlds(there, batch(there), batch(there, 2))
    oracle = values(there, made, reads, "sequential")
    agree(oracle, expected, TOLERANCE[torch.float64])
    for executor in ("batched", "shared"):
        agree(values(there, made, reads, executor), oracle, 1e-9)
    agree(values(there, made, reads, "shared", budget=20_000), oracle, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_executors_agree_in_other_dtypes(device, family, dtype):
    model = model_on(device, family, dtype)
    made = worlds(model, batch(model), batch(model, 2))
    if dtype == torch.bfloat16:  # what tells a token from another is lost in the softmax of large scores
        made = made[:2]
    expected = values(model, made, READS, "sequential")
    assert hk.choose(model, made).executor == "shared"
    for executor in ("batched", "shared"):
        agree(values(model, made, READS, executor), expected, TOLERANCE[dtype])


def test_draws_are_the_same_everywhere(device):
    rows = torch.arange(50)
    for draw in (hk.hash_counters, lambda *c: hk.choice(7, *c), hk.uniform):
        here, there = draw(5, rows, rows[:, None]), draw(5, rows.to(device), rows[:, None].to(device))
        assert there.device == device and torch.equal(there.cpu(), here) and len(here.unique()) > 5
    near(hk.normal(5, rows.to(device)), hk.normal(5, rows), 1e-12)


@torch.no_grad()
def test_what_is_kept_is_on_the_device_and_can_be_moved(device):
    model = model_on(device, "llama")
    x, other = batch(model), batch(model, 2)
    place = site("z", 1)
    run = model.run(other, capture=[place, site("logits", pos=-1)])
    assert run.logits.device == device and {value.device for _, value in run.tape.values} == {device}
    assert not torch.equal(run.logits[x.mask.to(device)], model.run(x).logits[x.mask.to(device)])
    audit = model.run(x, patch(place, source=run.tape)).audit
    assert [entry.status for entry in audit] == ["fired"] and 0 < audit[0].change < 100
    moved = run.tape.to(elsewhere(device))
    assert moved[place].device == elsewhere(device)
    with pytest.raises(ShapeError, match=f"on {elsewhere(device)}, the activation is .* on {device}"):
        model.run(x, patch(place, source=moved))
    if device.type != "cpu":
        near(model.run(x, patch(place, source=moved.to(device))).logits, model.run(x, patch(place, run.tape)).logits)


@torch.no_grad()
@pytest.mark.parametrize("executor", ["sequential", "batched", "shared"])
def test_a_value_on_another_device_is_refused(device, executor):
    model = model_on(device, "gpt2")
    x, ones = batch(model), torch.ones(32, dtype=torch.float64, device=elsewhere(device))
    for plan in (hk.steer(site("resid_post", 0), ones), hk.clamp(site("resid_post", 0, pos=1), ones)):
        with pytest.raises(ShapeError, match=f"a value on {elsewhere(device)} for an activation on {device}"):
            list(hk.run_worlds(model, [World(x, hk.as_plan(plan))], ["logits"], executor=executor))
    with pytest.raises(ShapeError, match=f"on {elsewhere(device)} for an activation on {device}"):
        model.run(x, hk.project_out(site("resid_post", 0), ones))


@torch.no_grad()
def test_statuses_are_told(device):
    model = model_on(device, "gpt2")
    x = batch(model)
    same = patch(site("resid_pre", 1), World(x))
    made = [World(x, hk.as_plan(p)) for p in (hk.zero(site("z", 0)), same, hk.zero(site("mlp_out", 1, pos=0)))]
    found = {o.index: o.status for o in hk.run_worlds(model, made, [site("logits", pos=-1)], executor="shared")}
    assert found == {0: "fired", 1: "inert", 2: "pruned"}


@torch.no_grad()
def test_a_plan_is_saved_on_one_device_and_used_on_another(device, tmp_path):
    here, there = model_on(torch.device("cpu"), "gpt2"), model_on(device, "gpt2")
    x = batch(here)
    made = []
    for number, model in enumerate((here, there)):
        vector = torch.linspace(-1, 1, 32, dtype=torch.float64, device=model.device)
        tape = model.run(batch(model, 2), capture=site("z", 1)).tape
        plan = hk.steer(site("resid_post", 0, pos=(1, 2)), vector) + patch(site("z", 1, head=2), tape)
        plan.save(tmp_path / str(number))
        made.append(plan)
    expected = here.run(x, made[0]).logits
    near(here.run(x, Plan.load(tmp_path / "1", here)).logits, expected)
    for number in ("0", "1"):
        near(there.run(x, Plan.load(tmp_path / number, there).to(device)).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_what_they_are_alone(device, side):
    model = model_on(device, "llama")
    x = batch(model, side=side)
    plan = hk.scale(site("resid_pre", 1, pos=2), 3.0) + hk.zero(site("z", 0, head=1, pos=-1))
    together = model.run(x, plan).logits
    for row, length in enumerate(x.lengths.tolist()):
        alone = model.run(model.inputs(x.ids[row][x.mask[row]][None]), plan).logits[0]
        near(together[row][x.mask[row].to(device)], alone)
        assert len(alone) == length


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "small_rms_rotary_gqa"])
def test_a_held_plan_never_waits(device, family, monkeypatch):
    """Within `visit`, nothing that is computed is read by the host, and nothing is copied to the device."""
    model = model_on(device, family)
    x, waits, visits = batch(model), [], []
    vector = torch.ones(model.architecture.width, dtype=torch.float64, device=device)
    tape = model.run(batch(model, 2), capture=[site("z", 1)]).tape
    plan = Plan(
        (
            hk.steer(site("resid_post", 0, pos=(1, 2)), vector, scale=2.0),
            hk.zero(site("attn_out", 1, pos=slice(1, 3))),
            patch(site("z", 1, head=1), tape),
            hk.scale(site("pattern", 0, head=0), 0.5),
            hk.knockout(site("scores", 1, head=1, pos=3, key_pos=(0, 2))),
            hk.clamp(site("attn_out", 0, pos=1), vector),
            hk.noise(site("q", 0, head=(0, 2)), 0.1),
            hk.Intervention(site("pattern", 0, head=2), hk.Attend(torch.eye(6, dtype=torch.float64))),
        )
    )

    @contextlib.contextmanager
    def watched():
        if device.type == "cuda":
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode(before)
        elif device.type == "card":
            mode = torch.utils._python_dispatch._get_current_dispatch_mode()
            before = len(mode.waits)
            yield
            waits.extend(mode.waits[before:])
        else:
            yield

    def visit(*args):
        visits.append(args[2])
        with watched():
            return program.visit(*args)

    ids, mask, positions = (value.to(device) for value in (x.ids, x.mask.long(), x.positions))
    with model.apply(plan) as audit:
        expected = model.module(input_ids=ids, attention_mask=mask, position_ids=positions)
        monkeypatch.setattr(native, "visit", visit)
        found = model.module(input_ids=ids, attention_mask=mask, position_ids=positions)
    logits = [out if isinstance(out, Tensor) else out.logits for out in (expected, found)]
    near(logits[1][x.mask.to(device)], logits[0][x.mask.to(device)], 0.0)
    assert len(visits) == 7 and waits == []
    assert {entry.status for entry in audit} == {"fired"}


@pytest.mark.parametrize("family", ["gpt2", "small_rms_rotary_gqa"])
def test_training_under_a_clamp_is_that_of_the_cpu(device, family):
    weights = []
    for where in (torch.device("cpu"), device):
        model = model_on(where, family)
        model.module.train()
        optimizer = torch.optim.SGD(model.module.parameters(), 1e-2)
        x = batch(model)
        plan = hk.Plan((hk.Intervention(site("pattern", 0, head=0), hk.AttendBack(1)),))
        plan += hk.noise(site("resid_pre", 1), 0.1)
        with model.apply(plan, seed=4) as audit:
            for _ in range(3):
                out = model.module(input_ids=x.ids.to(where), attention_mask=x.mask.long().to(where))
                logits = out if isinstance(out, Tensor) else out.logits
                mask = x.mask[:, 1:].to(where)
                chances = logits[:, :-1].log_softmax(-1).gather(2, x.ids[:, 1:, None].to(where))[..., 0]
                optimizer.zero_grad()
                (-torch.where(mask, chances, 0).mean()).backward()
                optimizer.step()
        assert [entry.calls for entry in audit] == [3, 3]
        weights.append(torch.cat([p.detach().flatten().cpu() for p in model.module.parameters()]))
    near(weights[1], weights[0])
    start = torch.cat([p.detach().flatten() for p in zoo.make(family).parameters()])
    assert float((weights[0] - start).abs().max()) > 1e-4


def test_gradients_flow_into_what_is_patched_in(device):
    found = []
    for where in (torch.device("cpu"), device):
        model = model_on(where, "llama")
        vector = torch.linspace(-1, 1, 24, dtype=torch.float64).to(where).detach().requires_grad_()
        run = model.run(batch(model), hk.steer(site("resid_post", 0, pos=1), vector), capture=["logits"], grad=True)
        loss = run.logits[:, -1, 7].sum()
        found.append(torch.autograd.grad(loss, vector)[0])
    near(found[1], found[0])
    assert float(found[0].abs().max()) > 1e-3 and found[1].device == device


@torch.no_grad()
def test_generation_without_a_cache(device):
    model = model_on(device, "llama")
    ids = zoo.random_inputs(zoo.VOCAB, [5, 5], "left", 1)[0]
    plan = hk.zero(site("z", 1, head=1, pos=2)) + hk.scale(site("resid_pre", 2, pos=-1), 4.0)
    expected, plain = ids, ids
    for _ in range(3):
        chosen = model.run(model.inputs(expected), plan).logits[:, -1].argmax(-1)
        expected = torch.cat([expected, chosen[:, None].cpu()], 1)
        plain = torch.cat([plain, model.run(model.inputs(plain)).logits[:, -1].argmax(-1)[:, None].cpu()], 1)
    with model.apply(plan):
        found = ids.to(device)
        for _ in range(3):
            logits = model.module(input_ids=found, use_cache=False).logits
            found = torch.cat([found, logits[:, -1].argmax(-1)[:, None]], 1)
    assert torch.equal(found.cpu(), expected) and not torch.equal(plain, expected)
    if device.type != "card":  # what generate() looks up of a device, a pretended one does not have
        # There -1 is the prompt's last token, and stays so.
        fixed, expected = plan.interventions[0] + hk.scale(site("resid_pre", 2, pos=4), 4.0), ids
        for _ in range(3):
            chosen = model.run(model.inputs(expected), fixed).logits[:, -1].argmax(-1)
            expected = torch.cat([expected, chosen[:, None].cpu()], 1)
        with model.apply(plan):
            out = model.module.generate(ids.to(device), max_new_tokens=3, do_sample=False, use_cache=False)
        assert torch.equal(out.cpu(), expected)


@torch.no_grad()
def test_inputs_may_be_given_on_the_device(device):
    model = model_on(device, "gpt2")
    ids, mask = zoo.random_inputs(zoo.VOCAB, [6, 4], "left", 1)
    on_device = model.inputs(ids.to(device), mask.to(device), row_ids=torch.tensor([3, 1]).to(device))
    assert on_device.ids.device.type == "cpu" and torch.equal(on_device.ids, ids)
    positions, only = torch.tensor([2, 1]), torch.tensor([True, False])
    runs = []
    for move in (lambda t: t, lambda t: t.to(device)):
        plan = hk.zero(site("resid_pre", 1, pos=move(positions))).where(move(only))
        plan += hk.scale(site("z", 0), 2.0).strength(move(torch.tensor([0.5, 1.0])))
        runs.append(model.run(on_device, plan).logits)
    near(runs[1], runs[0], 0.0)
    assert float((runs[0] - model.run(on_device).logits).abs().max()) > 1e-3


def test_the_budget_is_that_of_the_device(device):
    found = default_budget(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        assert 0 < found <= total // 4 and abs(found - free // 4) < total // 8
    else:
        assert found == CPU_BUDGET


@torch.no_grad()
def test_a_model_that_moves_is_followed(device):
    module = zoo.make("gpt2")
    model = hk.wrap(module)
    x, plan = batch(model), hk.zero(site("z", 0, head=1))
    before = [model.run(x, plan).logits, *values(model, [World(x, hk.as_plan(plan))], READS, "shared")[0]]
    placed(module, device)
    after = [model.run(x, plan).logits, *values(model, [World(x, hk.as_plan(plan))], READS, "shared")[0]]
    assert {value.device for value in after} == {device}
    for one, two in zip(after, before, strict=True):
        near(
            one[x.mask.to(device)] if one.shape[1] == x.width else one, two[x.mask] if one.shape[1] == x.width else two
        )


def test_a_model_spread_over_devices_is_not_shared(device):
    if device.type == "cpu":
        pytest.skip("there is one device")
    module = zoo.make("gpt2")
    placed(module.transformer.h, device)
    choice = hk.choose(hk.wrap(module), [World(hk.wrap(copy.deepcopy(zoo.make("gpt2"))).inputs([[1, 2, 3]]))])
    assert choice.executor == "batched" and "spread over" in choice.reason
