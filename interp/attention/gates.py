"""Interventions that are in force only where something says so: for each row and token, without a second pass.

A gate looks at values that lie before the site in the same step, or at what was kept of the step before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from hooks import Context, Intervention, Moment, PlanError, Read, Site, here, intervene


class Gate(Protocol):
    """Says where an intervention is in force.

    Attributes:
        reads: what it reads besides the value at the site.
    """

    @property
    def reads(self) -> tuple[Read, ...]:
        """What it reads of this world, before the site."""
        ...

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        """bool, broadcastable to x, the value at the site."""
        ...


@dataclass(frozen=True, eq=False)
class _Gated:
    inner: Intervention
    gate: Any

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        count = len(self.inner.reads)
        changed = self.inner.op(x, *reads[:count], ctx=ctx)
        return torch.where(self.gate(x, *reads[count:], ctx=ctx), changed, x)

    @property
    def __name__(self) -> str:
        return f"{self.inner.op} where {self.gate}"


def gated(item: Intervention, gate: Gate) -> Intervention:
    """An intervention in force only where a gate says so, decided anew for each row and token.

    Args:
        item: the intervention; its strength and its rows stay.
        gate: see `Gate`.

    Raises:
        PlanError: the intervention forbids attention (which a gate cannot take back).
    """
    if item.op.writes_inf:
        raise PlanError(
            f"{item} forbids, and what is forbidden cannot depend on a gate: scale the pattern by 0 instead"
        )
    made = intervene(item.site, _Gated(item, gate), (*item.reads, *gate.reads), tuple(item.op.mixes))
    return replace(made, weight=item.weight, only=item.only)


@dataclass(frozen=True, eq=False)
class ShareBelow:
    """Where a head gives some keys, such as the image's, less than a share of its attention, at the token itself.

    Attributes:
        keys: the scores of those keys: ``scores`` of a layer, its heads, the intervention's `pos`, and `key_pos`.
        share: in [0, 1].
    """

    keys: Site
    share: float

    def __post_init__(self) -> None:
        if self.keys.name != "scores" or self.keys.key_pos is None:
            raise PlanError(f"a share of attention is told by the scores of some keys, not by {self.keys}")

    @property
    def reads(self) -> tuple[Read, ...]:
        """The scores of those keys, and of all."""
        return here(self.keys), here(self.keys.at(key_pos=None))

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        some, every = (read.logsumexp(-1) for read in reads)
        low = (some - every).exp() < self.share  # [B, H, T]
        if ctx.axes == ("row", "head", "pos", "key_pos"):
            return low[..., None]
        if ctx.axes == ("row", "pos", "head", "dim"):
            return low.transpose(1, 2)[..., None]
        raise PlanError(f"the share of a head's attention says nothing about {ctx.site}, which has no heads")


@dataclass(frozen=True, eq=False)
class Detector:
    """Where a linear read-out of a value before the site is above a threshold, at the token itself.

    Attributes:
        where: ``z`` of resisting heads, say, with the positions of the intervention.
        direction: [..., D] with the sizes of that site's last axes.
        threshold: in the units of their product.
    """

    where: Site
    direction: Tensor
    threshold: float

    @property
    def reads(self) -> tuple[Read, ...]:
        """The value that it looks at."""
        return (here(self.where),)

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        (value,) = reads
        if tuple(value.shape[2:]) != tuple(self.direction.shape):
            raise PlanError(
                f"a direction {list(self.direction.shape)} for values {list(value.shape[2:])} at {self.where}"
            )
        told = (value * self.direction.to(value)).flatten(2).sum(-1) > self.threshold  # [B, T]
        axis = ctx.axes.index("pos")
        return told.reshape([len(told), *(told.shape[1] if n == axis else 1 for n in range(1, x.ndim))])


@dataclass(eq=False)
class Previous:
    """Where something that the step before said is above a threshold; nowhere in the call that feeds the prompt.

    It takes part in a `Decoder` (``gates=``), which keeps the number of each row from one step to the next and has it
    follow the rows when beams move.

    Attributes:
        measure: from the model's own logits [B, V] of the last token to a number for each row [B].
        threshold: above which the gate is open.
    """

    measure: Callable[[Tensor], Tensor]
    threshold: float
    _value: Tensor | None = field(default=None, repr=False)

    @property
    def reads(self) -> tuple[Read, ...]:
        """Nothing of this step."""
        return ()

    @property
    def _name(self) -> str:
        return f"gate {id(self)}"

    def recall(self, moment: Moment) -> None:
        """Look up what the step before said, before a call."""
        if moment.memory is None:
            raise PlanError(
                "a gate on the step before needs a key/value cache, by which rows are followed: use_cache=True"
            )
        self._value = moment.memory.get(self._name)

    def keep(self, own: Tensor, moment: Moment) -> None:
        """Keep what this step says for the next one."""
        if moment.memory is not None:
            moment.memory[self._name] = self.measure(own[:, -1].detach())

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        if self._value is None:
            return x.new_zeros([1] * x.ndim, dtype=torch.bool)
        if len(self._value) != len(x):
            raise PlanError(f"the step before had {len(self._value)} rows, this one has {len(x)}")
        return (self._value > self.threshold).reshape([-1] + [1] * (x.ndim - 1))


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the distribution that logits [..., V] give."""
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def open_where(
    weight: float, measure: Callable[[Tensor], Tensor], threshold: float
) -> Callable[[Tensor, Moment], Tensor]:
    """The weight of a term that is in force only for tokens whose own logits measure above a threshold in this step.

    Args:
        weight: w where it is.
        measure: from logits [B, T, V] to [B, T], such as `entropy`.
        threshold: above which.
    """
    return lambda own, _moment: weight * (measure(own) > threshold).to(own.dtype)


def heads_of(places: Sequence[tuple[int, int]]) -> dict[int, tuple[int, ...]]:
    """Pairs (layer, head) as heads by layer.

    Raises:
        PlanError: there are none.
    """
    found: dict[int, list[int]] = {}
    for layer, head in places:
        found.setdefault(int(layer), []).append(int(head))
    if not found:
        raise PlanError("no head is named")
    return {layer: tuple(sorted(set(heads))) for layer, heads in sorted(found.items())}
