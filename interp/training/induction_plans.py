"""The clamps of an ensemble's member as a plan of the engine, to hold on its module in a loop or a notebook."""

from __future__ import annotations

import torch

from hooks import Plan
from hooks.plan.plan import as_plan
from interp.training import clamps
from interp.training.induction_clamps import Clamp
from interp.training.induction_task import QUERY, TOKENS, Batch

PARTS = {"q": "query", "k": "key", "v": "value"}
FIRST, LAST = 0, 1


def plan_of(clamp: Clamp, batch: Batch) -> Plan:
    """What `Ensemble` holds as data, as interventions on `InductionModel`: both give the same logits and gradients.

    ``with ip.wrap(InductionModel.of(run.member(i), table)).apply(plan_of(member.clamp, batch))`` continues a member's
    training under its clamp, or evaluates it under another.

    Args:
        clamp: what is held.
        batch: one member's sequences: classes and labels [2, B], target [B]. A plan is of its batch, since the right
            label token and the labels' logits are.
    """
    plan = Plan(())
    for layer, scaled in ((FIRST, clamp.temperature_first), (LAST, clamp.temperature_last)):
        for head, t in scaled:
            plan = plan + clamps.temperature(layer, head, t)
    if clamp.previous_token:
        plan = plan + clamps.previous_token(FIRST, clamp.previous_token)
    if clamp.no_previous_token:
        queries = tuple(range(1, TOKENS, 2 if clamp.labels_only else 1))
        plan = plan + clamps.forbid_previous(FIRST, clamp.no_previous_token, pos=queries)
    if clamp.ablate_first:
        ablation = clamps.ablate_heads(FIRST, clamp.ablate_first)
        if clamp.preserve:
            what = [PARTS[part] for part in clamp.preserve]
            plan = clamps.preserving(what, ablation, LAST, base=plan, stop_gradient=clamp.stop_gradient)
        else:
            plan = plan + ablation
    if clamp.first_layer:
        plan = plan + clamps.attention_from(LAST, (0, 0, 2, 2, 4))
        plan = plan + clamps.attention_from(LAST, range(TOKENS), parts=("v",))
    if clamp.match is not None:
        right, wrong = 1 + 2 * batch.target, 3 - 2 * batch.target
        plan = plan + clamps.match_pattern(LAST, clamp.match, QUERY, right, wrong, sharpness=clamp.sharpness)
    if clamp.ablate_last:
        plan = plan + clamps.ablate_heads(LAST, clamp.ablate_last)
    if clamp.copy is not None:
        keys = torch.tensor([1, 3])
        plan = plan + as_plan(clamps.copy_to_logits(LAST, clamp.copy, QUERY, keys, batch.labels.T))
    return plan
