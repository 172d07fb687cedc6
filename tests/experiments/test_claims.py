"""What the README and the pages for users of other tools say of TransformerLens and nnsight, tried on them."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from torch import nn

from tests import zoo
from tests.hooks import bridged

TOKENS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4]])
ELSE = torch.tensor([[3, 9, 5, 2, 7, 8], [9, 3, 7, 6, 1, 4]])
Z = "blocks.1.attn.hook_z"

lens = pytest.importorskip("transformer_lens")


def ran(bridge, hooks) -> torch.Tensor:
    return bridge.run_with_hooks(TOKENS, fwd_hooks=hooks)


@pytest.fixture(scope="module")
def gpt2():
    return bridged.boot(bridged.make("gpt2"))


@pytest.fixture(scope="module")
def llama():
    return bridged.boot(bridged.make("llama"))


def test_of_these_versions():
    assert version("transformer_lens").startswith("4.3.") and version("nnsight").startswith("0.8.")


# TransformerLens


def test_a_bridge_changes_the_model_that_it_wraps():
    module = bridged.make("gpt2")
    names = set(module.state_dict())
    bridged.boot(module)
    assert names != set(module.state_dict())


def test_a_hook_name_that_resolves_to_nothing_raises(gpt2):
    with pytest.raises(Exception, match=r"blocks\.1\.attn\.hook_zz"):
        ran(gpt2, [("blocks.1.attn.hook_zz", lambda x, hook: 0 * x)])


def test_hook_points_that_exist_and_never_fire_raise_nothing():
    neox = bridged.boot(bridged.make("neox"))
    fired = []
    for name in ("blocks.1.attn.hook_rot_q", "blocks.1.attn.hook_rot_k"):
        assert name in neox.hook_dict
        ran(neox, [(name, lambda x, hook: fired.append(hook.name))])
    assert not fired


def test_grouped_keys_and_values_are_read_and_patched_by_head(llama):
    _, cache = llama.run_with_cache(TOKENS)
    heads = llama.cfg.n_key_value_heads
    assert heads < llama.cfg.n_heads
    assert cache["blocks.1.attn.hook_k"].shape[2] == heads
    from transformer_lens import patching

    found = patching.get_act_patch_attn_head_v_all_pos(llama, ELSE, cache, lambda logits: logits[:, -1, 3].sum())
    assert found.shape == (llama.cfg.n_layers, heads) and float(found.std()) > 0


def test_a_sweep_runs_one_forward_pass_a_cell(gpt2):
    from transformer_lens import patching

    _, cache = gpt2.run_with_cache(TOKENS)
    calls = []
    handle = gpt2.original_model.register_forward_pre_hook(lambda m, a: calls.append(1))
    try:
        found = patching.get_act_patch_resid_pre(gpt2, ELSE, cache, lambda logits: logits[:, -1, 3].sum())
    finally:
        handle.remove()
    assert len(calls) >= found.numel() == gpt2.cfg.n_layers * TOKENS.shape[1]


def test_edges_are_scored_by_attribution_patching(gpt2, llama):
    from transformer_lens.tools.analysis import EdgeAttributionConfig, attribution_patch

    def metric(logits):
        return logits[:, -1, 3].sum()

    config = EdgeAttributionConfig(granularity="edge")
    result = attribution_patch(gpt2, TOKENS[:1], ELSE[:1], metric, config=config)
    assert max(abs(float(score)) for score in result.edge_scores.values()) > 0
    with pytest.raises(Exception, match=r"(?i)n_key_value_heads"):  # not where heads share keys and values
        attribution_patch(llama, TOKENS[:1], ELSE[:1], metric, config=config)


def test_attn_in_is_a_copy_for_each_head(gpt2):
    gpt2.set_use_attn_in(True)
    try:
        _, cache = gpt2.run_with_cache(TOKENS)
        assert cache["blocks.1.hook_attn_in"].shape[2] == gpt2.cfg.n_heads
    finally:
        gpt2.set_use_attn_in(False)


def test_a_hook_at_resid_mid_reaches_the_mlp_alone(gpt2):
    plain, edited = {}, {}

    def keep(into, name):
        return (name, lambda x, hook: into.__setitem__(name, x.detach().clone()))

    names = ["blocks.1.hook_resid_pre", "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"]
    ran(gpt2, [keep(plain, name) for name in names])
    ran(gpt2, [("blocks.1.hook_resid_mid", lambda x, hook: 3 * x), *(keep(edited, name) for name in names)])
    assert not torch.allclose(plain[names[2]], edited[names[2]])
    stream = edited[names[0]] + edited[names[1]] + edited[names[2]]
    torch.testing.assert_close(edited[names[3]], stream)


def test_forbidden_scores_are_the_lowest_number(gpt2):
    _, cache = gpt2.run_with_cache(TOKENS)
    scores = cache["blocks.1.attn.hook_attn_scores"]
    assert float(scores[0, 0, 0, 1]) == torch.finfo(scores.dtype).min


@pytest.mark.parametrize(("family", "nan"), [("llama", True), ("gemma2", True), ("gpt2", False), ("neox", False)])
def test_rows_padded_on_the_left_in_float64_are_nan(family, nan):
    bridge = bridged.boot(bridged.make(family, torch.float64))
    mask = torch.ones_like(TOKENS)
    mask[1, :2] = 0
    assert bool(bridge(TOKENS, attention_mask=mask)[1, 2:].isnan().any()) == nan


def test_normalized_is_before_the_weight_and_hook_out_after_it(llama):
    """Why the sites ln1 and ln2 are ``hook_out``."""
    _, cache = llama.run_with_cache(TOKENS)
    x, scale = (cache[f"blocks.1.{name}"] for name in ("hook_resid_pre", "ln1.hook_scale"))
    torch.testing.assert_close(cache["blocks.1.ln1.hook_normalized"], x / scale)
    norm = llama.original_model.model.layers[1].input_layernorm
    torch.testing.assert_close(cache["blocks.1.ln1.hook_out"], x / scale * norm.weight)


# nnsight


@pytest.fixture(scope="module")
def nnsight():
    own = torch.Tensor.backward
    yield pytest.importorskip("nnsight")
    torch.Tensor.backward = own  # nnsight puts one of its own there


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


def test_any_module_runs_and_one_that_is_not_called_raises(nnsight):
    model = nnsight.NNsight(Two())
    with model.trace(torch.ones(1, 4)):
        kept = model.used.output.save()
    assert kept.shape == (1, 4)
    with pytest.raises(Exception, match=r"(?i)unused"):  # noqa: SIM117
        with model.trace(torch.ones(1, 4)):
            kept = model.unused.output.save()


def test_remote_of_a_plain_model_runs_here_and_says_nothing(nnsight):
    model = nnsight.NNsight(zoo.make("gpt2"))
    with model.trace(TOKENS, remote=True):
        kept = model.transformer.h[0].output.save()
    assert kept is not None
