"""Values moved between sites or positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import ShapeError
from ..context import Context, beside
from ..operation import Op


@dataclass(frozen=True, eq=False)
class CopyScores(Op):
    """Logits that are scores: those read [B, 1, n, m], written onto the tokens int [n, m] or [B, n, m]; the others
    `rest`.

    The scores are those of one head, for n queries and m keys; x is [B, n, V].
    """

    tokens: Tensor
    rest: float | Tensor = -1e9
    name: ClassVar[str] = "copy_scores"
    stacks: ClassVar[bool] = True
    tables: ClassVar[frozenset[str]] = frozenset({"tokens"})
    numbers: ClassVar[frozenset[str]] = frozenset({"rest"})

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        scores = reads[0]
        tokens = beside(self.tokens, x.device)
        if tokens.ndim == 3:
            if len(tokens) != ctx.total:
                raise ShapeError(f"{ctx.site}: tokens for {len(tokens)} rows, the inputs have {ctx.total}")
            tokens = tokens[ctx.window]
        tokens = tokens.expand(len(x), -1, -1)
        shape = (len(x), 1, x.shape[1], tokens.shape[-1])
        if scores.shape != shape or tokens.shape[1] != x.shape[1]:
            raise ShapeError(
                f"{ctx.site}: scores {list(scores.shape)} and tokens {list(tokens.shape)} for {list(x.shape)}; "
                f"expected the scores of one head {list(shape)}, one key for each token"
            )
        rest = torch.as_tensor(self.rest, dtype=x.dtype, device=x.device).clamp_min(torch.finfo(x.dtype).min)
        rest = torch.zeros_like(x) + rest
        return rest.scatter(2, tokens, scores[:, 0].to(x.dtype))


@dataclass(frozen=True, eq=False)
class FromPositions(Op):
    """The value read [B, n, M] of other positions: place i gets that of place `source[i]`, int [n], for every head."""

    source: Tensor
    name: ClassVar[str] = "from_positions"
    tables: ClassVar[frozenset[str]] = frozenset({"source"})
    mixes: ClassVar[frozenset[str]] = frozenset({"pos"})

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        moved = reads[0].index_select(1, beside(self.source, x.device))
        if moved.ndim == x.ndim - 1:
            moved = moved.unsqueeze(2)
        return moved.to(x.dtype).expand_as(x)
