"""Models without a head, and the towers of CLIP and SigLIP by themselves: states, pooled vectors, and no logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import interp as ip
from experiments.families.models import FAMILIES, Family
from hooks.certificate import compare
from tests import zoo

EXECUTORS = ("sequential", "batched", "shared")
TEXTS = ["BERT, no head", "Llama, no head", "GPT-2, no head", "CLIP, texts", "SigLIP, texts"]
IMAGES = ["CLIP, images", "SigLIP, images"]
ROWS = [[3, 9, 27, 31, 44, 12, 49], [3, 11, 27, 31, 8, 12, 49]]
"""Texts that end with the token at which CLIP pools."""


def wrapped(name: str) -> ip.Model:
    return ip.wrap(FAMILIES[name].make(torch.float64))


def inputs(model: ip.Model, seed: int = 0) -> ip.Inputs:
    if model.architecture.images is None:
        return model.inputs(ROWS if not seed else [[*row[::-1][1:], 49] for row in ROWS])
    return model.inputs(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def called(model: ip.Model, x: ip.Inputs):
    return model.module(**({"pixel_values": x.pixels} if x.pixels is not None else {"input_ids": x.ids}))


def pooled_of(output) -> Tensor:
    named = (getattr(output, name, None) for name in ("text_embeds", "image_embeds", "pooler_output"))
    return next(value for value in named if value is not None)


@pytest.mark.parametrize("name", [*TEXTS, *IMAGES])
@torch.no_grad()
def test_what_is_read_and_edited_is_the_models_own(name):
    model = wrapped(name)
    x, arch = inputs(model), model.architecture
    output = called(model, x)
    pools = "pooled" in {s.name for s in model.sites()}
    assert pools == (name not in ("Llama, no head", "GPT-2, no head"))
    run = model.run(x, capture=[arch.end, *(["pooled"] if pools else [])])
    torch.testing.assert_close(run.output, output.last_hidden_state)
    torch.testing.assert_close(run.tape[arch.end], output.last_hidden_state)
    if pools:
        torch.testing.assert_close(run.tape["pooled"][:, 0], pooled_of(output))
    with pytest.raises(ip.ModelError, match=f"there are no logits: a {type(model.module).__name__} has no head"):
        _ = run.logits
    assert "no head" in repr(model) and "states [2" in repr(run)
    # An edit in the middle is that of a hook by hand.
    with torch.no_grad():
        vector = torch.randn(32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        handle = arch.blocks[1].module.register_forward_hook(
            lambda _m, _a, out: (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector
        )
        wanted = called(model, x)
        handle.remove()
        plan = ip.steer(ip.site("resid_post", 1), vector)
        edited = model.run(x, plan, capture=["pooled"] if pools else [])
        torch.testing.assert_close(edited.output, wanted.last_hidden_state)
        assert not torch.allclose(edited.output, run.output)
        if pools:
            torch.testing.assert_close(edited.tape["pooled"][:, 0], pooled_of(wanted))
            assert not torch.allclose(edited.tape["pooled"], run.tape["pooled"])
        with model.apply(plan):
            torch.testing.assert_close(called(model, x).last_hidden_state, wanted.last_hidden_state)


SWEPT = ["BERT, no head", "Llama, no head", "CLIP, images"]


@pytest.mark.parametrize(
    "name", [*SWEPT, *(pytest.param(n, marks=pytest.mark.full) for n in [*TEXTS, *IMAGES] if n not in SWEPT)]
)
def test_sweeps_measure_states_and_pooled_vectors(name):
    model = wrapped(name)
    clean, corrupt = inputs(model), inputs(model, 3)
    reads = [model.architecture.end.at(pos=-1)]
    reads += ["pooled"] if model.architecture.pooler is not None else []
    asked = ip.grid("resid_post", layer="all", pos=[0, 2])
    for read in reads:
        metric = ip.metric(lambda value: value[:, 0, :3].sum(-1), [read], name="first three")
        found = {e: ip.sweep(model, clean, corrupt, asked, metric=metric, executor=e).effect for e in EXECUTORS}
        for executor in EXECUTORS[1:]:
            np.testing.assert_allclose(found[executor], found["sequential"], rtol=0, atol=1e-9)
        # By hand: the values of the other run, put in at one layer and position.
        other = model.run(clean, capture=[ip.site("resid_post", 1)]).tape[ip.site("resid_post", 1)]

        def put(_m, _a, out, other=other):
            states = (out[0] if isinstance(out, tuple) else out).clone()
            states[:, 2] = other[:, 2]
            return (states, *out[1:]) if isinstance(out, tuple) else states

        before = called(model, corrupt)
        handle = model.architecture.blocks[1].module.register_forward_hook(put)
        after = called(model, corrupt)
        handle.remove()
        of = pooled_of if read == "pooled" else lambda output: output.last_hidden_state[:, -1]
        told = ip.sweep(model, clean, corrupt, ip.grid("resid_post", layer=1, pos=2), metric=metric)
        by_hand = (of(after) - of(before))[:, :3].sum(-1).detach().numpy()
        np.testing.assert_allclose(told.effect.flatten(), by_hand, rtol=0, atol=1e-9)
        assert np.abs(by_hand).max() > 1e-3


def test_what_needs_logits_is_refused_by_name():
    model = wrapped("Llama, no head")
    x = inputs(model)
    says = pytest.raises(ip.InterpError, match=r"LlamaModel has no head.*AutoModelForCausalLM")
    with says:
        ip.sweep(model, x, inputs(model, 3), ip.grid("z", layer=0), metric=ip.logit_diff(3, 4))
    with says:
        ip.logit_lens(model, x)
    with says:
        model.run(x, ip.zero(ip.site("logits", pos=-1)))
    with says:
        model.fork(combine=lambda logits, moment: logits[0])
    with pytest.raises(ip.InterpError):
        ip.direct_logit_attribution(model, x, ip.logit_diff(3, 4))


def test_descriptions_of_headless_models_are_certified():
    from dataclasses import replace

    module = FAMILIES["CLIP, images"].make(torch.float64)
    from hooks.models import describe

    arch = describe(module)
    wrong = replace(arch, look=module.embeddings)  # without the norm before the first block
    for given, fits in ((arch, True), (wrong, False)):
        model = ip.wrap(module, adapter=lambda _m, given=given: given)
        assert (compare(model, inputs(model).rows(slice(0, 1))) == "") == fits


@pytest.mark.parametrize("name", ["Llama, no head", pytest.param("CLIP, images", marks=pytest.mark.full)])
def test_a_compiled_model_returns_the_same_states(name):
    model = wrapped(name)
    x, plan = inputs(model), ip.scale(ip.site("z", 1, head=2), 3.0)
    sites = ["pooled"] if model.architecture.pooler is not None else []
    wanted, run = model.run(x, plan, capture=sites), model.compile(plan, capture=sites, backend="eager")(x)
    torch.testing.assert_close(run.output, wanted.output)
    assert not torch.allclose(run.output, model.run(x).output)
    for place in sites:
        torch.testing.assert_close(run.tape[place], wanted.tape[place])
    with pytest.raises(ip.ModelError, match="there are no logits"):
        _ = run.logits


# Similarity


def both(kind: str):
    """A whole model of images and texts, with weights that matter."""
    import transformers

    stem = {"clip": "CLIP", "siglip": "Siglip"}[kind]
    vision, text = (FAMILIES[f"{'CLIP' if kind == 'clip' else 'SigLIP'}, {of}"].options for of in ("images", "texts"))
    text = {**text, "projection_size": 32}
    config = getattr(transformers, f"{stem}Config")(text_config=dict(text), vision_config=dict(vision))
    return zoo.prepare(getattr(transformers, f"{stem}Model")(config)).double()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@torch.no_grad()
def test_similarity_is_the_logit_of_an_image_and_a_text(kind):
    module = both(kind)
    seen, said = ip.wrap(module.vision_model), ip.wrap(module.text_model)
    x, t = inputs(seen), said.inputs(ROWS)
    wanted = module(input_ids=t.ids, pixel_values=x.pixels)
    bias = float(getattr(module, "logit_bias", 0.0))
    scale = float(module.logit_scale.exp())
    visual, textual = (getattr(module, f"{name}_projection", None) for name in ("visual", "text"))
    for model, given, other, through, logits in (
        (seen, x, wanted.text_embeds, visual, wanted.logits_per_image),
        (said, t, wanted.image_embeds, textual, wanted.logits_per_text),
    ):
        read = ip.site("ln_final", pos=-1) if kind == "clip" and model is said else "pooled"
        metric = ip.similarity(other, through=through, scale=scale, bias=bias, read=read)
        torch.testing.assert_close(ip.evaluate(model, given, metric).flatten(), logits.diag(), check_dtype=False)
        edit = ip.zero(ip.site("z", 1, head=2))
        assert (
            float((ip.evaluate(model, ip.World(given, ip.Plan((edit,))), metric).flatten() - logits.diag()).abs().min())
            > 0
        )
    with pytest.raises(ip.MetricError, match="3 vectors to compare with, and 2 rows"):
        ip.evaluate(seen, x, ip.similarity(torch.ones(3, 32)))
    with pytest.raises(ip.MetricError, match="32 numbers of each row with 7"):
        ip.evaluate(seen, x, ip.similarity(torch.ones(7)))
    with pytest.raises(ip.MetricError, match="no direction"):
        ip.similarity(torch.zeros(7))
    with pytest.raises(ip.ModelError, match=r"two towers.*vision_model"):
        ip.wrap(module)


# What bites


def test_siglip_pools_the_last_column_be_it_padding():
    model = wrapped("SigLIP, texts")
    with pytest.raises(ip.InputsError, match="pools the last column, which is padding"):
        model.run(model.inputs([[3, 9, 27], [4, 5]]))
    left = model.inputs([[3, 9, 27], [4, 5]], padding="left")
    alone = [model.run(model.inputs([row]), capture="pooled").tape["pooled"][0] for row in ([3, 9, 27], [4, 5])]
    together = model.run(left, capture="pooled").tape["pooled"]
    # Positions of a row begin with its first token, as they do alone.
    torch.testing.assert_close(together, torch.stack(alone))


def test_images_of_one_tower_do_not_go_into_another():
    clip, siglip = wrapped("CLIP, images"), wrapped("SigLIP, images")
    assert (clip.inputs(torch.zeros(1, 3, 16, 16)).width, siglip.inputs(torch.zeros(1, 3, 16, 16)).width) == (17, 16)
    assert siglip.inputs(torch.zeros(1, 3, 16, 16)).labels()[:2] == ("0,0", "0,1")
    with pytest.raises(ip.InputsError, match="after 1 tokens, and the model"):
        siglip.run(clip.inputs(torch.zeros(1, 3, 16, 16)))


def test_saved_images_keep_how_they_are_cut(tmp_path):
    model = wrapped("SigLIP, images")
    x = inputs(model)
    plan = ip.Plan((ip.patch(ip.site("resid_post", 1, pos=3), ip.World(inputs(model, 3))),))
    plan.save(tmp_path / "plan")
    again = ip.Plan.load(tmp_path / "plan")
    torch.testing.assert_close(model.run(x, again).output, model.run(x, plan).output)


def test_a_pooled_vector_is_edited_on_its_way_out():
    model = wrapped("CLIP, images")
    x = inputs(model)
    with model.apply(ip.zero("pooled")):
        assert not called(model, x).pooler_output.any()
    kept = ip.metric(lambda value: value[:, 0].norm(dim=-1), ["pooled"])
    result = ip.sweep(model, x, inputs(model, 3), ip.grid("z", layer=[0, 2], head="all"), metric=kept)
    assert np.abs(result.effect).min() > 0
    without = Family("Siglip", {**FAMILIES["SigLIP, images"].options, "vision_use_head": False}, "VisionModel",
                     "SiglipVisionConfig")  # fmt: skip
    bare = ip.wrap(without.make(torch.float64))
    with pytest.raises(ip.SiteError, match="made without its pooling head"):
        bare.run(inputs(bare), capture="pooled")


@pytest.mark.full
@pytest.mark.parametrize("stem", ["GPTNeoX", "GPTJ", "OPT", "Falcon", "Bloom", "Gemma2", "Mixtral", "GptOss", "Olmo2"])
def test_other_headless_families(stem):
    options = next(family for family in FAMILIES.values() if family.stem == stem)
    family = Family(stem, options.options, "Model", more=options.more)
    model = ip.wrap(family.make())
    ip.conformance(model).require()
