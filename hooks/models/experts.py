"""A mixture of experts with its inside exposed: what the router says, and what each expert adds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Route = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From the router's logits [N, E] to the weights and the numbers [N, k] of the experts that each token goes to."""


@dataclass(frozen=True)
class Experts:
    """A feed-forward layer in which a router sends every token to some of E experts.

    Attributes:
        module: the layer, which is run as it is unless a site inside it is looked at; called on [B, T, M].
        router: called on tokens [N, M], returns their logits first, then weights and numbers of experts.
        experts: called on tokens [N, M], numbers and weights [N, k], returns what those add together, [N, M].
        route: what the router makes of its logits.
        count: E; width: F, the hidden values of all experts that a token goes to.
        shared: what every token gets besides, a function of tokens [N, M].
    """

    module: nn.Module
    router: nn.Module
    experts: nn.Module
    route: Route
    count: int
    width: int
    shared: Callable[[Tensor], Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """What the layer makes of tokens [N, M]."""
        out = self.module(x[None])
        return (out[0] if isinstance(out, tuple) else out)[0]

    @property
    def matrices(self) -> int:
        """How many matrices [M, F] it multiplies a token by."""
        return 3

    def logits(self, x: Tensor) -> Tensor:
        """What the router says of tokens [N, M], [N, E]."""
        return self.router(x)[0]

    def parts(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """What each expert adds for tokens [N, M], [N, E, M]: its output by its weight, zero where it is not chosen.

        Args:
            weights, chosen: of the experts that each token goes to, [N, k].
        """
        found = x.new_zeros((len(x), self.count, x.shape[-1]))
        if not len(x):  # what a kernel of grouped products makes of no tokens is its own to say
            return found
        for slot in range(chosen.shape[1]):
            which = chosen[:, slot : slot + 1]
            # forward() rather than a call, which would run hooks once more.
            part = self.experts.forward(x, which, weights[:, slot : slot + 1])
            found = found.scatter_add(1, which[..., None].expand(-1, -1, x.shape[-1]), part[:, None].to(found.dtype))
        return found

    def joined(self, parts: Tensor, x: Tensor) -> Tensor:
        """What the layer adds [N, M], of what its experts add [N, E, M] for tokens [N, M]."""
        out = parts.sum(1)
        return out if self.shared is None else out + self.shared(x)


def softmax_first(k: int, normed: bool, wide: bool, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and numbers of the k likeliest experts by a softmax over all.

    Args:
        normed: whether those weights are made to sum to one; `wide`: whether they stay in float32.
    """
    weights, chosen = torch.topk(logits.softmax(-1, dtype=torch.float32), k, dim=-1)
    if normed:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights if wide else weights.to(logits.dtype), chosen


def softmax_last(k: int, wide: bool, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and numbers of the k experts with the largest logits, by a softmax over those."""
    top, chosen = torch.topk(logits, k, dim=-1)
    return top.softmax(-1, dtype=torch.float32 if wide else top.dtype).to(top.dtype), chosen
