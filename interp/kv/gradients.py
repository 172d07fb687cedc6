"""Estimates of every unit's effect from gradients at gates on the cache, and how they are mended."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hooks import MetricError, Seen, Tail
from interp.kv.asked import Units
from interp.kv.exact import asking
from interp.kv.measure import Measure

FIRST_ORDER = ("gradient", "rescaled")
HOWS = (*FIRST_ORDER, "integrated", "gauss_newton")


def estimate(
    tail: Tail,
    units: Units,
    times: Sequence[int],
    measure: Measure,
    how: str,
    steps: int = 8,
    seed: int = 0,
    per_query: bool = False,
    bias: Tensor | None = None,
    gates: Tensor | None = None,
) -> Tensor:
    """Estimates [metric, *units, m or 1] of the effect of removing each unit.

    A gate m_i on exp(score) has dz/dm_i = a_i (v_i - z) at the full cache, so that one backward pass to z of every
    layer
    scores every unit. ``rescaled`` puts a_i / (1 - a_i), with which the change of z is exact, in place of a_i;
    ``integrated`` goes from no gate to all gates closed together (Sundararajan et al. 2017; Aumann-Shapley values);
    ``gauss_newton`` is 1/2 J^T F J with the Fisher matrix F of the predictions, estimated by `steps` random directions.

    Args:
        tail: from the first time on at which something is removed.
        units: the units, whose estimates are sums over what they are made of.
        times: the first token that no longer sees each value of the last axis, or each token where there is none.
        measure: the metrics.
        how: of `HOWS`.
        steps: points of the integral, or random directions.
        seed: of those.
        per_query: estimate each query's number by itself, with a backward pass each.
        bias: [L, K, T] of keys that are gone already, -inf.
        gates: int64 [S], for ``integrated``: the first query that the gate of each token is for; None for all.

    Raises:
        MetricError: a first-order estimate of KL, whose gradient vanishes at the full cache; Gauss-Newton of
            anything else.
    """
    if "kl" in measure.names and how in FIRST_ORDER:
        raise MetricError(
            f"how={how!r} of 'kl' is identically zero: KL(full || without) is least at the full cache, where "
            f"its gradient "
            "vanishes; use how='gauss_newton', 'integrated' or 'exact'"
        )
    if how == "gauss_newton" and measure.names != ("kl",):
        raise MetricError(f"how='gauss_newton' is of 'kl' alone, not of {', '.join(measure.names)}: use 'integrated'")
    with torch.enable_grad():
        if how == "integrated":
            return _integrated(tail, units, measure, steps, per_query, bias, gates)
        layers, logits = _traced(tail, bias)
        if how == "gauss_newton":
            return _gauss_newton(tail, units, times, layers, logits, steps, seed, per_query)
        numbers = measure(logits[None])[:, 0]  # [metric, m]
        numbers = numbers if per_query else numbers.sum(1, keepdim=True)
        found = [_linear(tail, units, times, layers, number, how == "rescaled") for number in numbers.flatten()]
    return torch.stack(found, -1).unflatten(-1, numbers.shape).movedim(-2, 0)


def _traced(tail: Tail, bias: Tensor | None) -> tuple[list[Seen], Tensor]:
    """What every layer sees, attached to a graph, and the logits."""
    embedded = tail.embedded
    tail.embedded = embedded.detach().clone().requires_grad_()
    try:
        return tail.seen(bias)
    finally:
        tail.embedded = embedded


def _linear(
    tail: Tail, units: Units, times: Sequence[int], layers: Sequence[Seen], number: Tensor, rescaled: bool
) -> Tensor:
    """First-order effects [*units] on one number."""
    gradients = torch.autograd.grad(number, [seen.z for seen in layers], retain_graph=True)
    total = max(stop for _, stop in units.spans) if units.spans else len(times)
    found = torch.zeros(units.layers, units.heads, len(times), dtype=torch.float64)
    gone = asking(tail, torch.tensor(times))
    with torch.no_grad():
        for layer, (seen, g) in enumerate(zip(layers, gradients, strict=True)):
            weight = seen.pattern[..., :total]
            if rescaled:
                weight = weight / (1 - weight).clamp_min(1e-6)
            g = g.transpose(0, 1)  # [K, n, G, D]
            along = (seen.z.transpose(0, 1) * g).sum(-1, keepdim=True)
            each = weight * (along - g @ seen.v[:total].permute(1, 2, 0)[:, None])  # [K, n, G, S]
            # Spans may share tokens, and leave at different times.
            found[layer] = (_by_span(units, each.sum(2)) * gone.to(each.device)).sum(1).double().cpu()
    return _over_units(units, found)


def _by_span(units: Units, each: Tensor) -> Tensor:
    """Sums of [..., S] over the tokens of each span."""
    if units.names != ("span",) or units.spans is None:
        return each
    return torch.stack([each[..., a:b].sum(-1) for a, b in units.spans], -1)


def _over_units(units: Units, found: Tensor) -> Tensor:
    """Sums of [L, K, tokens or spans] over what units are not taken apart by, [*units]."""
    if units.spans is None:
        found = found.sum(-1)
    if "head" not in units.names:
        found = found.sum(1)
    return found if "layer" in units.names else found.sum(0)


def _integrated(
    tail: Tail,
    units: Units,
    measure: Measure,
    steps: int,
    per_query: bool,
    gone: Tensor | None,
    gates: Tensor | None,
) -> Tensor:
    count = len(measure.names) * (len(tail.wanted) if per_query else 1)
    context = tail.start if gates is None else len(gates)
    total = torch.zeros(count, units.layers, units.heads, context, dtype=torch.float64)
    closing = None
    if gates is not None:  # the queries that each key's gate is for
        closing = torch.nn.functional.pad(asking(tail, gates), (0, tail.total - context)).to(tail.logits.device)
    for step in range(steps):
        # Where the gates are nearly closed attention goes over to what has none, and most happens: points are denser
        # there.
        along = (step + 0.5) / steps
        gate, width = along**3, 3 * along**2 / steps
        logs = tail.logits.new_full((units.layers, units.heads, context), math.log(gate)).requires_grad_()
        bias = torch.nn.functional.pad(logs, (0, tail.total - context))
        bias = bias if gone is None else bias + gone
        bias = bias if closing is None else torch.where(closing, bias[:, :, None], 0.0)
        numbers = measure(tail.run(bias[None]))[:, 0]
        numbers = numbers if per_query else numbers.sum(1, keepdim=True)
        for i, number in enumerate(numbers.flatten()):
            (g,) = torch.autograd.grad(number, [logs], retain_graph=i + 1 < count)
            total[i] -= g.double().cpu() / gate * width
    found = torch.stack([_over_units(units, _by_span(units, one)) for one in total], -1)
    return found.unflatten(-1, (len(measure.names), -1)).movedim(-2, 0)


def _gauss_newton(
    tail: Tail,
    units: Units,
    times: Sequence[int],
    layers: Sequence[Seen],
    logits: Tensor,
    steps: int,
    seed: int,
    per_query: bool,
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1).sqrt()
    squares = []
    for _ in range(steps):
        # F = diag(p) - p p^T is R R^T with R = diag(sqrt p) (1 - sqrt p sqrt p^T).
        noise = torch.randint(0, 2, root.shape, generator=generator).to(root) * 2 - 1
        direction = root * (noise - root * (root * noise).sum(-1, keepdim=True))
        numbers = (direction * logits).sum(-1)
        numbers = numbers if per_query else numbers.sum()[None]
        each = [_linear(tail, units, times, layers, number, True) for number in numbers]
        squares.append(torch.stack(each, -1).square() / 2)
    return torch.stack(squares).mean(0)[None]
