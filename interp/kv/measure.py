"""What removing something from the cache does to the answer: its likelihood, the whole prediction, a margin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hooks import MetricError, nearest

METRICS = ("nll", "kl", "margin")


@dataclass(frozen=True, eq=False)
class Measure:
    """Numbers of worlds, one a query whose prediction is read, which are compared with those of the full cache.

    Attributes:
        names: of `METRICS`: ``nll``, the answer's negative log-likelihood; ``kl``, KL(full || without); ``margin``, the
            answer's logit above that of the token that was most likely besides it under the full cache.
        targets: int64 [m], the token that follows each query.
        full: [m, V], logits under the full cache, in float32 at least.
    """

    names: tuple[str, ...]
    targets: Tensor
    full: Tensor

    @classmethod
    def of(cls, names: Sequence[str], targets: Tensor, full: Tensor) -> Measure:
        """Check the names of metrics.

        Raises:
            MetricError: one is unknown or comes twice, or the full cache's logits are no numbers.
        """
        for name in names:
            if name not in METRICS:
                raise MetricError(f"unknown metric {name!r}{nearest(str(name), METRICS)}; there are {METRICS}")
        if not names or len(set(names)) != len(names):
            raise MetricError(f"metrics are some of {METRICS}, each once, not {tuple(names)}")
        if not bool(full.isfinite().all()):
            raise MetricError("the logits under the full cache are not all finite, so there is nothing to compare with")
        return cls(tuple(names), targets.to(full.device), full.to(torch.promote_types(full.dtype, torch.float32)))

    def __call__(self, logits: Tensor) -> Tensor:
        """Each metric of each query, [metric, W, m], of logits [W, m, V]."""
        logits = logits.to(self.full.dtype)
        return torch.stack([getattr(self, f"_{name}")(logits) for name in self.names])

    def _nll(self, logits: Tensor) -> Tensor:
        return logits.logsumexp(-1) - self._answer(logits)

    def _kl(self, logits: Tensor) -> Tensor:
        full = self.full.log_softmax(-1)
        return (full.exp() * (full - logits.log_softmax(-1))).sum(-1)

    def _margin(self, logits: Tensor) -> Tensor:
        others = self.full.scatter(1, self.targets[:, None], -torch.inf).argmax(1)
        return self._answer(logits) - logits.gather(2, others.expand(len(logits), -1)[..., None])[..., 0]

    def _answer(self, logits: Tensor) -> Tensor:
        return logits.gather(2, self.targets.expand(len(logits), -1)[..., None])[..., 0]
