"""What each cached key and value causes: the effect of removing it on what comes after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooks import Inputs, InputsError, Model, Tail, World, joined, nearest, site
from interp.axes import Axis
from interp.evaluation import read_world, require_eval
from interp.kv import drawing
from interp.kv.asked import Asked, Text, Units, asked, units_of
from interp.kv.exact import eviction_times, tails, through_tails, through_worlds, times_of_tokens
from interp.kv.gradients import HOWS, estimate
from interp.kv.measure import Measure
from interp.progress import tqdm
from interp.results import Result

ESTIMANDS = ("post_prefill", "streaming")
UNIT = ("layer", "head", "token")


@dataclass(frozen=True, eq=False, repr=False)
class KVEffects(Result):
    """The effects of removing units from the cache; a `Result` whose axes are layer, head and token, or what was asked.

    A removal that raises the answer's negative log-likelihood has a positive effect on ``nll``; one on ``margin`` is
    negative where the unit helps; ``kl`` says how much changes, whatever the answer.
    """

    def absolute(self) -> KVEffects:
        """The same, without signs."""
        return replace(self, effect=np.abs(self.effect))

    def text(self, row: int = 0, metric: str | None = None, ax: Any = None) -> Any:
        """Draw the effects over the text of a row: every token in the colour of its effect, summed over other axes."""
        return drawing.over_text(self, row, metric, ax)

    def html(self, row: int = 0, metric: str | None = None) -> str:
        """The text of a row as HTML, every token in the colour of its effect."""
        return drawing.text_html(self, row, metric)

    def _repr_html_(self) -> str:
        return self.html() + Result._repr_html_(self)


def kv_effects(
    model: Model,
    context: Text,
    suffix: Text,
    *,
    metric: str | Sequence[str] = "nll",
    estimand: str = "post_prefill",
    how: str = "exact",
    unit: Any = UNIT,
    answer: int | None = None,
    chunk: int = 64,
    per_query: bool = False,
    steps: int = 8,
    seed: int = 0,
    executor: str = "auto",
    progress: bool | None = None,
) -> KVEffects:
    """What removing each unit of the cache does to the answer, metric(without) - metric(full cache).

    Args:
        model: a wrapped decoder, in evaluation mode.
        context: what is cached: a text, token ids, several of either, or `Inputs`; a row is one context.
        suffix: what comes after each context, question and answer. A text is encoded without special tokens.
        metric: ``"nll"`` of the answer, ``"kl"`` of KL(full || without), ``"margin"`` of the answer's logit above its
            strongest rival's, each a sum over the answer's tokens; several add a first axis.
        estimand: ``"post_prefill"``: the whole context is cached, a unit is removed, and only the suffix is computed
            without it; ``"streaming"``: a unit is removed when its `chunk` of the context has been read, and all later
            context is computed without it. A span leaves after the chunk that it ends in; of a unit of all tokens, such
            as a head, each token leaves after its own, so that it is as if that head attended to its chunk alone.
        how: ``"exact"``; or an estimate: ``"gradient"`` (first order in a gate on exp(score), all units in one backward
            pass), ``"rescaled"`` (a/(1-a) in place of a, which is exact up to the attention's output), ``"integrated"``
            (over gates that close together, in `steps` steps; in a stream each is for the queries after its token
            left), ``"gauss_newton"`` (of ``kl``, by `steps` directions).
        unit: a tuple of ``"layer"``, ``"head"`` (of keys and values) and ``"token"``, along which units are taken
            apart, or ``"token"`` alone; or a list of spans of context tokens, (start, stop).
        answer: how many of the suffix's last tokens are the answer; None for all but its first.
        chunk: tokens that a stream reads at a time.
        per_query: keep the effect on each answer token, on an axis "query", in place of their sum.
        steps, seed: of estimates.
        executor: as in `ip.sweep`; ``"shared"`` runs the suffix alone, ``"sequential"`` the model itself, one unit at a
            time.
        progress: show a bar.

    Returns:
        Effects with axes [metric if several, *the unit's, query if asked for, row]; nan beyond the end of a context.

    Raises:
        InputsError: contexts and suffixes that do not fit, an unknown estimand, method or unit.
        MetricError: an unknown metric, or a first-order estimate of ``kl``, which is identically zero.
        ModelError: the model is in training mode.

    Source: removal in closed form as in CAOTE (arXiv 2504.14051) and OBCache (2510.07651), run through the layers
        above.
    """
    require_eval(model, "kv_effects")
    _check(estimand, "estimand", ESTIMANDS)
    _check(how, "how", ("exact", *HOWS))
    for name, number in (("chunk", chunk), ("steps", steps)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise InputsError(f"{name} is a positive whole number, not {number!r}")
    names = (metric,) if isinstance(metric, str) else tuple(metric)
    rows = asked(model, context, suffix, answer)
    longest = max(rows, key=lambda row: row.context)
    shortest = min(row.context for row in rows)
    whole = units_of(unit, model, shortest if isinstance(unit, list) else longest.context)
    most = max(len(row.queries) for row in rows) if per_query else 1
    effect, ready = np.full((len(names), *whole.shape, most, len(rows)), np.nan), []
    bar = tqdm(rows, disable=None if progress is None else not progress, unit="row", leave=False)
    with bar, torch.no_grad():
        for number, row in enumerate(bar):
            units = units_of(unit, model, row.context)
            step = chunk if estimand == "streaming" else None
            times = eviction_times(units, row.context, step)
            one = _prepare(model, row, min(step or row.context, row.context), names, executor)
            if how == "exact":
                found = _exact(model, one, units, times, per_query)
            elif one.executor == "shared" and one.tail is not None:
                integrated = step is not None and how == "integrated"
                gates = times_of_tokens(units, times, row.context, step) if integrated else None
                found = estimate(one.tail, units, times, one.measure, how, steps, seed, per_query, gates=gates).numpy()
            else:
                told = one.reason or f"executor={executor!r}"
                raise InputsError(f"how={how!r} needs a model that is run by its description: {told}")
            effect[(slice(None), *(slice(0, size) for size in found.shape[1:]), number)] = found
            ready.append(one)
    told = {"estimand": estimand, "how": how, "answer": answer, "model": repr(model), "dtype": str(model.dtype)}
    told |= {"chunk": chunk} if estimand == "streaming" else {}
    told |= {"steps": steps, "seed": seed} if how in ("integrated", "gauss_newton") else {}
    return _result(effect, ready, whole, not isinstance(metric, str), per_query, told)


@dataclass(frozen=True, eq=False)
class _Ready:
    """A row that can be measured: its numbers under the full cache [metric, m], twice, and how worlds are run."""

    row: Asked
    measure: Measure
    full: Tensor
    again: Tensor
    tail: Tail | None
    executor: str
    reason: str

    @property
    def floor(self) -> np.ndarray:
        """What of each metric is rounding."""
        rounding = torch.finfo(self.full.dtype).eps * self.full.sum(1).abs()
        return torch.maximum((self.full - self.again).sum(1).abs(), rounding).cpu().numpy()


def _prepare(model: Model, row: Asked, first: int, names: Sequence[str], executor: str) -> _Ready:
    """Read what a row is under the full cache, and find out whether its tail can be run alone.

    Args:
        first: the first token at which something is missing.
    """
    inputs, tail, reason = Inputs.of(row.ids), None, ""
    if executor in ("auto", "shared"):
        if len(model.held_on(inputs)[0]):
            reason = "batched instead of shared: a plan is held on the model"
        else:
            tail = Tail(model, row.ids, first, row.queries)
            reason = tail.unfit()
        executor = "batched" if reason else "shared"
    if tail is None or reason:
        (logits,) = read_world(model, World(inputs), [site("logits", pos=row.queries)], executor)
        full = again = logits[0]
    else:
        full, again = tail.logits, tail.run()[0]
    measure = Measure.of(names, row.targets, full)
    theirs, mine = (measure(logits[None])[:, 0].double() for logits in (full, again))
    return _Ready(row, measure, theirs, mine, tail, executor, reason)


def _changes(
    model: Model, ready: _Ready, units: Units, times: Sequence[int]
) -> Iterator[tuple[list[tuple[int, ...]], Tensor]]:
    """Cells and the changes [metric, w, m] of the worlds without them; what is left out is no change."""
    if ready.executor != "shared":
        for cells, values in through_worlds(model, ready.row, units, times, ready.measure, ready.executor):
            yield cells, values.double() - ready.again[:, None]
        return
    for tail, chosen in tails(model, ready.row, units, times):
        base = ready.measure(tail.run()).double()
        for cells, values in through_tails(model, units, tail, times, chosen, ready.measure):
            yield cells, values.double() - base


def _exact(model: Model, ready: _Ready, units: Units, times: Sequence[int], per_query: bool) -> np.ndarray:
    """Effects [metric, *units, m or 1]."""
    names, count = ready.measure.names, len(ready.row.queries) if per_query else 1
    effect = torch.zeros(len(names), *units.shape, count, dtype=torch.float64)
    for cells, change in _changes(model, ready, units, times):
        change = change.cpu() if per_query else change.cpu().sum(-1, keepdim=True)
        effect[(slice(None), *(torch.tensor(axis) for axis in zip(*cells, strict=True)))] = change
    return effect.numpy()


def _result(
    effect: np.ndarray, ready: Sequence[_Ready], units: Units, several: bool, per_query: bool, config: dict[str, Any]
) -> KVEffects:
    """A result of effects [metric, *units, query, row]."""
    rows, names = [one.row for one in ready], ready[0].measure.names
    alone = rows[0].labels[: rows[0].context] if len(rows) == 1 else ()
    axes = units.axes(alone)
    if per_query:
        axes = (*axes, Axis("query", tuple(range(effect.shape[-2]))))
    else:
        effect = effect[..., 0, :]
    pick = (lambda a: a) if several else (lambda a: a[0])
    executors = sorted({(one.executor, one.reason) for one in ready})
    return KVEffects(
        effect=pick(effect),
        axes=axes,
        metrics=names,
        several=several,
        base=pick(np.stack([one.again.sum(1).cpu().numpy() for one in ready], -1)),
        source=None,
        status=np.where(np.nan_to_num(np.abs(effect)).max((0, -1)) > 0, 0, 1).astype(np.int8),
        noise_floor=pick(np.stack([one.floor for one in ready]).max(0)),
        rows=tuple(joined(row.labels) for row in rows),
        config={
            **config,
            "tokens": [list(row.labels) for row in rows],
            "context": [row.context for row in rows],
            "executor": "/".join(name for name, _ in executors),
            "executor_reason": "; ".join(reason for _, reason in executors if reason),
        },
    )


def _check(given: Any, named: str, known: Sequence[str]) -> None:
    if given not in known:
        raise InputsError(f"{named} is one of {', '.join(map(repr, known))}, not {given!r}{nearest(str(given), known)}")
