"""A feed-forward layer, told by the values of its parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..models import moe
from ..models.blocks import Feed, Map, Mlp
from ..models.projections import Outputs
from .attending import is_linear
from .probe import Call, Probe, near

Parts = tuple[nn.Module | Outputs, nn.Module, Map, "nn.Module | Outputs | None", int]
ACTIVATIONS: tuple[Map, ...] = (nn.functional.silu, nn.functional.relu, nn.functional.gelu,
                                partial(nn.functional.gelu, approximate="tanh"))  # fmt: skip
"""Activations that are no module, as functions."""


def feed(seen: Probe, call: Call) -> Feed:
    """Describe a feed-forward layer that is one module."""
    module, read, returned = call.module, call.read, call.returned
    assert read is not None and returned is not None
    if hasattr(module, "experts"):
        try:
            return _mixture(seen, module, call)
        except ModelError:
            return whole(module)
    parts = seen.within(module)
    taken = apart(parts, read, returned)
    if taken is None:
        return whole(module)
    return replace(whole(module), pre=taken[0], down=taken[1], act=taken[2], up=taken[3], width=taken[4])


def whole(module: nn.Module) -> Mlp:
    """A layer that nobody looks into."""

    def out(x: Tensor) -> Tensor:
        made = module(x[None])
        return (made[0] if isinstance(made, tuple) else made)[0]

    return Mlp(module, module, module, nn.Identity(), whole=out)


def apart(parts: list[Call], read: Tensor, added: Tensor) -> Parts | None:
    """The parts `pre`, `down`, `act`, `up` and the width of a layer from what it reads and adds; None if unknown."""
    lines = [c for c in parts if is_linear(c)]
    downs = [c for c in lines if near(c.returned, added)]
    if not downs:
        return None
    down = downs[-1]
    hidden = down.read
    assert hidden is not None
    width = hidden.shape[-1]
    firsts = [c for c in lines if near(c.read, read) and c is not down]
    modules = [c.module for c in parts if not is_linear(c)]
    acts = [*dict.fromkeys(modules), *ACTIVATIONS]
    for pre, up in _ways(firsts, width):
        gate, other = _value(firsts, pre), None if up is None else _value(firsts, up)
        for act in acts:
            try:
                made = act(gate)
            except Exception:  # a module that is no activation
                continue
            if isinstance(made, Tensor) and near(made if other is None else made * other, hidden):
                return pre, down.module, act, up, width
    return None


def _ways(firsts: list[Call], width: int) -> Iterator[tuple[nn.Module | Outputs, nn.Module | Outputs | None]]:
    """What may be `pre` and `up`."""
    for call in firsts:
        assert call.returned is not None
        if call.returned.shape[-1] == 2 * width:
            halves = [Outputs(call.module, start, width) for start in (0, width)]
            yield halves[0], halves[1]
            yield halves[1], halves[0]
        elif call.returned.shape[-1] == width:
            yield call.module, None
            for other in firsts:
                if other is not call and other.returned is not None and other.returned.shape[-1] == width:
                    yield call.module, other.module


def _value(firsts: list[Call], part: nn.Module | Outputs) -> Tensor:
    module = part.module if isinstance(part, Outputs) else part
    out = next(c.returned for c in firsts if c.module is module)
    assert out is not None
    return part.read(out) if isinstance(part, Outputs) else out


def _mixture(seen: Probe, module: nn.Module, call: Call) -> Feed:
    """A mixture of experts whose parts were called as those are that are known.

    Raises:
        ModelError: they were not.
    """
    found = moe.experts(module)
    routed, made = seen.of(found.router), seen.of(found.experts)
    if len(routed) != 1 or len(made) != 1 or len(made[0].args) < 3 or not isinstance(routed[0].output, tuple):
        raise ModelError("its experts are called in another way")
    x, chosen, weights = made[0].args[:3]
    fits = isinstance(chosen, Tensor) and isinstance(weights, Tensor) and chosen.shape == weights.shape
    if not fits or chosen.is_floating_point() or not torch.equal(chosen, routed[0].output[2]):
        raise ModelError("its experts are called in another way")
    out = found.joined(found.parts(x, weights, chosen), x)
    if not near(out, call.returned):
        raise ModelError("it adds something besides what its experts and its shared expert do")
    return found
