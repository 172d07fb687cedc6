"""Gradient checkpointing, under which parts of a forward pass run again during the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.autograd.graph import disable_saved_tensors_hooks


@contextmanager
def uncheckpointed(module: nn.Module) -> Iterator[None]:
    """Run forward passes that are not computed again in the backward pass.

    A pass of another world has its own edits, which are no longer in force when the backward pass comes, so computing
    it again would give other values. The flags of transformers' models are turned off; checkpointing by hand raises.

    Raises:
        RuntimeError: from torch, on a checkpoint that the model makes by itself.
    """
    flagged = [m for m in module.modules() if getattr(m, "gradient_checkpointing", False) is True]
    message = (
        "gradients flow through another world's forward pass, which cannot be checkpointed: read it with "
        "stop_gradient=True, or leave gradient checkpointing off"
    )
    for m in flagged:
        m.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        with disable_saved_tensors_hooks(message):
            yield
    finally:
        for m in flagged:
            m.gradient_checkpointing = True  # type: ignore[assignment]
