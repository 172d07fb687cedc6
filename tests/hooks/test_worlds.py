"""Which executor runs worlds and why, and what is said where nothing fired."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import hooks as hk
from hooks import Model, World, patch, site
from hooks.record import Choice, choose
from tests.hooks.executing import Ran, agree, inputs, several_families
from tests.zoo import fresh, wrapped

# Where shared gives way


def test_functions_that_mix_are_run_batched_and_the_reason_says_so():
    model = wrapped("qwen3")
    x, other = inputs(model, "flat", 1), inputs(model, "flat", 2)
    over_rows = hk.intervene(site("z", 1, head=1), lambda v, ctx: v - v.mean(0, keepdim=True), mixes=("row",))
    over_positions = hk.intervene(site("resid_pre", 1), lambda v, ctx: v.flip(1), mixes=("pos",))
    for plan, word in ((over_rows, "row"), (over_positions, "pos"), (over_rows + over_positions, "mixes")):
        worlds = [World(x, plan), World(x, hk.zero(site("z", 0, pos=1)) + plan), World(other, plan), World(x)]
        for asked in ("auto", "shared"):
            choice = choose(model, worlds, asked)
            assert choice.executor == "batched"
            assert word in choice.reason and "shared" in choice.reason
        reads = [site("logits", pos=2), site("logits", pos=-1)]
        oracle = Ran(model, worlds, reads, "sequential")
        for budget in (None, 1):
            agree(oracle, Ran(model, worlds, reads, "shared", budget=budget), worlds, reads)
        assert float((oracle.values[0][1] - oracle.values[3][1]).abs().max()) > 1e-3


def submodules(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if part is not module and next(part.parameters(), None) is not None]


@several_families
def test_hooks_of_the_users_own_are_respected(family):
    model = fresh(family)
    x, other = inputs(model, "left", 1), inputs(model, "left", 2)
    block = model.architecture.blocks[1]
    for part in (
        block.module,
        block.of_attention.pre,
        block.attention.module,
        block.attention.out,
        model.architecture.embed,
    ):
        name = next(n for n, m in model.module.named_modules() if m is part)

        def bump(_module: nn.Module, _args: tuple, out: Tensor | tuple) -> Tensor | tuple:
            first = out[0] if isinstance(out, tuple) else out
            first = first + torch.arange(first.shape[-1]).double().cos()
            return (first, *out[1:]) if isinstance(out, tuple) else first

        handle = part.register_forward_hook(bump)
        worlds, reads = [World(x, patch(site("resid_pre", 1, pos=1), World(other))), World(x)], [site("logits", pos=-1)]
        choice = choose(model, worlds, "auto")
        assert choice.executor != "shared" and name in choice.reason
        oracle = Ran(model, worlds, reads, "sequential")
        agree(oracle, Ran(model, worlds, reads, "auto"), worlds, reads)
        handle.remove()
        assert choose(model, worlds, "auto").executor == "shared"
        plain = Ran(model, worlds, reads, "shared")
        assert float((oracle.values[0][0] - plain.values[0][0]).abs().max()) > 1e-3
    handle = block.module.register_forward_pre_hook(lambda m, args: None)
    assert choose(model, [World(x)]).executor != "shared"
    handle.remove()


@pytest.mark.parametrize("whole", [True, False], ids=["model", "a block"])
def test_training_mode_is_not_shared(whole):
    """Dropout draws afresh for every forward pass, wherever in the model it is switched on."""
    model = fresh("gpt2")
    for part in model.module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.5
    x = inputs(model, "flat", 1)
    assert choose(model, [World(x)]).executor == "shared"
    (model.module if whole else model.architecture.blocks[1].module).train()
    choice = choose(model, [World(x)])
    assert choice.executor != "shared"
    assert "training" in choice.reason


def test_executors_by_name():
    model = wrapped("gpt2")
    x = inputs(model, "flat", 1)
    for name in ("sequential", "batched"):
        assert choose(model, [World(x)], name) == Choice(name)
    assert choose(model, [], "auto").executor == "shared"
    assert list(hk.run_worlds(model, [], [site("logits")])) == []


# Unfired


def without_its_last_block(family: str) -> Model:
    """A model that has its last block, and does not compute what is in it."""
    model = fresh(family)
    model.module.blocks[-1].forward = lambda x, *rest: x
    return model


def test_blocks_that_were_taken_away_after_wrapping():
    model = fresh("small_ln_learned")
    x = inputs(model, "flat", 1)
    before = model.run(x).logits
    model.module.blocks = model.module.blocks[:-1]
    after = model.run(x).logits
    assert float((after - before).abs().max()) > 1e-3
    assert model.n_layers == 1 and max(s.layers for s in model.sites()) == 1
    for run in (lambda plan: model.run(x, plan), lambda plan: model.apply(plan).__enter__()):
        with pytest.raises(hk.errors.SiteError, match=r"z\.1: the model has layers 0 \.\. 0"):
            run(hk.zero(site("z", 1)))
    (shared,) = hk.run_worlds(model, [World(x)], [site("logits")], executor="shared")
    torch.testing.assert_close(shared.values[0], after, rtol=0, atol=1e-10)


def test_what_never_fires_raises():
    model = without_its_last_block("small_ln_learned")
    x = inputs(model, "flat", 1)
    idle, busy = hk.zero(site("z", 1)), hk.zero(site("z", 0))
    with pytest.raises(hk.errors.UnfiredError, match=r"never fired: zero at z\.1"):
        model.run(x, busy + idle)
    with pytest.raises(hk.errors.UnfiredError, match=r"z\.1"), model.apply(busy + idle):
        model.module(input_ids=x.ids)
    with pytest.raises(hk.errors.UnfiredError, match=r"z\.0.*z\.1"), model.apply(busy + idle):
        pass
    assert model.run(x, busy).audit[0].status == "fired"


def test_what_never_fires_hides_no_other_exception():
    model = without_its_last_block("small_ln_learned")
    x = inputs(model, "flat", 1)
    with pytest.raises(KeyError, match="mine"), model.apply(hk.zero(site("z", 1))):
        raise KeyError("mine")

    def fail(value: Tensor, ctx: hk.Context) -> Tensor:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        model.run(x, hk.intervene(site("z", 0), fail) + hk.zero(site("z", 1)))


@pytest.mark.parametrize("executor", ["sequential", "batched"])
def test_worlds_that_never_fire_raise(executor):
    model = without_its_last_block("small_ln_learned")
    x = inputs(model, "flat", 1)
    with pytest.raises(hk.errors.UnfiredError):
        list(hk.run_worlds(model, [World(x, hk.zero(site("z", 1)))], [site("logits", pos=-1)], executor=executor))


def test_a_forward_of_the_users_own_is_run():
    """A method that was replaced on one module: the copy-on-write executor does not call it, so another one is used."""
    model = fresh("gpt2")
    x = inputs(model, "flat", 1)
    worlds = [World(x), World(x, hk.zero(site("z", 1, head=0)))]
    before = [o.values[0] for o in hk.run_worlds(model, worlds, [site("logits")])]
    mlp = model.architecture.blocks[0].mlp.module
    whole = mlp.forward
    mlp.forward = lambda v: 0.5 * whole(v)
    choice = choose(model, worlds)
    assert choice.executor == "batched" and "mlp" in choice.reason and "forward" in choice.reason
    after = [o.values[0] for o in hk.run_worlds(model, worlds, [site("logits")])]
    torch.testing.assert_close(after[0], model.run(x).logits, rtol=0, atol=1e-10)
    assert min(float((a - b).abs().max()) for a, b in zip(after, before, strict=True)) > 1e-3


def test_a_model_on_several_devices_is_not_shared():
    model = fresh("small_ln_learned")
    assert model.unshareable() == ""
    model.module.unembed.to("meta")
    assert "cpu, meta" in model.unshareable()
