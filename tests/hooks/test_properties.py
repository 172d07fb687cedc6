"""Random plans on random inputs: the executors agree on values and on what reached, and the model stays as it was."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import hooks as hk
from hooks import Inputs, Intervention, Model, Plan, Site, World, site
from tests import zoo
from tests.zoo import wrapped

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

ATOL = 1e-10
NONE = 1e-12
"""What rounding may make of an effect that is none."""


@cache
def weights(family: str) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in wrapped(family).module.state_dict().items()}


def bend(x: Tensor, ctx: hk.Context) -> Tensor:
    return torch.where(x.isfinite(), 0.7 * x + torch.sin(2.0 * x), x)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], str, int]:
    lengths = draw(st.lists(st.integers(3, 6), min_size=1, max_size=3))
    return lengths, draw(st.sampled_from(["left", "right"])), draw(st.integers(0, 99))


@st.composite
def parts(draw: st.DrawFn, model: Model, x: Inputs, axes: tuple[str, ...] | None = None) -> Site:
    """A random part of a random site; every row has at least three tokens."""
    table = [info for info in model.sites() if axes is None or hk.KINDS[info.name].axes == axes]
    info = draw(st.sampled_from(table))
    place = site(info.name, draw(st.integers(0, info.layers - 1)) if info.layers else None)
    rows, shortest = len(x), int(x.lengths.min())
    positions: list[Any] = [None, slice(1, None), slice(-2, None), slice(0, 2)]
    positions += [draw(st.integers(-shortest, shortest - 1)), (0, -1), (1, 2)]
    positions.append(torch.tensor(draw(st.lists(st.integers(0, shortest - 1), min_size=rows, max_size=rows))))
    if model.sizes[place.key].get("pos") == 1:  # the logits of a classifier
        positions = [None, 0, -1, slice(0, 2), torch.zeros(rows, dtype=torch.int64)]
    restrictions = {"pos": draw(st.sampled_from(positions))}
    if "key_pos" in place.axes:
        restrictions["key_pos"] = draw(st.sampled_from([None, 0, (0, 1), slice(0, 2), -1]))
    if "head" in place.axes:
        size = model.sizes[place.key]["head"]
        restrictions["head"] = draw(st.sampled_from([None, 0, size - 1, -1, (0, 1), slice(1, None)]))
    if "dim" in place.axes and model.sizes[place.key]["dim"] > 3:
        restrictions["dim"] = draw(st.sampled_from([None, None, None, slice(0, 4), (1, 3)]))
    return place.at(**restrictions)


@st.composite
def interventions(draw: st.DrawFn, model: Model, x: Inputs, source: World, reference: World) -> Intervention:
    place = draw(parts(model, x))
    inside = place.name in ("scores", "pattern")
    kinds = ["patch", "zero", "scale", "bend", "freeze", "noise", "interchange", "clamp"]
    if not inside:
        kinds.append("here")
    if not isinstance(place.pos, Tensor):  # positions for each row cannot be asked of a set of other rows
        kinds += ["resample"] if place.name == "scores" else ["mean", "pooled", "resample"]
    if place.name == "scores":
        kinds = [*kinds, "knockout", "knockout"]
    if place.name.endswith("_scale"):  # by nothing nobody divides
        kinds = [kind for kind in kinds if kind not in ("zero", "clamp", "interchange", "scale", "here")]
    kind = draw(st.sampled_from(kinds))
    factor = draw(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]))
    if kind == "patch":
        item = hk.patch(place, source)
    elif kind == "scale":
        item = hk.intervene(place, lambda v, ctx: torch.where(v.isfinite(), factor * v, v))
    elif kind == "bend":
        item = hk.intervene(place, bend)
    elif kind == "freeze":
        item = hk.freeze(place)
    elif kind == "noise":
        item = hk.noise(place, 0.5, seed=draw(st.integers(0, 3)))
    elif kind == "interchange" and not inside and place.dim is None:
        width = model.sizes[place.key]["dim"]
        item = hk.interchange(place, torch.linspace(-1.0, 2.0, width).double(), source)
    elif kind == "clamp":
        item = hk.clamp(place, factor)
    elif kind in ("mean", "pooled"):
        item = hk.mean(place, reference, pooled=kind == "pooled")
    elif kind == "resample":
        item = hk.resample(place, reference, seed=draw(st.integers(0, 3)))
    elif kind == "here" and place.layer:
        earlier = draw(st.sampled_from(["z", "resid_pre", "v", "attn_out"]))
        read = hk.here(site(earlier, place.layer - 1, pos=draw(st.integers(0, 2))))

        def add(v: Tensor, r: Tensor, ctx: hk.Context) -> Tensor:
            return v + torch.tanh(r.flatten(1).sum(1)).reshape([-1] + [1] * (v.ndim - 1))

        item = hk.intervene(place, add, read)
    elif kind == "knockout":
        item = hk.knockout(place)
    else:
        item = hk.freeze(place) if place.name.endswith("_scale") else hk.zero(place)
    if not item.op.writes_inf and draw(st.integers(0, 2)) == 0:
        values = st.sampled_from([0.0, 0.3, 1.0])
        strength = draw(st.one_of(values, st.lists(values, min_size=len(x), max_size=len(x))))
        item = item.strength(torch.tensor(strength).double() if isinstance(strength, list) else strength)
    if draw(st.integers(0, 2)) == 0:
        rows = draw(st.lists(st.booleans(), min_size=len(x), max_size=len(x)).filter(any))
        item = item.where(torch.tensor(rows))
    return item


@st.composite
def cases(draw: st.DrawFn, family: str) -> tuple[Inputs, list[Plan], list[Site]]:
    model = wrapped(family)
    lengths, padding, seed = draw(batches())
    x = model.inputs(*zoo.random_inputs(zoo.VOCAB, lengths, padding, seed))
    keep = draw(st.integers(0, 4))
    other = Inputs.of(torch.where(x.mask & (x.positions >= keep), x.ids % (zoo.VOCAB - 1) + 1, x.ids), x.mask)
    reference = World(model.inputs(*zoo.random_inputs(zoo.VOCAB, [x.width] * 2, "right", seed + 1)))
    source = World(other)
    if draw(st.integers(0, 3)) == 0:
        source = World(other, hk.scale(site("resid_pre", 0, pos=1), 2.0))
    plans = [
        Plan(tuple(draw(st.lists(interventions(model, x, source, reference), min_size=1, max_size=4))))
        for _ in range(draw(st.integers(1, 3)))
    ]
    metric = st.sampled_from([-1, 0, 1, 2, (0, -1), torch.arange(len(x)) % 3])
    reads = [site("logits", pos=draw(metric))]
    if draw(st.booleans()):
        reads.append(site("logits", pos=draw(metric), dim=(3, 5)))
    if draw(st.integers(0, 2)) == 0:
        reads.append(draw(parts(model, x)).at(pos=draw(metric)))
    if draw(st.integers(0, 5)) == 0:
        reads = reads[2:] or [site("resid_post", 0, pos=1)]
    return x, plans, reads


def outcomes(
    model: Model, worlds: list[World], reads: list[Site], executor: str, budget: int | None = None
) -> tuple[list[list[Tensor]], list[set[str]]]:
    pieces: list[dict[int, hk.Outcome]] = [{} for _ in worlds]
    for outcome in hk.run_worlds(model, worlds, reads, executor=executor, budget=budget):
        pieces[outcome.index][outcome.rows.start] = outcome
    ordered = [[mine[start] for start in sorted(mine)] for mine in pieces]
    values = [[torch.cat([o.values[i] for o in mine]) for i in range(len(reads))] for mine in ordered]
    return values, [{o.status for o in mine} for mine in ordered]


def gap(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference of two worlds' reads; forbidden scores are equal where both are -inf."""
    return max(
        float(torch.where(x == y, 0.0, (x - y).abs()).nan_to_num(torch.inf).max()) for x, y in zip(a, b, strict=True)
    )


def unchanged(family: str) -> None:
    module = wrapped(family).module
    for name, value in module.state_dict().items():
        assert torch.equal(value, weights(family)[name]), name
    for part in module.modules():
        # Those of transformers stay once a call has asked for hidden states.
        hooks = part._forward_hooks.values()
        assert all(getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks)
        assert not part._forward_pre_hooks
        assert not part.training
        assert getattr(part, "config", None) in (None, module.config) or part is module
        assert "attend" not in vars(part)
    assert torch.is_grad_enabled()


def hypothesis_of(family: str):
    @settings(max_examples=15)
    @given(cases(family))
    def check(case: tuple[Inputs, list[Plan], list[Site]]) -> None:
        x, plans, reads = case
        weights(family)
        model = wrapped(family)
        worlds = [*(World(x, plan) for plan in plans), World(x)]
        choice = hk.choose(model, worlds)
        assert choice.executor == "shared" or "in one plan" in choice.reason
        oracle, oracle_status = outcomes(model, worlds, reads, "sequential")
        batched, _ = outcomes(model, worlds, reads, "batched")
        shared, shared_status = outcomes(model, worlds, reads, "shared")
        chunked, _ = outcomes(model, worlds, reads, "shared", budget=1)
        for index, world in enumerate(worlds):
            for name, other in {"batched": batched, "shared": shared, "in chunks": chunked}.items():
                difference = gap(oracle[index], other[index])
                assert difference < ATOL, f"{name} is off by {difference:.2g}: {world.plan}"
            effect = gap(oracle[index], oracle[-1])
            if shared_status[index] <= {"pruned", "inert"}:
                assert effect < NONE, f"{shared_status[index]}, yet the effect is {effect:.2g}: {world.plan}"
            if shared_status[index] == {"pruned"}:
                assert gap(shared[index], shared[-1]) == 0.0, world.plan
            if effect > 1e-6:
                assert shared_status[index] == {"fired"} == oracle_status[index], world.plan
            if oracle_status[index] == {"inert"}:
                assert gap(shared[index], shared[-1]) < NONE, world.plan
        unchanged(family)

    return check


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_executors_agree_on_random_plans(family):
    hypothesis_of(family)()


class Stop(BaseException):
    """Not an Exception, as an interrupt is not."""


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "small_rms_rotary_gqa"])
def test_random_plans_that_raise_leave_nothing_behind(family):
    @settings(max_examples=15)
    @given(cases(family), st.sampled_from(["sequential", "batched", "shared"]), st.data())
    def check(case: tuple[Inputs, list[Plan], list[Site]], executor: str, data: st.DataObject) -> None:
        x, plans, reads = case
        model = wrapped(family)
        weights(family)

        def fail(v: Tensor, ctx: hk.Context) -> Tensor:
            raise Stop

        bomb = hk.intervene(data.draw(parts(model, x)), fail)
        worlds = [World(x, plan) for plan in plans]
        worlds.insert(data.draw(st.integers(0, len(plans))), World(x, plans[0] + bomb))
        before = model.run(x).logits
        # A site above the last read is never computed by `shared`, and one that is pruned need not be.
        try:
            list(hk.run_worlds(model, worlds, [site("logits"), *reads], executor=executor))
        except Stop:
            pass
        else:
            raise AssertionError("the function was never called")
        unchanged(family)
        with pytest.raises(Stop), model.apply(plans[0] + bomb):
            model.forward(x.ids, x.mask, x.positions)
        unchanged(family)
        assert torch.equal(model.run(x).logits, before)

    check()


@pytest.mark.parametrize("family", ["gpt2", "mistral", "neox", "gemma2", "small_qk_norm"])
def test_random_plans_held_on_the_model_do_what_runs_do(family):
    @settings(max_examples=15)
    @given(cases(family))
    def check(case: tuple[Inputs, list[Plan], list[Site]]) -> None:
        x, plans, _ = case
        model = wrapped(family)
        weights(family)
        for plan in plans:
            expected = model.run(x, plan)
            with torch.no_grad(), model.apply(plan) as audit:
                got = model.forward(x.ids, x.mask, x.positions)
            assert gap([got[x.mask]], [expected.logits[x.mask]]) < ATOL, plan
            assert [entry.status for entry in audit] == [entry.status for entry in expected.audit]
        unchanged(family)

    check()
