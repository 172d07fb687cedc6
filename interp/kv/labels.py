"""What retaining heads are trained to say: the published label, and what removing each unit causes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hooks import InputsError, Model
from interp.kv.asked import Asked, Text, asked
from interp.kv.cache import new_cache
from interp.kv.effects import kv_effects
from interp.kv.eviction import Eviction
from interp.kv.policies import Policy
from interp.kv.seam import attending
from interp.kv.view import View

LABELS = ("published", "interventional", "both")


@dataclass(frozen=True, eq=False)
class Example:
    """One context with what its heads read and should say.

    Attributes:
        reads: for each layer queries [1, H, S, D], keys and values [1, K, S, D] of the context, before rotation.
        labels: [L, K, S]; of both labels [2, L, K, S], the published one first.
    """

    reads: tuple[tuple[Tensor, Tensor, Tensor], ...]
    labels: Tensor


@dataclass
class _Collected:
    reads: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def examples(
    model: Model,
    context: Text,
    suffix: Text,
    label: str = "published",
    *,
    answer: int | None = None,
    how: str = "exact",
) -> list[Example]:
    """What heads are trained on, row by row, on a frozen backbone.

    Args:
        model, context, suffix, answer: as in `kv_effects`.
        label: ``"published"``: the largest q k / sqrt(D) that a key has with a query whose prediction is measured, over
            the query heads of its group; ``"interventional"``: the effect on the answer's negative log-likelihood of
            removing it, without sign, divided by its root mean square over the row; ``"both"``: the two, of which the
            published one is put on the other's scale: less its mean over each head's keys, divided by the root mean
            square of what is left over the row. What a head's keys have in common ranks none of them.
        how: of interventional labels, as in `kv_effects`.

    Raises:
        InputsError: an unknown label.
    """
    if label not in LABELS:
        raise InputsError(f"a label is one of {', '.join(LABELS)}, not {label!r}")
    rows = asked(model, context, suffix, answer)
    found = []
    for row in rows:
        seen = _read(model, row)
        published = Example(tuple(seen.reads), torch.stack(seen.scores))
        if label == "published":
            found.append(published)
            continue
        causal = Example(published.reads, _scaled(_effects(model, row, how).to(published.labels)))
        found.append(causal if label == "interventional" else paired(published, causal))
    return found


def paired(published: Example, interventional: Example) -> Example:
    """Both labels of one context, on one scale; see `examples`."""
    apart = published.labels - published.labels.mean(-1, keepdim=True)
    return Example(published.reads, torch.stack([_scaled(apart), interventional.labels]))


def _effects(model: Model, row: Asked, how: str) -> Tensor:
    """The size of each unit's effect on the answer, [L, K, S]."""
    ids = row.ids.tolist()
    found = kv_effects(model, ids[: row.context], ids[row.context :], answer=len(row.queries), how=how)
    return torch.from_numpy(found.effect[..., 0]).abs()


def _scaled(labels: Tensor) -> Tensor:
    return labels / labels.square().mean().sqrt().clamp_min(1e-12)


def _read(model: Model, row: Asked) -> _Collected:
    """What each layer's attention sees of a whole row, and the published label of its context."""
    seen = _Collected()

    def collect(view: View) -> Tensor:
        keys = view.owner.turned(view.layer, view.keys, view.owner.positions, back=True)
        context = row.context
        seen.reads.append(
            tuple(x[:, :, :context].clone() for x in (view.raw_queries, keys, view.values))  # type: ignore[arg-type]
        )
        asking = view.queries[0, :, list(row.queries)].unflatten(0, (-1, view.groups))  # [K, G, m, D]
        scores = asking.flatten(1, 2) @ view.keys[0, :, :context].transpose(1, 2) * view.scaling
        seen.scores.append(scores.amax(1).float())
        return view.scores

    cache = new_cache(model, Eviction(None))
    with attending(cache, Policy("collect", collect)) as state:
        state.prefilling = True
        model.module(input_ids=row.ids[None].to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return seen
