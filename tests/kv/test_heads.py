"""Retaining heads: what they read, that they are causal, that they learn, and that files come back."""

from __future__ import annotations

import pytest
import torch

import interp as ip
from tests import zoo
from tests.kv.test_effects import CONTEXT, texts


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_scores_do_not_change_when_tokens_are_appended(family):
    model = zoo.wrapped(family)
    heads = ip.kv.RetainingHeads.for_model(model, 16)
    (context,), _ = texts(1)
    whole = ip.kv.scores_of(model, model.inputs([context]), heads.policy())
    for length in (4, 7):
        part = ip.kv.scores_of(model, model.inputs([context[:length]]), heads.policy())
        assert abs(whole[..., :length] - part).max() < 1e-6
    chunked = ip.kv.scores_of(model, model.inputs([context]), heads.policy(), chunk=2)
    assert abs(chunked - whole).max() < 1e-6 and whole.std() > 1e-2
    # A score that looks at later queries does change, so that this test can fail.
    h2o = ip.kv.policies.h2o()
    part = ip.kv.scores_of(model, model.inputs([context[:7]]), h2o)
    assert abs(ip.kv.scores_of(model, model.inputs([context]), h2o)[..., :7] - part).max() > 1e-2


def test_heads_read_what_projections_make():
    model = zoo.wrapped("llama")
    heads = ip.kv.RetainingHeads.for_model(model, 16)
    (context,), _ = texts(2)
    names = ("q", "k", "v")
    tape = model.run(model.inputs([context]), capture=[ip.site(n, layer=1) for n in names]).tape
    read = torch.cat([tape[ip.site(n, layer=1)][0].flatten(1) for n in names], -1)
    expected = heads.last[1](torch.nn.functional.silu(heads.first[1](read.to(heads.first[1].weight.dtype)))).T
    found = ip.kv.scores_of(model, model.inputs([context]), heads.policy())[1]
    torch.testing.assert_close(torch.from_numpy(found).float(), expected.detach().float(), rtol=0, atol=1e-5)
    sizes = heads.settings["sizes"] * 16 + 16 * heads.settings["heads"]
    assert heads.parameters_count == model.n_layers * sizes


def test_labels():
    model = zoo.wrapped("llama")
    (context,), (suffix,) = texts(3)
    (published,) = ip.kv.examples(model, context, suffix, "published")
    ids = model.inputs([context + suffix])
    tape = model.run(ids, capture=[ip.site("rot_q", layer=2), ip.site("rot_k", layer=2)]).tape
    q, k = tape[ip.site("rot_q", layer=2)][0], tape[ip.site("rot_k", layer=2)][0]
    queries = q[CONTEXT : CONTEXT + 3].unflatten(1, (2, 2))
    expected = torch.einsum("mkgd,skd->kgms", queries, k[:CONTEXT]).amax((1, 2)) / q.shape[-1] ** 0.5
    torch.testing.assert_close(published.labels[2], expected.float(), rtol=0, atol=1e-5)
    (causal,) = ip.kv.examples(model, context, suffix, "interventional")
    effect = torch.from_numpy(ip.kv.kv_effects(model, context, suffix).effect[..., 0]).abs()
    torch.testing.assert_close(causal.labels.double(), effect / effect.square().mean().sqrt(), rtol=1e-4, atol=1e-5)
    (both,) = ip.kv.examples(model, context, suffix, "both")
    apart = published.labels - published.labels.mean(-1, keepdim=True)
    torch.testing.assert_close(both.labels[0], apart / apart.square().mean().sqrt(), rtol=1e-5, atol=1e-6)
    assert torch.equal(both.labels[1], causal.labels)
    with pytest.raises(ip.InputsError, match="published"):
        ip.kv.examples(model, context, suffix, "all")


def test_heads_learn_and_the_backbone_does_not():
    model = zoo.fresh("llama")
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    contexts, suffixes = texts(4, rows=3)
    some = ip.kv.examples(model, contexts, suffixes)
    heads = ip.kv.RetainingHeads.for_model(model, 32)
    losses = ip.kv.train_heads(heads, some, steps=60, batch=3, learning_rate=3e-3)
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.module.named_parameters())
    again = ip.kv.RetainingHeads.for_model(model, 32)
    assert ip.kv.train_heads(again, some, steps=60, batch=3, learning_rate=3e-3) == losses
    with pytest.raises(ip.InputsError, match="none"):
        ip.kv.train_heads(heads, [])
    broken = ip.kv.Example(some[0].reads, some[0].labels * torch.nan)
    with pytest.raises(ip.InputsError, match="nan"):
        ip.kv.train_heads(heads, [broken])


def test_one_score_is_trained_on_both_labels():
    """The loss is what the two say, by their shares; either share alone is that label's own loss."""
    model = zoo.wrapped("llama")
    contexts, suffixes = texts(5, rows=3)
    some = ip.kv.examples(model, contexts, suffixes, "both")
    settings = {"steps": 60, "batch": 3, "learning_rate": 3e-3}

    def trained(given, **more):
        heads = ip.kv.RetainingHeads.for_model(model, 32)
        losses = ip.kv.train_heads(heads, given, **settings, **more)
        return losses, heads

    for mix, which in ((0.0, 0), (1.0, 1)):
        alone = [ip.kv.Example(one.reads, one.labels[which]) for one in some]
        assert trained(some, mix=mix)[0] == trained(alone)[0]
    losses, heads = trained(some)
    parts = [trained(some, mix=mix)[0] for mix in (0.0, 1.0)]
    assert losses[0] == pytest.approx((parts[0][0] + parts[1][0]) / 2, rel=1e-5) and losses[-1] < losses[0]
    with torch.no_grad():
        scores = torch.stack([heads(layer, *some[0].reads[layer])[0] for layer in range(model.n_layers)])

    def apart(labels):
        return torch.nn.functional.smooth_l1_loss(scores, labels).item()

    assert apart(some[0].labels.mean(0)) < min(apart(one) for one in some[0].labels)
    for mix in (-0.1, 1.5, float("nan")):
        with pytest.raises(ip.InputsError, match="mix"):
            trained(some, mix=mix)


def test_files_come_back_and_are_refused(tmp_path):
    model = zoo.wrapped("llama")
    heads = ip.kv.RetainingHeads.for_model(model, 16, seed=3)
    path = heads.save(tmp_path / "heads")
    again = ip.kv.RetainingHeads.load(path, model)
    assert all(torch.equal(a, b) for a, b in zip(heads.parameters(), again.parameters(), strict=True))
    with pytest.raises(ip.ShapeError, match="these heads are for"):
        ip.kv.RetainingHeads.load(path, zoo.wrapped("qwen3"))
    other = zoo.wrapped("qwen2")
    with pytest.raises(ip.ShapeError, match="another model"):
        ip.kv.prefill(other, other.inputs([[3, 4, 5, 6]]), heads.policy(), 2)
    (tmp_path / "heads.safetensors").write_bytes(b"x")
    with pytest.raises(ip.ResultError):
        ip.kv.RetainingHeads.load(path)
