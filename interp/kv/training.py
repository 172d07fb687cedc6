"""Training of retaining heads on a frozen backbone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hooks import InputsError
from interp.kv.heads import RetainingHeads
from interp.kv.labels import Example
from interp.progress import tqdm


def loss_of(scores: Tensor, labels: Tensor, smoothness: float = 0.0025, mix: float = 0.5) -> Tensor:
    """Smooth-L1 (beta 1) of scores [K, S], and the mean squared difference of neighbouring scores (Locret, eq. 3).

    Args:
        labels: [K, S], or both labels [2, K, S], of whose losses the second has the share `mix`.
    """
    shares = (1.0,) if labels.ndim == scores.ndim else (1 - mix, mix)
    each = zip(shares, labels.reshape(-1, *scores.shape), strict=True)
    said = sum(share * torch.nn.functional.smooth_l1_loss(scores, label) for share, label in each)
    return said + smoothness * scores.diff(dim=-1).square().mean()


def train_heads(
    heads: RetainingHeads,
    some: Sequence[Example],
    *,
    steps: int = 3000,
    batch: int = 8,
    learning_rate: float = 5e-4,
    warmup: float = 0.1,
    smoothness: float = 0.0025,
    mix: float = 0.5,
    seed: int = 0,
    progress: bool | None = False,
) -> list[float]:
    """Train heads, in place, to say the labels of examples; the backbone has been read and is not run.

    AdamW with betas (0.9, 0.95); the rate rises over the first `warmup` of the steps and falls linearly to 0.

    Args:
        heads: fresh, or trained on.
        some: examples, of any lengths.
        steps, batch: optimizer steps, and examples in each.
        learning_rate, warmup, smoothness: as published.
        mix: share of the interventional label in the loss, where examples have both.
        seed: of the order of the examples.
        progress: show a bar.

    Returns:
        The loss of each step.

    Raises:
        InputsError: no example, labels that are no numbers, or a share outside [0, 1].
    """
    if not some:
        raise InputsError("retaining heads are trained on examples, and there is none")
    if any(not bool(example.labels.isfinite().all()) for example in some):
        raise InputsError("a label is nan or infinite: heads cannot be trained to say it")
    if not 0 <= mix <= 1:
        raise InputsError(f"mix is the interventional label's share of the loss, from 0 to 1, not {mix!r}")
    optimizer = torch.optim.AdamW(heads.parameters(), lr=learning_rate, betas=(0.9, 0.95))
    rising = max(1, round(warmup * steps))
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / rising, max(0.0, (steps - s) / max(1, steps - rising)))
    )
    generator, losses = torch.Generator().manual_seed(seed), []
    device = next(heads.parameters()).device
    with torch.enable_grad():
        for _ in tqdm(range(steps), disable=None if progress is None else not progress, leave=False):
            chosen = torch.randint(len(some), (batch,), generator=generator).tolist()
            total = torch.zeros((), device=device)
            for number in chosen:
                example = some[number]
                for layer, reads in enumerate(example.reads):
                    scores = heads(layer, *(x.to(device) for x in reads))[0]
                    total = total + loss_of(scores, example.labels[..., layer, :, :].to(scores), smoothness, mix)
            total = total / (batch * len(some[0].reads))
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            rate.step()
            losses.append(float(total.detach()))
    return losses
