"""Saved plans: what comes back is equal, what is not data is refused, and no file is ever half of two plans."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import safetensors.torch
import torch
from torch import Tensor

import interp as ip
from hooks import Intervention, Plan, Span
from hooks.errors import InterpError, PlanError, ShapeError, SiteError
from hooks.plan.operation import Op
from hooks.plan.operations.attention import Attend, AttendBack, ForbidBack
from hooks.plan.operations.moving import CopyScores, FromPositions
from hooks.plan.operations.table import OPERATIONS
from hooks.plan.saving import fingerprint
from tests import zoo

ONE_TOKEN = ip.Inputs.of(torch.tensor([[1]]))
M = 32  # gpt2's width in the zoo; its heads are 8 wide


@pytest.fixture(scope="module")
def model() -> ip.Model:
    return ip.wrap(zoo.make("gpt2"))


@pytest.fixture(scope="module")
def inputs(model) -> ip.Inputs:
    return model.inputs([[1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11]], padding="left", row_ids=torch.tensor([4, 8, 15]))


def vector(n: int = M, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def every_op(model: ip.Model, inputs: ip.Inputs) -> dict[str, Plan]:
    """A plan of each built-in function, with each kind of parameter that it takes."""
    world = ip.World(inputs, ip.zero(ip.site("z", 0, head=1)) + ip.steer(ip.site("resid_pre", 1), vector()))
    tape = model.run(inputs, capture=[ip.site("resid_pre", 1), ip.site("z", 0, head=(1, 2))]).tape
    even = ip.World(model.inputs([[1, 2, 3, 4], [5, 6, 7, 8]]), ip.scale(ip.site("z", 0), 2.0))
    resid, z, scores = ip.site("resid_pre", 1, pos=-1), ip.site("z", 0, head=1), ip.site("scores", 1)
    return {
        "patch": ip.patch(resid, world)
        + ip.patch(ip.site("resid_pre", 1), tape)
        + ip.patch(resid, vector().expand(3, 1, M)),
        "freeze": ip.freeze(z) + ip.freeze(scores),
        "clamp": ip.clamp(resid, 0.1) + ip.clamp(resid, vector()) + ip.clamp(z, 2),
        "zero": ip.zero(z) + ip.zero("ln_final.hook_out") + ip.zero(ip.site("blocks.1.hook_mlp_out")),
        "mean": ip.mean(resid, world) + ip.mean(z, tape, pooled=True) + ip.mean(resid, torch.ones(2, 4, M).double()),
        "resample": ip.resample(z, even) + ip.resample(resid, tape, seed=7),
        "noise": ip.noise(resid, 0.3, seed=11) + ip.noise(z, vector(8)),
        "steer": ip.steer(resid, vector(), 4.0) + ip.steer(z, vector(8), vector(8, 1)) + ip.steer(resid, vector(), 3),
        "scale": ip.scale(z, 1 / 3) + ip.scale(resid, vector()) + ip.scale(resid, float("inf")),
        "project_out": ip.project_out(resid, vector()) + ip.project_out(z, torch.randn(3, 8).double()),
        "interchange": Plan((ip.interchange(resid, torch.randn(2, M).double(), world),))
        + ip.interchange(resid, vector(), world, source_site=ip.site("resid_post", 1, pos=-1)),
        "knockout": ip.knockout(ip.site("pattern", 1, head=2, pos=-1, key_pos=(0, 1)))
        + ip.knockout(ip.site("scores", 0, key_pos=slice(1, None))),
        "recompute": Plan((ip.recompute("hook_embed"),)),
        "patch_constant": ip.patch(resid, ip.scale(z, 2.0), stop_gradient=True) + ip.patch(z, ip.zero(z)),
        "attend": Plan((Intervention(ip.site("pattern", 0, head=1), Attend(torch.eye(2))),)),
        "attend_back": Plan((Intervention(ip.site("pattern", 0, head=1), AttendBack(2)),)),
        "forbid_back": Plan((Intervention(ip.site("scores", 1), ForbidBack(1)),)),
        "random_pattern": Plan((ip.counterfactual(ip.site("pattern", 0, head=1), "random", seed=5),)),
        "uniform_pattern": Plan((ip.counterfactual(ip.site("pattern", 1, key_pos=(0, 1)), "uniform"),)),
        "reversed_pattern": Plan((ip.counterfactual(ip.site("pattern", 1), "reversed"),)),
        "shuffled_pattern": Plan((ip.counterfactual(ip.site("pattern", 0), "shuffled", seed=3),)),
        "copy_scores": Plan(
            (
                Intervention(
                    ip.site("logits", pos=-1),
                    CopyScores(torch.tensor([[3, 4]])),
                    (ip.here(ip.site("scores", 1, head=2, pos=-1, key_pos=(0, 1))),),
                ),
            )
        ),
        "from_positions": Plan(
            (
                Intervention(
                    ip.site("q_input", 1, pos=(0, 1, 2)),
                    FromPositions(torch.tensor([0, 0, 1])),
                    (ip.here(ip.site("embed", pos=(0, 1, 2))),),
                ),
            )
        ),
    }


def restricted(model: ip.Model, inputs: ip.Inputs) -> dict[str, Plan]:
    """A plan of each way to say where."""
    mask = inputs.mask.clone()
    mask[0, 1] = False
    z = ip.site("z", 1)
    nested = ip.World(inputs, ip.patch(z, ip.World(inputs, ip.patch(z, ip.World(inputs, ip.zero("hook_embed"))))))
    vast = vector(dtype=torch.bfloat16)
    return {
        "ints": ip.zero(z.at(head=(0, -1), pos=(0, 2), dim=3)) + ip.zero(z.at(pos=-1)),
        "spans": ip.zero(z.at(pos=slice(1, -1))) + ip.zero(z.at(pos=Span(None, 2), head=Span(1), dim=slice(2, 5))),
        "a mask": ip.zero(z.at(pos=mask)),
        "positions of each row": ip.zero(z.at(pos=torch.tensor([0, 2, 1])))
        + ip.zero(z.at(pos=torch.tensor([[0, 1], [2, 0], [1, 3]], dtype=torch.int32))),
        "tokens of each row": ip.zero(ip.site("logits", dim=torch.tensor([[1, 2], [3, 4], [5, 6]]))),
        "where rows": ip.zero(z).where(torch.tensor([True, False, True])) + ip.zero(z),
        "where tokens": ip.zero(z).where(mask) + ip.zero(z).where(mask).where(torch.tensor([True, True, False])),
        "strength": ip.zero(z).strength(0.1) + ip.zero(z).strength(torch.tensor([0.0, 0.5, 1.0])).strength(0.5),
        "a learned strength": ip.zero(z).strength(torch.tensor(0.25, requires_grad=True)).at(head=1) + ip.zero(z),
        "another site": ip.patch(ip.site("resid_pre", 1, pos=1), ip.World(inputs), source_site=ip.site("embed", pos=0))
        + ip.zero(z),
        "worlds within worlds": ip.patch(z, nested) + ip.patch(z, nested),
        "one tensor twice": ip.steer(ip.site("resid_pre", 0), vast) + ip.steer(ip.site("resid_pre", 1), vast),
        "a view": ip.steer(ip.site("resid_pre", 0), torch.randn(M, 2).double().T[1]) + ip.zero(z),
        "gradients": ip.steer(ip.site("resid_pre", 0), vector().requires_grad_()) + ip.zero(z),
        "dtypes": ip.steer(ip.site("resid_pre", 0), vector(dtype=torch.float16), 1e-300) + ip.zero(z),
        "nothing": Plan(),
    }


NAMES = [*OPERATIONS, *(f"where: {n}" for n in (
    "ints", "spans", "a mask", "positions of each row", "tokens of each row", "where rows", "where tokens", "strength",
    "a learned strength", "another site", "worlds within worlds", "one tensor twice", "a view", "gradients", "dtypes",
    "nothing",
))]  # fmt: skip


def plan_of(name: str, model: ip.Model, inputs: ip.Inputs) -> Plan:
    made = restricted(model, inputs) if name.startswith("where: ") else every_op(model, inputs)
    return ip.Plan() + made[name.removeprefix("where: ")]


# What is saved comes back


@pytest.mark.parametrize("name", NAMES)
def test_what_comes_back_is_equal(model, inputs, tmp_path, name):
    plan = plan_of(name, model, inputs)
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert loaded == plan and plan == loaded and isinstance(loaded, Plan)
    assert fingerprint(loaded) == fingerprint(plan)
    assert str(loaded) == str(plan)
    assert len(loaded) == len(plan) and [type(i.op) for i in loaded] == [type(i.op) for i in plan]
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()
    # It is another plan once anything of it is changed.
    assert loaded + ip.zero(ip.site("z", 0)) != plan
    if len(plan) > 1:
        assert Plan(tuple(loaded)[:-1]) != plan


@pytest.mark.parametrize("name", [n for n in OPERATIONS if n not in ("mean",)])
def test_what_comes_back_does_the_same(model, inputs, tmp_path, name):
    plan = plan_of(name, model, inputs)
    if name == "patch":
        plan = plan + ip.patch(ip.site("resid_mid", 0), ip.World(inputs, plan))
    plan = Plan(tuple(i for i in plan if "inf" not in str(i.op)))
    plan.save(tmp_path / "plan")
    before, after = model.run(inputs, plan), model.run(inputs, Plan.load(tmp_path / "plan", model=model))
    assert torch.equal(before.logits, after.logits)
    base = model.run(inputs).logits
    assert name in ("recompute", "freeze", "patch") or (before.logits - base)[inputs.mask].abs().max() > 1e-6


def test_every_built_in_function_is_covered(model, inputs):
    assert set(every_op(model, inputs)) == set(OPERATIONS)
    assert [n.removeprefix("where: ") for n in NAMES if n.startswith("where: ")] == list(restricted(model, inputs))


def test_tensors_keep_their_dtype_and_are_free_of_the_graph(tmp_path):
    leaf = torch.ones(4, dtype=torch.float16, requires_grad=True)
    (ip.Plan() + ip.steer(ip.site("embed"), 2 * leaf)).save(tmp_path / "p")
    loaded = Plan.load(tmp_path / "p")[0].op.vector
    assert loaded.dtype == torch.float16 and not loaded.requires_grad and loaded.tolist() == [2.0] * 4


@pytest.mark.parametrize("name", ["p", "p.json", "p.safetensors", "p.v2", "new/folder/p", "naïve 計画"])
def test_names_of_files(tmp_path, name):
    plan = ip.Plan() + ip.steer(ip.site("embed"), vector())
    plan.save(tmp_path / name)
    plan.save(str(tmp_path / name))
    stem = name.removesuffix(".json").removesuffix(".safetensors")
    found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert found == [f"{stem}.json", f"{stem}.safetensors"]
    assert Plan.load(tmp_path / name) == plan and Plan.load(str(tmp_path / stem)) == plan


def test_a_plan_without_tensors_has_one_file(tmp_path):
    (ip.Plan() + ip.steer(ip.site("embed"), vector())).save(tmp_path / "p")
    plain = ip.Plan() + ip.zero(ip.site("embed"))
    plain.save(tmp_path / "p")
    assert os.listdir(tmp_path) == ["p.json"]
    assert Plan.load(tmp_path / "p") == plain


@pytest.mark.parametrize("beside", [None, "another plan's", "another kind of file"])
def test_somebody_elses_tensors_are_not_removed(tmp_path, beside):
    """A plan without tensors, saved beside a file that happens to have the name of its tensors."""
    weights = safetensors.torch.save({"weight": vector()})
    (tmp_path / "p.safetensors").write_bytes(weights)
    if beside == "another plan's":
        ip.Plan().save(tmp_path / "p")
    elif beside:
        (tmp_path / "p.json").write_text("[1, 2")
    (ip.Plan() + ip.zero(ip.site("embed"))).save(tmp_path / "p")
    assert (tmp_path / "p.safetensors").read_bytes() == weights


def test_the_files_are_data(model, inputs, tmp_path):
    plan = plan_of("patch", model, inputs)
    plan.save(tmp_path / "p")
    json.loads((tmp_path / "p.json").read_text())
    assert set(safetensors.torch.load_file(tmp_path / "p.safetensors"))
    assert b"python" not in (tmp_path / "p.json").read_bytes().lower()


# What is not data is not saved


def shout(x: torch.Tensor, ctx) -> torch.Tensor:
    return 2 * x


def test_a_function_of_the_users_is_not_saved(model, inputs, tmp_path):
    own = ip.intervene(ip.site("z", 0), shout)
    for plan in (
        ip.Plan() + own,
        ip.zero(ip.site("z", 0)) + own,
        ip.Plan() + ip.patch(ip.site("z", 1), ip.World(inputs, own)),
    ):
        with pytest.raises(PlanError, match=r"shout.*cannot be saved"):
            plan.save(tmp_path / "p")
    assert os.listdir(tmp_path) == []


# Files that hold something else


def written(tmp_path: Path) -> tuple[Path, dict]:
    plan = (
        ip.steer(ip.site("resid_pre", 1, pos=slice(1, None)), vector(), 0.5).where(torch.tensor([True, False]))
        + ip.patch(ip.site("z", 0), ip.World(ip.Inputs.of(torch.tensor([[1, 2], [3, 4]]))))
        + ip.freeze(ip.site("z", 1, head=(0, 1)))
    )
    plan.save(tmp_path / "p")
    return tmp_path / "p", json.loads((tmp_path / "p.json").read_text())


def nodes(data: Any) -> list[dict]:
    """Every node of a saved plan that names its type."""
    found = []
    if isinstance(data, dict):
        found += [data] if "type" in data else []
        for value in data.values():
            found += nodes(value)
    elif isinstance(data, list):
        for value in data:
            found += nodes(value)
    return found


def first(data: dict, kind: str) -> dict:
    return next(node for node in nodes(data) if node["type"] == kind)


def refused(path: Path, data: Any, match: str | None = None) -> None:
    path.with_name(path.name + ".json").write_text(data if isinstance(data, str) else json.dumps(data))
    with pytest.raises(InterpError, match=match):
        Plan.load(path)


KINDS = ["plan", "intervention", "op", "site", "span", "read", "world", "inputs", "tensor", "float", "tuple", "origin"]


@pytest.mark.parametrize("kind", KINDS)
def test_more_or_less_than_its_fields(tmp_path, kind):
    path, data = written(tmp_path)
    extra = copy.deepcopy(data)
    first(extra["plan"], kind)["__reduce__"] = "os.system"
    refused(path, extra)
    for field in [f for f in first(data["plan"], kind) if f != "type"]:
        fewer = copy.deepcopy(data)
        del first(fewer["plan"], kind)[field]
        refused(path, fewer)
    unknown = copy.deepcopy(data)
    first(unknown["plan"], kind)["type"] = f"{kind}s"
    refused(path, unknown)
    path.with_name("p.json").write_text(json.dumps(data))
    assert len(Plan.load(path)) == 3  # the file itself was good


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "wrong", ["text", {"type": "tuple", "items": []}, [1], {"a": 1}, 1.5, {"type": ["tuple"]}], ids=str
)
def test_fields_of_another_type(tmp_path, kind, wrong):
    """A field that holds another type is refused on loading, not when the plan is run."""
    path, data = written(tmp_path)
    for field, value in first(data["plan"], kind).items():
        fits = isinstance(wrong, str) and isinstance(value, str) and field != "name"
        if field in ("type", "fields") or fits or (field == "stack" and wrong == "text") or wrong == value:
            continue
        if wrong == {"type": "tuple", "items": []} and field in ("reads", "interventions", "tokens"):
            continue
        changed = copy.deepcopy(data)
        first(changed["plan"], kind)[field] = wrong
        refused(path, changed)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d["plan"]["interventions"]["items"][0]["op"].update(name="steeer"), "'steer'"),
        (lambda d: d["plan"]["interventions"]["items"][0]["op"].update(name="intervene"), "intervene"),
        (lambda d: d["plan"]["interventions"]["items"][0]["op"].update(name="__import__"), "__import__"),
        (lambda d: d["plan"]["interventions"]["items"][0]["op"]["fields"].update(code="x"), None),
        (lambda d: d["plan"]["interventions"]["items"][0]["op"]["fields"].pop("vector"), None),
        (lambda d: d["plan"]["interventions"]["items"][0]["op"]["fields"].update(vector="abc"), None),
        (lambda d: d["plan"]["interventions"]["items"][0]["op"]["fields"].update(scale=None), None),
        (lambda d: d["plan"]["interventions"]["items"][0]["op"]["fields"]["scale"].update(value="half"), None),
        (lambda d: d["plan"]["interventions"]["items"][0]["op"]["fields"]["vector"].update(name="t99"), "t99"),
        (lambda d: d["plan"]["interventions"]["items"][0]["site"].update(name="resid_prre"), "'resid_pre'"),
        (lambda d: d["plan"]["interventions"]["items"][0]["site"].update(layer=None), "layer"),
        (lambda d: d["plan"]["interventions"]["items"][0]["site"].update(head=1), "head"),
        (lambda d: d["plan"]["interventions"]["items"][2]["reads"]["items"][0]["source"].update(name="NOW"), None),
        (lambda d: d.update(plan={"type": "function", "name": "f", "code": "00"}), "function"),
        (lambda d: d.update(plan=d["plan"]["interventions"]), "plan"),
        (lambda d: d.update(plan=None), None),
        (lambda d: d.pop("plan"), None),
        (lambda d: d.update(version=2), "version 2"),
        (lambda d: d.update(version="1"), "version '1'"),
        (lambda d: d.pop("version"), "version None"),
        (lambda d: d.update(format="interp.result"), "not a saved plan"),
        (lambda d: d.update(tensors=0), None),
        (lambda d: d.update(surplus=1), None),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path, change, match):
    path, data = written(tmp_path)
    change(data)
    refused(path, data, match)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "1",
        '"plan"',
        "\x00\x01",
        "NaN",
        '{"format": "interp-plan", "version": NaN}',
        "[" * 100_000,
    ],
)
def test_garbage(tmp_path, text):
    path, _ = written(tmp_path)
    refused(path, text)


def test_deep_nesting_is_refused_not_a_crash(tmp_path):
    path, data = written(tmp_path)
    nested: Any = {"type": "tuple", "items": []}
    for _ in range(400):
        nested = {"type": "tuple", "items": [nested]}
    data["plan"]["interventions"]["items"][0]["reads"] = nested
    refused(path, data)


class Bomb:
    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(Bomb.where),))

    where = Path()


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_pickle_under_our_name_is_refused_and_not_run(tmp_path, suffix):
    path, _ = written(tmp_path)
    Bomb.where = tmp_path / "ran"
    for dump in (lambda f: pickle.dump(Bomb(), f), lambda f: torch.save({"t0": Bomb()}, f)):
        with open(tmp_path / f"p{suffix}", "wb") as file:
            dump(file)
        with pytest.raises(InterpError, match=rf"p\{suffix}"):
            Plan.load(path)
        assert not Bomb.where.exists()


def test_files_that_are_missing_or_broken(tmp_path):
    with pytest.raises(InterpError, match=r"no saved plan.*nowhere\.json"):
        Plan.load(tmp_path / "nowhere")
    path, _ = written(tmp_path)
    whole = (tmp_path / "p.safetensors").read_bytes()
    for content in (b"", whole[:20], whole[:-8], b"garbage" * 10, whole + b"more"):
        (tmp_path / "p.safetensors").write_bytes(content)
        with pytest.raises(InterpError, match=r"p\.safetensors"):
            Plan.load(path)
    (tmp_path / "p.safetensors").unlink()
    with pytest.raises(InterpError, match=r"p\.safetensors is missing"):
        Plan.load(path)


def test_tensors_of_another_plan_are_refused(tmp_path):
    """Two plans of one form have tensors of the same names: their files must not be mixed in silence."""
    for name, seed in (("p", 0), ("q", 1)):
        (ip.Plan() + ip.steer(ip.site("embed"), vector(seed=seed))).save(tmp_path / name)
    (tmp_path / "q.safetensors").replace(tmp_path / "p.safetensors")
    with pytest.raises(InterpError, match=r"p\.safetensors"):
        Plan.load(tmp_path / "p")


# Against a model


@pytest.mark.parametrize(
    ("plan", "error", "match"),
    [
        (ip.zero(ip.site("z", 7)), SiteError, "layers 0 .. 1"),
        (ip.zero(ip.site("z", 0, head=4)), SiteError, "no head 4"),
        (ip.zero(ip.site("rot_q", 0)), SiteError, "rot_q"),
        (ip.zero(ip.site("z", 0, dim=8)), SiteError, "8 entries"),
        (ip.steer(ip.site("resid_pre", 0), vector(M + 1)), ShapeError, r"33.*32"),
        (ip.clamp(ip.site("z", 0), vector(7)), ShapeError, r"7.*8"),
        (ip.project_out(ip.site("resid_pre", 0), torch.eye(2, 5).double()), ShapeError, r"5.*32"),
        (ip.patch(ip.site("z", 0), ip.World(ONE_TOKEN, ip.zero(ip.site("z", 9)))), SiteError, "layers"),
        (ip.patch(ip.site("z", 0), torch.ones(3, 2, 4, 9).double()), ShapeError, None),
        (ip.patch(ip.site("z", 0), torch.ones(3, 2, 5, 8).double()), ShapeError, None),
    ],
)  # fmt: skip
def test_a_plan_is_checked_against_the_model(model, tmp_path, plan, error, match):
    (ip.Plan() + plan).save(tmp_path / "p")
    assert Plan.load(tmp_path / "p") == ip.Plan() + plan
    with pytest.raises(error, match=match):
        Plan.load(tmp_path / "p", model=model)


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_that_fits_is_loaded(model, inputs, tmp_path, name):
    plan = plan_of(name, model, inputs)
    plan.save(tmp_path / "p")
    assert Plan.load(tmp_path / "p", model=model) == plan


# Interruptions


@pytest.mark.parametrize("old", ["tensors", "no tensors", "nothing"])
@pytest.mark.parametrize("new", ["tensors", "no tensors"])
@pytest.mark.parametrize("step", range(8))
def test_an_interrupted_save_leaves_a_whole_plan(tmp_path, old, new, step):
    """Whichever call to the file system fails: what loads afterwards is the old plan, the new one, or nothing."""
    plans = {
        "tensors": ip.Plan() + ip.steer(ip.site("embed"), vector()),
        "no tensors": ip.Plan() + ip.zero(ip.site("embed")),
        "new tensors": ip.Plan() + ip.steer(ip.site("resid_pre", 1), vector(seed=1)),
        "new no tensors": ip.Plan() + ip.zero(ip.site("z", 1)),
    }
    if old != "nothing":
        plans[old].save(tmp_path / "p")
    calls = []

    def failing(original: Callable) -> Callable:
        def call(*args, **kwargs):
            calls.append(original)
            if len(calls) == step + 1:
                raise OSError("no space left on device")
            return original(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "rename", "unlink", "fsync"):
            patch.setattr(os, name, failing(getattr(os, name)))
        patch.setattr(Path, "write_text", failing(Path.write_text))
        try:
            plans[f"new {new}"].save(tmp_path / "p")
        except OSError:
            failed = True
        else:
            failed = len(calls) > step
    if not failed:
        assert Plan.load(tmp_path / "p") == plans[f"new {new}"]
        return
    try:
        loaded = Plan.load(tmp_path / "p")
    except PlanError:
        # A pair whose halves are of two plans may be refused; a single file that was there must still be there.
        assert old == "nothing" or len(calls) > 2
        return
    assert loaded in [plans[k] for k in (old, f"new {new}") if k != "nothing"]
    strays = [f for f in os.listdir(tmp_path) if f not in ("p.json", "p.safetensors")]
    assert strays == [] or len(calls) > step + 1


# Fingerprints


def test_a_fingerprint_is_equal_where_plans_are(model, inputs):
    plans = [plan_of(name, model, inputs) for name in NAMES]
    prints = [fingerprint(p) for p in plans]
    assert len(set(prints)) == len(plans)
    torch.manual_seed(0)  # some of the plans draw their tensors
    again = ip.wrap(zoo.make("gpt2"))
    for a, b in zip(plans, [plan_of(n, again, inputs) for n in NAMES], strict=True):
        assert (a == b) == (fingerprint(a) == fingerprint(b))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ip.zero(ip.site("resid_pre", 1)), ip.zero(ip.site("resid_post", 0))),
        (ip.zero(ip.site("z", 1, pos=slice(1, None))), ip.zero(ip.site("z", 1, pos=Span(1)))),
        (ip.steer(ip.site("embed"), vector()), ip.steer(ip.site("embed"), vector().clone())),
        (ip.steer(ip.site("embed"), vector()), ip.steer(ip.site("embed"), vector().requires_grad_())),
        (ip.steer(ip.site("embed"), vector()), ip.steer(ip.site("embed"), torch.stack([vector()] * 2, 1)[:, 0])),
        (
            ip.steer(ip.site("embed"), shared := vector()) + ip.steer(ip.site("z", 0), shared),
            ip.steer(ip.site("embed"), vector()) + ip.steer(ip.site("z", 0), vector()),
        ),
        (
            ip.patch(ip.site("z", 0), ip.World(ip.Inputs.of(torch.tensor([[1, 2]]), tokens=(("a", "b"),)))),
            ip.patch(ip.site("z", 0), ip.World(ip.Inputs.of(torch.tensor([[1, 2]])))),
        ),
    ],
    ids=["two names", "slice", "clone", "leaf", "strides", "shared tensor", "token texts"],
)
def test_equal_things_have_one_fingerprint(one, other):
    assert one == other
    assert fingerprint(one) == fingerprint(other)


BASE = ip.steer(ip.site("z", 1, head=1), vector(8), 2.0)


@pytest.mark.parametrize(
    "other",
    [
        ip.steer(ip.site("z", 0, head=1), vector(8), 2.0),
        ip.steer(ip.site("z", 1, head=2), vector(8), 2.0),
        ip.steer(ip.site("z", 1, head=(1,)), vector(8), 2.0),
        ip.steer(ip.site("z", 1, head=1, pos=-1), vector(8), 2.0),
        ip.steer(ip.site("z", 1, head=1), vector(8), 2.0 + 2**-50),
        ip.steer(ip.site("z", 1, head=1), vector(8, 1), 2.0),
        ip.steer(ip.site("z", 1, head=1), vector(8).float(), 2.0),
        ip.steer(ip.site("z", 1, head=1), vector(8)[None], 2.0),
        ip.noise(ip.site("z", 1, head=1), vector(8)),
        BASE.strength(0.5),
        BASE.where(torch.tensor([True])),
        BASE + BASE,
        replace(BASE, reads=(ip.here(ip.site("z", 0)),)),
    ],
)
def test_different_things_have_different_fingerprints(other):
    assert other != BASE
    assert fingerprint(other) != fingerprint(BASE)


def test_fingerprints_of_inputs_and_worlds(model):
    ids, mask = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    made = [
        model.inputs(ids),
        model.inputs(ids, mask),
        model.inputs(ids, row_ids=torch.tensor([0, 2])),
        model.inputs(ids.flip(0)),
        ip.World(model.inputs(ids)),
        ip.World(model.inputs(ids), ip.zero(ip.site("z", 0))),
    ]
    assert len({fingerprint(x) for x in made}) == len(made)
    assert fingerprint(model.inputs(ids)) == fingerprint(model.inputs(ids.clone()))
    assert fingerprint(ip.World(model.inputs(ids))) == fingerprint(ip.World(model.inputs(ids.int())))


# Operations of a package above the engine


@dataclass(frozen=True, eq=False)
class Halve(Op):
    """An operation that the engine does not know."""

    by: float = 2.0
    name: ClassVar[str] = "halve"

    def __call__(self, x: Tensor, *reads: Tensor, ctx: ip.Context) -> Tensor:
        return x / self.by


def test_operations_that_are_handed_to_load(tmp_path, model, inputs):
    plan = Plan((Intervention(ip.site("z", layer=0), Halve(4.0)),)) + ip.zero(ip.site("attn_out", layer=1, pos=0))
    plan.save(tmp_path / "plan")
    with pytest.raises(PlanError, match="unknown intervention 'halve'"):
        Plan.load(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan", model, operations=[Halve])
    assert loaded == plan and loaded[0].op.parameters() == {"by": 4.0}
    same = ip.scale(ip.site("z", layer=0), 0.25) + Plan((plan[1],))
    torch.testing.assert_close(model.run(inputs, loaded).logits, model.run(inputs, same).logits, rtol=0, atol=1e-10)
    assert "halve" not in OPERATIONS  # what is handed over is known to this call alone
