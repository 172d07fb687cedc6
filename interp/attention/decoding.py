"""Decoding without what the priors alone would have said: a context around the user's own `generate`.

z = l + sum over terms of w (l - mean of the term's branches), without tokens that the model itself finds implausible.
CausalMM (Zhou et al. 2025, arXiv 2410.04780), equations 9 to 12; contrastive decoding's cut-off is Li et al. 2023's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hooks import Audit, Branch, Model, Moment, PlanError

Weight = float | Callable[[Tensor, Moment], "Tensor | float"]
"""A number; or a function of the model's own logits [B, T, V] and the `Moment` to one, or to a tensor [B, T]."""
Rule = Callable[[Tensor, Moment], Tensor]
"""From the logits of all worlds [W, B, T, V] and the `Moment` to logits [B, T, V]."""


@dataclass(frozen=True, eq=False)
class Term:
    """Something that a decoder subtracts: branches, and how much of them.

    Attributes:
        branches: one, or several samples whose logits are averaged.
        weight: w, see `Weight`.
        added: whether w times their logits is added in place of w (l - theirs), as in AGLA.
    """

    branches: tuple[Branch, ...]
    weight: Weight = 1.0
    added: bool = False

    def __post_init__(self) -> None:
        found = (self.branches,) if isinstance(self.branches, Branch) else tuple(self.branches)
        if not found or not all(isinstance(one, Branch) for one in found):
            raise PlanError("a term has one Branch or several")
        if not callable(self.weight) and (isinstance(self.weight, bool) or not isinstance(self.weight, (int, float))):
            raise PlanError(f"a weight is a number or a function of logits and the moment, not {self.weight!r}")
        if not callable(self.weight) and not math.isfinite(self.weight):
            raise PlanError(f"a weight is a finite number, not {self.weight}")
        object.__setattr__(self, "branches", found)


@dataclass(frozen=True, eq=False)
class Decoder:
    """A way of decoding: the worlds beside the model's own, and what their logits become.

    Attributes:
        terms: what is subtracted.
        eps: tokens under eps times the likeliest's probability, by the model's own logits, are out; None for no such
            cut-off.
        own: what is done in the model's own world.
        rule: in place of the sum of terms, for decoders that are none; it is given the logits of the branches in order.
        gates: values of one step that the interventions of the next one look at, see `interp.attention.gates`.
    """

    terms: tuple[Term, ...] = ()
    eps: float | None = 0.1
    own: Branch = field(default_factory=Branch)
    rule: Rule | None = None
    gates: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", (self.terms,) if isinstance(self.terms, Term) else tuple(self.terms))
        if self.eps is not None and not (isinstance(self.eps, (int, float)) and 0 < self.eps <= 1):
            raise PlanError(
                f"eps is the share of the likeliest token's probability, in (0, 1], or None; not {self.eps!r}"
            )

    @property
    def branches(self) -> tuple[Branch, ...]:
        """All worlds beside the model's own."""
        return tuple(branch for term in self.terms for branch in term.branches)

    def __add__(self, other: Decoder) -> Decoder:
        """Both at once: the terms of both, the stricter cut-off, and both plans in the model's own world."""
        if not isinstance(other, Decoder):
            return NotImplemented
        if self.rule is not None or other.rule is not None:
            raise PlanError("decoders add where they are sums of terms; one of these has a rule of its own")
        eps = [one.eps for one in (self, other) if one.eps is not None]
        return Decoder(
            self.terms + other.terms,
            max(eps, default=None),
            _joined(self.own, other.own),
            None,
            self.gates + other.gates,
        )

    def combine(self, worlds: Tensor, moment: Moment) -> Tensor:
        """The logits that tokens are chosen from.

        Args:
            worlds: [W, B, T, V], the model's own first.

        Raises:
            PlanError: a weight that is not finite.
        """
        own = worlds[0]
        wide = worlds.to(torch.promote_types(worlds.dtype, torch.float32))
        z = wide[0] if self.rule is None else self.rule(wide, moment)
        at = 1
        for term in self.terms if self.rule is None else ():
            branch = wide[at : at + len(term.branches)].mean(0)
            at += len(term.branches)
            # A token that a branch's own plan forbids is one that it says nothing about.
            silent = branch.isinf() | wide[0].isinf()
            change = branch if term.added else wide[0] - branch
            z = z + _weight(term.weight, wide[0], moment) * torch.where(silent, 0, change)
        for gate in self.gates:
            gate.keep(wide[0], moment)
        return plausible(z, wide[0], self.eps).to(own.dtype)


def plausible(z: Tensor, own: Tensor, eps: float | None) -> Tensor:
    """Logits z [..., V] where the model's own are within ln eps of their maximum, -inf elsewhere."""
    if eps is None:
        return z
    return z.masked_fill(own < own.amax(-1, keepdim=True) + math.log(eps), -torch.inf)


@contextmanager
def debiased(
    model: Model,
    branches: Branch | Term | Decoder | Sequence[Branch | Term],
    *,
    weight: Weight = 1.0,
    eps: float | None = 0.1,
    seed: int = 0,
) -> Iterator[tuple[Audit, ...]]:
    """Decode from z = l + w (l - l') while the context is open, whoever calls the model and however.

    Every call of the model is one call on a batch that holds each row once for each world; each world has its own keys
    and values. `generate` sees one batch of rows: greedy, sampled and beam search, padding, streamers and stopping
    criteria work as they are.

    Args:
        model: the wrapped model; the user calls the module that it wraps.
        branches: the counterfactual worlds, each with `weight`; terms with weights of their own; or a `Decoder`, which
            has everything.
        weight: w of every branch that is no `Term`.
        eps: tokens under eps times the likeliest's probability are out; None for no such cut-off.
        seed: of random counterfactuals.

    Returns:
        A context manager that gives the audit of each world, the model's own first.

    Raises:
        PlanError: a weight that is no finite number, eps outside (0, 1], worlds within worlds.
        UnfiredError: on leaving, where an intervention of a world never fired.
    """
    if isinstance(branches, Decoder):
        decoder = branches
    else:
        listed = (branches,) if isinstance(branches, (Branch, Term)) else tuple(branches)
        decoder = Decoder(tuple(one if isinstance(one, Term) else Term((one,), weight) for one in listed), eps)

    def begin(moment: Moment) -> None:
        for gate in decoder.gates:
            gate.recall(moment)

    with model.fork(
        *decoder.branches, combine=decoder.combine, own=decoder.own, begin=begin if decoder.gates else None, seed=seed
    ) as audits:
        yield audits


def _weight(weight: Weight, own: Tensor, moment: Moment) -> Tensor | float:
    if not callable(weight):
        return weight
    found = weight(own, moment)
    if isinstance(found, Tensor) and found.ndim:
        if found.shape != own.shape[:-1]:
            raise PlanError(
                f"a weight is a number or a tensor [B, T] = {list(own.shape[:-1])}, not {list(found.shape)}"
            )
        return found[..., None].to(own.dtype)
    return found


def _joined(one: Branch, two: Branch) -> Branch:
    if one.hide is not None and two.hide is not None:
        raise PlanError("two decoders hide columns from the model's own world")
    if one.images is not None and two.images is not None:
        raise PlanError("two decoders change the images of the model's own world")
    hide = two.hide if one.hide is None else one.hide
    return Branch(one.plan + two.plan, hide, one.images or two.images)
