"""Eviction: what is kept is what is masked, whatever the chunks, positions, heads, padding and model."""

from __future__ import annotations

import pytest
import torch

import interp as ip
from interp.kv import policies
from tests import zoo
from tests.kv.test_effects import deleted

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2"]
LENGTH = 21


def ids(rows: int = 1, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, zoo.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.module(tokens).logits


def scores_for(model, tokens: int, seed: int = 0) -> torch.Tensor:
    heads = model.architecture.blocks[0].attention.k.heads
    return torch.rand(model.n_layers, heads, tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["absolute", "slot"])
def test_a_budget_that_holds_everything_is_the_full_cache(family, positions):
    model, tokens = zoo.wrapped(family), ids(2)
    inputs = model.inputs(tokens[:, :15])
    cache = ip.kv.prefill(model, inputs, policies.h2o(), 15, chunk=4, positions=positions)
    expected = logits_of(model, tokens)
    torch.testing.assert_close(cache.logits, expected[:, 14], rtol=0, atol=1e-10)
    torch.testing.assert_close(ip.kv.follow(model, cache, tokens[:, 15:]), expected[:, 15:], rtol=0, atol=1e-10)
    assert cache.seen == LENGTH and cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_eviction_equals_masking(family):
    """Keys that are gone are keys that are masked, when all chunks but the first come after the last eviction."""
    model, tokens = zoo.wrapped(family), ids()
    scores = scores_for(model, 15)
    cache = ip.kv.prefill(model, model.inputs(tokens[:, :15]), policies.given(scores), 6, chunk=15)
    assert cache.layers[0].width == 6
    place = scores.argsort(-1, descending=True).argsort(-1)
    gone = {
        layer: {head: (place[layer, head] >= 6).nonzero().flatten().tolist() for head in range(scores.shape[1])}
        for layer in range(model.n_layers)
    }
    assert torch.equal(cache.kept(), place < 6)
    masked = deleted(model.module, tokens[0, :15].tolist(), tokens[0, 15:].tolist(), gone)
    found = ip.kv.follow(model, cache, tokens[:, 15:])[0, :-1]
    torch.testing.assert_close(found, masked, rtol=0, atol=1e-10)
    assert (found - logits_of(model, tokens)[0, 15:-1]).abs().max() > 1e-2


def streamed(model, tokens, scores, budget, chunk, local=0):
    """The same by knock-outs: a key is forbidden to all queries after the chunk at which it was let go."""
    context = scores.shape[-1]
    plan, kept = ip.Plan(), torch.zeros_like(scores, dtype=torch.bool)
    for start in range(0, context - local, chunk):
        stop = min(start + chunk, context - local)
        kept[..., start:stop] = True
        rank = scores.masked_fill(~kept, -torch.inf).argsort(-1, descending=True).argsort(-1)
        leaving = kept & (rank >= budget)
        kept = kept & ~leaving
        for layer, head, token in leaving.nonzero().tolist():
            groups = model.architecture.blocks[0].attention.q.heads // scores.shape[1]
            asking = [head * groups + g for g in range(groups)]
            place = ip.site("scores", layer=layer, head=asking, pos=range(stop, tokens.shape[1]), key_pos=token)
            plan = plan + ip.knockout(place)
    return model.run(model.inputs(tokens), plan).logits, kept


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_chunks_equal_knockouts(family):
    model, tokens = zoo.fresh(family), ids(seed=1)
    scores = scores_for(model, 15)
    expected, kept = streamed(model, tokens, scores, 5, 4, local=2)
    cache = ip.kv.prefill(model, model.inputs(tokens[:, :15]), policies.given(scores), 5, chunk=4, local=2)
    kept[..., 13:] = True
    assert torch.equal(cache.kept(), kept)
    found = ip.kv.follow(model, cache, tokens[:, 15:])
    torch.testing.assert_close(found, expected[:, 15:], rtol=0, atol=1e-9)
    # With fixed scores, the best of a stream are the best of the whole text.
    best = scores[..., :13].argsort(-1, descending=True).argsort(-1) < 5
    assert torch.equal(cache.kept()[..., :13], best)


def test_budgets_of_layers_and_heads_and_pools():
    model, tokens = zoo.wrapped("llama"), ids(seed=2)
    scores = scores_for(model, LENGTH)
    budget = torch.tensor([[3, 7], [5, 5], [9, 2]])
    cache = ip.kv.prefill(model, model.inputs(tokens), policies.given(scores), budget, chunk=6)
    assert torch.equal(cache.kept().sum(-1), budget)
    place = scores.argsort(-1, descending=True).argsort(-1)
    assert torch.equal(cache.kept(), place < budget[..., None])
    pooled = ip.kv.prefill(model, model.inputs(tokens), policies.given(scores), 4, chunk=LENGTH, across="layer")
    best = scores.flatten(1).argsort(-1, descending=True).argsort(-1).reshape(scores.shape) < 8
    assert torch.equal(pooled.kept(), best)
    with pytest.raises(ip.ModelError, match="heads or rows keep different keys"):
        model.module(tokens[:, :1], past_key_values=pooled)
    by_layer = ip.kv.prefill(model, model.inputs(tokens), policies.given(scores), [3, 4, 5], chunk=LENGTH)
    assert [layer.width for layer in by_layer.layers] == [3, 4, 5]


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("positions", ["absolute", "slot"])
def test_padded_rows_are_rows_alone(family, positions):
    model, tokens = zoo.wrapped(family), ids(3, seed=3)
    contexts = [tokens[0, :12].tolist(), tokens[1, :8].tolist(), tokens[2, :10].tolist()]
    settings = {"chunk": 4, "stabilizers": 1, "sinks": 1, "local": 2, "positions": positions}
    batch = model.inputs(contexts, padding="left")
    together = ip.kv.prefill(model, batch, policies.key_norm(), 5, **settings)
    # Rotary angles are rounded to float32 by transformers, so that positions that are shifted alike agree to that.
    close = {"rtol": 0, "atol": 1e-10 if positions == "absolute" else 1e-5}
    after = ip.kv.follow(model, together, tokens[:, 15:])
    for row, context in enumerate(contexts):
        # Chunks end at other tokens in a row that is padded: what is the same is a row whose chunks are.
        padding = 12 - len(context)
        alone = model.inputs(
            torch.tensor([[0] * padding + context]), torch.tensor([[0] * padding + [1] * len(context)])
        )
        single = ip.kv.prefill(model, alone, policies.key_norm(), 5, **settings)
        found = ip.kv.follow(model, single, tokens[row : row + 1, 15:])
        torch.testing.assert_close(after[row : row + 1], found, **close)
        assert torch.equal(together.kept(row)[..., : len(context)], single.kept(0)[..., : len(context)])
        if padding % 4 == 0:
            bare = ip.kv.prefill(model, model.inputs([context]), policies.key_norm(), 5, **settings)
            torch.testing.assert_close(ip.kv.follow(model, bare, tokens[row : row + 1, 15:]), found, **close)


def test_slots_move_keys_together():
    """By slot, what is kept is as a text of its own: with all of one prefix gone, the rest is attended to as alone."""
    model, tokens = zoo.wrapped("llama"), ids(seed=4)
    scores = torch.arange(12.0).expand(3, 2, 12)
    settings = {"chunk": 12, "eviction": 5}
    slot = ip.kv.prefill(model, model.inputs(tokens[:, :12]), policies.given(scores), positions="slot", **settings)
    absolute = ip.kv.prefill(model, model.inputs(tokens[:, :12]), policies.given(scores), **settings)
    with ip.kv.attending(slot) as state:
        model.module(tokens[:, 12:], past_key_values=slot)
        assert state.positions.tolist() == [list(range(5, 5 + LENGTH - 12))]
    # Rotary attention is relative: with the last keys alone, slots and absolute positions are the same.
    found = ip.kv.follow(model, absolute, tokens[:, 12:])
    again = ip.kv.prefill(model, model.inputs(tokens[:, :12]), policies.given(scores), positions="slot", **settings)
    torch.testing.assert_close(ip.kv.follow(model, again, tokens[:, 12:]), found, rtol=0, atol=1e-5)
    holes = scores_for(model, 12)
    one, two = (
        ip.kv.follow(
            model,
            ip.kv.prefill(model, model.inputs(tokens[:, :12]), policies.given(holes), 5, chunk=12, positions=p),
            tokens[:, 12:],
        )
        for p in ("slot", "absolute")
    )
    assert (one - two).abs().max() > 1e-3


@pytest.mark.parametrize("positions", ["absolute", "slot"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"across": "layer"}])
def test_generate_goes_on_from_what_is_kept(positions, settings):
    settings = dict(settings)
    across = settings.pop("across", "head")
    model, tokens = zoo.wrapped("llama"), ids(2, seed=5)
    inputs = model.inputs(tokens[:, :15])
    make = lambda: ip.kv.prefill(  # noqa: E731
        model, inputs, policies.h2o(), 6, chunk=5, positions=positions, across=across
    )
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **settings}
    found = ip.kv.generate(model, make(), model.inputs(tokens), **options)
    assert found.shape == (2, LENGTH + 5) and torch.equal(found[:, :LENGTH], tokens)
    if not settings:
        cache = make()
        now = ip.kv.follow(model, cache, tokens[:, 15:])[:, -1].argmax(-1)
        for step in range(5):
            assert torch.equal(found[:, LENGTH + step], now)
            now = ip.kv.follow(model, cache, now[:, None])[:, -1].argmax(-1)
    whole = ip.kv.prefill(model, inputs, policies.h2o(), 15, chunk=5, positions=positions)
    with torch.no_grad():
        plain = model.module.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    assert torch.equal(ip.kv.generate(model, whole, model.inputs(tokens), **options), plain)


def test_a_plain_cache_needs_no_context():
    """Heads that keep as many keys, at their own positions, are what the model's own attention can use."""
    model, tokens = zoo.wrapped("llama"), ids(seed=6)
    make = lambda: ip.kv.prefill(model, model.inputs(tokens[:, :15]), policies.key_norm(), 6, chunk=5)  # noqa: E731
    inside = ip.kv.follow(model, make(), tokens[:, 15:])
    with torch.no_grad():
        outside = model.module(tokens[:, 15:], past_key_values=make()).logits
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        generated = model.module.generate(tokens, past_key_values=make(), **options)
    torch.testing.assert_close(outside, inside, rtol=0, atol=1e-10)
    assert torch.equal(generated, ip.kv.generate(model, make(), model.inputs(tokens), **options))
    for settings in ({"positions": "slot"}, {"decoding": True}):
        cache = ip.kv.prefill(model, model.inputs(tokens[:, :15]), policies.key_norm(), 6, chunk=5, **settings)
        with pytest.raises(ip.ModelError, match="within ip"):
            model.module(tokens[:, 15:], past_key_values=cache)


def test_keys_go_while_decoding():
    model, tokens = zoo.wrapped("llama"), ids(seed=7)
    settings = {"chunk": 5, "decoding": True, "every": 3, "stabilizers": 2}
    cache = ip.kv.prefill(model, model.inputs(tokens[:, :15]), policies.tova(), 6, **settings)
    widths = []
    for step in range(15, LENGTH):
        ip.kv.follow(model, cache, tokens[:, step : step + 1])
        widths.append(cache.layers[0].width)
    assert widths == [7, 8, 6, 7, 8, 6]
    assert cache.kept()[..., -2:].all()
    with pytest.raises(ip.ModelError, match="taken back"):
        cache.crop(-4)
    out = ip.kv.generate(
        model, cache, model.inputs(torch.cat([tokens, ids(length=1)], 1)), max_new_tokens=6, pad_token_id=0
    )
    assert out.shape == (1, LENGTH + 7) and cache.layers[0].width <= 9


def test_tokens_are_taken_back():
    model, tokens = zoo.wrapped("llama"), ids(seed=8)
    cache = ip.kv.prefill(model, model.inputs(tokens[:, :15]), policies.key_norm(), 6, chunk=5)
    first = ip.kv.follow(model, cache, tokens[:, 15:])
    cache.crop(-(LENGTH - 15))
    assert cache.seen == 15
    torch.testing.assert_close(ip.kv.follow(model, cache, tokens[:, 15:]), first, rtol=0, atol=1e-12)


def test_the_model_is_as_it_was():
    model, tokens = zoo.fresh("llama"), ids()
    before = {name: len(m._forward_pre_hooks) for name, m in model.module.named_modules()}
    config = model.module.model.layers[0].self_attn.config

    def broken(view):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        ip.kv.prefill(model, model.inputs(tokens), ip.kv.Policy("broken", broken), 6, chunk=5)
    assert {name: len(m._forward_pre_hooks) for name, m in model.module.named_modules()} == before
    assert model.module.model.layers[0].self_attn.config is config is model.module.config


class Press:
    """A press of the common interface."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        assert attentions is None and "position_embeddings" in kwargs
        assert hidden_states.shape[-1] == module.q_proj.in_features
        return -keys.norm(dim=-1)


def test_a_press_is_a_policy():
    model, tokens = zoo.wrapped("llama"), ids(seed=9)
    cache = ip.kv.prefill(model, model.inputs(tokens), ip.kv.press(Press()), 6, chunk=5)
    mine = ip.kv.prefill(model, model.inputs(tokens), policies.key_norm(), 6, chunk=5)
    assert torch.equal(cache.kept(), mine.kept()) and cache.policy.name == "Press"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"eviction": 4, "stabilizers": 3, "sinks": 2}, ip.InputsError, "does not hold"),
        ({"eviction": 0}, ip.InputsError, "does not hold"),
        ({"eviction": 2.5}, ip.InputsError, "whole number"),
        ({"eviction": [1, 2]}, ip.ShapeError, "budgets are"),
        ({"eviction": 4, "chunk": 0}, ip.InputsError, "chunk"),
        ({"eviction": 4, "positions": "slots"}, ip.InputsError, "slot"),
        ({"eviction": 4, "local": LENGTH}, ip.InputsError, "none before"),
        ({"eviction": 4, "policy": None}, ip.InputsError, "needs a policy"),
        ({"eviction": 4, "policy": ip.kv.Policy("nan", lambda v: v.scores * torch.nan)}, ip.MetricError, "nan"),
        ({"eviction": 4, "policy": ip.kv.Policy("odd", lambda v: v.scores[..., 1:])}, ip.ShapeError, "expected"),
        ({"eviction": 4, "policy": ip.kv.Policy("none", lambda v: None)}, ip.ShapeError, "NoneType"),
        ({"eviction": 4, "policy": policies.given(torch.zeros(3, 2, 5))}, ip.ShapeError, "5 tokens"),
    ],
)
def test_bad_input(settings, error, message):
    model = zoo.wrapped("llama")
    given = {"policy": policies.key_norm(), **settings}
    with pytest.raises(error, match=message):
        ip.kv.prefill(model, model.inputs(ids()), **given)


def test_wrong_uses_are_refused():
    model, other, tokens = zoo.fresh("llama"), zoo.wrapped("qwen2"), ids()
    inputs = model.inputs(tokens[:, :15])
    cache = ip.kv.prefill(model, inputs, policies.key_norm(), 6)
    with pytest.raises(ip.ModelError, match="another model's"):
        zoo.wrapped("gpt2").module(tokens[:, 15:], past_key_values=cache)
    with ip.kv.attending(cache), pytest.raises(ip.ModelError, match="without the cache"):
        model.module(tokens[:, 15:])
    with ip.kv.attending(cache), pytest.raises(ip.ModelError, match="already"), ip.kv.attending(cache):
        pass
    with pytest.raises(ip.ModelError, match="takes the cache"), ip.kv.attending({}):
        pass
    with pytest.raises(ip.InputsError, match="pad on the left"):
        ip.kv.prefill(model, model.inputs([[3, 4, 5], [6, 7]]), policies.key_norm(), 2)
    with pytest.raises(ip.InputsError, match="at least one more"):
        ip.kv.generate(model, cache, inputs, max_new_tokens=1)
    with pytest.raises(ip.ModelError, match="rows"):
        ip.kv.follow(model, cache, tokens[:, 15:].expand(2, -1))
    small = zoo.wrapped("small_rms_rotary_gqa")
    with pytest.raises(ip.ModelError, match="not a decoder of theirs"):
        ip.kv.prefill(small, small.inputs(tokens), policies.key_norm(), 6)
    with pytest.raises(ip.ModelError, match="rotary"):
        ip.kv.prefill(zoo.wrapped("gpt2"), inputs, policies.key_norm(), 6, positions="slot")
    with model.apply(ip.zero(ip.site("mlp_out", layer=0))):
        with pytest.raises(ip.ModelError, match="held"):
            ip.kv.prefill(model, inputs, policies.key_norm(), 6)
        ip.evaluate(model, inputs, ip.logit(1))
    assert other is not None
    short = ip.kv.prefill(model, model.inputs(tokens[:, :3]), policies.h2o(), 6, chunk=1000)
    assert short.layers[0].width == 3


def test_attention_that_is_something_else_is_refused():
    """BLOOM's scores have a bias by distance, which comes in its mask."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=zoo.VOCAB, hidden_size=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    )
    module = BloomForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    model = ip.wrap(module)
    with pytest.raises(ip.InterpError, match=r"away from its own forward|attention interface"):
        ip.kv.prefill(model, model.inputs(ids()), policies.key_norm(), 6)


def test_other_dtypes():
    model, tokens = ip.wrap(zoo.make("llama", dtype=torch.bfloat16)), ids(2)
    cache = ip.kv.prefill(model, model.inputs(tokens[:, :15]), policies.snapkv(4), 15, chunk=4, positions="slot")
    expected = logits_of(model, tokens)[:, 15:]
    assert cache.layers[0].keys.dtype == torch.bfloat16
    found = ip.kv.follow(model, cache, tokens[:, 15:])
    assert (found - expected).abs().max() < 0.15 * expected.abs().max()
