"""Errors name what was given, what was expected and the nearest valid name; nothing is broadcast, cast or cut."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

import hooks as hk
from hooks import Inputs, Model, Plan, World, patch, site
from hooks.errors import InterpError, ModelError, PlanError, ShapeError, SiteError
from tests import zoo
from tests.zoo import wrapped


def example(model: Model, lengths: tuple[int, ...] = (5, 5), side: str = "right", seed: int = 1) -> Inputs:
    return model.inputs(*zoo.random_inputs(zoo.VOCAB, list(lengths), side, seed))


def says(error: type[InterpError], *words: str):
    """Expect an error whose message has all of these words, in any order."""
    return pytest.raises(error, match="(?s)" + "".join(f"(?=.*{re.escape(word)})" for word in words))


# Sites


def test_an_unknown_site():
    with says(SiteError, "resid_prre", "did you mean 'resid_pre'", "mlp_out"):
        site("resid_prre", layer=0)
    with says(SiteError, "blocks.0.atn.hook_z", "did you mean 'blocks.0.attn.hook_z'"):
        site("blocks.0.atn.hook_z")
    with says(SiteError, "hook_resid", "hook_"):
        site("hook_resid")
    with says(SiteError, "int"):
        site(3)
    x = example(wrapped("gpt2"))
    with says(SiteError, "attn_ot"):
        wrapped("gpt2").run(x, capture="attn_ot")
    assert issubclass(SiteError, ValueError)


def test_a_layer_that_is_missing_superfluous_or_out_of_range():
    model = wrapped("llama")
    x = example(model)
    with says(SiteError, "'z'", "layer=0"):
        site("z")
    with says(SiteError, "embed", "no layer", "2"):
        site("embed", layer=2)
    with says(SiteError, "names layer 1", "layer=2"):
        site("blocks.1.attn.hook_z", layer=2)
    for name in ("z", "resid_pre", "resid_post", "mlp_out", "pattern"):
        for layer in (3, 17, -1):
            with says(SiteError, name.split("_")[0], "0 .. 2"):
                model.run(x, hk.zero(site(name, layer)))
            with says(SiteError, "0 .. 2"):
                model.run(x, capture=site(name, layer))
            with says(SiteError, "0 .. 2"):
                list(hk.run_worlds(model, [World(x)], [site(name, layer)]))
    for layer in ("0", 1.5, None):
        with pytest.raises(SiteError):
            model.run(x, hk.zero(site("z", layer)))


def test_one_site_where_several_may_stand():
    model = wrapped("gpt2")
    x, place = example(model), "blocks.1.attn.hook_z"
    (one,), (other,) = (hk.run_worlds(model, [World(x)], reads) for reads in (place, [site(place)]))
    assert torch.equal(one.values[0], other.values[0])
    assert torch.equal(model.run(x, capture=place).tape[place], model.run(x, capture=[place]).tape[place])
    with says(SiteError, "not int"):
        model.run(x, capture=3)  # type: ignore[arg-type]
    with says(PlanError, "list"):
        next(hk.run_worlds(model, World(x), place))  # type: ignore[arg-type]


def test_tapes_of_other_prompts_differ():
    """The same ids, of which other ones are real."""
    ids = torch.tensor([[3, 0]])
    model = wrapped("gpt2")
    tapes = [hk.Tape(model.inputs(ids, mask), (), {}) for mask in (torch.tensor([[1, 0]]), torch.tensor([[1, 1]]))]
    assert tapes[0] == tapes[0] and tapes[0] != tapes[1]


def test_a_stack_that_the_model_lacks():
    model = wrapped("gpt2")
    with says(SiteError, "encoder"):
        model.run(example(model), hk.zero(site("z", 0, stack="encoder")))


def test_a_restriction_that_the_site_lacks():
    with says(SiteError, "resid_pre", "head"):
        site("resid_pre", 0, head=1)
    with says(SiteError, "key_pos"):
        site("z", 0, key_pos=1)
    with says(SiteError, "dim"):
        site("pattern", 0, dim=1)
    with says(SiteError, "heads", "did you mean 'head'"):
        site("z", 0, heads=1)
    with says(SiteError, "position"):
        site("z", 0).at(position=1)
    for bad in ("first", True, 1.5, [], [1, 1], [1.5], {1}, slice(0, 4, 2)):
        with says(SiteError, "pos"):
            site("z", 0, pos=bad)
    with says(SiteError, "float"):
        site("z", 0, pos=torch.tensor([1.0, 2.0]))


def test_a_head_that_the_layer_lacks():
    model = wrapped("gpt2")
    x = example(model)
    for head in (4, 99, -5, (0, 4)):
        with says(SiteError, "z.1", "4 (0 .. 3)"):
            model.run(x, hk.zero(site("z", 1, head=head)))
        with says(SiteError, "0 .. 3"):
            model.run(x, capture=site("z", 1, head=head))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "small_rms_rotary_gqa"])
@pytest.mark.parametrize("name", ["k", "v", "k_input", "v_input", "rot_k"])
def test_a_query_head_where_the_site_has_key_value_heads(family, name):
    model = wrapped(family)
    if name == "rot_k" and model.architecture.blocks[0].attention.rotary is None:
        pytest.skip("not rotary")
    with says(SiteError, "head 3", "4 query heads", "2 key/value heads", "reads key/value head 1"):
        model.run(example(model), hk.zero(site(name, 1, head=3)))
    model.run(example(model), hk.zero(site(name, 1, head=1)) + hk.zero(site("q", 1, head=3)))


def test_a_site_that_the_family_lacks():
    attention_only, gpt2 = wrapped("small_attn_only"), wrapped("gpt2")
    for name in ("resid_mid", "mlp_in", "mlp_pre", "mlp_post", "mlp_out"):
        with says(SiteError, f"no site '{name}'", "attn_out"):
            attention_only.run(example(attention_only), hk.zero(site(name, 0)))
        assert name not in [info.name for info in attention_only.sites()]
    for name in ("rot_q", "rot_k"):
        with says(SiteError, f"no site '{name}'", "mlp_out"):
            gpt2.run(example(gpt2), patch(site(name, 0), World(example(gpt2))))
    with says(SiteError, "pos_embed"):
        wrapped("llama").run(example(wrapped("llama")), hk.zero(site("pos_embed")))
    with says(SiteError, "rot_q"):
        gpt2.run(example(gpt2), hk.intervene(site("z", 0), lambda x, r, ctx: x, hk.here(site("rot_q", 0))))


def test_a_dimension_or_token_that_is_not_there():
    model = wrapped("gpt2")
    x = example(model)
    with says(SiteError, "resid_pre", "32"):
        model.run(x, hk.zero(site("resid_pre", 0, dim=32)))
    with says(SiteError, "50"):
        list(hk.run_worlds(model, [World(x)], [site("logits", pos=-1, dim=(3, 50))]))
    with pytest.raises(SiteError):
        list(hk.run_worlds(model, [World(x)], [site("logits", pos=-1, dim=torch.tensor([[3, 50], [0, 1]]))]))


def test_a_position_that_a_row_lacks():
    model = wrapped("gpt2")
    x = example(model, (5, 3), "left")
    for pos in (3, -4, (0, 4)):
        for executor in ("sequential", "batched", "shared"):
            with says(SiteError, "row 1", "3 tokens"):
                list(
                    hk.run_worlds(
                        model, [World(x, hk.zero(site("z", 0, pos=pos)))], [site("logits")], executor=executor
                    )
                )
            with says(SiteError, "row 1", "3 tokens"):
                list(hk.run_worlds(model, [World(x)], [site("logits", pos=pos)], executor=executor))
    with says(SiteError, "twice"):
        model.run(x, hk.zero(site("z", 0, pos=(2, -1))))
    with says(ShapeError, "padding"):
        model.run(x, hk.zero(site("z", 0, pos=torch.ones(2, 5, dtype=torch.bool))))
    with says(ShapeError, "3 rows", "have 2"):
        model.run(x, hk.zero(site("z", 0, pos=torch.tensor([0, 1, 2]))))
    with pytest.raises(InterpError):
        model.run(x, hk.zero(site("z", 0)).where(torch.tensor([True, False, True])))


# Sources


def test_a_source_on_another_device():
    model = wrapped("llama")
    x = example(model)
    tape = model.run(x, capture=site("z", 0)).tape
    away = tape[site("z", 0)].to("meta")
    vector = torch.ones(model.architecture.width, dtype=torch.float64, device="meta")
    for plan in (
        patch(site("z", 0), away),
        patch(site("z", 0), tape.to("meta")),
        hk.interchange(site("z", 0), torch.ones(8).double(), tape.to("meta")),
        hk.steer(site("resid_pre", 0), vector),
        hk.clamp(site("resid_pre", 0), vector),
        hk.project_out(site("resid_pre", 0), vector),
        hk.scale(site("resid_pre", 0), vector),
        hk.noise(site("resid_pre", 0), vector),
        hk.mean(site("z", 0), tape.to("meta")),
        hk.resample(site("z", 0), tape.to("meta")),
    ):
        with says(ShapeError, "meta", "cpu"):
            model.run(x, plan)


@pytest.mark.parametrize("executor", ["sequential", "batched", "shared"])
def test_a_source_of_another_dtype(executor):
    model = wrapped("llama")
    x = example(model)
    tape = model.run(x, capture=site("z", 0)).tape.to(dtype=torch.float32)
    vector = torch.ones(model.architecture.width)
    for plan in (
        patch(site("z", 0), tape[site("z", 0)]),
        patch(site("z", 0), tape),
        patch(site("z", 0, head=1), tape),
        hk.steer(site("resid_pre", 0), vector),
        hk.clamp(site("resid_pre", 0), vector.half()),
        hk.mean(site("z", 0), tape),
        hk.mean(site("z", 0), tape[site("z", 0)]),
        hk.resample(site("z", 0), tape),
    ):
        with says(ShapeError, "float64"):
            list(hk.run_worlds(model, [World(x, plan)], [site("logits")], executor=executor))
    model.run(x, patch(site("z", 0), tape.to(dtype=torch.float64)))


@pytest.mark.parametrize("executor", ["sequential", "batched", "shared"])
def test_clean_and_corrupt_of_different_lengths(executor):
    """Also where the batches are equally wide, and where only the keys would be laid over one another."""
    model = wrapped("qwen3")
    x = example(model, (5, 3))
    for lengths, side in (((3, 5), "right"), ((5, 4), "left"), ((6, 3), "right"), ((5, 3, 3), "right")):
        other = example(model, lengths, side, seed=2)
        tape = model.run(other, capture=[site("resid_pre", 1), site("pattern", 1), site("z", 0)]).tape
        for source in (World(other), tape):
            for place in (
                site("resid_pre", 1),
                site("z", 0, head=1),
                site("pattern", 1),
                site("pattern", 1, pos=-1),
                site("pattern", 1, pos=1, head=0),
                *([site("resid_pre", 1, pos=slice(1, None))] if lengths[0] < 5 else []),
            ):
                with says(ShapeError, place.name):
                    list(hk.run_worlds(model, [World(x, patch(place, source))], [site("logits")], executor=executor))
    other = example(model, (4, 6), "left", seed=2)
    model.run(x, patch(site("resid_pre", 1, pos=-1), World(other)) + patch(site("v", 1, pos=(0, -2)), World(other)))


@pytest.mark.parametrize("executor", ["sequential", "batched", "shared"])
def test_other_numbers_of_rows(executor):
    model = wrapped("gpt2")
    x, one, three = example(model), example(model, (5,)), example(model, (5, 5, 5))
    for source in (World(one), World(three), model.run(one, capture=site("z", 0)).tape):
        with says(ShapeError, "rows", "2"):
            list(hk.run_worlds(model, [World(x, patch(site("z", 0), source))], [site("logits")], executor=executor))


def values(model: Model, x: Inputs) -> Tensor:
    return model.run(x, capture=site("z", 0)).tape[site("z", 0)]


@pytest.mark.parametrize("executor", ["sequential", "batched", "shared"])
def test_values_that_would_broadcast(executor):
    """[2, 5, 4, 8] is expected; sizes of 1 and missing axes are what torch would stretch in silence."""
    model = wrapped("gpt2")
    x = example(model)
    whole = values(model, x)
    assert whole.shape == (2, 5, 4, 8)
    bad = [whole[:1], whole[:, :1], whole[:, :, :1], whole[..., :1], whole[0], whole[0, 0], whole.mean(), whole[None]]
    for value in bad:
        with pytest.raises(ShapeError, match=r"z\.0"):
            list(hk.run_worlds(model, [World(x, patch(site("z", 0), value))], [site("logits")], executor=executor))
    for value in (whole[:, :1], whole[..., :1], whole[:, :3], whole[:1, :1]):
        with pytest.raises(ShapeError):
            list(hk.run_worlds(model, [World(x, hk.mean(site("z", 0), value))], [site("logits")], executor=executor))
        with pytest.raises(ShapeError):
            list(
                hk.run_worlds(model, [World(x, hk.resample(site("z", 0), value))], [site("logits")], executor=executor)
            )
    for value in (whole[0, 0, :1], whole[0, 0, :, :1], whole[:1], whole[:, :1]):
        with pytest.raises(ShapeError):
            list(hk.run_worlds(model, [World(x, hk.clamp(site("z", 0), value))], [site("logits")], executor=executor))


def test_a_part_of_a_source_that_does_not_fit():
    """One head over several, one dimension over several, another kind of activation."""
    model = wrapped("gpt2")
    x, source = example(model), World(example(model, seed=2))
    for place, read in (
        (site("z", 0, head=(0, 1, 2)), site("z", 0, head=1)),
        (site("z", 0, dim=(0, 1, 2)), site("z", 0, dim=1)),
        (site("z", 0), site("z", 0, head=(1, 2))),
        (site("z", 0), site("resid_pre", 0)),
        (site("resid_pre", 0), site("mlp_pre", 0)),
        (site("resid_pre", 0, pos=(1, 2, 3)), site("resid_pre", 0, pos=2)),
        (site("resid_pre", 0, pos=2), site("resid_pre", 0, pos=(1, 2))),
        (site("pattern", 0, key_pos=(0, 1)), site("pattern", 0, key_pos=1)),
        (site("attn_out", 0), site("result", 0)),
    ):
        for build in (
            patch,
            lambda p, s, source_site: hk.interchange(p, torch.ones(8).double(), s, source_site=source_site),
        ):
            with pytest.raises(ShapeError):
                model.run(x, build(place, source, source_site=read))
    model.run(x, patch(site("z", 0, head=0), source, source_site=site("z", 1, head=3)))


def test_a_tape_that_did_not_keep_what_is_read():
    model = wrapped("gpt2")
    x = example(model)
    tape = model.run(x, capture=["blocks.0.attn.hook_z", site("q", 1, head=0)]).tape
    with says(SiteError, "z.1", "z.0"):
        model.run(x, patch(site("z", 1), tape))
    with says(SiteError, "q.1"):
        model.run(x, patch(site("q", 1, head=1), tape))
    with says(SiteError, "resid_pre.0", "not kept"):
        tape[site("resid_pre", 0)]


def test_a_stack_that_the_model_does_not_have():
    model = wrapped("gpt2")
    with says(SiteError, "encoder:z.0", "one stack"):
        model.run(example(model), capture=hk.Site("z", 0, stack="encoder"))


def test_widths_that_do_not_fit_are_refused_before_anything_runs(monkeypatch):
    model = wrapped("gpt2")
    x = example(model)
    monkeypatch.setattr(model, "forward", lambda *args: pytest.fail("the model ran"))
    for plan in (
        hk.steer(site("resid_pre", 0), torch.ones(31).double()),
        hk.steer(site("z", 0), torch.ones(32).double()),
        hk.clamp(site("mlp_post", 0), torch.ones(5, 32).double()),
        hk.project_out(site("z", 0), torch.eye(3, 9).double()),
        hk.steer(site("logits"), torch.ones(49).double()),
        hk.steer(site("resid_pre", 0, dim=(1, 2)), torch.ones(32).double()),
        hk.steer(site("resid_pre", 0, dim=slice(0, 4)), torch.ones(5).double()),
    ):
        with says(ShapeError, str(plan.site).split("[")[0]):
            model.run(x, plan)
        with pytest.raises(ShapeError), model.apply(plan):
            pass
        with pytest.raises(ShapeError):
            model.run(x, patch(site("z", 0), World(x, plan)))


@pytest.mark.parametrize(
    "fn", [lambda x, y, ctx: x.mul_(2.0), lambda x, y, ctx: y.zero_(), lambda x, y, ctx: y.add_(1.0) * x]
)
@pytest.mark.parametrize("executor", ["sequential", "batched", "shared"])
def test_a_function_that_writes_into_what_it_is_given(fn, executor):
    """Worlds share their values, and a tape is the user's: what writes into them would change more than one world."""
    model = wrapped("small_ln_learned")
    x, place = example(model), site("resid_post", 0)
    tape = model.run(example(model, seed=2), capture=place).tape
    worlds = [World(x), World(x, hk.intervene(place, fn, hk.Read(tape)))]
    with says(PlanError, "resid_post.0", "return a new tensor"):
        list(hk.run_worlds(model, worlds, [site("logits")], executor=executor))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, ctx: x[:, :1],
        lambda x, ctx: x.float(),
        lambda x, ctx: x.to("meta"),
        lambda x, ctx: 3.0,
        lambda x, ctx: None,
        lambda x, ctx: x.mean(),
        lambda x, ctx: (x,),
    ],
    ids=["shape", "dtype", "device", "number", "nothing", "scalar", "tuple"],
)
@pytest.mark.parametrize("executor", ["sequential", "batched", "shared"])
def test_a_function_that_returns_something_else(fn, executor):
    model = wrapped("small_ln_learned")
    x = example(model)
    with says(ShapeError, "z.0", "returned", "[2, 5, 4, 8]"):
        list(hk.run_worlds(model, [World(x, hk.intervene(site("z", 0), fn))], [site("logits")], executor=executor))


# Plans


@pytest.mark.parametrize("given", ["zero", 3, {"z": 1}, [1, 2], [None], torch.ones(3), World], ids=repr)
def test_what_is_no_plan(given):
    model = wrapped("gpt2")
    x = example(model)
    with pytest.raises(PlanError):
        model.run(x, given)
    with pytest.raises(PlanError), model.apply(given):
        pass
    with pytest.raises(PlanError):
        World(x, given)
    with pytest.raises(PlanError):
        Plan((given,))
    with pytest.raises(PlanError):
        hk.zero(site("z", 0)) + given


def test_interventions_that_cannot_be_stated():
    z = site("z", 0)
    for build in (patch, hk.mean, hk.resample):
        with says(PlanError, "source"):
            build(z, None)
    for wrong in (3, "clean", [1.0], {"z": 1}):
        with pytest.raises(InterpError):
            patch(z, wrong)
    with says(SiteError, "scores", "'z'"):
        hk.knockout(z)
    with says(PlanError, "-inf"):
        hk.knockout(site("scores", 0)).strength(0.5)
    with says(PlanError, "columns"):
        hk.intervene(z, lambda x, ctx: x, mixes=("columns",))
    with pytest.raises(InterpError):
        hk.steer(z, [1.0, 2.0])
    with pytest.raises(ShapeError, match=r"\[2, 2\]"):
        hk.zero(z).strength(torch.ones(2, 2))
    for mask in (torch.ones(2), torch.ones(2, 2, 2, dtype=torch.bool), torch.tensor([0, 1])):
        with says(ShapeError, "bool"):
            hk.zero(z).where(mask)
    model = wrapped("gpt2")
    with says(ShapeError, "3 rows", "2"):
        model.run(example(model), hk.zero(z).strength(torch.ones(3).double()))


def test_a_world_and_a_plan():
    model = wrapped("gpt2")
    x = example(model)
    with says(PlanError, "World"):
        model.run(World(x), hk.zero(site("z", 0)))


# Executors


@pytest.mark.parametrize("name", ["share", "parallel", "", None, 3])
def test_an_unknown_executor(name):
    model = wrapped("gpt2")
    with says(ModelError, "executor", "sequential", "batched", "shared"):
        list(hk.run_worlds(model, [World(example(model))], [site("logits")], executor=name))
    with pytest.raises(ModelError, match="did you mean 'shared'"):
        list(hk.run_worlds(model, [World(example(model))], [site("logits")], executor="share"))


@pytest.mark.parametrize("budget", [0, -1, "1GB", float("nan")])
@pytest.mark.parametrize("executor", ["sequential", "batched", "shared"])
def test_a_budget_that_is_none(budget, executor):
    model = wrapped("gpt2")
    with says(ModelError, "budget", str(budget)):
        list(hk.run_worlds(model, [World(example(model))], [site("logits")], executor=executor, budget=budget))


@pytest.mark.parametrize("executor", ["sequential", "batched", "shared"])
def test_worlds_and_reads_of_other_kinds(executor):
    model = wrapped("gpt2")
    x = example(model)
    for worlds, reads in (([World(x)], [3]), ([World(x)], ["logitz"]), ([hk.zero(site("z", 0))], [site("logits")])):
        with pytest.raises(InterpError):
            list(hk.run_worlds(model, worlds, reads, executor=executor))


# Models


class Headless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)


def test_what_cannot_be_wrapped():
    from transformers import BertConfig, BertForNextSentencePrediction

    for given in ("gpt2", None, 3, zoo.make, {"model": 1}):
        with says(ModelError, "torch module", type(given).__name__):
            hk.wrap(given)
    with says(ModelError, "Headless", "gpt2", "adapter"):
        hk.wrap(Headless())
    bert = BertForNextSentencePrediction(
        BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    with says(ModelError, "NextSentence", "AutoModelForMaskedLM"):
        hk.wrap(bert)
    model = wrapped("gpt2")
    assert hk.wrap(model) is model


def test_a_family_that_is_nearly_known():
    module = zoo.make("gpt2")
    module.config.model_type = "gpt22"
    assert hk.wrap(module).architecture.family == "gpt22"  # found out by its structure
    module.transformer.ln_f = torch.nn.Sequential(module.transformer.ln_f, torch.nn.Tanh())
    module.transformer.h[0].attn.c_proj = torch.nn.Sequential(module.transformer.h[0].attn.c_proj, torch.nn.Tanh())
    with says(ModelError, "gpt22", "did you mean 'gpt2'"):
        hk.wrap(module)


@pytest.mark.parametrize("executor", ["sequential", "batched", "shared"])
def test_an_error_leaves_the_model_as_it_was(executor):
    model = wrapped("small_rms_rotary_gqa")
    x = example(model)
    before = model.run(x).logits
    for plan in (hk.zero(site("z", 9)), patch(site("z", 0), World(example(model, (5,)))), hk.zero(site("z", 1, pos=7))):
        with pytest.raises(InterpError):
            list(hk.run_worlds(model, [World(x), World(x, plan)], [site("logits")], executor=executor))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    assert torch.equal(model.run(x).logits, before)


def test_new_tensors_of_torch_elsewhere_than_on_the_cpu():
    model = wrapped("gpt2")
    inputs = model.inputs([[1, 2, 3]])
    torch.set_default_device("meta")
    try:
        for call in (
            lambda: hk.wrap(model.module),
            lambda: model.inputs([[1, 2, 3]]),
            lambda: model.run(inputs),
            lambda: model.apply(hk.zero(site("z", layer=0))).__enter__(),
            lambda: list(hk.run_worlds(model, [World(inputs)], "logits")),
        ):
            with pytest.raises(ModelError, match="set_default_device"):
                call()
    finally:
        torch.set_default_device(None)
    assert model.run(inputs).logits.device.type == "cpu"
