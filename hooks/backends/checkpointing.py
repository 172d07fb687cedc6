"""Gradient checkpointing, under which parts of a forward pass run again, and what a call that is made twice writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import disable_saved_tensors_hooks

_FUNCTION = "_gradient_checkpointing_func"


def _checkpointed(module: nn.Module) -> list[nn.Module]:
    """The parts of a model that transformers checkpoints."""
    return [m for m in module.modules() if getattr(m, "gradient_checkpointing", False) is True]


@contextmanager
def checkpointing(module: nn.Module, bind: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Within it, the parts of a model are checkpointed by a function made of their own."""
    changed = [(m, vars(m)[_FUNCTION]) for m in _checkpointed(module) if _FUNCTION in vars(m)]
    for m, function in changed:
        setattr(m, _FUNCTION, bind(function))
    try:
        yield
    finally:
        for m, function in changed:
            setattr(m, _FUNCTION, function)


@contextmanager
def uncheckpointed(module: nn.Module) -> Iterator[None]:
    """Run forward passes that are not computed again in the backward pass.

    A pass of another world has its own edits, which are no longer in force when the backward pass comes, so computing
    it again would give other values. The flags of transformers' models are turned off; checkpointing by hand raises.

    Raises:
        RuntimeError: from torch, on a checkpoint that the model makes by itself.
    """
    flagged = _checkpointed(module)
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


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Undo what a call writes into the model's buffers, as running means do in training."""
    before = [(buffer, buffer._version, buffer.clone()) for buffer in module.buffers()] if module.training else []
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, version, value in before:
                if buffer._version != version:
                    buffer.copy_(value)
