"""Policies judged against what units cause: agreement, recall, regret, accuracy, and which units are misjudged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hooks import Inputs, InputsError, Model
from interp.kv.agreement import noise_ceiling, per_head, recall, spearman, tau
from interp.kv.asked import Asked, Text, asked
from interp.kv.cache import new_cache
from interp.kv.effects import kv_effects
from interp.kv.eviction import Eviction
from interp.kv.exact import as_bias, worlds_at_once
from interp.kv.judged_plots import lines
from interp.kv.policies import Policy, random
from interp.kv.prefill import feed, require_fit
from interp.kv.seam import attending
from interp.kv.sets import Cached, greedy
from interp.progress import tqdm
from interp.stats import bootstrap_ci

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

BUDGETS = (0.05, 0.1, 0.2, 0.5)
INVERTED, LEAVE_ONE_OUT = "inverted ", "leave-one-out"


@dataclass(frozen=True, eq=False)
class Judged:
    """What policies' scores are worth, on several contexts.

    Attributes:
        policies: names: those that are judged, the exact effect of each unit alone, and controls.
        budgets: shares of units kept in each layer and head.
        spearman, kendall: float64 [policy, row], rank correlation with |effect|, all units pooled; per_head:
            [policy, L, K, row], Spearman within each head.
        recall: [policy, budget, row], share of the most causal units (as many as the budget) that the policy keeps.
        nll: [policy, budget, row], the answer's negative log-likelihood from what the policy keeps.
        oracle: [budget, row], from what the greedy oracle keeps; full: [row], from the full cache.
        correct: [policy, budget, row], whether every answer token is the most likely one; full_correct: [row].
        ceiling: [row], Spearman of |effect| on one half of the answers' queries with the other; nan where there is one.
        misjudged: for each policy the units it ranks lowest for what they cause, as (row, layer, head, token, text,
            effect, rank of the effect, rank of the score), ranks in [0, 1].
    """

    policies: tuple[str, ...]
    budgets: tuple[float, ...]
    spearman: np.ndarray
    kendall: np.ndarray
    per_head: np.ndarray
    recall: np.ndarray
    nll: np.ndarray
    oracle: np.ndarray
    full: np.ndarray
    correct: np.ndarray
    full_correct: np.ndarray
    ceiling: np.ndarray
    misjudged: dict[str, list[tuple[Any, ...]]]

    @property
    def regret(self) -> np.ndarray:
        """[policy, budget, row]: negative log-likelihood above that of the greedy oracle at the same budget."""
        return self.nll - self.oracle

    def table(self, seed: int = 0) -> list[dict[str, Any]]:
        """One line a policy and budget: each number's mean over rows, with its 95 % bootstrap interval."""
        found = []
        for p, name in enumerate(self.policies):
            for b, budget in enumerate(self.budgets):
                line: dict[str, Any] = {"policy": name, "budget": budget}
                numbers = {
                    "spearman": self.spearman[p], "kendall": self.kendall[p],
                    "per_head": np.nanmean(self.per_head[p].reshape(-1, self.per_head.shape[-1]), 0),
                    "recall": self.recall[p, b], "regret": self.regret[p, b], "accuracy": self.correct[p, b],
                }  # fmt: skip
                for what, values in numbers.items():
                    line[what] = float(np.nanmean(values))
                    if len(values) > 1:
                        low, high = bootstrap_ci(values.astype(float)[None], seed=seed)
                        line[f"{what}_low"], line[f"{what}_high"] = float(low[0]), float(high[0])
                found.append(line)
        return found

    def to_frame(self) -> pd.DataFrame:
        """The table, for pandas."""
        import pandas as pd

        return pd.DataFrame(self.table())

    def figure(self) -> Figure:
        """Accuracy and regret against budget, and agreement with the exact effect."""
        return lines(self.table())


@torch.no_grad()
def judge(
    model: Model,
    context: Text,
    suffix: Text,
    policies: Sequence[Policy | Callable[[Model, Inputs], Policy]],
    *,
    budgets: Sequence[float] = BUDGETS,
    answer: int | None = None,
    chunk: int | None = None,
    oracle: str = "exact",
    drop: float = 0.05,
    controls: bool = True,
    misjudged: int = 5,
    progress: bool | None = None,
) -> Judged:
    """Judge policies by what the units that they keep and let go cause (post-prefill, of the answer's likelihood).

    Args:
        model, context, suffix, answer: as in `kv_effects`.
        policies: of different names; or functions from the model and a context to one that is made for it.
        budgets: shares of the context's units that each layer and head keeps.
        chunk: tokens that policies are shown at a time; None for the whole context.
        oracle: how the greedy oracle measures, as in `kv_effects`; `drop`: the share that it lets go in a round.
        controls: add random scores, and every policy's own scores inverted.
        misjudged: how many units to name for each policy.
        progress: show a bar.

    Raises:
        InputsError: policies of one name, or budgets that are no shares.
    """
    rows = asked(model, context, suffix, answer)
    names = [policy.name for policy in _made(model, rows[0], policies)]
    if len(set(names)) != len(names) or not names:
        raise InputsError(f"policies have different names, and there is at least one; got {names}")
    budgets = tuple(budgets)
    if not budgets or any(not 0 < budget <= 1 for budget in budgets):
        raise InputsError(f"budgets are shares of the context, such as {BUDGETS}, not {budgets}")
    if controls and "random" not in names:
        policies = [*policies, random()]
        names.append("random")
    every = [*names, LEAVE_ONE_OUT] + ([INVERTED + name for name in names] if controls else [])
    kept: dict[str, list[Any]] = {
        name: [] for name in Judged.__dataclass_fields__ if name not in ("policies", "budgets")
    }
    worst: dict[str, list[tuple[Any, ...]]] = {name: [] for name in every}
    for number, row in enumerate(tqdm(rows, disable=None if progress is None else not progress, leave=False)):
        found = _judged(model, row, policies, every, budgets, chunk, oracle, drop)
        effect, scores = found.pop("effect"), found.pop("scores")
        for name, value in found.items():
            kept[name].append(value)
        for name, mine in zip(every, scores, strict=True):
            worst[name] += _misjudged(number, row, np.abs(effect), effect, mine, misjudged)
    for name, units in worst.items():
        worst[name] = sorted(units, key=lambda unit: unit[7] - unit[6])[:misjudged]
    stacked = {name: np.stack(values, -1) for name, values in kept.items() if values}
    return Judged(tuple(every), budgets, misjudged=worst, **stacked)


def _made(model: Model, row: Asked, policies: Sequence[Policy | Callable[[Model, Inputs], Policy]]) -> list[Policy]:
    """The policies for a row's context."""
    inputs = Inputs.of(row.ids[: row.context])
    return [policy if isinstance(policy, Policy) else policy(model, inputs) for policy in policies]


def scores_of(model: Model, inputs: Inputs, policy: Policy, chunk: int | None = None) -> np.ndarray:
    """What a policy scores every unit of a context, all of which are kept, float64 [L, K, S].

    Args:
        inputs: one row.
        chunk: tokens fed at a time; None for all.
    """
    if len(inputs) != 1:
        raise InputsError(f"scores are of one context at a time, got {len(inputs)}: call it for each")
    cache = new_cache(model, Eviction(None, chunk=chunk or inputs.width))
    require_fit(model, inputs, "absolute")
    with torch.no_grad(), attending(cache, policy) as state:
        state.prefilling = True
        for start in range(0, inputs.width, cache.eviction.chunk):
            feed(model, cache, inputs, slice(start, min(start + cache.eviction.chunk, inputs.width)))
    return torch.stack([layer.scores[0] for layer in cache.layers]).double().cpu().numpy()


def _judged(
    model: Model, row: Asked, policies: Sequence[Policy | Callable[[Model, Inputs], Policy]], every: Sequence[str],
        budgets: Sequence[float],
    chunk: int | None, oracle: str, drop: float,
) -> dict[str, Any]:  # fmt: skip
    """The numbers of one row."""
    ids = row.ids.tolist()
    before, after = ids[: row.context], ids[row.context :]
    cached = Cached.of(model, before, after, answer=len(row.queries))
    each = kv_effects(model, before, after, answer=len(row.queries), per_query=True, progress=False).effect[..., 0]
    effect = each.sum(-1)
    inputs = Inputs.of(torch.tensor([before]))
    scores = [scores_of(model, inputs, policy, chunk) for policy in _made(model, row, policies)]
    inverses = [-one for one in scores] if len(every) > len(scores) + 1 else []
    scores = [*scores, effect, *inverses]
    best = greedy(cached, drop=drop, how=oracle, floor=min(budgets) / 2 if min(budgets) < 1 else 0.5)
    sizes = [max(1, round(budget * row.context)) for budget in budgets]
    worlds = torch.stack([_gone(one, size) for one in [*scores, best.order] for size in sizes])
    nll, correct = _outcomes(cached, worlds)
    shape = (len(scores) + 1, len(sizes))
    nll, correct = nll.reshape(shape), correct.reshape(shape)
    full, full_correct = _outcomes(cached, torch.zeros_like(worlds[:1]))
    size = np.abs(effect)
    return {
        "effect": effect,
        "scores": scores,
        "spearman": np.array([spearman(one, size) for one in scores]),
        "kendall": np.array([tau(one, size) for one in scores]),
        "per_head": np.stack([per_head(one, size) for one in scores]),
        "recall": np.array([[recall(~_gone(one, n).numpy(), size) for n in sizes] for one in scores]),
        "nll": nll[:-1],
        "oracle": nll[-1],
        "correct": correct[:-1],
        "full": full[0],
        "full_correct": full_correct[0],
        "ceiling": noise_ceiling(each),
    }


def _gone(scores: np.ndarray, keep: int) -> torch.Tensor:
    """bool [L, K, S]: all but the best of each layer and head."""
    place = torch.from_numpy(scores).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return place >= keep


def _outcomes(cached: Cached, gone: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """For worlds bool [W, L, K, S] the answer's negative log-likelihood, and whether all of it comes first."""
    nll, correct = [], []
    for some in gone.split(worlds_at_once(cached.model, cached.tail)):
        logits = cached.tail.run(as_bias(some.to(cached.model.device), cached.tail))
        nll.append(cached.measure(logits)[0].double().sum(1))
        correct.append((logits.argmax(-1) == cached.measure.targets).all(1).double())
    return torch.cat(nll).cpu().numpy(), torch.cat(correct).cpu().numpy()


def _misjudged(
    number: int, row: Asked, size: np.ndarray, effect: np.ndarray, scores: np.ndarray, count: int
) -> list[tuple[Any, ...]]:
    """The units whose rank by score lies furthest below their rank by effect."""
    total = size.size
    by_effect = size.ravel().argsort().argsort() / max(1, total - 1)
    by_score = scores.ravel().argsort().argsort() / max(1, total - 1)
    found = []
    # Of the most causal twentieth: ranks of units that cause nothing mean nothing.
    for flat in np.argsort(by_score - by_effect + 2 * (by_effect < 0.95))[:count]:
        layer, head, token = np.unravel_index(flat, size.shape)
        found.append(
            (
                number, int(layer), int(head), int(token), row.labels[token], float(effect.ravel()[flat]),
                float(by_effect[flat]), float(by_score[flat]),
            )
        )  # fmt: skip
    return found
