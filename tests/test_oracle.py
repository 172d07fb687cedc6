"""The oracle against the models themselves: logits, what plain forward hooks see, gradients, and what edits do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from interp.models import Transformer, TransformerConfig
from tests import oracle, zoo

HF = [family for family in zoo.FAMILIES if not family.startswith("small")]
ROTARY = [family for family in zoo.FAMILIES if family not in ("gpt2", "small_ln_learned", "small_qk_norm")]
WITH_MLP = [family for family in zoo.FAMILIES if family != "small_attn_only"]
WITH_MID = [family for family in WITH_MLP if family != "neox"]  # whose blocks are parallel
PADDINGS = {"none": ([7, 7], "right"), "right": ([9, 4, 6], "right"), "left": ([9, 4, 6], "left")}
EXACT = {"rtol": 0.0, "atol": 1e-10}

each_family = pytest.mark.parametrize("family", zoo.FAMILIES)
each_padding = pytest.mark.parametrize("padding", PADDINGS)


def logits_of(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """The model's own logits [B,T,V], its mask and positions given."""
    out = model(input_ids=ids, attention_mask=mask.long(), position_ids=oracle.positions(mask))
    return out if isinstance(out, Tensor) else out.logits


def example(family: str, padding: str = "left", seed: int = 1) -> tuple[nn.Module, Tensor, Tensor]:
    lengths, side = PADDINGS[padding]
    return zoo.make(family), *zoo.random_inputs(zoo.VOCAB, lengths, side, seed)


def differs(a: Tensor, b: Tensor, mask: Tensor) -> bool:
    """Whether every row changed at a real token, by far more than rounding."""
    change = (a - b).flatten(2).abs().amax(-1).masked_fill(~mask, 0.0)
    return bool((change.amax(-1) > 1e-3).all())


# Logits


@each_family
@each_padding
@torch.no_grad()
def test_logits_equal_the_model(family, padding):
    model, ids, mask = example(family, padding)
    logits, _ = oracle.forward(model, ids, mask)
    torch.testing.assert_close(logits[mask], logits_of(model, ids, mask)[mask], **EXACT)


@pytest.mark.parametrize("family", HF)
@torch.no_grad()
def test_logits_equal_the_model_with_its_own_norms(family):
    """Widening norms and eager attention is all that the zoo changes in a model, and it changes rounding alone."""
    lengths, side = PADDINGS["none" if family == "gemma2" else "left"]  # eager, so NaN in float64 where it has no key
    ids, mask = zoo.random_inputs(zoo.VOCAB, lengths, side)
    model = zoo.make(family, widen=False)
    logits, _ = oracle.forward(model, ids, mask)
    torch.testing.assert_close(logits[mask], logits_of(model, ids, mask)[mask], rtol=0.0, atol=2e-5)


OPTIONS = [
    {"positions": "none", "activation": "gelu_tanh"},
    {"positions": "none", "bias": False, "n_kv_heads": 1, "tied": True},
    {"positions": "rotary", "rotary_base": 100.0, "qk_norm": True, "n_kv_heads": 2},
    {"positions": "rotary", "gated": True, "activation": "relu", "norm": "rmsnorm", "qk_norm": True, "bias": False},
    {"positions": "learned", "gated": True, "activation": "silu", "d_head": 5, "norm_eps": 0.1},
    {"positions": "learned", "d_mlp": None, "qk_norm": True, "norm": "rmsnorm", "tied": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
@each_padding
@torch.no_grad()
def test_logits_equal_the_small_transformer_with_other_options(options, padding):
    base = TransformerConfig(vocab_size=zoo.VOCAB, n_layers=2, d_model=24, n_heads=4, d_mlp=20, n_ctx=16)
    lengths, side = PADDINGS[padding]
    ids, mask = zoo.random_inputs(zoo.VOCAB, lengths, side)
    data = base.to_dict() | {"n_kv_heads": None, "d_head": None} | options
    model = zoo.prepare(Transformer(TransformerConfig.from_dict(data)))
    logits, _ = oracle.forward(model, ids, mask)
    torch.testing.assert_close(logits[mask], logits_of(model, ids, mask)[mask], **EXACT)


@torch.no_grad()
def test_logits_equal_a_model_that_mixes_full_and_sliding_layers():
    from transformers import Qwen3ForCausalLM

    config = zoo.make("qwen3").config
    config.use_sliding_window, config.sliding_window = True, 3
    config.layer_types = ["full_attention", "sliding_attention"]
    model = zoo.prepare(Qwen3ForCausalLM(config))
    ids, mask = zoo.random_inputs(zoo.VOCAB, [9, 5], "left")
    logits, cache = oracle.forward(model, ids, mask)
    torch.testing.assert_close(logits[mask], logits_of(model, ids, mask)[mask], **EXACT)
    assert cache["pattern", 0][0, 0, -1].count_nonzero() == 9
    assert cache["pattern", 1][0, 0, -1].count_nonzero() == 3


@each_family
@torch.no_grad()
def test_padding_changes_nothing(family):
    """A row alone, padded on the left and padded on the right has the same logits at its real tokens."""
    model = zoo.make(family)
    alone, together = [], []
    for side in ("left", "right"):
        ids, mask = zoo.random_inputs(zoo.VOCAB, [9, 4, 6], side)
        together.append(oracle.forward(model, ids, mask)[0][mask])
    for row in range(len(ids)):
        real = ids[row, mask[row]][None]
        alone.append(oracle.forward(model, real, torch.ones_like(real, dtype=torch.bool))[0][0])
    torch.testing.assert_close(together[0], torch.cat(alone), **EXACT)
    torch.testing.assert_close(together[1], torch.cat(alone), **EXACT)


@each_family
def test_gradients_equal_the_model(family):
    model, ids, mask = example(family, "right")
    weight = torch.randn(zoo.VOCAB, dtype=torch.float64)
    parameters = list(model.parameters())
    ours = torch.autograd.grad((oracle.forward(model, ids, mask)[0][mask] @ weight).sum(), parameters)
    theirs = torch.autograd.grad((logits_of(model, ids, mask)[mask] @ weight).sum(), parameters)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
    assert max(gradient.abs().max() for gradient in ours) > 0.1


@each_family
def test_gradients_are_finite_where_a_query_attends_to_nothing(family):
    model, ids, mask = example(family, "left")
    gradients = torch.autograd.grad(oracle.forward(model, ids, mask)[0][mask].sum(), list(model.parameters()))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


@each_family
@torch.no_grad()
def test_no_module_is_called(family, monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the oracle called a module of the model")

    model, ids, mask = example(family)
    monkeypatch.setattr(nn.Module, "__call__", refuse)
    oracle.forward(model, ids, mask)


# What the model computes on the way

# (module, layer's site): what the module returns or, marked "<", the first thing that it reads.
Boundaries = dict[str, str]

BOUNDARIES: dict[str, tuple[Boundaries, str, Boundaries]] = {
    "gpt2": (
        {
            "transformer.wte": "embed",
            "transformer.wpe": "pos_embed",
            "transformer.ln_f": "ln_final",
            "lm_head": "logits",
        },
        "transformer.h.{}",
        {
            "<": "resid_pre",
            "": "resid_post",
            "<ln_1": "attn_in",
            "attn": "attn_out",
            "<attn.c_proj": "z",
            "<ln_2": "resid_mid",
            "ln_1": "ln1",
            "ln_2": "ln2",
            "mlp.c_fc": "mlp_pre",
            "mlp.act": "mlp_post",
            "mlp": "mlp_out",
        },
    ),
    "llama": (
        {"model.embed_tokens": "embed", "model.norm": "ln_final", "lm_head": "logits"},
        "model.layers.{}",
        {
            "<": "resid_pre",
            "": "resid_post",
            "<input_layernorm": "attn_in",
            "self_attn.q_proj": "q",
            "self_attn.k_proj": "k",
            "self_attn.v_proj": "v",
            "<self_attn.o_proj": "z",
            "self_attn": "attn_out",
            "<post_attention_layernorm": "resid_mid",
            "input_layernorm": "ln1",
            "post_attention_layernorm": "ln2",
            "mlp.gate_proj": "mlp_pre",
            "mlp.up_proj": "mlp_pre_linear",
            "<mlp.down_proj": "mlp_post",
            "mlp": "mlp_out",
        },
    ),
    "neox": (
        {"gpt_neox.embed_in": "embed", "gpt_neox.final_layer_norm": "ln_final", "lm_head": "logits"},
        "gpt_neox.layers.{}",
        {
            "<": "resid_pre",
            "": "resid_post",
            "<input_layernorm": "attn_in",
            "<attention.dense": "z",
            "attention": "attn_out",
            "<post_attention_layernorm": "mlp_in",
            "input_layernorm": "ln1",
            "post_attention_layernorm": "ln2",
            "mlp.dense_h_to_4h": "mlp_pre",
            "<mlp.dense_4h_to_h": "mlp_post",
            "mlp": "mlp_out",
        },
    ),
    "gemma2": (
        {"model.embed_tokens": "embed", "model.norm": "ln_final", "": "logits"},
        "model.layers.{}",
        {
            "<": "resid_pre",
            "": "resid_post",
            "<input_layernorm": "attn_in",
            "self_attn.q_proj": "q",
            "self_attn.k_proj": "k",
            "self_attn.v_proj": "v",
            "<self_attn.o_proj": "z",
            "post_attention_layernorm": "attn_out",
            "<pre_feedforward_layernorm": "resid_mid",
            "input_layernorm": "ln1",
            "pre_feedforward_layernorm": "ln2",
            "mlp.up_proj": "mlp_pre_linear",
            "mlp.gate_proj": "mlp_pre",
            "<mlp.down_proj": "mlp_post",
            "post_feedforward_layernorm": "mlp_out",
        },
    ),
    "small": (
        {"embed": "embed", "pos_embed": "pos_embed", "ln_final": "ln_final", "unembed": "logits"},
        "blocks.{}",
        {
            "<": "resid_pre",
            "": "resid_post",
            "<ln1": "attn_in",
            "attn.q_proj": "q",
            "attn.k_proj": "k",
            "attn.v_proj": "v",
            "<attn.o_proj": "z",
            "attn": "attn_out",
            "<ln2": "resid_mid",
            "ln1": "ln1",
            "ln2": "ln2",
            "mlp.gate": "mlp_pre",
            "<mlp.down": "mlp_post",
            "mlp": "mlp_out",
        },
    ),
}


def boundaries(family: str, model: nn.Module, layers: int) -> Iterator[tuple[nn.Module, bool, oracle.Key]]:
    """Each module of the model that bounds a site, whether by what it reads, and the site."""
    modules = dict(model.named_modules())
    kind = family if family in BOUNDARIES else family.split("_")[0]
    top, block, inside = BOUNDARIES.get(kind, BOUNDARIES["llama"])
    places = [(path, (site, None)) for path, site in top.items()]
    for layer in range(layers):
        for path, site in inside.items():
            prefix = "<" if path.startswith("<") else ""
            places.append((prefix + f"{block.format(layer)}.{path.removeprefix('<')}".rstrip("."), (site, layer)))
    for path, key in places:
        name = path.removeprefix("<")
        if key[0] == "mlp_pre" and name not in modules:
            name = name.replace("mlp.gate", "mlp.up")  # not gated
        if name in modules:
            yield modules[name], path.startswith("<"), key


@contextmanager
def hooked(places: list[tuple[nn.Module, bool, oracle.Key]]) -> Iterator[dict[oracle.Key, Tensor]]:
    """Record each place while the context is open, by plain torch hooks."""
    seen: dict[oracle.Key, Tensor] = {}

    def recorder(key: oracle.Key, reads: bool) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple, kwargs: dict, out: Tensor | tuple) -> None:
            value = (args[0] if args else kwargs["hidden_states"]) if reads else out
            seen[key] = (value if isinstance(value, Tensor) else value[0]).detach().clone()

        return record

    handles = [module.register_forward_hook(recorder(key, reads), with_kwargs=True) for module, reads, key in places]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@each_family
@each_padding
@torch.no_grad()
def test_cache_equals_forward_hooks(family, padding):
    model, ids, mask = example(family, padding)
    layers = len(oracle.read(model).layers)
    with hooked(list(boundaries(family, model, layers))) as seen:
        logits_of(model, ids, mask)
    _, cache = oracle.forward(model, ids, mask)

    counts = {"gpt2": 11, "neox": 11, "neox_sequential": 11, "small_attn_only": 9}
    in_a_layer = counts.get(family, 14 if family.startswith("small") else 15)
    assert len(seen) == 3 + (("pos_embed", None) in cache) + in_a_layer * layers
    for key, value in seen.items():
        torch.testing.assert_close(cache[key][mask].flatten(1), value[mask].flatten(1), **EXACT, msg=f"{key}")


@torch.no_grad()
def test_gpt2_queries_keys_and_values_are_the_fused_projection():
    model, ids, mask = example("gpt2")
    places = [(model.transformer.h[layer].attn.c_attn, False, ("qkv", layer)) for layer in range(2)]
    with hooked(places) as seen:
        logits_of(model, ids, mask)
    _, cache = oracle.forward(model, ids, mask)
    for layer in range(2):
        fused = torch.cat([cache[site, layer].flatten(2) for site in ("q", "k", "v")], dim=-1)
        torch.testing.assert_close(fused[mask], seen["qkv", layer][mask], **EXACT)


@pytest.mark.parametrize("family", ["neox", "neox_sequential"])
@torch.no_grad()
def test_neox_queries_keys_and_values_are_side_by_side_for_each_head(family):
    model, ids, mask = example(family)
    with hooked([(model.gpt_neox.layers[1].attention.query_key_value, False, ("qkv", 1))]) as seen:
        logits_of(model, ids, mask)
    _, cache = oracle.forward(model, ids, mask)
    fused = torch.cat([cache[site, 1] for site in ("q", "k", "v")], dim=-1).flatten(2)
    torch.testing.assert_close(fused[mask], seen["qkv", 1][mask], **EXACT)


@torch.no_grad()
def test_caps_and_windows_of_gemma_matter():
    """Without any one of them the logits are others: so the zoo's gemma tests each."""
    model, ids, mask = example("gemma2", "none")
    logits, cache = oracle.forward(model, ids, mask)
    assert cache["scores", 1][..., 0].abs().max() < model.config.attn_logit_softcapping
    assert logits.abs().max() < model.config.final_logit_softcapping
    windows = [attn.window for attn in (layer.attn for layer in oracle.read(model).layers)]
    assert windows == [zoo.WINDOW, None, zoo.WINDOW]
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window", "query_pre_attn_scalar"):
        kept = getattr(model.config, name)
        setattr(model.config, name, 8 if name == "query_pre_attn_scalar" else type(kept)(1000))
        assert differs(oracle.forward(model, ids, mask)[0], logits, mask), name
        setattr(model.config, name, kept)


@pytest.mark.parametrize("family", HF)
@torch.no_grad()
def test_pattern_equals_the_weights_of_eager_attention(family):
    """In float32, as eager attention's own softmax is: in float64 its mask overflows to nan in rows without a key."""
    lengths, side = PADDINGS["right"]
    ids, mask = zoo.random_inputs(zoo.VOCAB, lengths, side)
    model = zoo.make(family, dtype=torch.float32)
    _, cache = oracle.forward(model, ids, mask)
    model.set_attn_implementation("eager")
    out = model(ids, attention_mask=mask.long(), position_ids=oracle.positions(mask), output_attentions=True)
    for layer, weights in enumerate(out.attentions):
        ours, theirs = cache["pattern", layer].transpose(1, 2)[mask], weights.transpose(1, 2)[mask]
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("family", [family for family in zoo.FAMILIES if family.startswith("small")])
@torch.no_grad()
def test_rotated_queries_and_keys_are_what_the_attention_function_reads(family):
    model, ids, mask = example(family)
    seen = {}

    def attend(module, q, k, v, allowed, *, scaling):
        seen["q"], seen["k"], seen["allowed"] = q.transpose(1, 2), k.transpose(1, 2), allowed
        return type(module).attend(module, q, k, v, allowed, scaling=scaling)

    model.blocks[1].attn.attend = attend
    logits_of(model, ids, mask)
    _, cache = oracle.forward(model, ids, mask)
    assert torch.equal(seen["allowed"].expand_as(cache["scores", 1]), cache["scores", 1] > -torch.inf)
    assert (("rot_q", 1) in cache) == (family in ROTARY)
    if family in ROTARY:
        torch.testing.assert_close(cache["rot_q", 1][mask], seen["q"][mask], **EXACT)
        torch.testing.assert_close(cache["rot_k", 1][mask], seen["k"][mask], **EXACT)


@each_family
@torch.no_grad()
def test_shapes_and_sites(family):
    model, ids, mask = example(family)
    _, cache = oracle.forward(model, ids, mask)
    spec = oracle.read(model)
    attn, mlp = spec.layers[0].attn, spec.layers[0].mlp
    B, T = ids.shape
    (H, D, M), K, V = attn.W_Q.shape, attn.W_K.shape[0], zoo.VOCAB
    shapes = dict.fromkeys(("resid_pre", "attn_in", "attn_out", "resid_post"), (B, T, M))
    shapes |= {"q_input": (B, T, H, M), "k_input": (B, T, K, M), "v_input": (B, T, K, M)}
    shapes |= {"q": (B, T, H, D), "k": (B, T, K, D), "v": (B, T, K, D), "z": (B, T, H, D), "result": (B, T, H, M)}
    shapes |= {"ln1_scale": (B, T, 1), "ln1": (B, T, M)}
    shapes |= {"scores": (B, H, T, T), "pattern": (B, H, T, T)}
    if family in ROTARY:
        shapes |= {"rot_q": (B, T, H, D), "rot_k": (B, T, K, D)}
    if family in WITH_MID:
        shapes["resid_mid"] = (B, T, M)
    if mlp is not None:
        shapes |= dict.fromkeys(("mlp_in", "mlp_out"), (B, T, M))
        shapes |= dict.fromkeys(("mlp_pre", "mlp_post"), (B, T, len(mlp.W_up)))
        shapes |= {"ln2_scale": (B, T, 1), "ln2": (B, T, M)}
        if mlp.W_gate is not None:
            shapes["mlp_pre_linear"] = (B, T, len(mlp.W_up))
    expected: dict[oracle.Key, tuple[int, ...]] = {
        (name, layer): shape for name, shape in shapes.items() for layer in range(len(spec.layers))
    }
    expected |= {("embed", None): (B, T, M), ("ln_final", None): (B, T, M), ("ln_final_scale", None): (B, T, 1)}
    expected |= {("logits", None): (B, T, V)}
    if spec.W_pos is not None:
        expected["pos_embed", None] = (B, T, M)
    assert {key: tuple(value.shape) for key, value in cache.items()} == expected


@each_family
@torch.no_grad()
def test_attention_is_far_from_trivial(family):
    """Neither uniform nor one-hot in any layer: else a test of patterns would hold for wrong ones."""
    model, ids, mask = example(family, "none")
    _, cache = oracle.forward(model, ids, mask)
    for layer in range(len(oracle.read(model).layers)):
        last = cache["pattern", layer][:, :, -1]
        open_keys = (last > 0).sum(-1).max()
        largest = last.max(-1).values
        assert 1.2 / open_keys < largest.mean() < 0.95


# Edits


@each_family
@torch.no_grad()
def test_identity_edits_change_nothing(family):
    model, ids, mask = example(family)
    logits, cache = oracle.forward(model, ids, mask)
    edited, same = oracle.forward(model, ids, mask, {key: torch.clone for key in cache})
    assert torch.equal(edited, logits)
    assert all(torch.equal(same[key], cache[key]) for key in cache)


@each_family
@torch.no_grad()
def test_every_site_reaches_the_logits(family):
    """Noise at any one site changes the logits, is in the cache, and leaves every site before it alone."""
    model, ids, mask = example(family)
    logits, cache = oracle.forward(model, ids, mask)
    order = list(cache)
    for key in order:
        noise = torch.randn(cache[key].shape, dtype=torch.float64)
        edited, after = oracle.forward(model, ids, mask, {key: lambda x, noise=noise: x + noise})
        assert differs(edited, logits, mask), key
        same_tensor = {key, ("resid_post", (key[1] or 0) - 1)} if key[0] == "resid_pre" else {key}
        for earlier in order[: order.index(key)]:
            if earlier not in same_tensor:
                assert torch.equal(after[earlier], cache[earlier]), (key, earlier)
        if key[0] != "pattern":
            torch.testing.assert_close(after[key], cache[key] + noise, **EXACT)


def cut(layer: int, last: int, *sites: str) -> list[oracle.Key]:
    """Sites of one layer; `last` is the number of layers, past which the residual is what the final norm reads."""
    return [(site, layer) for site in sites if layer < last]


@each_family
@torch.no_grad()
def test_the_whole_residual_of_another_run_reproduces_it(family):
    model, ids, mask = example(family, seed=1)
    _, other_ids, _ = example(family, seed=2)
    logits, _ = oracle.forward(model, ids, mask)
    expected, other = oracle.forward(model, other_ids, mask)
    assert differs(logits, expected, mask)
    spec = oracle.read(model)
    cuts: list[list[oracle.Key]] = [[("ln_final", None)]]
    cuts.append([("embed", None), ("pos_embed", None)] if spec.W_pos is not None else [("embed", None)])
    for layer in range(len(spec.layers)):
        cuts += [[("resid_pre", layer)], [("resid_post", layer)]]
        if family in WITH_MID:
            cuts += [[("resid_mid", layer)]]
    for keys in cuts:
        edited, cache = oracle.forward(model, ids, mask, {key: lambda x, key=key: other[key] for key in keys})
        torch.testing.assert_close(edited, expected, **EXACT, msg=f"{keys}")
        assert all(torch.equal(cache[key], other[key]) for key in keys)


@each_family
@torch.no_grad()
def test_sites_that_hold_the_same_information_have_the_same_effect(family):
    """Patching another run's values at one of several sites in a row, between which nothing is lost or added."""
    model, ids, mask = example(family, seed=1)
    _, other_ids, _ = example(family, seed=2)
    logits, _ = oracle.forward(model, ids, mask)
    _, other = oracle.forward(model, other_ids, mask)

    def patched(*sites: str, layer: int = 1) -> Tensor:
        edits = {(site, layer): lambda x, site=site: other[site, layer] for site in sites}
        return oracle.forward(model, ids, mask, edits)[0]

    equal = [
        [("attn_in",), ("q_input", "k_input", "v_input"), ("q", "k", "v"), ("scores", "v"), ("pattern", "v"), ("z",)],
        [("z",), ("result",), ("attn_out",)],
        [("q_input", "k_input"), ("q", "k"), ("scores",), ("pattern",)],
        [("q_input",), ("q",)],
        [("k_input",), ("k",)],
        [("v_input",), ("v",)],
    ]
    if family in ROTARY:
        equal += [[("q",), ("rot_q",)], [("k",), ("rot_k",)]]
    if family in WITH_MLP:
        equal += [[("mlp_in",), ("mlp_post",), ("mlp_out",)]]
    for sites in equal:
        first = patched(*sites[0])
        assert differs(first, logits, mask), sites
        for others in sites[1:]:
            torch.testing.assert_close(patched(*others), first, **EXACT, msg=f"{others}, {sites[0]}")


@each_family
@torch.no_grad()
def test_attn_in_and_mlp_in_are_copies(family):
    """An edit of the copy reaches what reads it and not the residual; with the residual edited too, it is resid_pre."""
    model, ids, mask = example(family)
    _, cache = oracle.forward(model, ids, mask)
    delta = torch.randn(cache["resid_pre", 1].shape, dtype=torch.float64)

    def shifted(*keys: oracle.Key) -> tuple[Tensor, dict[oracle.Key, Tensor]]:
        return oracle.forward(model, ids, mask, {key: lambda x: x + delta for key in keys})

    if family in WITH_MLP and family not in WITH_MID:
        whole, _ = shifted(("resid_pre", 1))
        both, alone = shifted(("attn_in", 1), ("mlp_in", 1), ("resid_post", 1))
        torch.testing.assert_close(both, whole, **EXACT)
        added = cache["resid_pre", 1] + alone["attn_out", 1] + alone["mlp_out", 1]
        torch.testing.assert_close(alone["resid_post", 1], added + delta, **EXACT)
        for one in ("attn_in", "mlp_in"):
            read, alone = shifted((one, 1))
            assert differs(read, whole, mask)
            added = cache["resid_pre", 1] + alone["attn_out", 1] + alone["mlp_out", 1]
            torch.testing.assert_close(alone["resid_post", 1], added, **EXACT)
        return
    after = "resid_mid" if family in WITH_MLP else "resid_post"
    read, alone = shifted(("attn_in", 1))
    whole, _ = shifted(("resid_pre", 1))
    both, _ = shifted(("attn_in", 1), (after, 1))
    torch.testing.assert_close(both, whole, **EXACT)
    assert differs(read, whole, mask)
    torch.testing.assert_close(alone[after, 1], cache["resid_pre", 1] + alone["attn_out", 1], **EXACT)
    if family in WITH_MLP:
        read, alone = shifted(("mlp_in", 1))
        whole, _ = shifted(("resid_mid", 1))
        both, _ = shifted(("mlp_in", 1), ("resid_post", 1))
        torch.testing.assert_close(both, whole, **EXACT)
        assert differs(read, whole, mask)
        torch.testing.assert_close(alone["resid_post", 1], cache["resid_mid", 1] + alone["mlp_out", 1], **EXACT)


@each_family
@torch.no_grad()
def test_q_input_of_a_head_reaches_that_head_alone(family):
    model, ids, mask = example(family)
    _, cache = oracle.forward(model, ids, mask)
    groups = cache["q", 1].shape[2] // cache["k", 1].shape[2]
    for site, projected, head, heads in (
        ("q_input", "q", 2, [2]),
        ("k_input", "k", 1, range(groups, 2 * groups)),
        ("v_input", "v", 1, range(groups, 2 * groups)),
    ):
        noise = torch.zeros_like(cache[site, 1])
        noise[:, :, head] = torch.randn(noise[:, :, head].shape, dtype=torch.float64)
        _, after = oracle.forward(model, ids, mask, {(site, 1): lambda x, noise=noise: x + noise})
        moved = (after[projected, 1] - cache[projected, 1]).abs().amax((0, 1, 3)) > 1e-3
        assert moved.nonzero().flatten().tolist() == [head]
        # The first token's pattern is 1 whatever its query is, so look at all positions together.
        moved = (after["z", 1] - cache["z", 1]).abs().amax((0, 1, 3)) > 1e-6
        assert moved.nonzero().flatten().tolist() == list(heads)


@each_family
@each_padding
@torch.no_grad()
def test_scores_pattern_and_z_are_consistent(family, padding):
    """Also where edits of scores and pattern try to open what the masks forbid."""
    model, ids, mask = example(family, padding)
    T, window = ids.shape[1], oracle.read(model).layers[1].attn.window or ids.shape[1]
    allowed = torch.zeros(len(ids), 1, T, T, dtype=torch.bool)
    for row in range(len(ids)):
        for t in range(T):
            for s in range(T):
                allowed[row, 0, t, s] = s <= t and s > t - window and mask[row, s]
    empty = ~allowed.any(-1)

    def check(cache: dict[oracle.Key, Tensor], from_scores: bool) -> None:
        scores, pattern = cache["scores", 1], cache["pattern", 1]
        assert torch.equal(scores > -torch.inf, allowed.expand_as(scores))
        assert (pattern.masked_select(~allowed.expand_as(pattern)) == 0).all()
        if from_scores:
            weights = scores.exp().nan_to_num()
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
            torch.testing.assert_close(pattern, weights, **EXACT)
            torch.testing.assert_close(pattern.sum(-1), (~empty).double().expand_as(pattern[..., 0]), **EXACT)
        v = cache["v", 1].repeat_interleave(pattern.shape[1] // cache["v", 1].shape[2], dim=2)
        torch.testing.assert_close(cache["z", 1], (pattern @ v.transpose(1, 2)).transpose(1, 2), **EXACT)
        assert (cache["z", 1].transpose(1, 2).masked_select(empty[..., None].expand_as(v.transpose(1, 2))) == 0).all()

    logits, cache = oracle.forward(model, ids, mask)
    check(cache, from_scores=True)
    if padding == "left":
        assert bool(empty.any())
    for site in ("scores", "pattern"):
        edited, cache = oracle.forward(model, ids, mask, {(site, 1): lambda x: torch.full_like(x, 0.25)})
        check(cache, from_scores=site == "scores")
        assert differs(edited, logits, mask)


@each_family
@torch.no_grad()
def test_a_query_cut_from_every_key_has_a_zero_pattern(family):
    model, ids, mask = example(family, "none")

    def cut_last_query(scores: Tensor) -> Tensor:
        last = torch.arange(scores.shape[2])[:, None] == scores.shape[2] - 1
        return scores.masked_fill(last, -torch.inf)

    logits, cache = oracle.forward(model, ids, mask, {("scores", 0): cut_last_query})
    assert (cache["pattern", 0][:, :, -1] == 0).all()
    assert (cache["z", 0][:, -1] == 0).all()
    assert bool(logits.isfinite().all())
    assert differs(logits, oracle.forward(model, ids, mask)[0], mask)


@each_family
def test_gradients_flow_through_edits(family):
    """The gradient along a direction at a site is what finite differences say."""
    model, ids, mask = example(family)
    _, cache = oracle.forward(model, ids, mask)
    weight = torch.randn(zoo.VOCAB, dtype=torch.float64)
    for site in ("resid_pre", "k_input", "q", "k", "v", "scores", "pattern", "z", "result", "attn_out"):
        direction = torch.randn(cache[site, 1].shape, dtype=torch.float64)

        def effect(scale: Tensor, site: str = site, direction: Tensor = direction) -> Tensor:
            edits = {(site, 1): lambda x: x + scale * direction}
            return (oracle.forward(model, ids, mask, edits)[0][mask] @ weight).sum()

        scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(effect(scale), scale)
        with torch.no_grad():
            numeric = (effect(scale + 1e-5) - effect(scale - 1e-5)) / 2e-5
        assert gradient.abs() > 1e-2
        torch.testing.assert_close(gradient, numeric, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_edits_that_cannot_be_are_refused():
    model, ids, mask = example("small_attn_only")
    for key in (("mlp_out", 0), ("resid_mid", 1), ("pos_embed", None), ("z", 2), ("resid_pre", None), ("Z", 0)):
        with pytest.raises(ValueError, match=key[0]):
            oracle.forward(model, ids, mask, {key: torch.clone})
    with pytest.raises(ValueError, match="z in layer 0"):
        oracle.forward(model, ids, mask, {("z", 0): lambda x: x[:1]})


# The zoo


@each_family
def test_the_zoo_is_deterministic_and_varied(family):
    state = torch.random.get_rng_state()
    first, again, other = zoo.make(family), zoo.make(family), zoo.make(family, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not first.training
    for a, b, c in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert a.dtype == torch.float64
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        assert a.std() > 0.15
    narrow = zoo.make(family, dtype=torch.float32)
    assert all(torch.equal(a.float(), b) for a, b in zip(first.parameters(), narrow.parameters(), strict=True))


def test_random_inputs():
    right, real_right = zoo.random_inputs(zoo.VOCAB, [3, 5], "right")
    left, real_left = zoo.random_inputs(zoo.VOCAB, [3, 5], "left")
    assert real_right.tolist() == [[True, True, True, False, False], [True] * 5]
    assert real_left.tolist() == [[False, False, True, True, True], [True] * 5]
    assert torch.equal(right[real_right], left[real_left])
    assert torch.equal(right == 0, ~real_right)
    assert not torch.equal(right, zoo.random_inputs(zoo.VOCAB, [3, 5], seed=1)[0])
    with pytest.raises(ValueError, match="padding"):
        zoo.random_inputs(zoo.VOCAB, [3], "middle")
