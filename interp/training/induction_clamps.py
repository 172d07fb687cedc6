"""Clamps on the circuit of an induction head, as data: what each member holds fixed while it trains.

Source: Singh et al., "What needs to go right for an induction head?" (ICML 2024). A `Clamp` describes one member;
`stack` turns many into masks and values on a leading axis, so that members with different clamps share one program.
Layers are named by what they hold: the first layer's heads, the last layer's heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from hooks.errors import PlanError
from interp.training.induction_task import TOKENS

BLOCKED = -1e9
STREAMS = ("q", "k", "v")


@dataclass(frozen=True)
class Clamp:
    """What one member holds fixed; the default holds nothing.

    Attributes:
        previous_token: first-layer heads whose pattern attends to the token before (position 0 to itself).
        no_previous_token: first-layer heads whose scores from a token to the one before it are set to -1e9.
        labels_only: whether `no_previous_token` blocks at label tokens only.
        first_layer: whether the last layer's patterns are computed from embeddings that hold, at a label token, the
            exemplar before it, and its values from the plain embeddings. The residual stream itself stays as it is.
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
        if self.preserve and self.first_layer:
            raise PlanError("under first_layer, what the last layer reads is given: there is nothing to preserve")
        if self.sharpness != 1 and self.match is None:
            raise PlanError("sharpness is of the head that matches: name it in match")
        if self.labels_only and not self.no_previous_token:
            raise PlanError("labels_only says where no_previous_token holds: name its heads")
        if overlap := set(self.previous_token) & set(self.no_previous_token):
            raise PlanError(f"heads {sorted(overlap)} cannot both attend to the previous token and not attend to it")
        if not all(value > 0 for _, value in self.temperature_first + self.temperature_last):
            raise PlanError("temperatures must be positive")

    def heads(self) -> set[int]:
        """Every head that the clamp names."""
        named = {*self.previous_token, *self.no_previous_token, *self.ablate_first, *self.ablate_last}
        named |= {head for head, _ in self.temperature_first + self.temperature_last}
        return named | {head for head in (self.match, self.copy) if head is not None}

    def to_dict(self) -> dict[str, Any]:
        """What differs from the default, as JSON data."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in given.items() if value != getattr(Clamp(), name)}


def only_head(head: int, n_heads: int = 8, **clamp: Any) -> Clamp:
    """A clamp under which every last-layer head but one is ablated, so that the circuit is single.

    Args:
        head: the head that stays.
        n_heads: heads of the layer H.
        **clamp: fields of `Clamp` besides.

    Raises:
        PlanError: the layer lacks the head.
    """
    if not 0 <= head < n_heads:
        raise PlanError(f"there is no head {head}: the layer has {n_heads}, counted from 0")
    return Clamp(ablate_last=tuple(h for h in range(n_heads) if h != head), **clamp)


def stack(clamps: Sequence[Clamp], n_heads: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Masks and values of many clamps; a group that no member uses is left out, so that a program can skip it.

    Args:
        clamps: one a member.
        n_heads: heads a layer H.
        dtype: of the values.

    Returns:
        Some of: ``previous`` [M, H], ``blocked`` bool [M, H, T, S], ``gate_first`` and ``gate_last`` [M, H],
        ``first_layer`` [M], ``preserve`` and ``stopped`` [M, 3], ``match`` [M, H] with ``sharpness`` [M],
        ``copy``, ``scale_first`` and ``scale_last`` [M, H].

    Raises:
        PlanError: a head that the layer lacks.
    """
    if bad := {head for clamp in clamps for head in clamp.heads() if not 0 <= head < n_heads}:
        raise PlanError(f"heads {sorted(bad)} do not exist: a layer has {n_heads}, counted from 0")

    def chosen(name: str) -> Tensor:
        out = torch.zeros(len(clamps), n_heads, dtype=dtype)
        for row, clamp in zip(out, clamps, strict=True):
            value = getattr(clamp, name)
            for head in value if isinstance(value, tuple) else (value,):
                if head is not None:
                    row[head] = 1
        return out

    def scales(name: str) -> Tensor:
        out = torch.ones(len(clamps), n_heads, dtype=dtype)
        for row, clamp in zip(out, clamps, strict=True):
            for head, temperature in getattr(clamp, name):
                row[head] = 1 / temperature
        return out

    before = torch.ones(TOKENS - 1, dtype=torch.bool).diag(-1)
    at_labels = before & (torch.arange(TOKENS) % 2 == 1)[:, None]
    preserved = torch.tensor([[s in c.preserve for s in STREAMS] for c in clamps])
    stopped = preserved & torch.tensor([[c.stop_gradient] for c in clamps])
    groups: dict[str, tuple[bool, dict[str, Tensor]]] = {
        "previous": (any(c.previous_token for c in clamps), {"previous": chosen("previous_token")}),
        "blocked": (
            any(c.no_previous_token for c in clamps),
            {
                "blocked": chosen("no_previous_token")[..., None, None].bool()
                & torch.stack([at_labels if c.labels_only else before for c in clamps])[:, None]
            },
        ),
        "gate_first": (any(c.ablate_first for c in clamps), {"gate_first": 1 - chosen("ablate_first")}),
        "gate_last": (any(c.ablate_last for c in clamps), {"gate_last": 1 - chosen("ablate_last")}),
        "first_layer": (
            any(c.first_layer for c in clamps),
            {"first_layer": torch.tensor([float(c.first_layer) for c in clamps], dtype=dtype)},
        ),
        "preserve": (
            any(c.preserve for c in clamps),
            {"preserve": preserved.to(dtype), "stopped": stopped},
        ),
        "match": (
            any(c.match is not None for c in clamps),
            {"match": chosen("match"), "sharpness": torch.tensor([c.sharpness for c in clamps], dtype=dtype)},
        ),
        "copy": (any(c.copy is not None for c in clamps), {"copy": chosen("copy")}),
        "scale_first": (any(c.temperature_first for c in clamps), {"scale_first": scales("temperature_first")}),
        "scale_last": (any(c.temperature_last for c in clamps), {"scale_last": scales("temperature_last")}),
    }
    return {name: value for used, values in groups.values() if used for name, value in values.items()}
