"""Exact effects of cached keys and values against a loop that deletes one unit at a time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import interp as ip
from tests import zoo

CONTEXT, SUFFIX = 9, 4


def texts(seed: int = 0, rows: int = 1) -> tuple[list[list[int]], list[list[int]]]:
    ids = torch.randint(2, zoo.VOCAB, (rows, CONTEXT + SUFFIX), generator=torch.Generator().manual_seed(seed)).tolist()
    return [row[:CONTEXT] for row in ids], [row[CONTEXT:] for row in ids]


def numbers(logits: torch.Tensor, full: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """The metrics of [m, V], written out."""
    answer = logits.gather(1, targets[:, None])[:, 0]
    rival = full.scatter(1, targets[:, None], -torch.inf).argmax(1)
    return {
        "nll": torch.nn.functional.cross_entropy(logits, targets, reduction="none"),
        "kl": (full.softmax(-1) * (full.log_softmax(-1) - logits.log_softmax(-1))).sum(-1),
        "margin": answer - logits.gather(1, rival[:, None])[:, 0],
    }


@torch.no_grad()
def deleted(module: torch.nn.Module, context: list[int], suffix: list[int], gone: dict[int, dict[int, list[int]]]):
    """Logits [m, V] of the suffix after keys {layer: {head: tokens}} are cut out of a cache, by transformers alone.

    Where heads of a layer keep different keys, they are masked by an attention function of this test's own.
    """
    cache = DynamicCache(config=module.config)
    module(torch.tensor([context]), past_key_values=cache, use_cache=True)
    layers = {
        m.layer_idx: m for m in module.modules() if hasattr(m, "layer_idx") and hasattr(m, "num_key_value_groups")
    }
    handles = []
    for layer, heads in gone.items():
        bias = torch.zeros(1, module.config.num_key_value_heads, 1, len(context) + len(suffix), dtype=torch.float64)
        for head, tokens in heads.items():
            bias[0, head, 0, tokens] = -torch.inf
        bias = bias.repeat_interleave(layers[layer].num_key_value_groups, 1)
        n, start = len(suffix), len(context)
        causal = torch.ones(n, start + n, dtype=torch.bool).tril(start)
        mask = torch.zeros(n, start + n, dtype=torch.float64).masked_fill(~causal, -torch.inf)

        def put(_module, args, kwargs, mask=mask + bias):
            return args, {**kwargs, "attention_mask": mask}

        handles.append(layers[layer].register_forward_pre_hook(put, with_kwargs=True))
    try:
        return module(torch.tensor([suffix]), past_key_values=cache, use_cache=True).logits[0, :-1]
    finally:
        for handle in handles:
            handle.remove()


def loop(module, context, suffix, removals) -> dict[str, np.ndarray]:
    """Effects [removal, m] by deleting one unit at a time."""
    targets = torch.tensor(suffix[1:])
    full = deleted(module, context, suffix, {})
    base, found = numbers(full, full, targets), {name: [] for name in ("nll", "kl", "margin")}
    for gone in removals:
        now = numbers(deleted(module, context, suffix, gone), full, targets)
        for name, values in found.items():
            values.append((now[name] - base[name]).numpy())
    return {name: np.array(values) for name, values in found.items()}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_unit_equals_a_loop_that_deletes_it(family):
    model = zoo.wrapped(family)
    (context,), (suffix,) = texts()
    heads = model.module.config.num_key_value_heads
    units = list(itertools.product(range(model.n_layers), range(heads), range(CONTEXT)))
    expected = loop(model.module, context, suffix, [{layer: {head: [i]}} for layer, head, i in units])
    found = ip.kv.kv_effects(model, context, suffix, metric=("nll", "kl", "margin"), per_query=True)
    assert found.config["executor"] == "shared"
    for number, name in enumerate(("nll", "kl", "margin")):
        assert np.abs(expected[name]).max() > 1e-3
        mine = found.effect[number, ..., 0].reshape(len(units), -1)
        np.testing.assert_allclose(mine, expected[name], rtol=0, atol=1e-10)
    summed = ip.kv.kv_effects(model, context, suffix)
    np.testing.assert_allclose(summed.effect[..., 0], found.effect[0, ..., 0].sum(-1), rtol=0, atol=1e-12)
    assert (found.absolute().effect >= 0).all()


@pytest.mark.parametrize("unit", ["token", ("layer", "head"), ("layer", "token"), [(0, 3), (2, 7)]])
def test_larger_units(unit):
    model = zoo.wrapped("llama")
    (context,), (suffix,) = texts(1)
    layers, heads = range(model.n_layers), range(2)
    every = range(CONTEXT)
    if unit == "token":
        removals = [{layer: {h: [i] for h in heads} for layer in layers} for i in every]
    elif unit == ("layer", "head"):
        removals = [{layer: {h: list(every)}} for layer in layers for h in heads]
    elif unit == ("layer", "token"):
        removals = [{layer: {h: [i] for h in heads}} for layer in layers for i in every]
    else:
        removals = [{layer: {h: list(range(*span)) for h in heads} for layer in layers} for span in unit]
    expected = loop(model.module, context, suffix, removals)["nll"].sum(1)
    found = ip.kv.kv_effects(model, context, suffix, unit=unit)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found.effect[..., 0].ravel(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("family", "estimand"),
    [
        ("llama", "streaming"),
        ("mistral", "post_prefill"),
        ("gemma2", "streaming"),
        *(
            pytest.param(family, estimand, marks=pytest.mark.full)
            for family in ("llama", "mistral", "gemma2", "qwen3", "small_rms_rotary_gqa", "neox")
            for estimand in ("post_prefill", "streaming")
        ),
    ],
)
def test_executors_agree(family, estimand):
    model = zoo.wrapped(family)
    (context,), (suffix,) = texts(2)
    options = {"estimand": estimand, "chunk": 4, "metric": ("nll", "kl")}
    fast = ip.kv.kv_effects(model, context, suffix, **options)
    slow = ip.kv.kv_effects(model, context, suffix, executor="sequential", **options)
    assert (fast.config["executor"], slow.config["executor"]) == ("shared", "sequential")
    assert np.abs(slow.effect).max() > 1e-3
    np.testing.assert_allclose(fast.effect, slow.effect, rtol=0, atol=1e-10)


def test_a_stream_differs_from_prefill_and_ends_as_it():
    model = zoo.wrapped("llama")
    (context,), (suffix,) = texts(3)
    prefill = ip.kv.kv_effects(model, context, suffix)
    stream = ip.kv.kv_effects(model, context, suffix, estimand="streaming", chunk=3)
    np.testing.assert_allclose(stream.effect[..., 6:, 0], prefill.effect[..., 6:, 0], rtol=0, atol=1e-11)
    assert np.abs(stream.effect[..., :6, 0] - prefill.effect[..., :6, 0]).max() > 1e-3
    whole = ip.kv.kv_effects(model, context, suffix, estimand="streaming", chunk=100)
    np.testing.assert_allclose(whole.effect, prefill.effect, rtol=0, atol=1e-11)


@pytest.mark.parametrize("unit", [("layer", "head"), ("layer",), ("head",)])
def test_a_head_leaves_a_stream_little_by_little(unit):
    """Without what it has read before its chunk, as by a mask of the test's own."""
    model = zoo.wrapped("llama")
    (context,), (suffix,) = texts(9)
    ids, chunk = torch.tensor([context + suffix]), 4
    times = torch.tensor([min((i // chunk + 1) * chunk, CONTEXT) for i in range(CONTEXT)])
    queries = torch.arange(ids.shape[1])
    gone = torch.zeros(ids.shape[1], ids.shape[1], dtype=torch.bool)
    gone[:, :CONTEXT] = queries[:, None] >= times
    found = ip.kv.kv_effects(model, context, suffix, unit=unit, estimand="streaming", chunk=chunk)
    assert found.config["executor"] == "shared"
    targets = torch.tensor(suffix[1:])

    def nll(removed):
        causal = torch.ones_like(gone).tril()
        handles = []
        for layer, heads in removed.items():
            mask = torch.zeros(1, 4, *gone.shape, dtype=torch.float64).masked_fill(~causal, -torch.inf)
            for head in heads:
                mask[0, 2 * head : 2 * head + 2].masked_fill_(gone, -torch.inf)

            def put(_module, args, kwargs, mask=mask):
                return args, {**kwargs, "attention_mask": mask}

            attention = model.module.model.layers[layer].self_attn
            handles.append(attention.register_forward_pre_hook(put, with_kwargs=True))
        with torch.no_grad():
            logits = model.module(ids, use_cache=False).logits[0, CONTEXT:-1]
        for handle in handles:
            handle.remove()
        return float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))

    layers, heads = range(model.n_layers), range(2)
    removals = {
        ("layer", "head"): [{layer: [h]} for layer in layers for h in heads],
        ("layer",): [{layer: heads} for layer in layers],
        ("head",): [{layer: [h] for layer in layers} for h in heads],
    }[unit]
    expected = np.array([nll(one) for one in removals]) - nll({})
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(found.effect[..., 0].ravel(), expected, rtol=0, atol=1e-10)
    slow = ip.kv.kv_effects(model, context, suffix, unit=unit, estimand="streaming", chunk=chunk, executor="sequential")
    np.testing.assert_allclose(slow.effect, found.effect, rtol=0, atol=1e-10)
    first = ip.kv.kv_effects(model, context, suffix, unit=unit, estimand="streaming", chunk=chunk, how="gradient")
    each = ip.kv.kv_effects(model, context, suffix, estimand="streaming", chunk=chunk, how="gradient").effect
    axes = tuple(i for i, name in enumerate(("layer", "head", "token")) if name not in unit)
    np.testing.assert_allclose(first.effect, each.sum(axes), rtol=0, atol=1e-11)


def test_rows_are_their_own():
    model = zoo.wrapped("llama")
    contexts, suffixes = texts(4, rows=3)
    contexts[1] = contexts[1][:5]
    together = ip.kv.kv_effects(model, contexts, suffixes)
    order = [2, 0, 1]
    permuted = ip.kv.kv_effects(model, [contexts[i] for i in order], [suffixes[i] for i in order])
    np.testing.assert_array_equal(permuted.effect, together.effect[..., order])
    assert np.isnan(together.effect[:, :, 5:, 1]).all() and not np.isnan(together.effect[:, :, :5]).any()
    for row in range(3):
        alone = ip.kv.kv_effects(model, contexts[row], suffixes[row]).effect[..., 0]
        np.testing.assert_array_equal(alone, together.effect[:, :, : alone.shape[2], row])
    padded = model.inputs(contexts, padding="left")
    np.testing.assert_array_equal(ip.kv.kv_effects(model, padded, suffixes).effect, together.effect)


def test_attention_all_on_one_key():
    """Where a weight is nearly 1 the removal formula divides by nearly nothing."""
    model = zoo.fresh("llama")
    with torch.no_grad():
        for block in model.module.model.layers:
            block.self_attn.q_proj.weight.mul_(6)
            block.self_attn.k_proj.weight.mul_(6)
    (context,), (suffix,) = texts(5)
    from hooks import Tail

    with torch.no_grad():
        seen, _ = Tail(model, torch.tensor(context + suffix), CONTEXT, [CONTEXT, CONTEXT + 1]).seen()
    assert max(float(one.pattern[..., :CONTEXT].max()) for one in seen) > 1 - 1e-6
    fast = ip.kv.kv_effects(model, context, suffix)
    slow = ip.kv.kv_effects(model, context, suffix, executor="sequential")
    np.testing.assert_allclose(fast.effect, slow.effect, rtol=0, atol=1e-10)


def test_a_held_plan_and_a_hook_are_obeyed():
    model = zoo.fresh("llama")
    (context,), (suffix,) = texts(6)
    plan = ip.zero(ip.site("mlp_out", layer=1))
    with model.apply(plan):
        held = ip.kv.kv_effects(model, context, suffix)
        assert "held" in held.config["executor_reason"]
        slow = ip.kv.kv_effects(model, context, suffix, executor="sequential")
    bare = ip.kv.kv_effects(model, context, suffix)
    np.testing.assert_allclose(held.effect, slow.effect, rtol=0, atol=1e-10)
    assert np.abs(held.effect - bare.effect).max() > 1e-3
    handle = model.module.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out * 0)
    hooked = ip.kv.kv_effects(model, context, suffix)
    handle.remove()
    np.testing.assert_allclose(hooked.effect, held.effect, rtol=0, atol=1e-10)


def test_a_wrong_description_is_noticed():
    """A block that multiplies what it adds is not what the adapter says, so the tail is not trusted."""
    model = zoo.fresh("llama")

    class Odd(type(model.module.model.layers[0])):
        def forward(self, hidden_states, *args, **kwargs):
            return super().forward(hidden_states, *args, **kwargs) * 0.5

    model.module.model.layers[1].__class__ = Odd
    (context,), (suffix,) = texts(7)
    found = ip.kv.kv_effects(model, context, suffix)
    assert found.config["executor"] == "batched" and found.config["executor_reason"]
    slow = ip.kv.kv_effects(model, context, suffix, executor="sequential")
    np.testing.assert_allclose(found.effect, slow.effect, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "nil"}, "nll"),
        ({"metric": ()}, "each once"),
        ({"estimand": "prefill"}, "post_prefill"),
        ({"how": "gradeint"}, "gradient"),
        ({"unit": "tokens"}, "token"),
        ({"unit": [(3, 20)]}, "does not lie"),
        ({"unit": [(3, 3)]}, "does not lie"),
        ({"unit": 3}, "list of spans"),
        ({"suffix": [5]}, "at least two"),
        ({"suffix": [[5, 6], [7, 8]]}, "row by row"),
        ({"context": []}, "texts, token ids"),
        ({"context": "text"}, "tokenizer"),
        ({"answer": 4}, "1 to 3"),
        ({"answer": 0}, "1 to 3"),
        ({"chunk": 0}, "positive"),
        ({"steps": True}, "positive"),
        ({"context": [1, 2, 999]}, "999"),
        ({"how": "gradient", "metric": "kl"}, "identically zero"),
        ({"how": "gauss_newton"}, "'kl' alone"),
    ],
)
def test_bad_input(change, message):
    (context,), (suffix,) = texts()
    given = {"context": context, "suffix": suffix, **change}
    with pytest.raises(ip.InterpError, match=message):
        ip.kv.kv_effects(zoo.wrapped("llama"), **given)


def test_training_mode_is_refused():
    model = zoo.fresh("llama")
    model.module.train()
    (context,), (suffix,) = texts()
    with pytest.raises(ip.ModelError, match="training mode"):
        ip.kv.kv_effects(model, context, suffix)


def test_results_draw_and_come_back(tmp_path):
    model = zoo.wrapped("llama")
    (context,), (suffix,) = texts(8)
    found = ip.kv.kv_effects(model, context, suffix, metric=("nll", "kl"))
    again = ip.kv.KVEffects.load(found.save(tmp_path / "e"))
    np.testing.assert_array_equal(again.effect, found.effect)
    drawn = again.text(metric="kl")
    assert len(drawn.texts) == CONTEXT + SUFFIX
    assert found.html().count("<span") == CONTEXT and "shared" in found._repr_html_()
    assert ip.kv.kv_effects(model, context, suffix, unit=[(0, 4)]).html().count("rgb(255,255,255)") == CONTEXT - 4
    with pytest.raises(ip.ResultError, match="tokens or spans"):
        ip.kv.kv_effects(model, context, suffix, unit=("layer",)).text()
