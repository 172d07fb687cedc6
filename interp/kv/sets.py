"""Sets of units: what removing them together does, what each has a share in, and which can go with least harm.

Two copies of a fact have no effect one at a time: either alone is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hooks import InputsError, Model, ModelError, Tail
from interp.evaluation import require_eval
from interp.kv.asked import Asked, Text, Units, asked, units_of
from interp.kv.exact import as_bias, through_tails, worlds_at_once
from interp.kv.gradients import estimate
from interp.kv.measure import Measure


@dataclass(frozen=True, eq=False)
class Cached:
    """A context whose cache is whole, and what follows it; units are removed from it after prefill.

    Attributes:
        model, row: of what.
        tail: the suffix, against the context's keys and values.
        measure: of one metric.
        full: that metric under the full cache, summed over the answer's tokens.
    """

    model: Model
    row: Asked
    tail: Tail
    measure: Measure
    full: float

    @classmethod
    def of(cls, model: Model, context: Text, suffix: Text, metric: str = "nll", answer: int | None = None) -> Cached:
        """Read a context and its suffix once.

        Raises:
            InputsError: several rows, or whatever `kv_effects` refuses.
            ModelError: the suffix cannot be run by itself on this model as it is.
        """
        require_eval(model, "a cache")
        rows = asked(model, context, suffix, answer)
        if len(rows) != 1:
            raise InputsError(f"sets are of one context at a time, got {len(rows)}: call it for each")
        if model.holds:
            raise ModelError("a plan is held on the model: leave apply() first, sets of units are removed without it")
        with torch.no_grad():
            tail = Tail(model, rows[0].ids, rows[0].context, rows[0].queries)
            reason = tail.unfit()
            if reason:
                raise ModelError(f"sets of units need a model that is run by its description: {reason}")
            measure = Measure.of((metric,), rows[0].targets, tail.logits)
            full = float(measure(tail.run()).double().sum())
        return cls(model, rows[0], tail, measure, full)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, key/value heads and context tokens."""
        architecture = self.model.architecture
        return len(architecture.blocks), architecture.blocks[0].attention.k.heads, self.row.context

    @torch.no_grad()
    def without(self, gone: Tensor) -> np.ndarray:
        """The metric of worlds without some units, [W], of bool [W, L, K, S] (or [W, 1, 1, S]) that are gone.

        Raises:
            InputsError: another shape or dtype.
        """
        if gone.dtype != torch.bool or gone.ndim != 4 or gone.shape[3] != self.row.context:
            raise InputsError(
                f"units that are gone are bool [worlds, layers, heads, {self.row.context}], not {gone.dtype} "
                f"{list(gone.shape)}"
            )
        gone = gone.expand(-1, *self.shape[:2], -1).to(self.model.device)
        chunk = worlds_at_once(self.model, self.tail)
        parts = [self.measure(self.tail.run(as_bias(some, self.tail)))[0].double().sum(1) for some in gone.split(chunk)]
        return torch.cat(parts).cpu().numpy()


def set_effects(cached: Cached, sets: Sequence[Sequence[int]] | Tensor) -> np.ndarray:
    """The effect of removing each of some sets together, metric(without) - metric(full cache), [W].

    Args:
        cached: the context and its suffix.
        sets: lists of context tokens, which are removed in every layer and head; or bool [W, L, K, S].

    Raises:
        InputsError: a token that is not in the context.
    """
    return cached.without(_gone(cached, sets)) - cached.full


def _gone(cached: Cached, sets: Sequence[Sequence[int]] | Tensor) -> Tensor:
    if isinstance(sets, Tensor):
        return sets
    gone = torch.zeros(len(sets), 1, 1, cached.row.context, dtype=torch.bool)
    for w, tokens in enumerate(sets):
        for token in tokens:
            if not 0 <= token < cached.row.context:
                raise InputsError(f"token {token} is not in a context of {cached.row.context}")
            gone[w, :, :, token] = True
    return gone


@dataclass(frozen=True, eq=False)
class Shapley:
    """Shapley values of units, estimated from permutations.

    Attributes:
        values: float64 [*units], each unit's mean marginal effect; they sum to the effect of removing all.
        error: float64 [*units], standard errors; nan where there is one pair of permutations.
        total: the effect of removing all of them.
    """

    values: np.ndarray
    error: np.ndarray
    total: float


def shapley(cached: Cached, unit: object = "token", *, permutations: int = 16, seed: int = 0) -> Shapley:
    """Sampled Shapley values of units: their mean effect when they leave in random order (Castro et al. 2009).

    Args:
        cached: the context and its suffix.
        unit: as in `kv_effects`; spans must not overlap.
        permutations: how many orders; each is run backwards, too, which takes out what is odd about it.
        seed: of the orders.

    Raises:
        InputsError: fewer than one permutation, or spans that overlap.
    """
    if isinstance(permutations, bool) or not isinstance(permutations, int) or permutations < 1:
        raise InputsError(f"permutations is a positive number, not {permutations!r}")
    units = units_of(unit, cached.model, cached.row.context)
    players = units.removed(list(units.cells()), cached.row.context, torch.device("cpu"))
    if bool((players.sum(0) > 1).any()):
        raise InputsError("spans that overlap have no Shapley values: a token leaves once")
    generator = torch.Generator().manual_seed(seed)
    rounds = []
    for _ in range(permutations):
        order = torch.randperm(len(players), generator=generator)
        pair = np.zeros((2, len(players)))
        for i, way in enumerate((order, order.flip(0))):
            values = np.concatenate([[cached.full], *_leaving(cached, players, way)])
            pair[i, way.numpy()] = np.diff(values)
        rounds.append(pair.mean(0))
    found = np.stack(rounds)
    error = found.std(0, ddof=1) / len(found) ** 0.5 if len(found) > 1 else np.full(len(players), np.nan)
    return Shapley(found.mean(0).reshape(units.shape), error.reshape(units.shape), float(found.mean(0).sum()))


def _leaving(cached: Cached, players: Tensor, order: Tensor) -> Iterator[np.ndarray]:
    """The metric after each more of the players has left."""
    chunk, gone = worlds_at_once(cached.model, cached.tail), torch.zeros_like(players[0])
    for some in order.split(chunk):
        worlds = []
        for player in some.tolist():
            gone = gone | players[player]
            worlds.append(gone)
        yield cached.without(torch.stack(worlds))


@dataclass(frozen=True, eq=False)
class Greedy:
    """The order in which a greedy oracle lets units go.

    Attributes:
        order: float64 [L, K, S], a score: the higher, the longer a unit is kept.
        kept: share of units kept after each round, from 1 down.
        values: the metric after each round.
    """

    order: np.ndarray
    kept: tuple[float, ...]
    values: tuple[float, ...]


def greedy(
    cached: Cached,
    *,
    drop: float = 0.05,
    how: str = "exact",
    per_head: bool = True,
    floor: float = 0.05,
    progress: Callable[[int], None] | None = None,
) -> Greedy:
    """Let the units of least effect go, round by round, measured anew under what is gone already.

    Args:
        cached: the context and its suffix.
        drop: share of all units that go in a round (5 % keeps the quadratic cost of an oracle in bounds).
        how: ``"exact"``, or an estimate of `kv_effects`.
        per_head: whether every layer and head loses as many, as under a budget for each; else all compete.
        floor: share of units at which it ends.
        progress: told the number of every round.

    Raises:
        InputsError: a share outside (0, 1).
    """
    for name, share in (("drop", drop), ("floor", floor)):
        if not 0 < share < 1:
            raise InputsError(f"{name} is a share between 0 and 1, not {share!r}")
    layers, heads, context = cached.shape
    units = units_of(("layer", "head", "token"), cached.model, context)
    gone = torch.zeros(layers, heads, context, dtype=torch.bool)
    order = torch.full((layers, heads, context), 2.0, dtype=torch.float64)
    kept, values = [1.0], [cached.full]
    total = context if per_head else gone.numel()
    step = max(1, round(drop * total))
    while int(gone.sum()) // (1 if not per_head else layers * heads) + step <= total * (1 - floor) + 1e-9:
        effect = _effects_under(cached, units, gone, how)
        effect[gone] = torch.inf
        flat = effect.reshape(-1, total)
        leaving = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, flat.argsort(dim=1, stable=True)[:, :step], True)
        leaving = leaving.reshape(gone.shape)
        gone = gone | leaving
        share = float(gone.double().mean())
        order[leaving] = share
        kept.append(1 - share)
        values.append(float(cached.without(gone[None])[0]))
        if progress is not None:
            progress(len(kept) - 1)
    # What is never let go is ranked by its effect under the last round's removals.
    rest = ~gone
    last = _effects_under(cached, units, gone, how)[rest]
    order[rest] = 2 + last.argsort().argsort().double() / max(1, len(last))
    return Greedy(order.numpy(), tuple(kept), tuple(values))


def _effects_under(cached: Cached, units: Units, gone: Tensor, how: str) -> Tensor:
    """Effects float64 [L, K, S] of each unit where some are gone already."""
    bias = as_bias(gone[None].to(cached.model.device), cached.tail)[0]
    times = [cached.row.context] * cached.row.context
    if how != "exact":
        return estimate(cached.tail, units, times, cached.measure, how, bias=bias)[0, ..., 0]
    effect = torch.zeros(gone.shape, dtype=torch.float64)
    with torch.no_grad():
        base = cached.measure(cached.tail.run(bias[None])).double().sum()
        for cells, found in through_tails(
            cached.model, units, cached.tail, times, range(cached.row.context), cached.measure, bias
        ):
            index = tuple(torch.tensor(axis) for axis in zip(*cells, strict=True))
            effect[index] = (found[0].double().sum(-1) - base).cpu()
    return effect
