"""Every option of `generate` leaves a plan what it is: recomputation, token for token, or a refusal by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import hooks as hk
from hooks import Inputs, World, site
from tests import zoo
from tests.hooks.decoding import OPTIONS, assert_equal, generated, oracle, prompts, recomputed
from tests.hooks.test_generation import one_of_each
from tests.hooks.test_generation_modes import mixed, repeating
from tests.zoo import fresh, wrapped

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def words() -> Any:
    """A tokenizer whose tokens are t0, t1, ..., and the one by which transformers finds out what stands before each."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{number}": number for number in range(zoo.VOCAB - 1)} | {"abcdef": zoo.VOCAB - 1}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="t0"))
    inner.pre_tokenizer = WhitespaceSplit()  # type: ignore[attr-defined]
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="t0", pad_token="t0")


class Silent:
    """A streamer that says nothing."""

    def put(self, value: Tensor) -> None:
        pass

    def end(self) -> None:
        pass


def loop(module: Any, input_ids: Tensor, **given: Any) -> Tensor:
    """Decoding that a user writes for `generate`, with what that has prepared; it asks for the states of all layers."""
    names = ("attention_mask", "past_key_values", "position_ids")
    given, ids, fed = {name: given[name] for name in names}, input_ids, input_ids
    for _ in range(OPTIONS["max_new_tokens"]):
        output = module(input_ids=fed, output_hidden_states=True, use_cache=True, logits_to_keep=1, **given)
        module._update_model_kwargs_for_generation(output, {})
        assert len(output.hidden_states) == module.config.num_hidden_layers + 1
        fed = output.logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, fed], 1)
        mask = given["attention_mask"]
        given |= {"attention_mask": None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], 1)}
        given |= {"position_ids": given["position_ids"][:, -1:] + 1}
    return ids


def contrast(module: Any, input_ids: Tensor, **given: Any) -> Tensor:
    """The same by contrast of layers: an early one is turned into logits by a part of the model, called by itself."""
    output = module(input_ids=input_ids, output_hidden_states=True, past_key_values=given["past_key_values"])
    early = module.get_output_embeddings()(output.hidden_states[1])
    fed = (output.logits - early)[:, -1:].argmax(-1)
    module(input_ids=fed, past_key_values=output.past_key_values)
    return torch.cat([input_ids, fed], 1)


def watermark() -> dict[str, Any]:
    from transformers import WatermarkingConfig

    return {"watermarking_config": WatermarkingConfig(bias=2.5, seeding_scheme="selfhash")}


def synthetic_id() -> dict[str, Any]:
    from transformers import SynthIDTextWatermarkingConfig

    config = SynthIDTextWatermarkingConfig(keys=[3, 5, 7], ngram_len=3)
    return {"watermarking_config": config, "do_sample": True, "draws": 2}


def compiled() -> dict[str, Any]:
    from transformers import CompileConfig

    config: Any = CompileConfig(backend="eager", fullgraph=False)
    config._compile_all_devices = True  # as on an accelerator
    return {"cache_implementation": "static", "compile_config": config}


@dataclass(frozen=True)
class Way:
    """How to generate: options of it, and those that recomputation is made without."""

    both: dict[str, Any] = field(default_factory=dict)
    ours: Callable[[], dict[str, Any]] = dict
    make: Callable[[], dict[str, Any]] = dict


WAYS: dict[str, Way] = {
    "watermark": Way(make=watermark),
    "SynthID": Way(make=synthetic_id),
    "penalties": Way({"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.1}),
    "sampling": Way(
        {"do_sample": True, "draws": 1, "min_p": 0.05, "temperature": 0.7, "top_k": 6, "top_p": 0.9}
        | {"num_return_sequences": 3}
    ),
    "beams, all of them": Way({"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.5}),
    "beams that end": Way({"num_beams": 3, "num_return_sequences": 2, "early_stopping": True, "eos_token_id": 5}),
    "forced end": Way({"forced_eos_token_id": 3, "suppress_tokens": [7]}),
    "all that it returns": Way(
        {"output_hidden_states": True, "output_attentions": True, "output_scores": True, "output_logits": True}
        | {"return_dict_in_generate": True}
    ),
    "bounded": Way({"max_time": 600.0, "min_new_tokens": 2}),
    "stop strings": Way(make=lambda: {"stop_strings": ["t9"], "tokenizer": words()}),
    "streamer": Way(ours=lambda: {"streamer": Silent()}),
    "a loop of ones own": Way(ours=lambda: {"custom_generate": loop}),
    "compiled": Way(ours=compiled),
    "not compiled": Way(ours=lambda: {"cache_implementation": "static", "disable_compile": True}),
}
CASES = [
    pytest.param(family, way, marks=() if family == "gemma2" else pytest.mark.full)
    for way in WAYS
    for family in ("gpt2", "llama", "gemma2", "mistral")
]


@torch.no_grad()
@pytest.mark.parametrize(("family", "way"), CASES)
def test_an_option_leaves_the_plan_what_it_is(family, way):
    model = wrapped(family)
    x = prompts(model)
    if way == "streamer":
        x = x.rows(slice(1))
    plan, told = one_of_each(model, x), WAYS[way]
    both = told.both | told.make()
    got, audit = generated(model, x, plan, seed=5, **both, **told.ours())
    want = recomputed(model, x, plan, seed=5, **both)
    assert torch.equal(got.tokens, want.tokens)
    assert_equal(got.logits, want.logits)
    assert {entry.status for entry in audit} == {"fired"}
    plain = recomputed(model, x, None, **both)
    assert float((got.logits[0] - plain.logits[0]).abs().max()) > 1e-3


@torch.no_grad()
def test_decoding_that_was_compiled_before_the_plan_came():
    """What is compiled goes by no hook that came later; and what comes after the plan is what was before."""
    model = fresh("llama")
    module: Any = model.module
    x, plan = prompts(model), mixed(model)
    call: dict[str, Any] = {"input_ids": x.ids, "attention_mask": x.mask.long()} | OPTIONS | compiled()
    before = module.generate(**call)
    assert getattr(module, "_compiled_call", None) is not None
    got, audit = generated(model, x, plan, seed=4, **compiled())
    want = recomputed(model, x, plan, seed=4)
    assert torch.equal(got.tokens, want.tokens) and audit[0].positions == 6
    assert_equal(got.logits, want.logits)
    assert torch.equal(module.generate(**call), before) and not torch.equal(got.tokens, before)


@torch.no_grad()
def test_code_that_generate_loads_from_a_folder(tmp_path):
    """It is given the model, calls it in a loop of its own, and the plan goes by what it feeds."""
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(
        "import torch\n"
        "def generate(model, input_ids, attention_mask, max_new_tokens, **_):\n"
        "    cache, fed = None, input_ids\n"
        "    for _ in range(max_new_tokens):\n"
        "        position = attention_mask.cumsum(1).sub(1).clamp(min=0)[:, -fed.shape[1]:]\n"
        "        out = model(input_ids=fed, attention_mask=attention_mask, position_ids=position,\n"
        "                    past_key_values=cache, use_cache=True)\n"
        "        cache, fed = out.past_key_values, out.logits[:, -1:].argmax(-1)\n"
        "        model._update_model_kwargs_for_generation(out, {})\n"
        "        input_ids = torch.cat([input_ids, fed], 1)\n"
        "        attention_mask = torch.cat([attention_mask, torch.ones_like(fed)], 1)\n"
        "    return input_ids\n"
    )
    model = wrapped("llama")
    x, plan = prompts(model), mixed(wrapped("llama"))
    got, audit = generated(model, x, plan, seed=4, custom_generate=str(tmp_path), trust_remote_code=True)
    want = recomputed(model, x, plan, seed=4)
    assert torch.equal(got.tokens, want.tokens) and audit[0].positions == 6
    assert_equal(got.logits, want.logits)


@torch.no_grad()
def test_layers_in_contrast():
    """What is called by itself is as it is, unless the plan is on it."""
    model, x = fresh("llama"), Inputs.of(repeating(5))
    plan = hk.steer(site("resid_post", 0), 2.0 * torch.arange(model.architecture.width).double().cos())
    got, audit = generated(model, x, plan, custom_generate=contrast)
    module: Any = model.module
    run = model.run(x, plan, capture=site("resid_post", 0))
    early = module.get_output_embeddings()(run.tape[site("resid_post", 0)])
    assert int(got.tokens[0, -1]) == int((run.logits - early)[0, -1].argmax()) and audit[0].positions == 6
    with pytest.raises(hk.PlanError, match="a part of the model is called by itself"):
        generated(model, x, plan + hk.scale(site("logits"), 2.0), custom_generate=contrast)


# An assistant is a model of its own


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_plan_on_the_assistant_changes_what_it_proposes_alone(family):
    model, small = fresh(family), hk.wrap(zoo.make(family, seed=3))
    module: Any = model.module
    x, vector = Inputs.of(repeating(7)), torch.ones(fresh(family).architecture.width).double()
    plan, own = one_of_each(model, x), hk.steer(site("resid_post", 0), vector)
    options = OPTIONS | {"max_new_tokens": 6, "assistant_model": small.module}
    for held in (plan, None):
        want = recomputed(model, x, held, seed=5, max_new_tokens=6)
        with model.apply(hk.Plan() if held is None else held, seed=5), small.apply(own) as audit:
            assert torch.equal(module.generate(x.ids, **options), want.tokens)
        assert audit[0].positions >= 7
    with model.apply(plan, seed=5):
        got = module.generate(x.ids, **options | {"do_sample": True})
    assert got.shape == (1, 13)


@torch.no_grad()
def test_a_quantised_cache_cannot_forget_what_was_rejected():
    model = fresh("llama")
    options: dict[str, Any] = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    options["prompt_lookup_num_tokens"] = 3
    with pytest.raises(hk.PlanError, match="a quantised cache keeps what it is to forget"):
        generated(model, Inputs.of(repeating()), hk.scale(site("v", 0), 1.5), **options)


# Guidance calls the model on a negative prompt besides


NEGATIVE = torch.tensor([[3, 4, 5], [6, 7, 8]])


@torch.no_grad()
@pytest.mark.parametrize("negative", [False, True])
def test_a_plan_that_every_text_bears_is_on_both_that_guidance_compares(negative):
    model = wrapped("llama")
    x = prompts(model)
    plan = hk.scale(site("v", 1), 1.5) + hk.scale(site("z", 0, pos="new"), 0.5) + hk.freeze(site("mlp_out", 1))
    options: dict[str, Any] = {"guidance_scale": 1.5} | ({"negative_prompt_ids": NEGATIVE} if negative else {})
    scores: list[Tensor] = []
    got, _ = generated(model, x, plan, logits_processor=[lambda ids, s: scores.append(s.clone()) or s], **options)
    begun = NEGATIVE if negative else x.ids[:, -1:]
    other = oracle(model, torch.ones(begun.shape, dtype=torch.bool), plan)
    twin, said = oracle(model, x.mask, plan), got.tokens[:, x.width :]
    for step in range(4):
        of_prompt = twin(input_ids=got.tokens[:, : x.width + step]).logits[:, -1]
        assert_equal([got.logits[step]], [of_prompt])
        besides = other(input_ids=torch.cat([begun, said[:, :step]], 1)).logits[:, -1].log_softmax(-1)
        want = 1.5 * (of_prompt.float().log_softmax(-1) - besides) + besides
        assert_equal([scores[step].double()], [want], 1e-5)


@torch.no_grad()
def test_what_is_of_the_prompt_alone_is_refused_in_a_text_besides():
    model = wrapped("llama")
    x = prompts(model)
    other = Inputs.of((x.ids + 7) % zoo.VOCAB, x.mask)
    tape = model.run(other, capture=site("resid_pre", 1)).tape
    plans = [
        hk.scale(site("v", 1, pos=3), 2.0),
        hk.scale(site("v", 1, pos=x.mask), 2.0),
        hk.scale(site("v", 1), 2.0).where(x.mask),
        hk.patch(site("resid_pre", 1, pos=-1), tape),
        hk.patch(site("resid_pre", 1, pos=slice(None)), World(other)),
    ]
    for plan in plans:
        options: dict[str, Any]
        for options in ({}, {"negative_prompt_ids": NEGATIVE}):
            with pytest.raises(hk.PlanError, match="negative prompt"):
                generated(model, x, plan, guidance_scale=1.5, **options)
        generated(model, x, plan)
    for pos in (-1, "new"):
        with pytest.raises(hk.PlanError, match="nobody knows where its prompt ends"):
            generated(model, x, hk.scale(site("v", 1, pos=pos), 2.0), guidance_scale=1.5, use_cache=False)
    generated(model, x, hk.scale(site("v", 1), 2.0), guidance_scale=1.5, use_cache=False)
