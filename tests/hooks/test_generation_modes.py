"""Other ways to generate, and what stands on a model meanwhile: assisted, streaming, guided, finished rows, compiled,
interrupted, in threads, ten thousand times.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

import hooks as hk
from hooks import Inputs, Model, Plan, site
from hooks.backends.gate import gate_of
from hooks.hold import holds_on
from tests import zoo
from tests.hooks.decoding import CACHED, OPTIONS, assert_equal, generated, oracle, prompts, recomputed, recorded
from tests.hooks.test_restore import State
from tests.zoo import fresh, wrapped

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def mixed(model: Model) -> Plan:
    """Edits that persist in the cache, and edits of new tokens."""
    vector = 2.0 * torch.arange(model.architecture.width).double().cos()
    plan = hk.steer(site("resid_post", 0, pos="new"), vector) + hk.scale(site("v", 1, pos=-1), -1.5)
    return plan + hk.noise(site("k", 0), 0.5) + hk.freeze(site("mlp_out", 1, pos="new"))


def repeating(length: int = 9) -> Tensor:
    """A prompt in which n-grams come again, so that prompt lookup proposes tokens."""
    return torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5]])[:, :length]


# Tokens that are proposed and rejected


@torch.no_grad()
@pytest.mark.parametrize("family", CACHED)
def test_prompt_lookup(family):
    model = wrapped(family)
    x, plan = Inputs.of(repeating()), mixed(wrapped(family))
    want = recomputed(model, x, plan, seed=4, max_new_tokens=6)
    widths: list[int] = []
    handle = model.module.register_forward_pre_hook(
        lambda m, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with model.apply(plan, seed=4) as audit:
        got = model.module.generate(x.ids, prompt_lookup_num_tokens=3, **OPTIONS | {"max_new_tokens": 6})
    handle.remove()
    assert torch.equal(got, want.tokens)
    assert widths[0] > 9  # the prompt, and tokens that are proposed
    # Every place of the text counts once, whatever tokens were tried there.
    assert audit[1].positions == 1 and audit[2].positions >= 9 + 5 and audit[2].positions <= 9 + 5 + 3


@torch.no_grad()
def test_the_logits_of_tokens_that_are_proposed():
    """Of every call, at every token that was tried."""
    from transformers import LogitsProcessor, LogitsProcessorList

    model = wrapped("llama")
    x, plan = Inputs.of(repeating()), mixed(wrapped("llama"))
    said: list[Tensor] = []
    texts: list[Tensor] = []
    logits: list[Tensor] = []

    class Note(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            said.append(input_ids.clone())
            return scores

    own = model.module._update_model_kwargs_for_generation

    def note(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        logits.extend(outputs.logits[0])
        texts.extend(said[-outputs.logits.shape[1] :])
        return own(outputs, *args, **kwargs)

    model.module._update_model_kwargs_for_generation = note
    options = OPTIONS | {"max_new_tokens": 6, "logits_processor": LogitsProcessorList([Note()])}
    try:
        with model.apply(plan, seed=4):
            model.module.generate(x.ids, prompt_lookup_num_tokens=3, **options)
    finally:
        del model.module._update_model_kwargs_for_generation
    assert len(texts) > 6  # some were rejected
    whole = oracle(model, x.mask, plan, seed=4)
    assert_equal(logits, [whole(input_ids=text).logits[0, -1] for text in texts])


@torch.no_grad()
def test_an_assistant():
    """It proposes as it is; under the plan is the model that it was applied to."""
    model, small = fresh("llama"), zoo.make("llama", seed=3)
    x, plan, state = Inputs.of(repeating(5)), mixed(model), State(model.module)
    want = recomputed(model, x, plan, max_new_tokens=6)
    with model.apply(plan):
        got = model.module.generate(x.ids, assistant_model=small, **OPTIONS | {"max_new_tokens": 6})
    assert torch.equal(got, want.tokens)
    for assistant in ({"assistant_model": model.module}, {"assistant_early_exit": 1}):
        with pytest.raises(hk.PlanError, match="its own assistant"), model.apply(plan):
            model.module.generate(x.ids, **assistant, **OPTIONS)
    state.assert_kept()


# Rows that have ended


@torch.no_grad()
def test_padding_that_a_finished_row_is_fed_is_no_token():
    model = wrapped("llama")
    x, plan = prompts(model), hk.noise(site("resid_post", 0), 0.5) + hk.scale(site("resid_post", 1, pos="new"), 1.5)
    free, _ = generated(model, x, plan, max_new_tokens=6)
    first, second = (row[x.width :].tolist() for row in free.tokens)
    # A token that ends the second row alone, and not at once.
    n, end = next((n, one) for n, one in enumerate(second) if n and one not in (*first, *second[:n]))
    got, audit = generated(model, x, plan, max_new_tokens=6, eos_token_id=end)
    assert got.tokens[1, x.width :].tolist() == [*second[: n + 1], *[0] * (5 - n)]
    assert torch.equal(got.tokens[0], free.tokens[0])
    assert_equal([row[0] for row in got.logits], [row[0] for row in free.logits])
    # As in a batch of its own, in which the token that ended it would not have been fed.
    assert [entry.positions for entry in audit] == [6 + 5 + 4 + n, 5 + n]
    alone, mine = generated(model, x.rows(slice(1, 2)), plan, max_new_tokens=6, eos_token_id=end)
    assert [entry.positions for entry in mine] == [4 + n, n] and alone.tokens.shape[1] == x.width + n + 1
    for options in ({"use_cache": False}, {"num_return_sequences": 2, "do_sample": True, "draws": 0}):
        more, audit = generated(model, x, plan, max_new_tokens=6, eos_token_id=end, **options)
        expand = options.get("num_return_sequences", 1)
        ended = [row[x.width :].tolist() for row in more.tokens]
        lengths = [row.index(end) if end in row else 5 for row in ended]
        assert audit[1].positions == sum(lengths) and audit[0].positions == expand * 10 + sum(lengths)


# Other calls that a generation makes, and other prompts


@torch.no_grad()
def test_guidance_calls_the_model_on_a_text_of_its_own():
    """The calls for it go by their own positions, and do not disturb those of the generation."""
    model = wrapped("llama")
    x, plan = prompts(model, lengths=(6,)), hk.scale(site("v", 1, pos=-1), 2.0) + hk.scale(site("z", 0, pos="new"), 0.5)
    got, audit = generated(model, x, plan, guidance_scale=1.5)
    twin = oracle(model, x.mask, plan)
    text = [got.tokens[:, : x.width + n] for n in range(4)]
    assert_equal(got.logits, [twin(input_ids=ids).logits[:, -1] for ids in text])
    assert [entry.positions for entry in audit] == [2, 6]


@torch.no_grad()
def test_a_prompt_of_embeddings():
    model = wrapped("llama")
    x, plan = prompts(model), mixed(wrapped("llama"))
    module = model.module
    want = recomputed(model, x, plan, seed=1)
    with model.apply(plan, seed=1) as audit:
        got = recorded(
            module,
            lambda: module.generate(
                inputs_embeds=module.get_input_embeddings()(x.ids), attention_mask=x.mask.long(), **OPTIONS
            ),
        )
    assert torch.equal(got.tokens, want.tokens[:, x.width :])
    assert_equal(got.logits, want.logits)
    assert [entry.positions for entry in audit] == [6, 2, 16, 6]


@torch.no_grad()
def test_a_way_of_decoding_that_runs_rows_of_its_own_is_refused():
    model = wrapped("llama")
    x = prompts(model)

    def twice(module: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        cache = kwargs["past_key_values"]
        return module(input_ids=input_ids.repeat(2, 1), past_key_values=cache).logits

    with pytest.raises(hk.PlanError, match="4 rows, and it has 2"):
        generated(model, x, mixed(model), custom_generate=twice)


def test_attention_that_caches_something_else_is_refused():
    from transformers import DynamicCache, EncoderDecoderCache

    model, x = fresh("llama"), Inputs.of(repeating(5))
    plan = hk.scale(site("v", 1), 2.0)
    with pytest.raises(hk.PlanError, match="two caches"), model.apply(plan):
        model.module(input_ids=x.ids, past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()))
    model.module.model.layers[1].self_attn.kv_lora_rank = 4
    with pytest.raises(hk.PlanError, match="latent attention"):
        generated(model, x, plan)
    generated(model, x, plan, use_cache=False)


@torch.no_grad()
def test_runs_while_a_plan_for_new_tokens_is_held():
    """A run has none, so that part of the plan is nothing to it, and the rest holds."""
    model = fresh("llama")
    x = prompts(model)
    old, new = hk.scale(site("v", 1, pos=-1), 2.0), hk.scale(site("z", 0, pos="new"), 0.5)
    with model.apply(old + new) as audit:
        got = model.run(x).logits
        model.module.generate(x.ids, attention_mask=x.mask.long(), **OPTIONS)
    assert_equal([got[x.mask]], [model.run(x, old).logits[x.mask]])
    assert [entry.positions for entry in audit] == [4, 6]


@torch.no_grad()
def test_a_plan_that_is_read_has_to_fire_too():
    model = fresh("llama")
    x = prompts(model)
    source = hk.scale(site("v", 0), 2.0) + hk.scale(site("z", 0, pos=hk.new(9)), 2.0)
    with pytest.raises(hk.UnfiredError, match=r"z.0\[pos=new\[9:\]\]"):
        generated(model, x, hk.patch(site("mlp_out", 0, pos="new"), source))


@torch.no_grad()
def test_what_a_model_returns_as_a_tuple():
    model = fresh("llama")
    x, plan = prompts(model, lengths=(6,)), hk.scale(site("z", 0, pos="new"), 0.5)
    with model.apply(plan):
        _, cache = model.module(input_ids=x.ids, use_cache=True, return_dict=False)
        got = model.module(input_ids=x.ids[:, :1], past_key_values=cache, return_dict=False)[0]
    whole = Inputs.of(torch.cat([x.ids, x.ids[:, :1]], 1))
    assert_equal([got], [model.run(whole, plan.at(pos=6)).logits[:, 6:]])


# Threads and streams


@torch.no_grad()
def test_a_streamer_in_another_thread():
    from transformers import TextIteratorStreamer

    class Words:
        def decode(self, ids: Any, **_: Any) -> str:
            return "".join(f"{int(i)} " for i in ids)

    model = fresh("llama")
    x, plan = Inputs.of(repeating(5)), mixed(model)
    want = recomputed(model, x, plan).tokens[0].tolist()
    streamer = TextIteratorStreamer(Words(), skip_prompt=True)
    with model.apply(plan) as audit:
        thread = threading.Thread(target=model.module.generate, args=(x.ids,), kwargs=OPTIONS | {"streamer": streamer})
        thread.start()
        said = "".join(streamer)
        thread.join()
    assert [int(word) for word in said.split()] == want[5:]
    assert audit[0].positions == 3


@torch.no_grad()
def test_generations_in_threads_at_once():
    """One forward pass at a time, each of its own text."""
    model = fresh("gpt2")
    plan = mixed(model)
    xs = [prompts(model, seed=n, lengths=(4 + n, 3)) for n in range(3)]
    want = [recomputed(model, x, plan, max_new_tokens=6).tokens for x in xs]
    got: dict[int, Tensor] = {}

    def work(n: int) -> None:
        x = xs[n]
        got[n] = model.module.generate(x.ids, attention_mask=x.mask.long(), **OPTIONS | {"max_new_tokens": 6})

    with model.apply(plan) as audit:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert all(torch.equal(got[n], want[n]) for n in range(3))
    assert audit[0].positions == 3 * 2 * 5


# What stands on the model


class Breaks:
    """A streamer that raises at some token."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.left, self.error = at, error

    def put(self, value: Tensor) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error

    def end(self) -> None:
        pass


@torch.no_grad()
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_the_model_is_as_before_whatever_was_raised(error):
    from transformers import DynamicCache

    model = fresh("llama")
    x, cache = prompts(model, lengths=(5,)), DynamicCache(config=model.module.config)
    plan, state = mixed(model) + hk.scale(site("rot_k", 1), 2.0), State(model.module)
    want = recomputed(model, x, plan).tokens
    with model.apply(plan):
        with pytest.raises(type(error)):
            model.module.generate(x.ids, streamer=Breaks(3, error), past_key_values=cache, **OPTIONS)
        assert torch.equal(model.module.generate(x.ids, **OPTIONS), want)
    with pytest.raises(type(error)), model.apply(plan):
        model.module.generate(x.ids, streamer=Breaks(2, error), **OPTIONS)
    state.assert_kept()
    assert not {"reorder_cache", "crop", "reset"} & set(vars(cache))
    assert holds_on(model.module) is None and not gate_of(model.module)._handles


@torch.no_grad()
def test_copies_that_are_made_under_a_plan_generate_without_it():
    model = fresh("gpt2")
    x, plan = prompts(model), mixed(model)
    plain = model.module.generate(x.ids, attention_mask=x.mask.long(), **OPTIONS)
    with model.apply(plan):
        edited = model.module.generate(x.ids, attention_mask=x.mask.long(), **OPTIONS)
        twins = [copy.deepcopy(model.module), pickle.loads(pickle.dumps(model.module))]
        with model.suspended():
            assert torch.equal(model.module.generate(x.ids, attention_mask=x.mask.long(), **OPTIONS), plain)
        for twin in twins:
            assert torch.equal(twin.generate(x.ids, attention_mask=x.mask.long(), **OPTIONS), plain)
    assert not torch.equal(edited, plain)
    for twin in twins:
        assert torch.equal(twin.generate(x.ids, attention_mask=x.mask.long(), **OPTIONS), plain)
        wrapped_twin = hk.wrap(twin)
        got, _ = generated(wrapped_twin, x, plan)
        assert torch.equal(got.tokens, edited)


@torch.no_grad()
@pytest.mark.parametrize("first", ["plan", "plain"])
def test_decoding_that_is_compiled_by_itself(first, monkeypatch):
    """On an accelerator a static cache has the decoding step compiled, which would skip hooks that come later."""
    model = fresh("llama")
    x, plan, options = prompts(model), mixed(model), {"cache_implementation": "static"}
    want, plain = recomputed(model, x, plan), recomputed(model, x, None)
    # As what is compiled does, this goes by no hook.
    monkeypatch.setattr(type(model.module), "_valid_auto_compile_criteria", lambda self, *args, **kwargs: True)
    monkeypatch.setattr(type(model.module), "get_compiled_call", lambda self, config: self.forward)
    if first == "plain":
        got = model.module.generate(x.ids, attention_mask=x.mask.long(), **OPTIONS, **options)
        assert torch.equal(got, plain.tokens)
    got, audit = generated(model, x, plan, **options)
    assert torch.equal(got.tokens, want.tokens) and audit[0].positions == 6
    assert_equal(got.logits, want.logits)
    assert "get_compiled_call" not in vars(model.module)


def test_a_method_that_somebody_else_has_replaced_is_called_and_stays():
    model = fresh("llama")
    x, plan = prompts(model), mixed(model)
    calls = []
    own = model.module._expand_inputs_for_generation

    def mine(**kwargs: Any) -> Any:
        calls.append(1)
        return own(**kwargs)

    model.module._expand_inputs_for_generation = mine
    got, _ = generated(model, x, plan, seed=1)
    assert calls and vars(model.module)["_expand_inputs_for_generation"] is mine
    assert torch.equal(got.tokens, recomputed(model, x, plan, seed=1).tokens)


@torch.no_grad()
def test_nested_plans_and_one_that_comes_later():
    model = fresh("llama")
    x, plan = prompts(model, lengths=(6,)), mixed(model)
    parts = [Plan(plan.interventions[:2]), Plan(plan.interventions[2:3])]
    want = recomputed(model, x, parts[0] + parts[1])
    with model.apply(parts[0]), model.apply(parts[1]):
        got = recorded(model.module, lambda: model.module.generate(x.ids, **OPTIONS))
    assert_equal(got.logits, want.logits)
    # A world that is read has to be run from the first call on.
    with model.apply(parts[0]):
        cache = model.module(input_ids=x.ids, use_cache=True).past_key_values
        with pytest.raises(hk.PlanError, match="no cache of that world"), model.apply(hk.freeze(site("z", 1))):
            model.module(input_ids=x.ids[:, :1], past_key_values=cache)
        model.module(input_ids=x.ids[:, :1], past_key_values=cache)


@torch.no_grad()
def test_ten_thousand_applications_leave_nothing():
    """Hooks, attributes and objects are flat, also those of caches and generations that were followed."""
    module = zoo.make("gpt2")
    del module.transformer.h[1]
    model = hk.wrap(module)
    x, plan, state = Inputs.of(torch.tensor([[3, 4]])), hk.scale(site("v", 0), 1.5), State(model.module)

    def objects() -> int:
        gc.collect()
        return len(gc.get_objects())

    def work(times: int) -> None:
        for number in range(times):
            if number % 25:
                with suppress(hk.UnfiredError), model.apply(plan):
                    pass
                continue
            with model.apply(plan):
                first = model.module(input_ids=x.ids, use_cache=True)
                model.module(input_ids=x.ids[:, :1], past_key_values=first.past_key_values)

    work(100)
    before = objects()
    work(10_000)
    assert objects() - before < 100
    for _ in range(20):
        generated(model, x, plan)
    assert objects() - before < 100
    parts = list(model.module.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in parts)
    state.assert_kept()


def test_no_cache_is_kept_alive():
    """While a plan is held, a cache goes with the last who has it, and with it those of worlds that were read."""
    from transformers import DynamicCache

    model = fresh("llama")
    x, made = prompts(model), []
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad(), model.apply(mixed(model)):
            for cache in (None, DynamicCache(config=model.module.config)):
                out = model.module(input_ids=x.ids, past_key_values=cache, use_cache=True)
                made.append(weakref.ref(out.past_key_values))
                model.module(input_ids=x.ids[:, :1], past_key_values=out.past_key_values)
                del out
            del cache
            generated_ids = model.module.generate(x.ids, attention_mask=x.mask.long(), **OPTIONS)
            assert [one() for one in made] == [None, None] and len(generated_ids) == 2
            assert not len(holds_on(model.module).decodings._known)
            assert holds_on(model.module).decodings._generations.around() is None
    finally:
        gc.enable()
