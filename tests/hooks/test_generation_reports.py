"""What users of other tools reported of interventions during generation, tried here, each as it was told."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import hooks as hk
from hooks import Inputs, Model, Plan, new, site
from hooks.backends import seams
from hooks.hold import holds_on
from tests import zoo
from tests.hooks.decoding import OPTIONS, assert_equal, generated, prompts, recomputed, recorded
from tests.hooks.test_generation_ways import words
from tests.zoo import fresh, prepare, wrapped

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def direction(model: Model) -> Tensor:
    return 2.0 * torch.arange(model.architecture.width).double().cos()


@torch.no_grad()
def test_position_0_is_not_each_new_token():
    """pyvene: a unit location of 0 intervened on every token that was generated, since each was alone in its call."""
    model = wrapped("gpt2")
    x, v = prompts(model), direction(wrapped("gpt2"))
    for pos, count in ((0, 2), (new(2, 3), 2), ("new", 6)):
        plan = hk.steer(site("resid_post", 0, pos=pos), v)
        got, audit = generated(model, x, plan)
        assert audit[0].positions == count
        assert_equal(got.logits, recomputed(model, x, plan).logits)


@torch.no_grad()
def test_the_first_token_is_steered_from_the_prompt_s_last():
    """CAA: the vector began one token late, since the last token of the prompt is what says the first of the answer."""
    model = wrapped("llama")
    x, v = prompts(model), direction(wrapped("llama"))
    late, whole = hk.steer(site("resid_post", 1, pos="new"), v), hk.steer(site("resid_post", 1, pos=-1), v)
    plain = generated(model, x, None)[0]
    for plan, first in ((late, False), (late + whole, True)):
        got, _ = generated(model, x, plan)
        assert_equal(got.logits, recomputed(model, x, plan).logits)
        assert (float((got.logits[0] - plain.logits[0]).abs().max()) > 1e-3) is first


@torch.no_grad()
def test_an_open_slice_is_the_prompt_with_a_cache_and_without():
    """circuit-tracer: a slice without an end meant the prompt with a cache, and all that came since without one."""
    model = wrapped("gemma2")
    x = prompts(model)
    plan = hk.scale(site("mlp_post", 0, pos=slice(1, None)), -1.5)
    cached, uncached = (generated(model, x, plan, use_cache=use) for use in (True, False))
    assert cached[1][0].positions == uncached[1][0].positions == 8
    assert_equal(cached[0].logits, uncached[0].logits)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_row_of_a_batch_writes_what_it_writes_alone(family):
    """TransformerLens: padding was attended to while generating, so the shorter prompts went on otherwise."""
    model = hk.wrap(zoo.make(family), words())
    texts = ["t3 t4 t5 t6 t7 t8", "t9 t10", "t11 t12 t13 t14"]
    plan = hk.steer(site("resid_post", 0), direction(model)) + hk.scale(site("v", 1, pos=(0, -1)), -1.3)
    options = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0, "logits": True}
    together = model.generate(texts, plan, **options)
    for row, text in enumerate(texts):
        alone = model.generate(text, plan, **options)
        assert alone.texts is not None and together.texts is not None and alone.texts[0] == together.texts[row]
        assert alone.logits is not None and together.logits is not None
        assert_equal([together.logits[row].double()], [alone.logits[0].double()], 1e-5)
    assert together.texts != model.generate(texts, **options).texts


@torch.no_grad()
def test_a_mask_of_each_row_of_a_padded_batch():
    """steering-vectors: a mask was of one row, so the token that is steered could not differ from row to row."""
    model = wrapped("mistral")
    x, v = prompts(model, lengths=(6, 3)), direction(wrapped("mistral"))
    mask = torch.zeros(2, x.width, dtype=torch.bool)
    mask[0, 2], mask[1, -1] = True, True
    plan = hk.steer(site("resid_post", 0), v).where(mask)
    got, audit = generated(model, x, plan)
    assert audit[0].positions == 2
    assert_equal(got.logits, recomputed(model, x, plan).logits)
    assert_equal(got.logits, generated(model, x, hk.steer(site("resid_post", 0, pos=mask), v))[0].logits)


@torch.no_grad()
@pytest.mark.parametrize("number", [0, 1])
def test_biases_by_distance_with_a_cache(number):
    """TransformerLens: BLOOM with a cache gave the first rows of ALiBi's bias to the last tokens."""
    from transformers import BloomConfig, BloomForCausalLM, FalconConfig, FalconForCausalLM

    sizes: dict[str, Any] = {"vocab_size": zoo.VOCAB, "hidden_size": 24, "bos_token_id": 1, "eos_token_id": 2}
    if number:
        module: Any = FalconForCausalLM(FalconConfig(num_hidden_layers=2, num_attention_heads=3, alibi=True, **sizes))
    else:
        module = BloomForCausalLM(BloomConfig(n_layer=2, n_head=3, **sizes))
    model = hk.wrap(prepare(module))
    x = prompts(model, lengths=(5, 5))
    plan = hk.scale(site("k", 1, pos=(0, -1)), -2.0) + hk.scale(site("v", 0, pos="new"), -1.5)
    plan += hk.freeze(site("mlp_out", 1))
    got, _ = generated(model, x, plan)
    # BLOOM's softmax is in float32.
    assert_equal(got.logits, recomputed(model, x, plan).logits, 1e-10 if number else 1e-5)
    plain, _ = generated(model, x, None)
    assert float((got.logits[0] - plain.logits[0]).abs().max()) > 1e-2


@torch.no_grad()
def test_what_is_kept_of_tokens_that_are_generated_is_what_a_run_of_the_text_shows():
    """TransformerLens: no cache of activations while generating, and a second run of the text lacked the hooks."""
    model = wrapped("llama")
    x, plan = prompts(model), hk.steer(site("resid_post", 0), direction(wrapped("llama")))
    out = model.generate(x, plan, capture="blocks.1.attn.hook_z", **OPTIONS)
    kept = out["blocks.1.attn.hook_z"]
    whole = Inputs.of(out.sequences[:, :-1], out.mask[:, :-1])
    again = model.run(whole, plan, capture=site("z", 1)).tape["blocks.1.attn.hook_z"]
    assert kept.shape[1] == x.width + 3
    assert_equal([kept[whole.mask]], [again[whole.mask]])


@torch.no_grad()
def test_rows_that_end_early_keep_what_they_had():
    """nnsight: where generation ended before all iterations that were asked for, what was saved was gone."""
    model = wrapped("llama")
    x = prompts(model)
    free = model.generate(x, **OPTIONS).tokens[0].tolist()
    n, end = next((n, one) for n, one in enumerate(free) if n and one not in free[:n])
    plan = hk.scale(site("resid_post", 1, pos="new"), 1.0)
    options: dict[str, Any] = OPTIONS | {"eos_token_id": end}
    out = model.generate(x, plan, capture=site("mlp_out", 1), **options)
    assert out.lengths[0] == n + 1 and out.audit[0].positions == int((out.lengths - 1).sum())
    assert bool(out[site("mlp_out", 1)][0, : x.width + n].abs().sum(-1).gt(0).all())


# A prefix that is kept for several texts


def after_a_prefix(model: Model, plan: Plan | hk.Intervention, copied: Any) -> None:
    """A prefix is fed once, under the plan, and two texts go on from copies of its cache."""
    from transformers import DynamicCache

    module: Any = model.module
    begun, rests = torch.tensor([[3, 4, 5, 6]]), [torch.tensor([[7, 8, 9]]), torch.tensor([[10, 11]])]
    texts, got = [torch.cat([begun, rest], 1) for rest in rests], []
    with model.apply(plan, seed=2):
        cache = DynamicCache(config=module.config)
        module(begun, past_key_values=cache, use_cache=True)
        for text in texts:
            twin = copied(cache)
            got.append(recorded(module, lambda t=text, c=twin: module.generate(t, past_key_values=c, **OPTIONS)))
        assert cache.get_seq_length() == 4
    assert not any(isinstance(value, seams.Seam) for value in vars(cache).values())
    for text, found in zip(texts, got, strict=True):
        want = recomputed(model, Inputs.of(text), plan, seed=2)
        assert torch.equal(found.tokens, want.tokens)
        assert_equal(found.logits, want.logits)


PLANS: dict[str, Any] = {
    "every token": lambda v: hk.steer(site("resid_post", 0), v) + hk.scale(site("v", 1), -1.3),
    "one of the prefix": lambda v: hk.scale(site("v", 1, pos=0), -2.0) + hk.scale(site("rot_k", 0, pos=(1, 2)), 1.9),
    "new ones": lambda v: hk.steer(site("resid_post", 0, pos="new"), v),
    "this world unedited": lambda v: hk.freeze(site("mlp_out", 1)) + hk.scale(site("v", 0), 2.0),
    "a world read through another": lambda v: hk.patch(
        site("mlp_post", 0), Plan((hk.freeze(site("attn_out", 0)), hk.scale(site("mlp_pre", 0), 0.5)))
    ),
    "noise": lambda v: hk.noise(site("k", 0), 0.5),
}


@torch.no_grad()
@pytest.mark.parametrize("what", PLANS)
def test_copies_of_the_cache_of_a_prefix(what):
    """transformers: a prompt's cache is copied for each text that goes on from it; what is known of it goes along."""
    model = fresh("llama")
    after_a_prefix(model, PLANS[what](direction(model)), copy.deepcopy)


@torch.no_grad()
def test_copies_of_copies_go_on_by_themselves():
    model = fresh("llama")
    plan = PLANS["this world unedited"](direction(model)) + hk.scale(site("v", 1, pos=0), -2.0)
    after_a_prefix(model, plan, lambda cache: copy.deepcopy(copy.deepcopy({"kept": [cache]})["kept"][0]))

    def through_another_turn(cache: Any) -> Any:
        twin = copy.deepcopy(cache)
        other = copy.deepcopy(twin)
        model.module(torch.tensor([[12, 13]]), past_key_values=other)
        assert other.get_seq_length() == 6 and twin.get_seq_length() == 4
        return twin

    after_a_prefix(model, plan, through_another_turn)


@torch.no_grad()
def test_copies_of_other_kinds():
    """One that shares all with the cache is the cache; one that came out of a file has no world beside it."""
    from transformers import DynamicCache

    model = fresh("llama")
    module: Any = model.module
    plan = PLANS["this world unedited"](direction(model))
    text = torch.tensor([[3, 4, 5, 6, 7, 8]])
    with model.apply(plan):
        cache = DynamicCache(config=module.config)
        module(text[:, :4], past_key_values=cache, use_cache=True)
        with pytest.raises(hk.PlanError, match="no cache of that world was kept"):
            module(text[:, 4:], past_key_values=pickle.loads(pickle.dumps(cache)))
        shared = copy.copy(cache)
        got = module(text[:, 4:], past_key_values=shared).logits
        shared.batch_repeat_interleave(2)
        again = module(torch.tensor([[9], [10]]), past_key_values=shared).logits
    assert_equal([got], [model.run(Inputs.of(text), plan).logits[:, 4:]])
    both = Inputs.of(torch.cat([text.expand(2, -1), torch.tensor([[9], [10]])], 1))
    assert_equal([again], [model.run(both, plan).logits[:, 6:]])


@torch.no_grad()
def test_a_copy_holds_no_more_than_the_cache():
    """Nothing of ours goes into files with a cache, or stays on copies."""
    model = fresh("llama")
    module: Any = model.module
    with model.apply(hk.freeze(site("mlp_out", 1)) + hk.scale(site("v", 0), 2.0)):
        cache = module(prompts(model).ids, use_cache=True).past_key_values
        twin, stored = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
        assert "__deepcopy__" in vars(twin)
        again = copy.deepcopy(stored)
        holds = holds_on(module)
        assert holds is not None and holds.decodings is not None and len(holds.decodings._known) == 2
        del twin
        assert len(holds.decodings._known) == 1
    for one in (cache, again):
        assert "__deepcopy__" not in vars(one)
        assert torch.equal(one.layers[1].keys, stored.layers[1].keys)
        assert copy.deepcopy(one).get_seq_length() == 6
