"""Small images of four shapes, a mark in the corner that gives the class away, and a vision transformer on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CLASSES = ("square", "plus", "cross", "disc")
SIDE, PATCH = 16, 4
AGREES = 0.95
"""How often, in training, the mark in the corner is that of the shape."""


def images(shapes: Tensor, marks: Tensor | None, seed: int, noise: float = 0.35) -> Tensor:
    """Draw shapes in random places and sizes.

    Args:
        shapes: int [B], places in `CLASSES`.
        marks: int [B], the class whose mark is in the corner, or None for no mark.
        seed: of places, sizes and noise.
        noise: standard deviation of each pixel's.

    Returns:
        [B, 1, 16, 16].
    """
    draw = torch.Generator().manual_seed(seed)
    n = len(shapes)
    radius = torch.randint(2, 4, (n,), generator=draw)
    at = torch.randint(7, 12, (n, 2), generator=draw)
    ys, xs = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    dy, dx = ((axis[None] - at[:, i, None, None]).abs() for i, axis in enumerate((ys, xs)))
    r = radius[:, None, None]
    inside = torch.maximum(dy, dx) <= r
    drawn = torch.stack(
        [
            inside & (torch.maximum(dy, dx) == r),
            inside & ((dy == 0) | (dx == 0)),
            inside & (dy == dx),
            dy**2 + dx**2 <= r**2,
        ],
        1,
    )
    picture = drawn[torch.arange(n), shapes].float()
    picture = picture + noise * torch.randn(picture.shape, generator=draw)
    if marks is not None:
        # One bright pixel of the corner's patch, another for each class.
        corner = torch.tensor([[1, 1], [1, 2], [2, 1], [2, 2]])[marks]
        picture[torch.arange(n), corner[:, 0], corner[:, 1]] += 2.0
    return picture[:, None]


def labels(n: int, seed: int) -> Tensor:
    """Random classes, int [n]."""
    return torch.randint(len(CLASSES), (n,), generator=torch.Generator().manual_seed(seed))


def other(classes: Tensor, seed: int) -> Tensor:
    """For each class a random other one."""
    step = torch.randint(1, len(CLASSES), classes.shape, generator=torch.Generator().manual_seed(seed))
    return (classes + step) % len(CLASSES)


def marked(classes: Tensor, seed: int) -> Tensor:
    """The marks of training: mostly the shape's own."""
    agrees = torch.rand(classes.shape, generator=torch.Generator().manual_seed(seed)) < AGREES
    return torch.where(agrees, classes, other(classes, seed + 1))


def train(seed: int, steps: int, batch: int = 128, log: Callable[[str], None] = print) -> Any:
    """Train a small `ViTForImageClassification` on marked images.

    Args:
        seed: of the weights and of the images.
        steps: of AdamW; each has new images.
        batch: images a step.
        log: is told the loss now and then.
    """
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    names = dict(enumerate(CLASSES))
    config = ViTConfig(
        image_size=SIDE, patch_size=PATCH, num_channels=1, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=96, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        id2label=names, label2id={name: i for i, name in names.items()},
    )  # fmt: skip
    model = ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        base = 10_000_000 + seed * 1_000_000 + 4 * step
        classes = labels(batch, base)
        pixels = images(classes, marked(classes, base + 1), base + 3)
        loss = torch.nn.functional.cross_entropy(model(pixel_values=pixels).logits, classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            log(f"step {step}: loss {loss.item():.3f}")
    return model.eval()
