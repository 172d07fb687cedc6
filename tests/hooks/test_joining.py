"""Worlds that part at a layer are one before it, and are what they would be if they were apart throughout."""

from __future__ import annotations

import pytest
import torch

import hooks.joining
import interp as ip
from hooks import Branch
from tests import zoo
from tests.hooks.decoding import CACHED, OPTIONS, assert_equal, recorded
from tests.hooks.test_fork import IDS, MASK, MODES, both, contrast, steered


def late(model, form="random", first=1):
    """Another attention from a layer on."""
    layers = range(first, model.n_layers)
    return Branch(ip.Plan(tuple(ip.counterfactual(ip.site("pattern", n), form, seed=1) for n in layers)))


@pytest.fixture
def rows(monkeypatch):
    """How many rows each block was called with, by call."""
    found = []
    own = hooks.joining.joining

    def joining(call, network, layer, count, worlds):
        found.append((layer, count, worlds))
        return own(call, network, layer, count, worlds)

    monkeypatch.setattr("hooks.holds.joining", joining)
    return found


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "sampled beams"])
def test_generation_equals_separate_runs(mode, rows):
    model = zoo.wrapped("llama")
    got, want, _ = both(model, [late(model), late(model, "uniform", 2)], **MODES[mode])
    assert torch.equal(got.tokens, want.tokens) and rows and all(layer == 1 for layer, _, _ in rows)
    if mode != "ended":  # a row that has ended is fed padding, whose logits are nobody's
        assert_equal(got.logits, want.logits, 1e-5)


@pytest.mark.parametrize("family", CACHED)
def test_every_family(family, rows):
    model = zoo.wrapped(family)
    got, want, audits = both(model, [late(model, "shuffled")])
    assert torch.equal(got.tokens, want.tokens)
    assert_equal(got.logits, want.logits, 1e-5)
    # Blocks that take something else, and an attention function that is none of transformers'.
    assert bool(rows) == (family not in ("bloom", "falcon", "falcon_alibi", "gemma2"))
    assert all(entry.rows == 3 for audit in audits for entry in audit.entries)


def test_blocks_before_it_run_the_callers_rows_and_keep_its_part_of_the_cache():
    model = zoo.wrapped("llama")
    seen: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    handles = [
        block.register_forward_hook(lambda _m, args, out, n=n: seen[n].add(len(out)))
        for n, block in enumerate(model.module.model.layers)
    ]
    try:
        with model.fork(late(model, first=2), combine=contrast), torch.no_grad():
            cache = model.module(IDS, attention_mask=MASK, use_cache=True).past_key_values
    finally:
        for handle in handles:
            handle.remove()
    assert seen == {0: {3}, 1: {3}, 2: {6}}
    assert [len(layer.keys) for layer in cache.layers] == [3, 3, 6]


def test_what_is_read_before_it_is_every_worlds():
    """An early layer's read-out is a world whose edit is in the last block."""
    model = zoo.wrapped("llama")
    earlier = ip.here(ip.site("resid_post", 0))
    exits = ip.intervene(ip.site("resid_post", 2), lambda x, early, ctx: early, earlier)
    got, want, _ = both(model, [Branch(ip.Plan((exits,)))])
    assert_equal(got.logits, want.logits, 1e-10)


def test_an_outer_plan_and_one_that_comes_between_two_steps():
    """A plan on an earlier block, held from the second step on: until then the worlds were one there."""
    model = zoo.wrapped("llama")
    module = model.module
    item = ip.scale(ip.site("resid_post", 1), 1.3)

    def steps(apart: bool):
        found = []
        forks = model.fork(
            late(model, first=2), combine=contrast, own=Branch(ip.Plan((_nothing(),))) if apart else None
        )
        with forks, torch.no_grad():
            out = module(IDS, attention_mask=MASK, use_cache=True)
            fed, mask = IDS[:, :1], torch.cat([MASK, torch.ones(3, 2, dtype=torch.int64)], 1)
            with model.apply(item):
                for step in (1, 2):
                    cut = mask[:, : 5 + step]
                    out = module(fed, attention_mask=cut, past_key_values=out.past_key_values, use_cache=True)
                    found.append(out.logits)
        return found, [len(layer.keys) for layer in out.past_key_values.layers]

    def _nothing():
        return ip.scale(ip.site("resid_post", 0), 1.0)

    (got, sizes), (want, wide) = steps(False), steps(True)
    assert_equal(got, want)
    assert sizes == [3, 6, 6] and wide == [6, 6, 6]


def test_where_it_is_not_known_what_blocks_do_with_rows_worlds_are_apart_throughout(rows):
    model = zoo.wrapped("llama")
    branch = late(model, first=2)
    with model.fork(branch, combine=contrast):
        module = model.module
        with torch.no_grad():
            want = module(IDS, attention_mask=MASK).logits
            assert len(rows) == 1
            recording = module(IDS, attention_mask=MASK, output_hidden_states=True)
        graph = module(IDS, attention_mask=MASK).logits  # a graph, which may be computed again
        assert len(rows) == 1 and [len(x) for x in recording.hidden_states] == [3] * 4
        assert_equal([recording.logits, graph], [want, want])
    with model.fork(Branch(steered(model)), combine=contrast), torch.no_grad():
        module(IDS, attention_mask=MASK)
    assert len(rows) == 1, "an edit in the first block parts them there"


def test_other_calls_within_one_are_not_of_its_worlds():
    """A hook of the user's that runs the model: its rows are its own."""
    model = zoo.wrapped("llama")
    module, found = model.module, []
    alone = module(IDS).logits

    def nested(_module, _args, _out):
        if not found:
            found.append(None)
            found[0] = module(IDS).logits

    handle = module.model.layers[0].register_forward_hook(nested)
    try:
        with model.fork(late(model, first=2), combine=contrast), torch.no_grad():
            module(IDS)
    finally:
        handle.remove()
    assert_equal(found, [alone], 1e-6)


def test_hooks_are_gone_after_an_exception():
    model = zoo.wrapped("llama")

    def stop(worlds, moment):
        raise KeyError("stop")

    before = model.module(IDS).logits
    with model.fork(late(model, first=2), combine=stop), torch.no_grad(), pytest.raises(KeyError):
        model.module.generate(IDS, attention_mask=MASK, **OPTIONS)
    assert not any(block._forward_pre_hooks for block in model.module.model.layers)
    assert torch.equal(model.module(IDS).logits, before)
    assert recorded(model.module, lambda: model.module.generate(IDS, attention_mask=MASK, **OPTIONS)).logits


def test_in_half_precision_it_is_what_worlds_apart_give():
    """Blocks before the edit compute the same rows, so there is nothing to round differently but the batch."""
    import copy

    model = ip.wrap(copy.deepcopy(zoo.wrapped("llama").module).to(torch.bfloat16))
    kept = ip.scale(ip.site("resid_post", 0), 1.0)  # parts them in the first block, and changes nothing
    found = []
    for own in (None, Branch(ip.Plan((kept,)))):
        with model.fork(late(model, first=2), combine=contrast, own=own), torch.no_grad():
            out = model.module(IDS, attention_mask=MASK, use_cache=True)
            assert out.logits.dtype == torch.bfloat16
            found.append((out.logits.float(), [len(layer.keys) for layer in out.past_key_values.layers]))
    (one, narrow), (two, wide) = found
    assert narrow == [3, 3, 6] and wide == [6, 6, 6]
    assert float((one - two).abs().max()) <= 0.02 * float(two.abs().max())
