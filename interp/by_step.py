"""A metric at every step of a generation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hooks import Generated, Inputs, MetricError, Model, resolve
from interp.metrics import Metric


@torch.no_grad()
def by_step(model: Model, out: Generated, metric: Metric) -> Tensor:
    """A metric of the logits that each token was chosen from.

    Args:
        out: of ``model.generate(..., logits=True)``.
        metric: of the logits at one position, as `logit_diff`, `log_prob` or `prob` of single tokens, or a metric of
            your own that reads ``site("logits", pos=-1)``. Answers that are one for each row are one for each row of
            `out`.

    Returns:
        [R, S], nan once a row has ended.

    Raises:
        MetricError: `out` is something else, or its logits were not kept; the metric reads something else, several
            positions, or a reference.
    """
    if not isinstance(out, Generated):
        raise MetricError(f"by_step() measures what model.generate() returned, not {type(out).__name__}")
    if out.logits is None:
        raise MetricError("the logits of this generation were not kept: generate(..., logits=True)")
    if metric.reference is not None:
        raise MetricError(f"{metric.name} compares with a reference, which has no steps of its own")
    # What is known of one step: one token a row, whose logits these are.
    step = Inputs.of(torch.zeros(len(out), 1, dtype=torch.int64))
    bound = metric.bind(model, step)
    wrong = [str(read) for read in bound.reads if read.name != "logits"]
    if wrong:
        raise MetricError(f"{metric.name} reads {', '.join(wrong)}, and a step has its logits alone")
    regions = [resolve(read, step.columns, model.sizes[read.key]) for read in bound.reads]
    found: list[Any] = []
    for number in range(out.logits.shape[1]):
        logits = out.logits[:, number : number + 1]
        found.append(bound.fn(slice(0, len(out)), *(region.get(logits) for region in regions)))
    measured = torch.stack(found, 1)
    answered = out.mask[:, out.prompts.width :][:, : measured.shape[1]].to(measured.device)
    return torch.where(answered, measured, torch.nan)
