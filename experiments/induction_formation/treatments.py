"""What each member holds fixed while it trains (the paper says "clamps"): words, and the plan that they mean.

Source: Singh et al., "What needs to go right for an induction head?" (ICML 2024). Calling a `Treatment` is the only
way in which its words become interventions: a module is trained under that plan, and the stacked program is made of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import interp as ip
from experiments.induction_formation.task import QUERY, TOKENS, Batch
from hooks import PlanError
from interp import training

FIRST, LAST = 0, 1
"""The layers, as the engine counts them; fields of a `Treatment` name them by these words."""
OF_FIRST = ("previous_token", "no_previous_token", "ablate_first", "temperature_first")
"""Fields of a `Treatment` that say what the first layer does."""
STREAMS = {"q": "query", "k": "key", "v": "value"}
LABELS = (1, 3)
"""Positions of the two label tokens; each follows its exemplar."""
TO_THE_LEFT = (0, 0, 1, 2, 4)
"""Whose embedding a token's query and key are made of where the first layer is held: of all between the first token and
the query, that of the token one to the left, so of a label, its exemplar's."""

Held = ip.Plan | Callable[[Batch], ip.Plan]
"""What a member holds: a plan, or, where that depends on the sequences, a function of a batch (as `Treatment` is)."""


@dataclass(frozen=True)
class Treatment:
    """What one member holds fixed; the default holds nothing. It is a function from a batch to a plan.

    Attributes:
        previous_token: first-layer heads whose pattern attends to the token before (position 0 to itself).
        no_previous_token: first-layer heads that may not attend from a token to the one before it.
        labels_only: whether `no_previous_token` holds at label tokens only.
        first_layer: whether the residual stream after the first layer is the plain embedding, so that what the first
            layer adds reaches neither the last one nor the output, and the last layer's queries and keys are computed
            from embeddings one to the left (`TO_THE_LEFT`).
        match: a last-layer head whose pattern at the query is `sharpness` on the right label token and 1 - `sharpness`
            on the wrong one.
        sharpness: in [0, 1].
        copy: a last-layer head whose pre-softmax scores on the two label tokens are the logits of those labels; every
            other label's logit is -1e9.
        ablate_first, ablate_last: heads whose values are 0.
        preserve: which of the last layer's "q", "k", "v" are computed as if `ablate_first` were not there:
            ("q", "k") is a pattern-preserving ablation, ("v",) a value-preserving one, and all three leave only the
            direct path ablated.
        stop_gradient: whether what is preserved is a constant, or gradients flow through both forwards.
        temperature_first, temperature_last: (head, temperature) pairs; a head's scores are divided by its temperature.

    Raises:
        PlanError: fields that cannot be meant, or not together.
    """

    previous_token: tuple[int, ...] = ()
    no_previous_token: tuple[int, ...] = ()
    labels_only: bool = False
    first_layer: bool = False
    match: int | None = None
    sharpness: float = 1.0
    copy: int | None = None
    ablate_first: tuple[int, ...] = ()
    ablate_last: tuple[int, ...] = ()
    preserve: tuple[str, ...] = ()
    stop_gradient: bool = True
    temperature_first: tuple[tuple[int, float], ...] = ()
    temperature_last: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for name in ("previous_token", "no_previous_token", "ablate_first", "ablate_last"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(head, int) for head in value):
                raise PlanError(f"{name} is a tuple of heads, got {value!r}")
        for name in ("temperature_first", "temperature_last"):
            value = getattr(self, name)
            if not all(isinstance(item, tuple) and len(item) == 2 for item in value):
                raise PlanError(f"{name} is a tuple of (head, temperature) pairs, got {value!r}")
            if len({head for head, _ in value}) < len(value):
                raise PlanError(f"{name} gives a head two temperatures: {value!r}")
        if not 0 <= self.sharpness <= 1:
            raise PlanError(f"sharpness is a share of attention and lies between 0 and 1, got {self.sharpness}")
        if not set(self.preserve) <= set(STREAMS):
            raise PlanError(f"preserve names streams of the last layer among q, k, v; got {self.preserve}")
        if self.preserve and not self.ablate_first:
            raise PlanError("preserve has nothing to preserve against: name the heads to ablate in ablate_first")
        if self.first_layer and (idle := [name for name in OF_FIRST if getattr(self, name)]):
            raise PlanError(
                f"under first_layer, nothing that the first layer does reaches anything: no {', '.join(idle)}"
            )
        if self.sharpness != 1 and self.match is None:
            raise PlanError("sharpness is of the head that matches: name it in match")
        if self.labels_only and not self.no_previous_token:
            raise PlanError("labels_only says where no_previous_token holds: name its heads")
        if overlap := set(self.previous_token) & set(self.no_previous_token):
            raise PlanError(f"heads {sorted(overlap)} cannot both attend to the previous token and not attend to it")
        if not all(value > 0 for _, value in self.temperature_first + self.temperature_last):
            raise PlanError("temperatures must be positive")

    def __call__(self, batch: Batch) -> ip.Plan:
        """The interventions that this means on the sequences of a batch; the same at every step but for these.

        ``with ip.wrap(InductionModel.of(run.member(i), table)).apply(treatment(batch))`` continues a member's training
        under its treatment, or evaluates it under another one.

        Args:
            batch: one member's sequences: classes and labels [2, B], target [B].
        """
        plan = ip.Plan()
        for layer, scaled in ((FIRST, self.temperature_first), (LAST, self.temperature_last)):
            for head, t in scaled:
                plan = plan + training.temperature(layer, head, t)
        if self.previous_token:
            plan = plan + training.previous_token(FIRST, self.previous_token)
        if self.no_previous_token:
            queries = LABELS if self.labels_only else tuple(range(1, TOKENS))
            plan = plan + training.forbid_previous(FIRST, self.no_previous_token, pos=queries)
        if self.ablate_first:
            ablation = training.ablate_heads(FIRST, self.ablate_first)
            if self.preserve:
                what = [STREAMS[part] for part in self.preserve]
                plan = training.preserving(what, ablation, LAST, base=plan, stop_gradient=self.stop_gradient)
            else:
                plan = plan + ablation
        if self.first_layer:
            plan = plan + training.residual_from(LAST, range(TOKENS))
            plan = plan + training.attention_from(LAST, TO_THE_LEFT)
        if self.match is not None:
            right, wrong = LABELS[0] + 2 * batch.target, LABELS[1] - 2 * batch.target
            plan = plan + training.match_pattern(LAST, self.match, QUERY, right, wrong, sharpness=self.sharpness)
        if self.ablate_last:
            plan = plan + training.ablate_heads(LAST, self.ablate_last)
        if self.copy is not None:
            plan = plan + training.copy_to_logits(LAST, self.copy, QUERY, torch.tensor(LABELS), batch.labels.T)
        return plan


def only_head(head: int, n_heads: int = 8, **held: Any) -> Treatment:
    """A treatment under which every last-layer head but one is ablated, so that the circuit is single.

    Args:
        head: the head that stays.
        n_heads: heads of the layer H.
        **held: fields of `Treatment` besides.

    Raises:
        PlanError: the layer lacks the head.
    """
    if not 0 <= head < n_heads:
        raise PlanError(f"there is no head {head}: the layer has {n_heads}, counted from 0")
    return Treatment(ablate_last=tuple(h for h in range(n_heads) if h != head), **held)
