"""What ablating edges fixes and costs, measured, and held on a model for forward passes of the user's own."""

from __future__ import annotations

import pytest
import torch

import interp as ip
from interp import paths
from tests import zoo
from tests.paths import networks, oracle
from tests.paths.cases import CLOSE, at_last, case


def test_repair_takes_out_what_is_spurious():
    """The second head reads the token too, and with the wrong sign: without it the first one's answer is whole."""
    model = ip.wrap(networks.two_heads(-0.75, None))
    metric = ip.logit(networks.WANTED)
    inputs = {"on": model.inputs([[networks.ON]] * 2), "off": model.inputs([[networks.OFF]])}
    measured = {name: (rows, metric) for name, rows in inputs.items()}
    edge = "a0.h1->logits"
    found = paths.repair(model, [edge], measured, values="zero")
    assert found.before == pytest.approx({"on": 0.25, "off": 0.0}) and found.after == pytest.approx({"on": 1, "off": 0})
    assert (found.edges, found.values, found.rows) == ((edge,), "zero", {"on": 2, "off": 1})
    reference = model.inputs([[networks.ON], [networks.OFF], [networks.ON], [networks.ON]])
    found = paths.repair(model, [edge], measured, reference=reference)
    assert found.after == pytest.approx({"on": 1 - 0.75 * 0.75, "off": -0.75 * 0.75})
    assert "0.25 -> 0.4375  (+0.1875; 2 rows)" in str(found) and "0.4375" in found._repr_html_()


def test_a_repair_can_be_held_on_the_model():
    model = ip.wrap(networks.two_heads(-0.75, None))
    ids = torch.tensor([[networks.ON]])
    with model.apply(paths.repair_plan(model, "a0.h1->logits", values="zero")):
        assert model.module(ids)[0, -1, networks.WANTED].item() == pytest.approx(1.0)
    assert model.module(ids)[0, -1, networks.WANTED].item() == pytest.approx(0.25)


REPAIRED = {
    "gpt2": ["input->a0.h1<k>", "a0.h1->a1.h0<q>", "a0.h2->m1", "m0->logits"],
    "gemma2": ["input->a0.h1<k>", "a0.h1->a1.h0<q>", "a0.h2->m1", "m0->logits"],
}


@pytest.mark.parametrize("family", REPAIRED)
@pytest.mark.parametrize("options", [{"values": "zero"}, {"values": "mean"}, {"values": "mean", "pooled": True}])
def test_a_held_repair_serves_batches_of_any_length(family, options):
    """The edges carry constants in every forward pass, whatever its lengths; the reference prompts are run once."""
    given, short, edges = case(family), case(family, (4, 3)), REPAIRED[family]
    module, runs = given.module, []
    reference = given.inputs("reference") if options["values"] == "mean" else None
    repaired = paths.repair_plan(given.model, edges, reference=reference, **options)
    batches = [(given.inputs("clean", "left"), given.prompts("clean")), (short.inputs("clean"), short.prompts("clean"))]
    counted = module.register_forward_hook(lambda *_: runs.append(1))
    try:
        with torch.no_grad(), given.model.apply(repaired):
            held = [
                module(input_ids=run.ids, attention_mask=run.mask.long(), position_ids=run.positions).logits
                for run, _ in batches
            ]
    finally:
        counted.remove()
    assert len(runs) == 2 and held[0].shape[1] != held[1].shape[1]
    for logits, (inputs, run) in zip(held, batches, strict=True):
        with torch.no_grad():
            copied = oracle.replaced(module, run, other=given.prompts("reference"), **options)
            expected = at_last(oracle.edge_set(module, run, copied, edges), run.mask)
            plain = at_last(oracle.forward(module, run).logits, run.mask)
        torch.testing.assert_close(at_last(logits, inputs.mask), expected, **CLOSE)
        assert (expected - plain).abs().amax(1).min() > 1e-3


def test_a_held_repair_of_a_classifier():
    model = ip.wrap(zoo.make("vit"))
    draw = torch.Generator().manual_seed(0)
    images = [torch.randn(n, *zoo.IMAGE, generator=draw, dtype=torch.float64) for n in (6, 3, 1)]
    edges, metric = ["input->a0.h1<v>", "a0.h0->m1"], ip.logit(0)
    repaired = paths.repair_plan(model, edges, reference=model.inputs(images[0]))
    for pixels in images[1:]:
        inputs = model.inputs(pixels)
        with torch.no_grad(), model.apply(repaired):
            held = model.module(pixel_values=pixels).logits[:, 0]
        told = paths.repair(model, edges, {"x": (inputs, metric)}, reference=model.inputs(images[0]))
        found = paths.path_patch(
            model, inputs, None, edges, semantics="set", metric=metric, values="mean", reference=model.inputs(images[0])
        )
        torch.testing.assert_close(held, torch.as_tensor(found.base + found.effect), **CLOSE)
        assert told.after["x"] == pytest.approx(held.mean().item(), abs=1e-10)
        assert found.effect.min() != 0 and abs(told.after["x"] - told.before["x"]) > 1e-4


def test_a_held_repair_whose_reference_is_too_short():
    given = case("gpt2")
    repaired = paths.repair_plan(given.model, "m0->logits", reference=given.model.inputs([[3, 4], [5]]))
    with given.model.apply(repaired):
        given.module(torch.tensor([[1, 2]]))
        with pytest.raises(ip.InterpError, match="at most 2 tokens, and position 2 needs a mean"):
            given.module(torch.tensor([[1, 2, 3]]))
    module = zoo.make("gpt2").train()
    with pytest.raises(ip.InterpError, match="training mode"):
        paths.repair_plan(ip.wrap(module), "m0->logits", reference=given.inputs("reference"))


def test_gradients_flow_through_a_held_repair():
    """What a repaired edge carries is a constant: the weights of its writer feel the other edges alone."""
    model = ip.wrap(networks.two_heads(-0.75, None))
    weight = model.module.blocks[0].attn.v_proj.weight
    ids = torch.tensor([[networks.ON]])

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(model.module(ids)[0, -1, networks.WANTED], weight)[0].unflatten(0, (2, -1))

    plain = gradient()
    with model.apply(paths.repair_plan(model, "a0.h1->logits", values="zero")):
        held = gradient()
    assert plain.abs().amax((1, 2)).min() > 0.1 and held[1].abs().max() == 0
    torch.testing.assert_close(held[0], plain[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": "patch"}, "constants"), ({"values": "mean"}, "reference"), ({"edges": ["a0.h9->logits"]}, "a0.h9"),
        ({"measured": {}}, "measured"), ({"edges": []}, "no edge"), ({"values": "means"}, "did you mean 'mean'"),
        ({"measured": {"on": 3}}, "'on' is prompts and a metric"), ({"pooled": True}, "pooled=True"),
        ({"measured": {"on": ("text", ip.logit(1))}}, "'on' is prompts and a metric"),
        ({"values": "mean", "reference": [[1]]}, "model.inputs"), ({"graph": "heads"}, "Graph.of"),
    ],
)  # fmt: skip
def test_what_a_repair_refuses(options, message):
    model = ip.wrap(networks.two_heads(-0.75, None))
    measured = {"on": (model.inputs([[networks.ON]]), ip.logit(networks.WANTED))}
    given = {"edges": ["a0.h1->logits"], "measured": measured, "values": "zero"} | options
    with pytest.raises(ip.InterpError, match=message):
        paths.repair(model, **given)
