"""Worlds decoded side by side equal separate runs of the whole text at every step, however tokens are chosen."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor

import interp as ip
from hooks import Branch
from hooks.errors import PlanError, ShapeError
from tests import zoo
from tests.hooks.decoding import CACHED, OPTIONS, assert_equal, recorded, spelled

IDS = torch.tensor([[0, 0, 5, 3, 8], [2, 7, 4, 1, 9], [0, 6, 4, 4, 1]])
MASK = (torch.arange(5) >= torch.tensor([[2], [0], [1]])).long()


def language(model, form="random", seed=1):
    return ip.Plan(
        tuple(ip.counterfactual(ip.site("pattern", layer), form, seed=seed) for layer in range(model.n_layers))
    )


def steered(model):
    width = model.sizes["resid_post", 0, None]["dim"]
    vector = torch.randn(width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ip.Plan((ip.steer(ip.site("resid_post", 0), vector, 0.7),))


def contrast(worlds: Tensor, moment) -> Tensor:
    """z = l + sum of g (l - l'), with a g that grows from step to step."""
    own, others = worlds[0], worlds[1:]
    return own + (1 + 0.1 * moment.step) * (own - others).sum(0)


def separately(model, branches, own=None, expand=1, combine=contrast, seed=4):
    """A copy of the model whose forward runs each world by itself, the whole text at every step."""
    twin = copy.deepcopy(model.module)
    rows = torch.arange(len(IDS)).repeat_interleave(expand)

    @functools.wraps(model.module.forward)
    def forward(input_ids, **_):
        from transformers.modeling_outputs import CausalLMOutputWithPast

        step = input_ids.shape[1] - IDS.shape[1]
        found = []
        for branch in (own or Branch(), *branches):
            seen = MASK.bool() & ~(torch.zeros_like(MASK).bool() if branch.hide is None else branch.hide)
            real = torch.cat([seen[rows], torch.ones(len(rows), step, dtype=torch.bool)], 1)
            inputs = ip.Inputs.of(input_ids, real, rows)
            plan = spelled(branch.plan, seen, rows, input_ids.shape[1])
            found.append(model.run(inputs, plan, seed=seed).logits)
        moment = type("Moment", (), {"step": step})
        return CausalLMOutputWithPast(logits=combine(torch.stack(found), moment))

    twin.forward = forward
    return twin


def both(model, branches, own=None, seed=4, draws=0, **options):
    arguments = {"attention_mask": MASK} | OPTIONS | options
    expand = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    module = model.module
    with model.fork(*branches, combine=contrast, own=own, seed=seed) as audits:
        torch.manual_seed(draws)
        got = recorded(module, lambda: module.generate(IDS, **arguments))
    twin = separately(model, branches, own, expand, seed=seed)
    torch.manual_seed(draws)
    want = recorded(twin, lambda: twin.generate(IDS, **{**arguments, "use_cache": False}))
    return got, want, audits


MODES = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "beams": {"num_beams": 3},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "ended": {"eos_token_id": list(range(0, 50, 3)), "max_new_tokens": 6},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "processors": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_length": 8, "eos_token_id": 3},
}


@pytest.mark.parametrize("mode", MODES)
def test_generation_equals_separate_runs(mode):
    model = zoo.wrapped("llama")
    branches = [Branch(language(model)), Branch(steered(model))]
    got, want, _ = both(model, branches, **MODES[mode])
    assert torch.equal(got.tokens, want.tokens)
    if mode != "ended":  # a row that has ended is fed padding, whose logits are nobody's
        assert_equal(got.logits, want.logits, 1e-5)
    plain = model.module.generate(IDS, attention_mask=MASK, **OPTIONS)
    if mode == "greedy":
        assert not torch.equal(plain, got.tokens)


@pytest.mark.parametrize("family", CACHED)
def test_every_family(family):
    model = zoo.wrapped(family)
    got, want, audits = both(model, [Branch(language(model, "shuffled"))], own=Branch(steered(model)))
    assert torch.equal(got.tokens, want.tokens)
    assert_equal(got.logits, want.logits, 1e-5)
    assert all(entry.rows == 3 for audit in audits for entry in audit.entries) and len(audits) == 2


def test_in_float64_where_nothing_is_exposed_to_the_digit():
    """Without edits of patterns, whose softmax models compute in float32, worlds are exact."""
    model = zoo.wrapped("llama")
    got, want, _ = both(model, [Branch(steered(model))])
    assert_equal(got.logits, want.logits, 1e-10)


def test_what_a_world_does_not_see_is_as_if_it_had_not_been_written():
    model = zoo.wrapped("llama")
    hide = torch.zeros(3, 5, dtype=torch.bool)
    hide[0, 3], hide[1, 1:3], hide[2, 4] = True, True, True
    got, want, _ = both(model, [Branch(hide=hide)])
    assert torch.equal(got.tokens, want.tokens)
    assert_equal(got.logits, want.logits, 1e-10)
    # The tokens taken out and not only masked: the first step of the world alone.
    short = model.module(torch.tensor([[2, 1, 9]])).logits[0, -1]
    with model.fork(Branch(hide=hide), combine=lambda worlds, _: worlds[1]):
        found = model.module(IDS, attention_mask=MASK).logits[1, -1]
    torch.testing.assert_close(found, short, rtol=0, atol=1e-10)
    full = model.module(IDS, attention_mask=MASK).logits[1, -1]
    assert float((full - short).abs().max()) > 1e-3


def test_the_own_world_may_hide_columns_too():
    model = zoo.wrapped("qwen2")
    hide = torch.zeros(3, 5, dtype=torch.bool)
    hide[:, 2] = True
    got, want, _ = both(model, [Branch(steered(model))], own=Branch(hide=hide))
    assert torch.equal(got.tokens, want.tokens)
    assert_equal(got.logits, want.logits, 1e-10)


def test_positions_mean_what_each_world_sees():
    """pos=-1 and negative positions count in the text as the world has it."""
    model = zoo.wrapped("llama")
    hide = torch.zeros(3, 5, dtype=torch.bool)
    hide[:, 4] = True
    plan = ip.Plan((ip.scale(ip.site("resid_post", 0, pos=-1), 2.0), ip.scale(ip.site("z", 1, pos="new"), 0.5)))
    got, want, _ = both(model, [Branch(plan, hide)])
    assert_equal(got.logits, want.logits, 1e-10)


def test_a_loop_of_ones_own():
    model = zoo.wrapped("llama")
    branches = [Branch(language(model, "uniform"))]
    twin = separately(model, branches)
    with model.fork(*branches, combine=contrast, seed=4), torch.no_grad():
        ids, cache, mask = IDS, None, MASK
        found, fed = [], IDS
        for _ in range(3):
            out = model.module(fed, attention_mask=mask, past_key_values=cache, use_cache=True)
            cache, fed = out.past_key_values, out.logits[:, -1:].argmax(-1)
            found.append(out.logits[:, -1])
            ids, mask = torch.cat([ids, fed], 1), torch.cat([mask, torch.ones(3, 1, dtype=torch.int64)], 1)
    # Without positions a model counts padding in, here as there: the rows that have none are compared.
    with torch.no_grad():
        want = [twin(input_ids=ids[:, : 5 + step]).logits[:, -1] for step in range(3)]
    assert_equal([x[1:2] for x in found], [x[1:2] for x in want], 1e-5)


def test_a_chat_goes_on_in_one_cache():
    model = zoo.wrapped("llama")
    branches = [Branch(steered(model))]
    from transformers import DynamicCache

    with model.fork(*branches, combine=contrast):
        cache = DynamicCache()
        first = model.module.generate(IDS[1:2], past_key_values=cache, **OPTIONS)
        turn = torch.cat([first, torch.tensor([[3, 4]])], 1)
        got = model.module.generate(turn, past_key_values=cache, **OPTIONS)
        want = model.module.generate(turn, **OPTIONS)
    assert torch.equal(got, want)


def test_one_cache_for_both_worlds_would_not_do():
    """The worlds really part: the second step of a world depends on its own keys and values."""
    model = zoo.wrapped("llama")
    plan = ip.Plan((ip.scale(ip.site("v", 0, pos=slice(0, 3)), -2.0),))
    with model.fork(Branch(plan), combine=lambda worlds, _: worlds[1]):
        got = recorded(model.module, lambda: model.module.generate(IDS, attention_mask=MASK, **OPTIONS))
    with model.apply(plan):
        want = recorded(model.module, lambda: model.module.generate(IDS, attention_mask=MASK, **OPTIONS))
    plain = recorded(model.module, lambda: model.module.generate(IDS, attention_mask=MASK, **OPTIONS))
    assert_equal(got.logits, want.logits)
    assert float((got.logits[1] - plain.logits[1]).abs().max()) > 1e-3


def test_memory_follows_beams():
    model = zoo.wrapped("llama")
    seen = []

    def keep(worlds, moment):
        before = moment.memory.get("tokens")
        # What each row holds is told by the row itself: here the sum of the logits that it was given last.
        moment.memory["tokens"] = worlds[0, :, -1].sum(-1)
        seen.append((before, worlds[0, :, -1].sum(-1)))
        return worlds[0]

    order = []
    with model.fork(Branch(), combine=keep):
        from transformers import DynamicCache

        cache = DynamicCache()
        own = cache.reorder_cache
        cache.reorder_cache = lambda index: (order.append(index), own(index))[1]
        model.module.generate(IDS, attention_mask=MASK, past_key_values=cache, num_beams=3, **OPTIONS)
    moved = 0
    for (before, _), (_, last), index in zip(seen[1:], seen, order, strict=False):
        assert torch.equal(before, last[index[:9]]) and torch.equal(index[9:], index[:9] + 9)
        moved += int(not torch.equal(index[:9], torch.arange(9)))
    assert moved


def test_what_else_a_call_returns_is_the_first_worlds():
    model = zoo.wrapped("llama")
    plain = model.module(IDS, attention_mask=MASK, output_hidden_states=True)
    with model.fork(Branch(steered(model)), combine=lambda worlds, _: worlds[0]):
        got = model.module(IDS, attention_mask=MASK, output_hidden_states=True)
        as_tuple = model.module(IDS, attention_mask=MASK, return_dict=False)
    assert_equal(got.hidden_states, plain.hidden_states)
    assert_equal([got.logits, as_tuple[0]], [plain.logits] * 2)
    after = model.module(IDS, attention_mask=MASK).logits
    assert torch.equal(after, plain.logits)


def test_an_outer_plan_is_in_force_in_every_world():
    model = zoo.wrapped("llama")
    outer = steered(model)
    with model.apply(outer), model.fork(Branch(language(model)), combine=contrast, seed=4):
        got = model.module(IDS, attention_mask=MASK).logits
    want = separately(model, [Branch(outer + language(model))], Branch(outer))(input_ids=IDS).logits
    assert_equal([got[1:2]], [want[1:2]], 1e-5)


def test_gradients_flow_through_all_worlds():
    model = zoo.wrapped("llama")
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    with model.fork(Branch(ip.scale(ip.site("z", 0), scale)), combine=contrast):
        model.module(IDS, attention_mask=MASK).logits[:, -1].sum().backward()
    assert scale.grad is not None and float(scale.grad.abs()) > 0


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Branch(hide=torch.zeros(2, 3)), ShapeError, r"hide= is bool \[B, P\]"),
        (lambda: Branch(images=3), ip.InputsError, "function of pixels"),
        (lambda: Branch("steer"), PlanError, "expected a Plan"),
    ],
)
def test_no_branch(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_refused():
    model = zoo.wrapped("llama")
    module = model.module
    first = lambda worlds, _: worlds[0]  # noqa: E731
    with (
        pytest.raises(PlanError, match="held on this model already"),
        model.fork(combine=first),
        model.fork(combine=first),
    ):
        pass
    with model.fork(Branch(), combine=first), pytest.raises(PlanError, match="labels"):
        module(IDS, labels=IDS)
    cache = module(IDS, use_cache=True).past_key_values
    with model.fork(Branch(), combine=first), pytest.raises(PlanError, match="tokens of one world"):
        module(IDS[:, :1], past_key_values=cache)
    short = Branch(hide=torch.zeros(2, 5, dtype=torch.bool))
    with model.fork(short, combine=first), pytest.raises(ShapeError, match="3 rows of 5 columns"):
        module(IDS)
    with model.fork(Branch(hide=MASK.bool()), combine=first), pytest.raises(ShapeError, match="a whole row"):
        module(IDS, attention_mask=MASK)
    with model.fork(Branch(), combine=lambda worlds, _: worlds), pytest.raises(ShapeError, match="combine gave"):
        module(IDS)
    with pytest.raises(ip.UnfiredError), model.fork(Branch(steered(model)), combine=first):
        pass
    assert torch.equal(module(IDS).logits, module(IDS).logits)
