"""Measuring a model in the middle of its training without leaving a trace."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from hooks import ModelError


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode for a while: without dropout, what is measured twice is the same."""
    modes = [(m, m.training) for m in module.modules()]
    for m, _ in modes:
        m.training = False
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode for a while, and leave it, its gradients and all random state as they were.

    Random state is Python's, numpy's, and torch's on the CPU and on every CUDA device in use. Gradients that are
    computed inside (by `backward`, say) go to buffers of their own. Mixed precision is off, also where accelerate has
    put it into the model's forward: what is measured does not depend on where in a loop it is.

    Raises:
        ModelError: on leaving without an exception, where a parameter or buffer was changed in place.
    """
    parameters = list(module.parameters())
    gradients = [p.grad for p in parameters]
    weights = [*module.named_parameters(), *module.named_buffers()]
    versions = [w._version for _, w in weights]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    for p in parameters:
        p.grad = None
    forward = vars(module).pop("forward", None) if hasattr(module, "_original_forward") else None
    try:
        with evaluating(module), ExitStack() as stack:
            for kind in {p.device.type for p in parameters}:
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        if forward is not None:
            vars(module)["forward"] = forward
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)
    changed = [name for (name, w), version in zip(weights, versions, strict=True) if w._version != version]
    if changed:
        raise ModelError(
            f"the measurement changed {', '.join(changed[:3])}{' and others' * (len(changed) > 3)} in place"
        )
