"""Generation under a plan equals recomputation of the whole text at every step, in every family and mode."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import hooks as hk
from hooks import Inputs, Model, Plan, World, new, site
from tests import zoo
from tests.hooks.decoding import CACHED, assert_equal, generated, has, oracle, prompts, recomputed, recorded
from tests.zoo import wrapped

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 2, "draws": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2, "draws": 4},
    "static": {"cache_implementation": "static"},
    "in chunks": {"prefill_chunk_size": 2},
    "without a cache": {"use_cache": False},
}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def one_of_each(model: Model, x: Inputs) -> Plan:
    """Edits of prompt tokens, of new ones and of both, at every kind of site; some read other worlds, or their own."""
    other = Inputs.of((x.ids + 7) % zoo.VOCAB, x.mask)
    tape = model.run(other, capture=site("resid_pre", 1)).tape
    vector = 2.0 * torch.arange(model.architecture.width).double().cos()
    items = [
        hk.steer(site("resid_post", 0, pos="new"), vector),
        hk.scale(site("resid_pre", 0), 1.2).where(torch.arange(len(x)) == 0),
        hk.zero(site("k", 1, pos=slice(1, 3), dim=slice(0, 3))),
        hk.scale(site("v", 0, pos=0), -1.3),
        hk.scale(site("rot_k", 0, pos=-1), 1.9),
        hk.scale(site("rot_k", 1, pos="new"), 1.4),
        hk.scale(site("rot_q", 1, pos="new"), 1.2),
        hk.knockout(site("scores", 1, head=1, key_pos=-1)).at(pos="new"),
        hk.knockout(site("scores", 0, head=0, key_pos=0)).at(pos=slice(1, None)),
        hk.scale(site("pattern", 0, head=0, pos="new", key_pos="new"), 0.3),
        hk.noise(site("resid_pre", 1), 0.3),
        hk.zero(site("z", 1, head=2, pos=new(1, 3))),
        hk.patch(site("resid_pre", 1, pos=(0, -1)), tape),
        hk.patch(site("z", 0, head=0, pos=slice(1, 3)), World(other, hk.scale(site("resid_pre", 0), 1.5))),
        hk.freeze(site("mlp_out", 1, pos="new")),
        hk.freeze(site("attn_out", 0, pos=-2)),
        hk.patch(
            site("mlp_post", 0, pos="new"), Plan((hk.freeze(site("attn_out", 0)), hk.scale(site("mlp_pre", 0), 0.5)))
        ),
        hk.scale(site("logits", pos="new"), 1.5).strength(torch.linspace(0.2, 1.0, len(x)).double()),
    ]
    return Plan(tuple(item for item in items if has(model, item.site)))


@cache
def case(family: str) -> tuple[Model, Inputs, Plan]:
    model = wrapped(family)
    x = prompts(model)
    return model, x, one_of_each(model, x)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", CACHED)
def test_generation_is_recomputation(family, mode):
    model, x, plan = case(family)
    got, audit = generated(model, x, plan, seed=5, **MODES[mode])
    want = recomputed(model, x, plan, seed=5, **MODES[mode])
    assert torch.equal(got.tokens, want.tokens)
    assert_equal(got.logits, want.logits)
    assert {entry.status for entry in audit} == {"fired"}
    plain = recomputed(model, x, None, **MODES[mode])
    assert min(float((a - b).abs().max()) for a, b in zip(got.logits, plain.logits, strict=True)) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "neox_sequential"])
def test_each_intervention_alone_matters(family):
    """The plan above has no part that changes nothing, so that none could be wrong unseen."""
    model, x, plan = case(family)
    plain, _ = generated(model, x, None)
    for item in plan:
        got, _ = generated(model, x, item)
        want = recomputed(model, x, item)
        assert_equal(got.logits, want.logits)
        moved = [float((a - b).abs().max()) for a, b in zip(got.logits, plain.logits, strict=True)]
        assert max(moved) > 1e-6 or not torch.equal(got.tokens, plain.tokens) or item.op.name == "freeze", item


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_static_prefill_has_more_columns_than_tokens(padding):
    """Unpadded, its mask is None, and the first query is the first column's, not one counted from the last."""
    from transformers import StaticCache

    for family in ("llama", "gpt2", "gemma2"):
        model = wrapped(family)
        x = prompts(model, lengths=(5, 5) if padding == "none" else (5, 3))
        plan = hk.scale(site("pattern", 0, head=1), 0.5) + hk.knockout(site("scores", 1, pos=-1, key_pos=(0, 1)))
        static = StaticCache(config=model.module.config, max_cache_len=12)
        got, _ = generated(model, x, plan, past_key_values=static)
        assert_equal(got.logits, recomputed(model, x, plan).logits)


@torch.no_grad()
def test_positions_are_those_of_the_prompt():
    """-1 stays the prompt's last token, and a slice ends with the prompt; what is generated is asked for by name."""
    model = wrapped("llama")
    x = prompts(model)
    place = site("resid_post", 1)
    counts = [(-1, 2), (0, 2), (slice(-2, None), 4), (slice(1, None), 8), ("all", 16), (None, 16), ((0, 2), 4)]
    counts += [("new", 6), (new(1), 4), (new(0, 2), 4), (new(0, None, 2), 4), (new(2, 3), 2)]
    for pos, count in counts:
        _, audit = generated(model, x, hk.scale(place.at(pos=pos), 1.5))
        assert (audit[0].positions, audit[0].rows) == (count, 2), pos
        _, again = generated(model, x, hk.scale(place.at(pos=pos), 1.5), use_cache=False)
        assert (again[0].positions, again[0].rows) == (count, 2), pos
    mask = x.mask & (torch.arange(x.width) > 3)
    _, audit = generated(model, x, hk.scale(place.at(pos=mask), 1.5))
    assert audit[0].positions == int(mask.sum())
    _, audit = generated(model, x, hk.scale(place, 1.5).where(x.mask))
    assert audit[0].positions == int(x.mask.sum())
    with pytest.raises(hk.SiteError, match=r"pos \[7\] is not in row 0, which has 6 tokens"):
        generated(model, x, hk.scale(place.at(pos=7), 1.5))
    with pytest.raises(hk.SiteError, match="selects no token"):
        generated(model, x, hk.scale(place.at(pos=slice(8, None)), 1.5))


@torch.no_grad()
def test_what_never_comes_is_unfired():
    model = wrapped("llama")
    x = prompts(model)
    with pytest.raises(hk.UnfiredError, match=r"resid_post.1\[pos=new\[7:\]\]"):
        generated(model, x, hk.scale(site("resid_post", 1, pos=new(7)), 1.5))
    with pytest.raises(hk.UnfiredError, match="new"):
        generated(model, x, hk.scale(site("resid_post", 1, pos="new"), 1.5), max_new_tokens=1)
    with pytest.raises(hk.UnfiredError, match="logits"):  # whose logits are not computed
        generated(model, x, hk.scale(site("logits", pos=0), 1.5))
    with pytest.raises(hk.SiteError, match="new token"):
        model.run(x, hk.scale(site("resid_post", 1, pos="new"), 1.5))


@torch.no_grad()
def test_a_world_that_is_read_lacks_the_new_tokens():
    model = wrapped("llama")
    x = prompts(model)
    other = Inputs.of((x.ids + 1) % zoo.VOCAB, x.mask)
    with pytest.raises(hk.ShapeError, match="a slice, as pos=slice"):
        generated(model, x, hk.patch(site("resid_post", 1), other))
    plan = hk.patch(site("resid_post", 1, pos=slice(None)), other)
    got, _ = generated(model, x, plan)
    assert_equal(got.logits, recomputed(model, x, plan).logits)
    pooled = hk.mean(site("z", 1, head=0), World(other), pooled=True)  # has no positions to lack
    got, _ = generated(model, x, pooled)
    assert_equal(got.logits, recomputed(model, x, pooled).logits)
    whole = torch.randn(2, x.width, model.architecture.width, dtype=torch.float64)
    for options in ({}, {"prefill_chunk_size": 4}, {"num_return_sequences": 2, "do_sample": True, "draws": 1}):
        got, _ = generated(model, x, hk.patch(site("resid_post", 0, pos=(0, -1)), whole), **options)
        rows = torch.arange(2).repeat_interleave(options.get("num_return_sequences", 1))
        part = torch.stack([whole[r, x.mask[r]][[0, -1]] for r in rows])

        def at(width: int, rows: torch.Tensor = rows, part: torch.Tensor = part) -> Plan:
            last = torch.stack([torch.zeros(len(rows), dtype=torch.int64), x.lengths[rows] - 1], 1)
            return Plan((hk.patch(site("resid_post", 0, pos=last), part),))

        twin = oracle(model, x.mask, None, options.get("num_return_sequences", 1), at=at)
        torch.manual_seed(1)
        arguments = {k: v for k, v in options.items() if k not in ("draws", "prefill_chunk_size")}
        arguments |= {"input_ids": x.ids, "attention_mask": x.mask.long(), "max_new_tokens": 4, "use_cache": False}
        want = recorded(twin, lambda a=arguments, t=twin: t.generate(**a, pad_token_id=0, eos_token_id=None))
        assert_equal(got.logits, want.logits)


@torch.no_grad()
def test_a_draw_is_the_same_cached_or_recomputed_and_in_every_beam():
    model = wrapped("gpt2")
    x = prompts(model)
    plan = hk.noise(site("resid_post", 0, pos="new"), 2.0, seed=3)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(value: torch.Tensor, ctx: hk.Context) -> torch.Tensor:
        seen.append((ctx.row.clone(), ctx.pos.clone()))
        return value.clone()

    both = plan + hk.intervene(site("resid_post", 0, pos="new"), note)
    got, _ = generated(model, x, both, num_beams=3)
    assert [row.tolist() for row, _ in seen] == [[0, 0, 0, 1, 1, 1]] * 3
    assert [pos.flatten().tolist() for _, pos in seen] == [[6 + n] * 3 + [4 + n] * 3 for n in range(3)]
    assert_equal(got.logits, recomputed(model, x, plan, num_beams=3).logits)


@torch.no_grad()
def test_a_plan_that_is_a_function_of_the_call():
    """It is asked at every step, of the tokens that are fed."""
    model = wrapped("llama")
    x = prompts(model)
    shapes = []

    def plan(inputs: Inputs) -> Plan:
        shapes.append(tuple(inputs.ids.shape))
        return Plan((hk.scale(site("resid_post", 0, pos="new"), 1.5), hk.scale(site("k", 1, pos=-1), 2.0)))

    got, audit = generated(model, x, plan)
    assert shapes == [(2, 6), (2, 1), (2, 1), (2, 1)]
    assert [entry.positions for entry in audit] == [6, 2]
    assert_equal(got.logits, recomputed(model, x, plan(x)).logits)
    with pytest.raises(hk.PlanError, match="no cache of that world was kept"):
        generated(model, x, lambda inputs: hk.freeze(site("mlp_out", 1)) if inputs.width == 1 else hk.Plan())


def test_a_difference_or_a_tolerance_that_is_nan_fails():
    x = torch.zeros(2, 3)
    assert_equal([x], [x])
    for got, want, atol in (([x * torch.nan], [x], 1e-10), ([x], [x * torch.nan], 1e-10), ([x], [x], float("nan"))):
        with pytest.raises(AssertionError):
            assert_equal(got, want, atol)
    with pytest.raises(AssertionError):
        assert_equal([], [])
    with pytest.raises(AssertionError):
        assert_equal([x], [x + 1e-9])


def test_new_tokens_print_and_save(tmp_path):
    plan = hk.scale(site("resid_post", 3, pos=new(0, 5)), 2.0) + hk.knockout(site("scores", 1, key_pos="new"))
    plan = plan + hk.zero(site("z", 0, pos=new(2, None, 3)))
    assert [str(item.site) for item in plan] == [
        "resid_post.3[pos=new[0:5]]",
        "scores.1[key_pos=new]",
        "z.0[pos=new[2::3]]",
    ]
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan") == plan
    assert site("z", 0, pos="new") == site("z", 0, pos=new()) != site("z", 0, pos=new(1))
    for wrong in ((-1,), (3, 2), (0, None, 0), (0.5,), (True,)):
        with pytest.raises(hk.SiteError, match="new"):
            new(*wrong)
    with pytest.raises(hk.SiteError, match="head"):
        site("z", 0, head=new())
