"""Decoding loops of the user's own, with a cache of the user's own, continued turn by turn; and chats by `generate`."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import hooks as hk
from hooks import Inputs, Model, Plan, site
from tests.hooks.decoding import CACHED, OPTIONS, assert_equal, generated, prompts, recorded, spelled
from tests.zoo import fresh, wrapped

some_families = pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "neox"])


def both_kinds(model: Model) -> Plan:
    """Edits of the prompt's last token, of new tokens, and of all of them, some of which persist in the cache."""
    vector = 2.0 * torch.arange(model.architecture.width).double().cos()
    plan = hk.steer(site("resid_post", 0, pos="new"), vector) + hk.scale(site("v", 1, pos=-1), -1.5)
    plan = plan + hk.knockout(site("scores", 1, head=0, key_pos=1)).at(pos="new") + hk.noise(site("k", 0), 0.5)
    plan = plan + hk.freeze(site("mlp_out", 1, pos="new"))
    if model.architecture.blocks[0].attention.rotary is not None:
        plan = plan + hk.scale(site("rot_k", 1, pos=-2), 2.0)
    return plan


def loop(
    model: Model, ids: Tensor, mask: Tensor, steps: int, past: Any = None, **given: Any
) -> tuple[list[Tensor], Any]:
    """Greedy decoding by hand; returns the logits of each step and all tokens, and what the last call returned."""
    logits, cache, fed = [], past, ids
    length = 0 if past is None else int(past.get_seq_length())
    for _ in range(steps):
        positions = (mask.long().cumsum(1) - 1).clamp_min(0)[:, length:]
        out = model.module(
            input_ids=fed,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **given,
        )
        logits.append(out.logits[:, -1].clone())
        cache, length = out.past_key_values, mask.shape[1]
        fed = out.logits[:, -1].float().argmax(-1, keepdim=True)
        ids = torch.cat([ids, fed], 1)
        mask = torch.cat([mask, torch.ones_like(fed, dtype=torch.bool)], 1)
    return [*logits, ids], cache


def whole(model: Model, plan: Plan, x: Inputs, ids: Tensor, seed: int = 0) -> Tensor:
    """The logits of a text, all of it run under a plan for its first tokens as the prompt."""
    rows, width = torch.arange(len(x)), ids.shape[1]
    mask = torch.cat([x.mask, torch.ones(len(x), width - x.width, dtype=torch.bool)], 1)
    return model.run(Inputs.of(ids, mask), spelled(plan, x.mask, rows, width), seed=seed).logits


@torch.no_grad()
@some_families
def test_a_loop_by_hand(family):
    from transformers import DynamicCache, StaticCache

    model = wrapped(family)
    x, plan, config = prompts(model), both_kinds(model), model.module.config
    static = StaticCache(config=config, max_cache_len=12)
    for past in (None, DynamicCache(config=config), DynamicCache(), static):
        with model.apply(plan, seed=2) as audit:
            (*logits, ids), _ = loop(model, x.ids, x.mask, 4, past)
        for n, got in enumerate(logits):
            want = whole(model, plan, x, ids[:, : x.width + n], 2)[:, -1]
            assert_equal([got], [want])
        assert [entry.positions for entry in audit][:4] == [6, 2, 6, 16]
        assert "reorder_cache" not in vars(static)


@torch.no_grad()
def test_right_padding_by_hand():
    """New tokens stand after the padding, and positions count real tokens."""
    model = wrapped("llama")
    x, plan = prompts(model, "right"), both_kinds(wrapped("llama"))
    with model.apply(plan) as audit:
        first = model.module(input_ids=x.ids, attention_mask=x.mask.long(), position_ids=x.positions, use_cache=True)
        new = torch.tensor([[5], [9]])
        second = model.module(
            input_ids=new,
            attention_mask=torch.cat([x.mask.long(), torch.ones(2, 1, dtype=torch.long)], 1),
            position_ids=x.lengths[:, None],
            past_key_values=first.past_key_values,
        )
    want = whole(model, plan, x, torch.cat([x.ids, new], 1))
    assert_equal([first.logits[x.mask], second.logits], [want[:, :-1][x.mask], want[:, -1:]])
    assert [entry.positions for entry in audit] == [2, 2, 2, 12, 2, 2]


def of_turns(model: Model, plan: Plan, turns: list[tuple[Tensor, int]], ids: Tensor) -> Tensor:
    """The logits of a chat, run whole: tokens that a turn feeds are edited as the turn's prompt says.

    Args:
        turns: the real columns of each turn's prompt, bool [B, P], and the first column that the turn feeds.
    """
    rows, width, items = torch.arange(len(ids)), ids.shape[1], []
    ends = [start for _, start in turns[1:]] + [width]
    real = torch.cat([turns[-1][0], torch.ones(len(ids), width - turns[-1][0].shape[1], dtype=torch.bool)], 1)
    index = (real.long().cumsum(1) - 1).clamp_min(0)
    for (prompt, start), end in zip(turns, ends, strict=True):
        fed = real & (torch.arange(width) >= start) & (torch.arange(width) < end)
        for item in spelled(plan, prompt, rows, end):
            pos = item.site.pos
            if pos is None:
                chosen = fed
            elif pos.dtype == torch.bool:
                chosen = torch.nn.functional.pad(pos, (0, width - end)) & fed
            else:
                chosen = (index[:, :, None] == pos[:, None, :]).any(-1) & fed
            if chosen.any():
                key = {}
                if "key_pos" in item.site.axes and isinstance(item.site.key_pos, Tensor):
                    keys = item.site.key_pos
                    if keys.dtype == torch.bool:
                        keys = torch.nn.functional.pad(keys, (0, width - end))
                    key = {"key_pos": keys}
                items.append(item.at(pos=chosen, **key))
    return model.run(Inputs.of(ids, real), Plan(tuple(items)), seed=2).logits


@torch.no_grad()
@pytest.mark.parametrize("by", ["generate", "hand"])
@pytest.mark.parametrize("family", CACHED)
def test_a_chat_in_two_turns(family, by):
    """The second turn's prompt is all that stands before its answer; what the first wrote into the cache stays."""
    from transformers import DynamicCache

    model = wrapped(family)
    x, plan = prompts(model), both_kinds(model)
    said = torch.tensor([[7, 8, 9], [3, 2, 1]])
    cache = DynamicCache(config=model.module.config)
    ones = torch.ones(2, 3 + 3, dtype=torch.bool)
    with model.apply(plan, seed=2) as audit:
        if by == "generate":
            module, options = model.module, OPTIONS | {"max_new_tokens": 3}
            one = recorded(
                module,
                lambda: module.generate(x.ids, attention_mask=x.mask.long(), past_key_values=cache, **options),
            )
            ids, mask = torch.cat([one.tokens, said], 1), torch.cat([x.mask, ones], 1)
            two = recorded(
                module, lambda: module.generate(ids, attention_mask=mask.long(), past_key_values=cache, **options)
            )
            logits, final = one.logits + two.logits, two.tokens
        else:
            (*first, told), _ = loop(model, x.ids, x.mask, 3, cache)
            ids, mask = torch.cat([told, said], 1), torch.cat([x.mask, ones], 1)
            out = model.module(
                input_ids=ids[:, x.width + 2 :],
                attention_mask=mask.long(),
                position_ids=(mask.long().cumsum(1) - 1)[:, x.width + 2 :],
                past_key_values=cache,
            )
            next_ids = out.logits[:, -1].float().argmax(-1, keepdim=True)
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.bool)], 1)
            (*rest, _), _ = loop(model, next_ids, mask, 2, cache)
            logits = [*first, out.logits[:, -1], *rest]
            tokens = [next_ids, rest[0].float().argmax(-1, keepdim=True)]
            final = torch.cat([ids, *tokens], 1)
    prompts_of = [(x.mask, 0), (torch.cat([x.mask, ones], 1), x.width + 2)]
    widths = [x.width, x.width + 1, x.width + 2, x.width + 6, x.width + 7, x.width + 8]
    for got, width in zip(logits, widths, strict=True):
        turns = prompts_of[: 1 if width < x.width + 3 else 2]
        assert_equal([got], [of_turns(model, plan, turns, final[:, :width])[:, -1]])
    counts = [entry.positions for entry in audit]
    assert counts[:2] == [8, 4] and counts[3] == 10 + 2 * 8
    assert family == "mistral" or counts[2] == 8  # where the key is in no window of some row


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("lengths", [(6, 6), (6, 4)], ids=["even", "padded"])
def test_a_chat_that_hands_over_new_tokens_alone(kind, lengths):
    """Of whose mask, where it is all ones, only the width is left."""
    from transformers import DynamicCache, StaticCache

    model = wrapped("gemma2")
    x, plan, module = prompts(model, lengths=lengths), both_kinds(wrapped("gemma2")), wrapped("gemma2").module
    cache = DynamicCache(config=module.config) if kind == "dynamic" else StaticCache(module.config, max_cache_len=16)
    options = OPTIONS | {"max_new_tokens": 2, "past_key_values": cache}
    mask = torch.cat([x.mask, torch.ones(2, 4, dtype=torch.bool)], 1)
    with model.apply(plan, seed=2):
        told = module.generate(x.ids, attention_mask=x.mask.long(), **options)
        fed = torch.cat([told[:, -1:], torch.tensor([[7, 8], [3, 2]])], 1)
        two = recorded(module, lambda: module.generate(fed, attention_mask=mask.long(), **options))
    ids = torch.cat([told[:, :-1], two.tokens], 1)
    for n, got in enumerate(two.logits):
        want = of_turns(model, plan, [(x.mask, 0), (mask, x.width + 1)], ids[:, : mask.shape[1] + n])
        assert_equal([got], [want[:, -1]])


@torch.no_grad()
def test_what_is_done_to_a_cache_between_calls_is_followed():
    """Rows that are repeated, chosen and reordered keep their prompts; tokens that are cropped were never there."""
    from transformers import DynamicCache

    model = wrapped("llama")
    x = prompts(model)
    plan = hk.noise(site("resid_post", 0), 1.0) + hk.freeze(site("mlp_out", 1, pos="new"))
    plan = plan + hk.scale(site("v", 1, pos="new"), 3.0).where(torch.tensor([True, False]))
    moves = [("batch_repeat_interleave", 2), ("reorder_cache", [1, 0, 3, 2]), ("reorder_cache", [2, 2, 0, 0])]
    moves += [("batch_select_indices", [0, 2, 3]), ("crop", -1)]
    cache = DynamicCache(config=model.module.config)
    rows, ids = torch.arange(2), x.ids
    with model.apply(plan, seed=1) as audit:
        model.module(input_ids=x.ids, attention_mask=x.mask.long(), position_ids=x.positions, past_key_values=cache)
        for number, (name, argument) in enumerate(moves):
            getattr(cache, name)(torch.tensor(argument) if isinstance(argument, list) else argument)
            if name == "crop":
                ids = ids[:, :argument]
            else:
                order = torch.arange(len(rows)).repeat_interleave(2) if argument == 2 else torch.tensor(argument)
                rows, ids = rows[order], ids[order]
            fed = torch.arange(len(rows))[:, None] + 3 * number
            ids = torch.cat([ids, fed], 1)
            mask = torch.cat([x.mask[rows], torch.ones(len(rows), ids.shape[1] - x.width, dtype=torch.bool)], 1)
            out = model.module(
                input_ids=fed,
                attention_mask=mask.long(),
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=cache,
            )
            inputs = Inputs.of(ids, mask, rows)
            with model.suspended():
                want = model.run(inputs, spelled(plan, x.mask, rows, ids.shape[1]), seed=1)
            assert_equal([out.logits[:, -1]], [want.logits[:, -1]])
        assert audit[0].calls == len(moves) + 1
        cache.reset()
        assert "reorder_cache" in vars(cache)
    assert "reorder_cache" not in vars(cache) and not any(hasattr(v, "own") for v in vars(cache).values())


@torch.no_grad()
def test_copies_of_a_cache_are_caches_of_their_own():
    from transformers import DynamicCache

    model = fresh("llama")
    x = prompts(model, lengths=(5,))
    cache = DynamicCache(config=model.module.config)
    with model.apply(hk.scale(site("v", 1), 2.0)):
        model.module(input_ids=x.ids, past_key_values=cache)
        twins = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
        for twin in twins:
            twin.batch_repeat_interleave(3)
            assert twin.layers[0].keys.shape[0] == 3 and cache.layers[0].keys.shape[0] == 1
            out = model.module(input_ids=torch.tensor([[3]] * 3), past_key_values=twin)
            assert out.logits.shape[0] == 3
    for twin in twins:
        twin.crop(-1)
        assert twin.get_seq_length() == 5


# Caches that were filled before


@torch.no_grad()
@some_families
def test_a_cache_that_was_filled_before(family):
    """What can be told is done, and what cannot is refused: where the prompt ends, and what is in the cache already."""
    from transformers import DynamicCache

    model = wrapped(family)
    x = prompts(model, lengths=(6, 6))
    cache = model.module(
        input_ids=x.ids[:, :3], past_key_values=DynamicCache(config=model.module.config)
    ).past_key_values

    def goes_on(plan: Any, ids: Tensor = x.ids[:, 3:]) -> Tensor:
        with model.apply(plan):
            return model.module(input_ids=ids, past_key_values=copy.deepcopy(cache)).logits

    late = torch.arange(6) >= 3
    for plan in (hk.scale(site("v", 1), 2.0), hk.scale(site("resid_post", 0, pos=-1), 2.0), hk.freeze(site("z", 1))):
        both = plan + hk.scale(site("mlp_out", 0, pos=(3, 5)), 0.5) + hk.knockout(site("scores", 1, key_pos=0))
        want = model.run(x, both.where(late.expand(2, -1))).logits[:, 3:]
        assert_equal([goes_on(both)], [want])
    assert_equal(
        [goes_on(hk.scale(site("v", 1), 2.0), x.ids[:, 3:4])],
        [model.run(x.rows(slice(0, 2)), hk.scale(site("v", 1, pos=(3, 4, 5)), 2.0)).logits[:, 3:4]],
    )
    for pos in (0, (1, 4), slice(0, 5), slice(None), -5):
        with pytest.raises(hk.PlanError, match="filled before the plan was applied, where it cannot reach"):
            goes_on(hk.scale(site("resid_post", 0, pos=pos), 2.0))
    for pos in (-1, "new", 3, slice(1, None)):
        with pytest.raises(hk.PlanError, match="filled before the plan was"):
            goes_on(hk.scale(site("resid_post", 0, pos=pos), 2.0), x.ids[:, 3:4])
    with model.apply(hk.scale(site("resid_post", 0, pos=-1), 2.0)):
        first = model.module(input_ids=x.ids[:, :3], use_cache=True)
        with pytest.raises(hk.PlanError, match="several tokens are fed after several"):
            model.module(input_ids=x.ids[:, 3:], past_key_values=first.past_key_values)
    with model.apply(hk.scale(site("resid_post", 0, pos=slice(1, None)), 2.0)):
        first = model.module(input_ids=x.ids[:, :3], use_cache=True)
        got = model.module(input_ids=x.ids[:, 3:], past_key_values=first.past_key_values).logits
    assert_equal([got], [model.run(x, hk.scale(site("resid_post", 0, pos=slice(1, None)), 2.0)).logits[:, 3:]])


@torch.no_grad()
def test_a_prefix_that_many_prompts_share():
    """transformers' way to reuse a prompt: a cache of its beginning, copied for each that goes on from it."""
    from transformers import DynamicCache

    model = wrapped("llama")
    x = prompts(model, lengths=(6,))
    cache = model.module(
        input_ids=x.ids[:, :3], past_key_values=DynamicCache(config=model.module.config)
    ).past_key_values
    plan = hk.scale(site("resid_post", 0, pos=-1), 2.0) + hk.steer(
        site("resid_post", 1, pos="new"), torch.ones(24).double()
    )
    got, audit = generated(model, x, plan, past_key_values=copy.deepcopy(cache))
    want, _ = generated(model, x, plan)
    assert torch.equal(got.tokens, want.tokens)
    assert_equal(got.logits, want.logits)
    assert [entry.positions for entry in audit] == [1, 3]


@torch.no_grad()
def test_what_mixes_positions_or_reads_tokens_that_are_gone_is_refused():
    model = wrapped("llama")
    x = prompts(model)
    over = hk.intervene(site("z", 1), lambda v, ctx: v - v.mean(1, keepdim=True), mixes=("pos",))
    with pytest.raises(hk.PlanError, match="mixes positions"):
        generated(model, x, over)
    generated(model, x, over, use_cache=False)
    generated(model, x, over.at(pos=slice(None)))
    with pytest.raises(hk.PlanError, match="mixes positions"):
        generated(model, x, over.at(pos=slice(None)), prefill_chunk_size=3)
    first = hk.here(site("resid_pre", 0, pos=0))
    with pytest.raises(hk.PlanError, match="their values are gone"):
        generated(model, x, hk.intervene(site("resid_post", 1, pos="new"), lambda v, r, ctx: v + r, first))
    own = hk.intervene(
        site("resid_post", 1, pos="new"), lambda v, r, ctx: v + r, hk.here(site("resid_pre", 0, pos="new"))
    )
    got, _ = generated(model, x, own)
    free, _ = generated(model, x, own, use_cache=False)
    assert_equal(got.logits, free.logits)


@torch.no_grad()
def test_rows_that_nobody_saw_are_refused():
    model = wrapped("llama")
    x = prompts(model)
    with model.apply(hk.scale(site("v", 1), 2.0)):
        first = model.module(input_ids=x.ids, use_cache=True)
        for layer in first.past_key_values.layers:
            layer.batch_repeat_interleave(2)
        with pytest.raises(hk.PlanError, match="4 rows, and its key/value cache was filled with 2"):
            model.module(input_ids=x.ids[:1, :1].expand(4, 1), past_key_values=first.past_key_values)
    with pytest.raises(hk.PlanError, match="no key/value cache"), model.apply(hk.scale(site("v", 1), 2.0)):
        model.module(input_ids=x.ids[:, :1], past_key_values=((torch.zeros(2, 2, 3, 8),) * 2,) * 3)


def test_tokens_of_a_suspended_call_are_part_of_the_text():
    model = wrapped("gpt2")
    x = prompts(model, lengths=(6,))
    plan = hk.scale(site("resid_post", 0), 2.0)
    with torch.no_grad(), model.apply(plan):
        cache = model.module(input_ids=x.ids[:, :3], use_cache=True).past_key_values
        with model.suspended():
            model.module(input_ids=x.ids[:, 3:5], past_key_values=cache)
        got = model.module(input_ids=x.ids[:, 5:], past_key_values=cache).logits
    assert_equal([got], [model.run(x, plan.at(pos=(0, 1, 2, 5))).logits[:, 5:]])
    # A world that is read lacks them, and is not taken for one that has them.
    with torch.no_grad(), model.apply(plan + hk.freeze(site("z", 1))):
        cache = model.module(input_ids=x.ids[:, :3], use_cache=True).past_key_values
        with model.suspended():
            model.module(input_ids=x.ids[:, 3:5], past_key_values=cache)
        with pytest.raises(hk.PlanError, match="holds 3 tokens where the call's holds 5"):
            model.module(input_ids=x.ids[:, 5:], past_key_values=cache)
