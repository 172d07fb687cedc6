"""How much of a cache is kept, and in what manner the rest goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hooks import InputsError, Model, ShapeError, nearest

POSITIONS = ("absolute", "slot")
ACROSS = ("head", "layer")


@dataclass(frozen=True, eq=False)
class Eviction:
    """A budget, and the settings of prefill in chunks (Locret's algorithm 1; its settings for Llama-3.1-8B in
    brackets).

    Attributes:
        budget: keys kept for each key/value head of each layer [16384]: a number, one for each layer, or [L, K]; None
            keeps all.
        chunk: tokens of the context that are fed at a time [1024].
        stabilizers: the most recent tokens, which are kept in any case, within the budget, except on the last chunk
            [2500].
        local: the last tokens of the context, which are fed after all others and kept [100].
        sinks: the first tokens, which are kept in any case, within the budget.
        positions: ``"absolute"``: kept keys stay at the positions of their tokens; ``"slot"``: they move together, and
            what follows is counted from there (the published way). Sliding windows go by the tokens' numbers in either.
        across: ``"head"``: each head keeps its budget; ``"layer"``: the heads of a layer share theirs, and those whose
            keys score higher keep more.
        decoding: whether keys go while tokens are generated, too, as soon as there are `every` more than the budget.
        every: see there.
    """

    budget: Any
    chunk: int = 1024
    stabilizers: int = 0
    local: int = 0
    sinks: int = 0
    positions: str = "absolute"
    across: str = "head"
    decoding: bool = False
    every: int = 1

    def budgets(self, model: Model) -> Tensor | None:
        """int64 [L, K], or None where all is kept.

        Raises:
            InputsError: a number is out of range, or a budget does not hold what is kept in any case.
            ShapeError: budgets for other layers and heads than the model has.
        """
        for name, given, known in (("positions", self.positions, POSITIONS), ("across", self.across, ACROSS)):
            if given not in known:
                raise InputsError(
                    f"{name} is {' or '.join(map(repr, known))}, not {given!r}{nearest(str(given), known)}"
                )
        for name, least in (("chunk", 1), ("stabilizers", 0), ("local", 0), ("sinks", 0), ("every", 1)):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise InputsError(f"{name} is a whole number from {least} on, not {number!r}")
        if self.budget is None:
            return None
        blocks = model.architecture.blocks
        shape = (len(blocks), blocks[0].attention.k.heads)
        budgets = torch.as_tensor(self.budget)
        if budgets.dtype.is_floating_point or budgets.dtype == torch.bool:
            raise InputsError(f"a budget is a whole number of keys, not {self.budget!r}")
        if budgets.ndim == 1:
            budgets = budgets[:, None]
        if budgets.ndim > 2 or any(n not in (1, m) for n, m in zip(budgets.shape[::-1], shape[::-1], strict=False)):
            raise ShapeError(f"budgets are a number, [{shape[0]}] or {list(shape)}, not {list(budgets.shape)}")
        budgets = budgets.to(torch.int64).expand(shape)
        least = self.stabilizers + self.sinks
        if int(budgets.min()) < max(1, least):
            raise InputsError(
                f"a budget of {int(budgets.min())} keys does not hold the {self.stabilizers} stabilizers and "
                f"{self.sinks} sinks "
                "that are kept in any case: raise it, or lower those"
            )
        return budgets

    def but(self, **changes: Any) -> Eviction:
        """The same with other settings."""
        return replace(self, **changes)


def choose_kept(
    scores: Tensor, valid: Tensor, forced: Tensor, budgets: Sequence[int] | Tensor, across: str
) -> tuple[Tensor, Tensor]:
    """Which keys a layer keeps.

    Args:
        scores: [B, K, N]; valid: bool [B, K, N], keys of real tokens; forced: bool [B, K, N], kept in any case.
        budgets: int [K].
        across: see `Eviction`.

    Returns:
        int64 [B, K, n] in the order of the text, and bool [B, K, n], which of them are kept: heads may keep fewer
        than n.
    """
    budgets = torch.as_tensor(budgets, device=scores.device)
    # Scores may be infinite, and still what is kept in any case comes first, and padding last.
    most = torch.finfo(torch.float64).max
    rank = scores.to(torch.float64).clamp(-most, most).masked_fill(forced, torch.inf).masked_fill(~valid, -torch.inf)
    _, heads, width = rank.shape
    if across == "layer":
        flat = rank.flatten(1)
        best = flat.topk(min(int(budgets.sum()), flat.shape[1]), dim=1).indices
        keep = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, best, True).unflatten(1, (heads, width))
    else:
        place = rank.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        keep = place < budgets[:, None]
    keep = keep & valid
    most = max(1, int(keep.sum(-1).max()))
    order = keep.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :most]
    order, _ = order.sort(dim=-1)
    return order, keep.gather(-1, order)
