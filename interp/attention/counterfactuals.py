"""Counterfactual attention in chosen layers, heads and edges, as a plan: the do() of attention causality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hooks import Branch, Model, Plan, SiteError, counterfactual, site
from interp.attention.decoding import Term, Weight


def layers_of(model: Model, stack: str | None = None) -> int:
    """How many layers a stack has: the language model's (None), or that of the vision tower (``"vision"``).

    Raises:
        SiteError: the model has no such stack.
    """
    found = [layer for name, layer, at in model.sizes if name == "pattern" and at == stack]
    if not found:
        stacks = sorted({at or "language" for name, _, at in model.sizes if name == "pattern"})
        raise SiteError(
            f"the model has no stack {stack!r} whose attention could be replaced; it has {', '.join(stacks)}"
        )
    return max(found) + 1


def attention(
    model: Model,
    form: str = "random",
    *,
    stack: str | None = None,
    layers: int | Sequence[int] | range | str = "all",
    heads: int | Sequence[int] | None = None,
    queries: Any = None,
    keys: Any = None,
    seed: int = 0,
) -> Plan:
    """Replace attention by counterfactual attention, ``do(A = a*)``.

    Args:
        model: the wrapped model.
        form: ``"random"``, ``"uniform"``, ``"reversed"`` or ``"shuffled"``; see `interp.counterfactual`.
        stack: ``"vision"`` for the image encoder; None for the language model.
        layers: which, or ``"all"``; negative ones count from the last.
        heads: which; None for all.
        queries, keys: positions, as of a site; ``keys="image"`` is the attention to the image alone, whose share of
            each query's attention stays what it is.
        seed: of the draw.

    Raises:
        SiteError: the model has no such stack, layer or head.
        PlanError: an unknown form.
    """
    count = layers_of(model, stack)
    chosen = range(count) if isinstance(layers, str) and layers == "all" else layers
    if isinstance(chosen, str):
        raise SiteError(f"layers={layers!r}: expected ints or 'all'")
    chosen = [chosen] if isinstance(chosen, int) else list(chosen)
    if not chosen or any(not -count <= layer < count for layer in chosen):
        raise SiteError(f"layers {chosen}: the {stack or 'language'} stack has layers 0 to {count - 1}")
    chosen = sorted({layer % count for layer in chosen})
    places = [replace(site("pattern", layer, head=heads, pos=queries, key_pos=keys), stack=stack) for layer in chosen]
    plan = Plan(tuple(counterfactual(place, form, seed=seed) for place in places))
    model.check(plan)
    return plan


def sampled(
    model: Model, form: str = "random", *, samples: int = 1, weight: Weight = 1.0, seed: int = 0, **where: Any
) -> Term:
    """A term whose branches are draws of the same counterfactual, averaged: E over a* of l(do(A = a*)).

    Args:
        model, form: as of `attention`, which also takes `where`.
        samples: how many draws S; ``"uniform"`` and ``"reversed"`` draw nothing, and one is enough.
        weight: of the term.
        seed: of the first draw; the others have the next ones.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise SiteError(f"samples is how many counterfactuals are averaged, 1 or more, not {samples!r}")
    count = samples if form in ("random", "shuffled") else 1
    return Term(tuple(Branch(attention(model, form, seed=seed + n, **where)) for n in range(count)), weight)
