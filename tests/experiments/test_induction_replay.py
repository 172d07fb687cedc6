"""The study's programs replay what an independent implementation trained, from its weights, on its batches.

The numbers are `data/induction_replay.safetensors`, written by `induction_replay`.
"""

import pytest
import torch
from safetensors.torch import load_file

import interp as ip
from experiments.induction_formation.by_hand import logits_under
from experiments.induction_formation.members import Member, constants_of
from experiments.induction_formation.module import InductionModel
from experiments.induction_formation.network import Shape, forward, losses
from experiments.induction_formation.task import Batch, Task
from experiments.induction_formation.treatments import LAST, Treatment, only_head
from interp import training
from interp.training.ensemble import Ensemble, Program
from tests.experiments import induction_replay as replay

SHAPE = Shape(d_input=replay.INPUT, d_model=replay.WIDTH, n_heads=replay.HEADS)
TASK = Task(n_classes=4, n_labels=replay.LABELS, largest=4, held_out_classes=2)
"""Only its numbers of exemplars and labels count: the batches are given."""
TREATMENTS = {
    "all heads": Treatment(),
    "none": only_head(0, 2),
    "previous token": only_head(0, 2, previous_token=(0,)),
    "no previous token": only_head(0, 2, no_previous_token=(0, 1)),
    "layer 1": only_head(0, 2, first_layer=True),
    "match": only_head(0, 2, match=0),
    "blunt match": only_head(0, 2, match=0, sharpness=0.75),
    "copy": Treatment(copy=0),
    "layer 1 + copy": Treatment(first_layer=True, copy=0),
    "ablated": Treatment(ablate_first=(0,)),
    "pattern-preserving": Treatment(ablate_first=(0,), preserve=("q", "k")),
    "value-preserving": Treatment(ablate_first=(0,), preserve=("v",)),
    "temperature": Treatment(temperature_last=((0, 0.5), (1, 0.5))),
}
assert list(TREATMENTS) == list(replay.CLAMPS)


@pytest.fixture(scope="module")
def written():
    return load_file(replay.PATH)


def start(written):
    """The weights as the study lays them out."""
    w = {name.removeprefix("start."): value for name, value in written.items() if name.startswith("start.")}
    params = {name: w[name] for name in ("embed.weight", "embed.bias", "label", "read.weight", "read.bias")}
    params |= {"qkv0": torch.cat([w[f"{part}0"] for part in "qkv"]), "out0": w["out0"]}
    params |= {"q1": w["q1"], "kv1": torch.cat([w["k1"], w["v1"]]), "out1": w["out1"]}
    for ours, theirs in (("ln0", "norm0"), ("ln1", "norm1"), ("ln_final", "norm2")):
        params |= {f"{ours}.{part}": w[f"{theirs}.{part}"] for part in ("weight", "bias")}
    return params


def batch_of(sequences: torch.Tensor) -> Batch:
    """Sequences [..., B, 5] of the other implementation as a batch [..., 2, B], [..., 2, B], [..., B]."""
    numbers = sequences.long().movedim(-1, 0)
    return Batch(numbers[:2].movedim(0, -2), numbers[2:4].movedim(0, -2), numbers[4])


def test_the_fixture_says_something(written):
    curves = written["losses"]
    assert curves.shape == (len(TREATMENTS), replay.UPDATES) and curves.dtype == torch.float64
    assert (curves[:, :10].mean(1) - curves[:, -40:].mean(1)).min() > 0.1
    apart = (curves[:, None] - curves[None]).abs().amax(-1) + torch.eye(len(curves))
    assert apart.min() > 1e-3
    assert replay.PATH.stat().st_size < 100_000


def test_the_stacked_program_replays_every_run(written):
    members = [Member(treatment=treatment, task=TASK) for treatment in TREATMENTS.values()]
    params = {name: torch.stack([value] * len(members)) for name, value in start(written).items()}
    constants = constants_of(members, written["exemplars"], SHAPE, torch.float64)
    constants["exemplars"] = written["exemplars"]

    def loss(params, constants, step):
        given = batch_of(written["batches"][int(step)].expand(len(members), -1, -1))
        return losses(forward(params, given, constants, SHAPE).logits, given.answer).mean(1)

    run = Ensemble(lambda _: Program(params, constants, loss), members, rate=replay.RATE)
    found = run.train(replay.UPDATES).T
    torch.testing.assert_close(found, written["losses"], rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", TREATMENTS)
def test_the_engine_under_the_plan_replays_it(written, name):
    """The module, held by `apply`, with torch's own Adam."""
    module = InductionModel.of(start(written), written["exemplars"], replay.LABELS, SHAPE)
    module.requires_grad_(True)
    model, optimizer = ip.wrap(module), torch.optim.Adam(module.parameters(), lr=replay.RATE)
    found = []
    for sequences in written["batches"][:12]:
        batch = batch_of(sequences)
        optimizer.zero_grad()
        with model.apply(TREATMENTS[name](batch)):
            logits = module(batch.ids(replay.CLASSES))[:, -1]
            loss = torch.nn.functional.cross_entropy(logits, batch.answer)
            loss.backward()
        optimizer.step()
        found.append(loss.item())
    expected = written["losses"][list(TREATMENTS).index(name), :12]
    torch.testing.assert_close(found, expected.tolist(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["layer 1", "layer 1 + copy"])
def test_the_clamp_of_layer_1_is_a_forward_written_by_hand(written, name):
    """Three programs against it, on every sequence that differs; and what the clamp was taken for is something else."""
    weights = {name.removeprefix("start."): value for name, value in written.items() if name.startswith("start.")}
    rows = [[a, b, y, z, t] for a, b in ((0, 1), (3, 2), (5, 0)) for y, z in ((0, 1), (3, 2), (1, 3)) for t in (0, 1)]
    expected = replay.logits(weights, written["exemplars"], torch.tensor(rows), replay.CLAMPS[name])
    batch, treatment = batch_of(torch.tensor(rows)), TREATMENTS[name]
    module = InductionModel.of(start(written), written["exemplars"], replay.LABELS, SHAPE)
    ids = batch.ids(replay.CLASSES)

    model = ip.wrap(module)

    def engines(plan: ip.Plan) -> torch.Tensor:
        with model.apply(plan):
            return module(ids)[:, -1].detach()

    constants = constants_of([Member(treatment=treatment, task=TASK)], written["exemplars"], SHAPE, torch.float64)
    constants["exemplars"] = written["exemplars"]
    stacked = {key: value[None] for key, value in start(written).items()}
    one = Batch(*(value[None] for value in batch))
    found = {
        "plain": logits_under(module, batch, treatment),
        "stacked": forward(stacked, one, constants, SHAPE).logits[0].T,
        "engine": engines(treatment(batch)),
    }
    for way, logits in found.items():
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10, msg=way)
    others = {
        "the exemplar at the second one too": training.residual_from(LAST, range(5))
        + training.attention_from(LAST, (0, 0, 2, 2, 4)),
        "the residual stream as it is": training.attention_from(LAST, (0, 0, 1, 2, 4))
        + training.attention_from(LAST, range(5), parts=("v",)),
    }
    if name == "layer 1":
        for what, plan in others.items():
            plan = plan + training.ablate_heads(LAST, 1)
            logits = engines(plan)
            assert float((logits - expected).abs().max()) > 1e-3, what
