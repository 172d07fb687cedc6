"""Every cache that `generate` can be told to make gives what recomputation does, or is refused before anything runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hooks as hk
from experiments.families.models import FAMILIES
from hooks import Inputs, Model, Plan, site
from hooks.backends import caching
from tests.hooks.decoding import OPTIONS, assert_equal, generated, prompts, recomputed, recorded
from tests.hooks.test_generation import one_of_each
from tests.zoo import fresh, prepare, wrapped

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

EQUAL: dict[str, dict[str, Any]] = {
    "dynamic": {"cache_implementation": "dynamic"},
    "static": {"cache_implementation": "static"},
    "a longer static": {"cache_implementation": "static", "max_cache_len": 40},
    "static, in chunks": {"cache_implementation": "static", "prefill_chunk_size": 2},
    "static, beams": {"cache_implementation": "static", "num_beams": 2},
    "hybrid": {"cache_implementation": "hybrid"},
    "sliding_window": {"cache_implementation": "sliding_window"},
    "hybrid_chunked": {"cache_implementation": "hybrid_chunked"},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "offloaded": ({"cache_implementation": "offloaded"}, "'dynamic' holds the same"),
    "offloaded_static": ({"cache_implementation": "offloaded_static"}, "'static' holds the same"),
    "offloaded_hybrid": ({"cache_implementation": "offloaded_hybrid"}, "'static' holds the same"),
    "offloaded_hybrid_chunked": ({"cache_implementation": "offloaded_hybrid_chunked"}, "'static' holds the same"),
    "hqq": ({"cache_implementation": "quantized", "cache_config": {"backend": "hqq"}}, "'fp8'} needs no package"),
    "unknown": ({"cache_implementation": "quantized", "cache_config": {"backend": "zip"}}, "Unknown quantization"),
    "paged": ({"cache_implementation": "paged"}, "continuous batching"),
}


@torch.no_grad()
@pytest.mark.parametrize("way", EQUAL)
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_cache_by_its_name_is_recomputation(family, way):
    model = wrapped(family)
    x = prompts(model)
    plan = one_of_each(model, x)
    got, audit = generated(model, x, plan, seed=5, **EQUAL[way])
    options = {name: value for name, value in EQUAL[way].items() if name != "max_cache_len"}
    want = recomputed(model, x, plan, seed=5, **options)
    assert torch.equal(got.tokens, want.tokens) and {entry.status for entry in audit} == {"fired"}
    assert_equal(got.logits, want.logits)


@torch.no_grad()
@pytest.mark.parametrize("way", REFUSED)
def test_a_cache_that_cannot_be_made_is_refused_before_anything_runs(way):
    model = fresh("llama")
    x, plan, calls = prompts(model), hk.scale(site("v", 1), 2.0), []
    handle = model.module.register_forward_hook(lambda *_: calls.append(1))
    options, words = REFUSED[way]
    with pytest.raises(hk.PlanError, match=words):
        generated(model, x, plan, **options)
    for given in (plan, None):
        with pytest.raises(hk.PlanError, match=words):
            model.generate(x, given, **OPTIONS, **options)
    config: Any = copy.deepcopy(model.module.generation_config)
    config.update(**OPTIONS, **options)
    with pytest.raises(hk.PlanError, match=words):
        model.generate(x, plan, generation_config=config)
    handle.remove()
    assert not calls
    generated(model, x, plan)


def test_every_name_that_transformers_has_is_tried():
    from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

    tried = {options["cache_implementation"] for options in EQUAL.values()}
    tried |= {options["cache_implementation"] for options, _ in REFUSED.values()}
    assert tried == {*ALL_CACHE_IMPLEMENTATIONS, "paged"}


@torch.no_grad()
def test_an_offloaded_cache_of_ones_own_is_refused_where_there_is_nothing_to_move_to():
    from transformers import DynamicCache

    model = fresh("llama")
    cache = DynamicCache()
    cache.offloading = True
    with pytest.raises(hk.PlanError, match="offloading=True"), model.apply(hk.scale(site("v", 1), 2.0)):
        model.module(prompts(model).ids, past_key_values=cache)
    assert not caching.filled(cache)


def test_a_copy_of_an_offloaded_cache_moves_by_the_same_stream():
    """No copy can be made of a stream, and a world that is read needs a cache of its own."""
    from transformers import DynamicCache, EncoderDecoderCache

    class Stream(torch.Stream):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("cannot pickle")

        __reduce_ex__ = __deepcopy__

    cache = DynamicCache()
    cache.prefetch_stream = stream = Stream.__new__(Stream)
    cache.update(torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 3), 0)
    both = EncoderDecoderCache(cache, DynamicCache())
    for twin in (caching.apart(cache), caching.apart(both).self_attention_cache):
        assert twin.prefetch_stream is stream and twin is not cache and caching.filled(twin) == 2
        twin.update(torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 3), 0)
    assert caching.filled(cache) == 2


@torch.no_grad()
def test_caches_of_a_model_that_decodes_what_it_encodes():
    model = hk.wrap(prepare(FAMILIES["T5"].make()))
    module: Any = model.module
    x = model.inputs([[3, 4, 5, 6, 7, 8], [9, 10, 11]])
    assert x.source is not None
    plan = hk.scale(site("v", 1), 2.0) + hk.scale(site("z", 1, stack="cross", head=2), 3.0)
    plan += hk.scale(site("resid_post", 0, pos="new"), 1.5) + hk.freeze(site("mlp_out", 1))
    call = {"input_ids": x.source.ids, "attention_mask": x.source.mask.long(), "max_new_tokens": 5, "min_new_tokens": 5}
    said = []
    for options in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
        with model.apply(plan):
            said.append(recorded(module, lambda o=options: module.generate(**call, **o)))
    for found in said[1:]:
        assert torch.equal(found.tokens, said[0].tokens)
        assert_equal(found.logits, said[0].logits, 1e-9)
    plain = recorded(module, lambda: module.generate(**call))
    assert float((plain.logits[0] - said[0].logits[0]).abs().max()) > 1e-3
    for kind, words in (("quantized", "decodes what it encodes"), ("offloaded", "'dynamic' holds the same")):
        with pytest.raises(hk.PlanError, match=words), model.apply(plan):
            module.generate(**call, cache_implementation=kind)


# Many texts in one row


@torch.no_grad()
def test_continuous_batching_is_refused():
    model = fresh("llama")
    module: Any = model.module
    plan = hk.scale(site("v", 1), 2.0)
    with model.apply(plan):
        for start in (lambda: module.generate_batch([[3, 4, 5]], max_new_tokens=2), module.init_continuous_batching):
            with pytest.raises(hk.PlanError, match="continuous batching"):
                start()
        with model.suspended():
            module.init_continuous_batching()
        module(prompts(model).ids)
    assert "init_continuous_batching" not in vars(module)


@torch.no_grad()
@pytest.mark.parametrize("name", ["cu_seq_lens_q", "block_table", "write_index"])
def test_what_a_batch_that_was_begun_before_calls_the_model_with_is_refused(name):
    """Also of one token, whose position alone does not show that there are others in the row."""
    model = fresh("llama")
    with pytest.raises(hk.PlanError, match=name), model.apply(hk.scale(site("v", 1), 2.0)):
        model.module(input_ids=torch.tensor([[3]]), position_ids=torch.tensor([[5]]), **{name: torch.tensor([0, 1])})


# Quantised: what is kept is not what was computed, so the same edits made by hand on the same cache are the measure


def rounding(module: Any) -> Any:
    """A cache that keeps keys and values rounded but for the last few, and puts off reordering these."""
    from transformers.cache_utils import Cache, QuantizedLayer

    class Rounded(QuantizedLayer):
        def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
            return (tensor * 8).round()

        def _dequantize(self, q_tensor: Tensor) -> Tensor:
            return q_tensor / 8

    return Cache(layers=[Rounded(residual_length=2) for _ in range(module.config.num_hidden_layers)])


def eight_bits(module: Any) -> Any:
    from transformers import QuantizedCache

    return QuantizedCache(backend="fp8", config=module.config)


def blocks(module: Any) -> Any:
    return module.transformer.h if hasattr(module, "transformer") else module.model.layers


def by_hand(model: Model, x: Inputs, cache: Any, vector: Tensor, frozen: bool, **options: Any) -> Any:
    """The plan of the test below, made with hooks on a copy of the module and on the cache."""
    twin: Any = copy.deepcopy(model.module)
    bare, other = copy.deepcopy(model.module), copy.deepcopy(cache)
    unedited: list[Tensor] = []

    def steer(_module: nn.Module, _args: Any, output: Any) -> Any:
        return torch.cat([output[:, :-1], output[:, -1:] + vector], 1)

    def scaled(own: Callable[..., Any]) -> Callable[..., Any]:
        def update(keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
            keys = torch.cat([keys[:, :, :-1], 1.9 * keys[:, :, -1:]], 2)
            return own(keys, -1.3 * values, *args, **kwargs)

        return update

    def run_unedited(_module: nn.Module, args: Any, kwargs: Any) -> None:
        bare(*args, **kwargs | {"past_key_values": other})

    def reorder(own: Callable[..., Any]) -> Callable[..., Any]:
        def both(rows: Tensor) -> None:
            other.reorder_cache(rows)
            own(rows)

        return both

    blocks(twin)[0].register_forward_hook(steer)
    cache.layers[1].update = scaled(cache.layers[1].update)
    if frozen:
        cache.reorder_cache = reorder(cache.reorder_cache)
        blocks(bare)[1].mlp.register_forward_hook(lambda m, a, output: unedited.append(output))
        twin.register_forward_pre_hook(run_unedited, with_kwargs=True)
        blocks(twin)[1].mlp.register_forward_hook(lambda m, a, output: unedited.pop())
    arguments = {"input_ids": x.ids, "attention_mask": x.mask.long(), "past_key_values": cache} | OPTIONS | options
    return recorded(twin, lambda: twin.generate(**arguments))


@torch.no_grad()
@pytest.mark.parametrize("way", ["greedy", "beams"])
@pytest.mark.parametrize("make", [rounding, eight_bits])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_edits_persist_in_a_quantised_cache_and_are_made_once(family, make, way):
    model = wrapped(family)
    x, vector = prompts(model), 2.0 * torch.arange(model.architecture.width).double().cos()
    options: dict[str, Any] = {"max_new_tokens": 6} | ({"num_beams": 3} if way == "beams" else {})
    key = site("rot_k" if family == "llama" else "k", 1)
    plan = Plan()
    for pos in (-1, "new"):
        plan += hk.steer(site("resid_post", 0, pos=pos), vector) + hk.scale(key.at(pos=pos), 1.9)
    plan += hk.scale(site("v", 1), -1.3)
    for frozen in (False, True):
        held = plan + hk.freeze(site("mlp_out", 1)) if frozen else plan
        got, audit = generated(model, x, held, past_key_values=make(model.module), **options)
        want = by_hand(model, x, make(model.module), vector, frozen, **options)
        assert torch.equal(got.tokens, want.tokens) and {entry.status for entry in audit} == {"fired"}
        assert_equal(got.logits, want.logits)
        exact = recomputed(model, x, held, **options)
        assert float((got.logits[1] - exact.logits[1]).abs().max()) > 1e-6  # what was kept is rounded
        plain = recomputed(model, x, None, **options)
        assert float((got.logits[0] - plain.logits[0]).abs().max()) > 1e-2


@torch.no_grad()
def test_a_quantised_cache_by_its_name():
    model = wrapped("llama")
    x, plan = prompts(model), hk.scale(site("v", 1), -1.3)
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    got, _ = generated(model, x, plan, **options)
    assert_equal(got.logits, generated(model, x, plan, past_key_values=eight_bits(model.module))[0].logits)
    assert not torch.equal(got.logits[1], generated(model, x, plan)[0].logits[1])
