"""The stacked program is made of plans: it does what the engine does under them, and refuses what it cannot."""

import pytest
import torch
from torch import Tensor

import interp as ip
from experiments.induction_formation.members import Member
from experiments.induction_formation.module import InductionModel
from experiments.induction_formation.network import forward
from experiments.induction_formation.stacked import GROUPS, read, stack
from experiments.induction_formation.task import QUERY, Batch, draw
from experiments.induction_formation.treatments import FIRST, LABELS, LAST, Treatment
from hooks.errors import PlanError
from interp import training
from tests.experiments.induction import ROWS, SHAPE, TABLE, TASK, TREATMENTS, ensemble

HEADS = SHAPE.n_heads

PLANS = {
    "heads and positions counted from the end": training.previous_token(FIRST, -1)
    + training.forbid_previous(FIRST, ip.Span(1, 3), pos=(-1, 2)),
    "two positions back": ip.Plan() + training.forbid_previous(FIRST, 0, offset=2),
    "temperatures multiply": training.temperature(FIRST, None, 2.0) + training.temperature(FIRST, 1, 0.1),
    "the first layer cut off": ip.Plan() + training.residual_from(LAST, range(5)),
    "queries kept, the rest cut off": training.preserving("query", training.ablate_heads(FIRST, 0), LAST)
    + training.residual_from(LAST, range(5)),
    "values moved": training.attention_from(LAST, range(5), parts=("v",)),
    "one pattern for all rows": training.match_pattern(LAST, (0, 3), QUERY, 1, 0, sharpness=0.25)
    + training.ablate_heads(LAST, 2),
    "other logits": lambda batch: (
        ip.Plan() + training.copy_to_logits(LAST, 1, QUERY, torch.tensor(LABELS), batch.labels.T, rest=-2.0)
    ),
    "attention to the wrong label": lambda batch: (
        ip.Plan() + training.match_pattern(LAST, 0, QUERY, 3 - 2 * batch.target)
    ),
}
"""Plans that no treatment makes, and that the program can express all the same."""


def engines(held, params: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [B, labels] and gradients of the module under a plan."""
    module = InductionModel.of(params, TABLE, shape=SHAPE)
    module.requires_grad_(True)
    ids = batch.ids(TASK.n_exemplars)
    with ip.wrap(module).apply(held if isinstance(held, ip.Plan) else held(batch)):
        logits = module(ids)[:, -1]
        torch.nn.functional.cross_entropy(logits, batch.answer).backward()
    zero = {name: torch.zeros_like(value) for name, value in module.named_parameters()}
    return logits.detach(), {name: zero[name] if p.grad is None else p.grad for name, p in module.named_parameters()}


def stackeds(run, constants: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The same of the stacked program."""
    together = Batch(*(value[None] for value in batch))
    logits = forward(run.params, together, constants, SHAPE).logits[0].T
    gradients = torch.func.grad(lambda params: run.loss(params, constants, torch.tensor(0))[0])(run.params)
    model = InductionModel.of({name: g[0] for name, g in gradients.items()}, TABLE, shape=SHAPE)
    return logits, {name: value.detach() for name, value in model.named_parameters()}


def apart(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> float:
    """The largest difference of a logit or a gradient."""
    gradients = [float((one[1][name] - other[1][name]).abs().max()) for name in one[1]]
    return max(float((one[0] - other[0]).abs().max()), *gradients)


@pytest.mark.parametrize("name", [*TREATMENTS, *PLANS])
def test_it_is_the_engine_under_the_plan(name):
    """Logits and gradients agree; and they do not, where any of the tensors that the plan was read into is left out."""
    held = TREATMENTS[name] if name in TREATMENTS else PLANS[name]
    run = ensemble([Member(5, held, TASK)])
    batch = Batch(*(value[0] for value in draw(run.constants, 0, ROWS)))
    expected = engines(held, run.member(0), batch)
    assert apart(stackeds(run, run.constants, batch), expected) < 1e-10
    nothing = {k: v[None].to(v.dtype) for k, v in read(Treatment(), HEADS).items()}
    read_into = {part for group in GROUPS for part in group} & set(run.constants)
    assert bool(read_into) == (name != "none")
    # What the last layer writes, and what it is added to, reach no logit that is a copied score; scores reach no
    # pattern that is held; and nothing of the first layer reaches a stream that is the plain embedding.
    idle = (
        {"gate_last", "match", "given", "bare"} if "copy" in read_into else {"scale_last"} if name == "many" else set()
    )
    if "bare" in read_into:
        idle |= {"gate_first"}
    for part in read_into:
        said = not torch.equal(run.constants[part], nothing[part]) and part not in idle
        without = apart(stackeds(run, run.constants | {part: nothing[part]}, batch), expected)
        assert without > 1e-4 if said else without < 1e-10, part


def test_groups_that_no_member_uses_are_left_out():
    assert stack([Treatment(), Treatment()], HEADS) == {}
    found = stack([Treatment(), Treatment(match=2, sharpness=0.75), Treatment(copy=1)], HEADS)
    assert set(found) == {"match", "given", "copy", "rest"}
    assert found["match"].tolist() == [[0] * 4, [0, 0, 1, 0], [0] * 4]
    assert found["given"][1].tolist() == [[0, 0.75, 0, 0.25, 0], [0, 0.25, 0, 0.75, 0]]
    assert found["copy"].dtype == torch.float32 and found["rest"].tolist() == [0, 0, -1e9]


def preserving(base=None, **options) -> ip.Plan:
    return training.preserving("query", training.ablate_heads(FIRST, 0), LAST, base=base, **options)


def patterned(batch: Batch) -> ip.Plan:
    """A pattern that follows the labels, which the program does not look at."""
    return ip.Plan() + training.match_pattern(LAST, 0, QUERY, torch.where(batch.labels[0] == 0, 1, 3))


REFUSED = {
    "another site": (ip.zero(ip.site("attn_out", layer=1)), r"zero at attn_out"),
    "another operation": (ip.steer(ip.site("z", layer=0), torch.ones(4)), r"steer\("),
    "another layer": (training.previous_token(LAST, 0), r"attend_back\("),
    "no such layer": (training.ablate_heads(2, 0), r"zero at"),
    "some positions": (training.ablate_heads(FIRST, 0, pos=1), r"zero at"),
    "some keys": (training.previous_token(FIRST, 0).at(key_pos=(0, 1)), r"attend_back\("),
    "a strength": (training.previous_token(FIRST, 0).strength(0.5), r"strength 0.5"),
    "some rows": (training.ablate_heads(FIRST, 0).where(torch.ones(16, dtype=torch.bool)), r"zero at .*where"),
    "a longer look back": (training.previous_token(FIRST, 0, offset=2), r"attend_back\(offset=2\)"),
    "a token to itself": (training.forbid_previous(FIRST, 0, offset=0), r"forbid_back\(offset=0\)"),
    "positions by row": (training.forbid_previous(FIRST, 0, pos=torch.tensor([1, 2])), r"forbid_back\("),
    "a temperature for each key": (training.temperature(FIRST, 0, torch.ones(5)), r"scale\("),
    "negative scores": (ip.scale(ip.site("scores", layer=0, head=0), -1.0), r"scale\("),
    "another source": (training.attention_from(LAST, (0, 0, 2, 2, 4)), r"from_positions\("),
    "another residual": (
        training.attention_from(LAST, range(5), parts=("v",), residual="blocks.0.hook_resid_post"),
        r"from_positions\(",
    ),
    "another stream": (training.residual_from(LAST, (0, 0, 1, 2, 4)), r"from_positions\("),
    "a stream before": (training.residual_from(FIRST, range(5)), r"from_positions\("),
    "a preserved world that is bare": (
        preserving(base=training.residual_from(LAST, range(5))),
        r"patch_constant at",
    ),
    "a pattern elsewhere": (training.match_pattern(LAST, 0, 3, 1), r"attend\("),
    "a pattern of labels": (patterned, r"attend\("),
    "two patterns": (
        training.match_pattern(LAST, 0, QUERY, 1) + training.match_pattern(LAST, 1, QUERY, 3),
        r"attend\(",
    ),
    "other keys": (
        lambda batch: ip.Plan() + training.copy_to_logits(LAST, 0, QUERY, [0, 3], batch.labels.T),
        r"copy_scores\(",
    ),
    "other tokens": (
        lambda batch: ip.Plan() + training.copy_to_logits(LAST, 0, QUERY, [1, 3], batch.labels.flip(0).T),
        r"copy_scores\(",
    ),
    "two copies": (
        lambda batch: Treatment(copy=0)(batch) + Treatment(copy=1)(batch),
        r"copy_scores\(",
    ),
    "a tape": (ip.patch(ip.site("q", layer=1), torch.zeros(16, 5, 4, 4)), r"patch at"),
    "another world": (ip.patch(ip.site("q", layer=1), ip.Plan()) + training.previous_token(FIRST, 0), r"patch at"),
    "some heads' queries": (preserving(head=0), r"patch_constant at"),
    "preserved twice": (preserving() + preserving(), r"patch_constant at"),
    "moved and preserved": (
        preserving() + training.attention_from(LAST, (0, 0, 1, 2, 4), parts=("q",)),
        r"patch_constant at",
    ),
    "a world that it cannot hold": (preserving(base=training.previous_token(FIRST, 0, offset=2)), r"offset=2"),
    "no such head": (training.ablate_heads(LAST, 7), r"heads \[7\] do not exist: there are 4"),
    "no such position": (training.forbid_previous(FIRST, 0, pos=5), r"positions \[5\] do not exist"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_plan_that_it_cannot_express_is_refused_by_name(name):
    held, words = REFUSED[name]
    with pytest.raises(PlanError, match=rf"member 1: .*{words}"):
        stack([Treatment(), held if callable(held) else ip.Plan() + held], HEADS)
