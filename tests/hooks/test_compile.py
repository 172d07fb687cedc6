"""A model and a plan as one compiled graph: the numbers of a plain run, one graph for all that are only tensors."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hooks as hk
from hooks import Inputs, Model, Plan, Run, site
from hooks.errors import InputsError, ModelError, PlanError, ShapeError, SiteError
from interp.models import Transformer, TransformerConfig
from tests import zoo
from tests.hooks.test_restore import State

GRAPHS = ["gpt2", "llama"]


@pytest.fixture(autouse=True)
def compiler():
    """Compiled code of one test is not that of the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def example(model: Model, padded: bool = False, seed: int = 1, rows: int = 2) -> Inputs:
    lengths = [5, 4, 3] if padded else [5, 5, 5]
    return model.inputs(*zoo.random_inputs(zoo.VOCAB, lengths[:rows], "left", seed))


def vector(model: Model, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(model.architecture.width, generator=generator, dtype=torch.float64).to(model.dtype)


def agree(out: Run, ref: Run, x: Inputs, atol: float = 1e-10) -> None:
    close = {"rtol": 0.0, "atol": atol}
    torch.testing.assert_close(out.logits[x.mask], ref.logits[x.mask], **close)
    for (_, a), (_, b) in zip(out.tape.values, ref.tape.values, strict=True):
        torch.testing.assert_close(a, b, **close)
    for mine, theirs in zip(out.audit, ref.audit, strict=True):
        assert (mine.status, mine.rows, mine.positions) == (theirs.status, theirs.rows, theirs.positions)
        torch.testing.assert_close(mine.change, theirs.change, **close)


def plan_of(model: Model, n: int) -> Plan:
    """A plan of one structure, all of whose numbers, vectors, positions and heads follow from `n`."""
    pos, head = (-1, 2, -3)[n], (1, 2, 0)[n]
    steer = hk.steer(site("resid_post", 0, pos=pos), vector(model, n), 1.5 + n)
    sharp = hk.scale(site("scores", 1, head=head), 0.5 + n)
    held = hk.clamp(site("pattern", 1, head=(head, 3), pos=pos), 0.1 * n).strength((0.25, 1.0, 0.0)[n])
    loud = hk.noise(site("z", 0, head=head), 0.1 + n, seed=n)
    cut = hk.knockout(site("scores", 0, head=head, pos=pos, key_pos=(0, 1, 0)[n]))
    return steer + sharp + held + loud + cut + hk.zero(site("mlp_out", 1, pos=pos)).strength(torch.tensor(0.5))


@pytest.mark.parametrize("family", GRAPHS)
def test_new_values_vectors_strengths_positions_heads_and_seeds_are_one_graph(family):
    model = zoo.wrapped(family)
    capture = [site("resid_post", 1), site("z", 0, head=1, pos=-1)]
    fast = model.compile(capture=capture, backend="eager")
    padded = family == "gpt2"
    for n in range(3):
        x, plan = example(model, padded, seed=n), plan_of(model, n)
        out, ref = fast(x, plan, seed=n), model.run(x, plan, capture=capture, seed=n)
        agree(out, ref, x)
        assert float((out.logits - model.run(x).logits)[x.mask].abs().max()) > 1e-2
        assert {entry.status for entry in out.audit} == ({"fired", "inert"} if n == 2 else {"fired"})
    assert fast.graphs.count == 1


def test_what_is_another_structure_is_another_graph_and_is_right():
    model = zoo.wrapped("small_attn_only")
    fast, x = model.compile(backend="eager"), example(model)
    for count, (plan, y) in enumerate(
        [
            (None, x),
            (hk.zero(site("z", 0, head=1)), x),
            (hk.zero(site("z", 1, head=1)), x),
            (hk.zero(site("z", 1, head=1)), example(model, padded=True)),
            (hk.zero(site("z", 1, head=(1, 2))), x),
        ],
        start=1,
    ):
        agree(fast(y, plan), model.run(y, plan), y)
        assert fast.graphs.count == count


@pytest.mark.full
def test_worlds_that_are_read():
    model = zoo.wrapped("small_ln_learned")
    x, other = example(model, padded=True), example(model, padded=True, seed=2)
    tape = model.run(other, capture="blocks.0.attn.hook_q").tape

    full = hk.World(example(model, seed=3, rows=3))
    reference = torch.randn(4, 6, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def plan(n: int) -> Plan:
        knocked = hk.World(other, hk.zero(site("z", 0, head=n)))
        score = hk.here(site("scores", 0, head=n, pos=-1, key_pos=0))
        return (
            hk.patch(site("z", 1, head=n), knocked)
            + hk.freeze(site("pattern", 1, head=n))
            + hk.patch(site("q", 0, head=n), tape)
            + hk.resample(site("mlp_out", 0), full, seed=n)
            + hk.mean(site("v", 0, head=n), reference)
            + hk.intervene(site("resid_pre", 1, pos=-1), lambda x, s, ctx: x + 0.1 * s.mean(1), score)
        )

    fast = model.compile(backend="eager")
    for n in (1, 2):
        todo = plan(n)
        agree(fast(x, todo, seed=n), model.run(x, todo, seed=n), x)
    # The world itself, it unedited, the one that is patched in and the reference set.
    assert fast.graphs.count == 4


def test_gradients_by_taps_are_those_of_a_plain_run():
    model = zoo.fresh("small_attn_only")
    x = example(model, padded=True)
    steering, head = vector(model, 1).requires_grad_(), nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    plan = hk.steer(site("resid_pre", 1, pos=-1), steering, head) + hk.freeze(site("z", 1, head=2))
    capture = [site("resid_post", 0), site("z", 0, head=1, pos=-1), site("pattern", 1)]
    fast = model.compile(plan, capture=capture, backend="aot_eager")
    weights = torch.randn(zoo.VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def measured(run: Run) -> Tensor:
        return (run.logits[x.mask] @ weights).sum() + run.tape[capture[0]][x.mask].square().sum()

    out, ref = fast(x, grad=True), model.run(x, plan, capture=capture, grad=True)
    agree(out, ref, x)
    for a, b in zip(out.gradient(measured(out)), ref.gradient(measured(ref)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
        assert float(b.abs().max()) > 1e-3
    (one,) = out.gradient(measured(out), "blocks.0.hook_resid_post")
    assert torch.equal(one, out.gradient(measured(out))[0])
    learned = [steering, head, *model.module.parameters()]
    found, expected = (torch.autograd.grad(measured(run), learned) for run in (out, ref))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    with pytest.raises(SiteError, match="not captured"):
        out.gradient(measured(out), site("z", 1))
    with pytest.raises(PlanError, match="grad=True"):
        out.gradient(fast(x).logits.sum())


def test_what_is_learned_is_seen_and_the_model_is_left_alone():
    model = zoo.fresh("small_rms_rotary_gqa")
    x, place = example(model), site("resid_post", 0)
    learned = vector(model, 1)
    plan = hk.steer(place, learned) + hk.scale(site("scores", 1, head=1), 0.3)
    fast, state = model.compile(plan, backend="eager"), State(model.module)
    first = fast(x)
    state.assert_kept()
    with torch.no_grad():
        learned.mul_(2)
        for parameter in model.module.parameters():
            parameter.mul_(1.1)
        projection = model.module.get_submodule("blocks.0.attn.q_proj")
        projection.weight = nn.Parameter(1.5 * projection.weight)  # type: ignore[operator]
    again = fast(x)
    agree(again, model.run(x, plan), x)
    assert float((again.logits - first.logits).abs().max()) > 1e-2
    model.module.train()
    agree(fast(x), model.run(x, plan), x)
    model.module.eval()
    blocks: Any = model.module.blocks
    blocks[1].mlp.act = torch.tanh
    agree(fast(x), model.run(x, plan), x)
    handle = blocks[0].register_forward_hook(lambda module, args, out: 1.2 * out)
    agree(fast(x), model.run(x, plan), x)
    handle.remove()
    agree(fast(x), model.run(x, plan), x)


def test_what_is_held_besides_comes_first():
    model = zoo.fresh("small_attn_only")
    x = example(model)
    held, plan = hk.scale(site("z", 0, head=1), 0.5), hk.steer(site("resid_post", 0), vector(model, 1))
    fast = model.compile(plan, backend="eager")
    with model.apply(held) as audit:
        agree(fast(x), model.run(x, plan), x)
        with model.suspended():
            agree(fast(x), model.run(x, plan), x)
    assert audit[0].calls == 2
    assert float((fast(x).logits - model.run(x, held + plan).logits).abs().max()) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    model = hk.wrap(zoo.make("small_attn_only", dtype=dtype))
    x = example(model)
    plan = hk.steer(site("resid_post", 0), vector(model, 1), 0.3) + hk.scale(site("z", 1, head=1), 0.7)
    out, ref = model.compile(plan, backend="eager")(x), model.run(x, plan)
    assert out.logits.dtype == dtype
    assert torch.equal(out.logits, ref.logits)


@pytest.mark.full
def test_a_compiler_of_kernels():
    shape = TransformerConfig(vocab_size=zoo.VOCAB, n_layers=1, d_model=16, n_heads=2, positions="none")
    model = hk.wrap(zoo.prepare(Transformer(shape), dtype=torch.float32))
    x = example(model)
    plan = hk.steer(site("resid_pre", 0, pos=-1), vector(model, 1), 0.3)
    agree(model.compile(plan, capture=site("z", 0))(x), model.run(x, plan, capture=site("z", 0)), x, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="replaying CUDA graphs needs a GPU")
def test_cuda_graphs():
    model = hk.wrap(zoo.make("gpt2", dtype=torch.float32).cuda())
    capture = [site("z", 0, head=1)]
    fast = model.compile(capture=capture, mode="reduce-overhead")
    runs = []
    for n in (0, 1, 2, 0, 1, 2):  # recorded at the second call, replayed from the third on
        x = example(model, seed=n)
        plan = hk.steer(site("resid_post", 0, pos=n), vector(model, n).cuda(), 1.0 + n) + hk.zero(site("z", 1, head=n))
        runs.append((fast(x, plan), model.run(x, plan, capture=capture), x))
    for out, ref, x in runs:  # what earlier calls gave is not overwritten
        agree(out, ref, x, atol=1e-4)
    assert fast.graphs.count == 1
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


def test_errors_teach_as_in_a_plain_run():
    model = zoo.wrapped("small_attn_only")
    x = example(model)
    fast = model.compile(backend="eager")
    with pytest.raises(ShapeError, match="does not fit"):
        fast(x, hk.steer(site("resid_post", 0, pos=(0, 1)), torch.zeros(3, 32, dtype=torch.float64)))
    with pytest.raises(ShapeError, match=r"float32|convert"):
        fast(x, hk.clamp(site("resid_post", 0), torch.zeros(32, dtype=torch.float32)))
    with pytest.raises(PlanError, match="wrote into"):
        fast(x, hk.intervene(site("z", 0), lambda x, ctx: x.mul_(2)))
    with pytest.raises(ModelError, match="cannot be compiled with this plan as one graph"):
        fast(x, hk.intervene(site("z", 0), lambda x, ctx: x * (2.0 if bool((x > 0).any()) else 1.0)))
    with pytest.raises(InputsError, match="takes Inputs"):
        fast(x.ids)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="brings its own plan"):
        fast(hk.World(x), Plan())
    with pytest.raises(SiteError, match="did you mean"):
        model.compile(capture="blocks.0.hook_resid_mid_")
    agree(fast(x), model.run(x), x)


def test_what_calls_parts_of_the_very_model_is_refused():
    model = zoo.fresh("small_attn_only")
    x = example(model)
    blocks: Any = model.module.blocks
    block = blocks[0]
    block.forward = lambda *args: type(block).forward(block, *args)
    with pytest.raises(ModelError, match=r"the forward of the model\.blocks\.0 was replaced"):
        model.compile(hk.zero(site("z", 0)), backend="eager")(x)
    plain = zoo.make("small_attn_only")
    found = hk.wrap(plain).architecture
    with pytest.raises(ModelError, match="the adapter finds parts of another module"):
        hk.wrap(plain, adapter=lambda module: found).compile(backend="eager")(x)


def test_a_compiled_model_that_nobody_has_is_freed():
    model = zoo.fresh("gpt2")
    fast, known = model.compile(hk.zero(site("pattern", 1)), backend="eager"), weakref.ref(model.module)
    fast(example(model))
    torch._dynamo.reset()
    del fast, model
    gc.collect()
    assert known() is None
