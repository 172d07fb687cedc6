"""Counterfactual attention: distributions on the allowed keys, by hand, the same however a row is run."""

from __future__ import annotations

import pytest
import torch

import interp as ip
from hooks.random import uniform
from tests import zoo
from tests.hooks.decoding import CACHED, OPTIONS, assert_equal, recorded, spelled

FORMS = ("random", "uniform", "reversed", "shuffled")
PROMPTS = [[3, 1, 4, 1, 5, 9], [2, 6, 5], [8, 9, 7, 9]]
FAMILIES = ("small_ln_learned", "llama", "gemma2", "mistral")


def patterns(model, inputs, form, layer=1, seed=0, **where):
    place = ip.site("pattern", layer)
    plan = ip.counterfactual(place.at(**where), form, seed=seed)
    clean = model.run(inputs, capture=place).tape[place]
    return clean, model.run(inputs, plan, capture=place, seed=7).tape[place]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_sum_to_one_and_never_look_at_a_forbidden_key(family, padding, form):
    model = zoo.wrapped(family)
    inputs = model.inputs(PROMPTS, padding=padding)
    clean, found = patterns(model, inputs, form)
    moved = 0
    for row, length in enumerate(inputs.lengths.tolist()):
        cols = inputs.order[row, :length]
        before, after = (x[row][:, cols][:, :, cols] for x in (clean, found))
        torch.testing.assert_close(after.sum(-1), torch.ones_like(after.sum(-1)), rtol=0, atol=1e-6)
        assert bool((after >= 0).all()) and bool((after.triu(1) == 0).all())
        assert bool((after[before == 0] == 0).all())
        padding_columns = sorted(set(range(inputs.ids.shape[1])) - set(cols.tolist()))
        assert bool((found[row][:, cols][:, :, padding_columns] == 0).all())
        moved += int((before - after).abs().max() > 0.01)
    assert moved == len(PROMPTS)


@pytest.mark.parametrize("form", FORMS)
def test_each_form_by_hand(form):
    model = zoo.wrapped("small_ln_learned")
    inputs = model.inputs(PROMPTS, padding="left")
    clean, found = patterns(model, inputs, form, layer=1, seed=5)
    salt = _salt("pattern", 1)
    for row, length in enumerate(inputs.lengths.tolist()):
        cols = inputs.order[row, :length]
        for head in range(clean.shape[1]):
            for query in range(length):
                before, after = (x[row, head, cols[query], cols[: query + 1]] for x in (clean, found))
                drawn = torch.tensor([float(uniform(7, 5, salt, row, head, query, key)) for key in range(query + 1)])
                if form == "random":
                    wanted = drawn.double() / drawn.double().sum()
                elif form == "uniform":
                    wanted = torch.full_like(before, 1 / (query + 1))
                elif form == "reversed":
                    left = before.max() - before
                    wanted = left / left.sum() if query else torch.ones_like(left)
                else:
                    wanted = torch.zeros_like(before).index_put((drawn.argsort(),), before)
                    assert torch.equal(after.sort().values, before.sort().values)
                torch.testing.assert_close(after, wanted, rtol=0, atol=1e-7)


def _salt(name, layer):
    """As it was when there were 25 kinds of sites, which draws go by for good."""
    assert name == "pattern"
    return 13 + 25 * (layer + 1)


def test_equal_weights_reversed_stay_equal():
    """0 / 0 nowhere: a row whose weights differ by rounding alone is not turned into noise."""
    model = zoo.wrapped("llama")
    inputs = model.inputs([[5, 5, 5, 5]])
    place = ip.site("pattern", 0)
    plan = ip.counterfactual(place, "uniform") + ip.counterfactual(place, "reversed")
    found = model.run(inputs, plan, capture=place).tape[place]
    want = torch.ones(4, 4).tril() / torch.arange(1, 5)[:, None]
    torch.testing.assert_close(found, want.double().expand_as(found), rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_a_part_of_the_keys_keeps_its_share(form):
    model = zoo.wrapped("llama")
    inputs = model.inputs([PROMPTS[0], [2, 6, 5, 3, 5, 8]])
    keys = (1, 2, 3)
    clean, found = patterns(model, inputs, form, key_pos=keys, pos=slice(2, None), head=(0, 3))
    changed = (clean - found).abs() > 1e-12
    assert bool(changed.any()) and not bool(changed[:, :, :, [0, 4, 5]].any()) and not bool(changed[:, :, :2].any())
    assert not bool(changed[:, [1, 2]].any())
    part = list(keys)
    torch.testing.assert_close(found[..., part].sum(-1), clean[..., part].sum(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_a_draw_is_the_same_alone_and_padded(form):
    model = zoo.wrapped("llama")
    place = ip.site("pattern", 2)
    plan = ip.counterfactual(ip.site("pattern", 1), form, seed=3)
    plan = plan + ip.counterfactual(place, form, seed=4)
    batch = model.run(model.inputs(PROMPTS, padding="left"), plan)
    for row, prompt in enumerate(PROMPTS):
        alone = model.run(model.inputs([prompt], row_ids=torch.tensor([row])), plan)
        torch.testing.assert_close(batch.logits[row, -1], alone.logits[0, -1], rtol=0, atol=1e-10)
    other = model.run(model.inputs(PROMPTS, padding="left"), plan, seed=1)
    assert (float((other.logits - batch.logits)[:, -1].abs().max()) > 1e-3) == (form in ("random", "shuffled"))


@pytest.mark.parametrize("form", FORMS)
def test_executors_agree(form):
    model = zoo.wrapped("llama")
    inputs = model.inputs(PROMPTS, padding="left")
    edits = (ip.counterfactual(ip.site("pattern", layer, pos=slice(1, None)), form) for layer in range(3))
    worlds = [ip.World(inputs, edit) for edit in edits]
    reads = [ip.site("logits", pos=-1)]
    found = {
        executor: torch.stack([one.values[0] for one in ip.run_worlds(model, worlds, reads, executor=executor)])
        for executor in ("sequential", "batched", "shared")
    }
    plain = model.run(inputs, capture=reads[0]).tape[reads[0]]
    assert float((found["sequential"] - plain).abs().amin(0).max()) > 1e-4
    assert_equal([found["batched"], found["shared"]], [found["sequential"]] * 2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", CACHED[:3])
def test_in_force_at_every_step_of_a_generation(family, form):
    """Cached decoding equals the whole text run anew at every step, its past under the intervention too."""
    model = zoo.wrapped(family)
    ids = torch.tensor([[0, 0, 5, 3, 8], [2, 7, 4, 1, 9]])
    mask = (torch.arange(5) >= torch.tensor([[2], [0]])).long()
    plan = ip.Plan((ip.counterfactual(ip.site("pattern", 0), form), ip.counterfactual(ip.site("pattern", 1), form)))
    with model.apply(plan, seed=2):
        got = recorded(model.module, lambda: model.module.generate(ids, attention_mask=mask, **OPTIONS))
    tokens = got.tokens if got.tokens.ndim == 2 and got.tokens.numel() else got.output
    with torch.no_grad():
        for step, logits in enumerate(got.logits):
            width = 5 + step
            real = torch.cat([mask, torch.ones(2, step, dtype=torch.int64)], 1)
            inputs = model.inputs(tokens[:, :width], real)
            whole = model.run(inputs, spelled(plan, mask.bool(), torch.arange(2), width), seed=2).logits[:, -1]
            torch.testing.assert_close(logits.reshape(whole.shape), whole, rtol=0, atol=1e-6)


def test_what_is_no_pattern_or_no_form_is_refused():
    with pytest.raises(ip.SiteError, match="replaces a pattern"):
        ip.counterfactual(ip.site("scores", 0))
    with pytest.raises(ip.PlanError, match="did you mean 'random'"):
        ip.counterfactual(ip.site("pattern", 0), "randon")
    with pytest.raises(ip.PlanError, match="a seed is an int"):
        ip.counterfactual(ip.site("pattern", 0), "random", seed=0.5)


@pytest.mark.parametrize("form", FORMS)
def test_keys_that_a_window_has_left_are_not_counted(form):
    """While a text grows past a sliding window, some of the keys that a plan lists are in no column any more."""
    model = zoo.wrapped("mistral")
    ids = torch.tensor([[6, 1, 5, 3, 8, 2], [2, 7, 4, 1, 9, 3]])
    plan = ip.Plan(tuple(ip.counterfactual(ip.site("pattern", n, key_pos=(1, 2, 3, 4)), form) for n in range(2)))
    options = {**OPTIONS, "max_new_tokens": 6}
    with model.apply(plan, seed=2), torch.no_grad():
        got = recorded(model.module, lambda: model.module.generate(ids, **options))
    tokens = got.tokens if got.tokens.numel() else got.output
    left = 0
    for step, logits in enumerate(got.logits):
        inputs = model.inputs(tokens[:, : 6 + step])
        whole, plain = (model.run(inputs, one, seed=2).logits[:, -1] for one in (plan, None))
        torch.testing.assert_close(logits.reshape(whole.shape), whole, rtol=0, atol=1e-6)
        left += int(step > 0 and float((whole - plain).abs().max()) > 1e-6)
    assert left


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("form", FORMS)
def test_rows_with_fewer_keys_count_no_others(form, padding):
    """A part of the keys that is larger in one row than in another: filler is another key, which is not meant."""
    model = zoo.wrapped("llama")
    inputs = model.inputs(PROMPTS, padding=padding)
    keys = torch.zeros_like(inputs.mask, dtype=torch.bool)
    for row, length in enumerate(inputs.lengths.tolist()):
        keys[row, inputs.order[row, 1 : length - row]] = True
    place = ip.site("pattern", 1)
    edit = ip.counterfactual(place.at(key_pos=keys), form)
    clean, found = (model.run(inputs, plan, capture=place).tape[place] for plan in (None, edit))
    assert float((clean - found).abs().max()) > 0.01 and len(set(keys.sum(1).tolist())) > 1
    for row in range(len(PROMPTS)):
        before, after = (x[row][..., keys[row]].sum(-1) for x in (clean, found))
        torch.testing.assert_close(after, before, rtol=0, atol=1e-12)
        assert torch.equal(clean[row][..., ~keys[row]], found[row][..., ~keys[row]])
    read = [ip.site("logits", pos=-1)]
    runs = {e: ip.run_worlds(model, [ip.World(inputs, edit)], read, executor=e) for e in ("batched", "shared")}
    (one,), (two,) = ([x.values[0] for x in found] for found in runs.values())
    assert_equal([one], [two])
