"""Mixtures of experts as transformers keeps them: a router module, one module of all experts, and a shared expert."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .experts import Experts, Route, softmax_first, softmax_last

ROUTERS, SHARED = ("gate", "router"), ("shared_expert", "shared_experts", "shared_mlp")
"""What the parts of a mixture are called."""


def experts(module: Any) -> Experts:
    """Find the parts of a mixture of experts.

    Raises:
        ModelError: nobody knows how its router chooses.
    """
    router = next((getattr(module, name) for name in ROUTERS if hasattr(module, name)), None)
    if not isinstance(router, nn.Module) or not isinstance(getattr(module, "experts", None), nn.Module):
        raise ModelError(f"{type(module).__name__} is not a mixture of experts with a router that is known")
    _, weight = _matrix(router)
    count, width = weight.shape
    route, k = route_of(router)
    down = getattr(module.experts, "down_proj", None)
    inner = down.numel() // (count * width) if isinstance(down, Tensor) else width
    return Experts(module, router, module.experts, route, count, k * inner, _shared(module))


@torch.no_grad()
def route_of(router: Any) -> tuple[Route, int]:
    """How a router goes on from its logits, found by trying on random tokens; and to how many experts each goes.

    Raises:
        ModelError: in none of the ways that are known.
    """
    name, weight = _matrix(router)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(16, weight.shape[1], generator=generator, dtype=torch.float64).to(weight)
    if weight.device.type == "meta":
        return partial(own_route, router, name), int(getattr(router, "top_k", 1))
    # forward() rather than a call, which would run hooks that are placed on it.
    found = router.forward(tokens)
    fits = isinstance(found, tuple) and len(found) == 3 and all(isinstance(each, Tensor) for each in found)
    if fits and found[0].shape == (16, len(weight)) and not found[2].is_floating_point():
        logits, weights, chosen = found
        k = chosen.shape[-1]
        rules: list[Route] = [partial(softmax_first, k, normed, wide) for normed in (True, False)
                              for wide in (False, True)]  # fmt: skip
        for rule in [*rules, partial(softmax_last, k, False), partial(own_route, router, name)]:
            # Bitwise, or a token on the edge between two experts would go another way.
            if _same(rule(logits), (weights, chosen)):
                return rule, k
    raise ModelError(f"nobody knows how a router of class {type(router).__name__} chooses experts")


def own_route(router: Any, name: str, logits: Tensor) -> tuple[Tensor, Tensor]:
    """What a router itself makes of logits [N, E]: it is given them as tokens, with the identity as its matrix.

    Args:
        name: of the matrix [E, M]; a bias beside it counts as nothing.
    """
    home, _, leaf = name.rpartition(".")
    twin = _apart(router)
    part = twin
    for step in home.split(".") if home else ():
        child = _apart(part._modules[step])
        vars(part)["_modules"] = {**part._modules, step: child}
        part = child
    weight = part._parameters[leaf]
    assert weight is not None
    count, width = weight.shape
    bias = part._parameters.get("bias")
    changed = {leaf: torch.eye(count, width, dtype=weight.dtype, device=weight.device)}
    changed |= {} if bias is None else {"bias": torch.zeros_like(bias)}
    vars(part)["_parameters"] = {**part._parameters, **changed}
    # Nothing infinite may be multiplied by zero.
    most = torch.finfo(weight.dtype).max / 4
    tokens = nn.functional.pad(logits.to(weight.dtype).clamp(-most, most), (0, width - count))
    _, weights, chosen = twin.forward(tokens)
    return weights, chosen


def _same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, wanted, strict=True))


def _apart(module: Any) -> Any:
    """A copy that shares what the module holds, and has no hooks."""
    twin = copy.copy(module)
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        vars(twin)[hooks] = type(vars(twin)[hooks])()
    return twin


def _matrix(router: nn.Module) -> tuple[str, Tensor]:
    """The matrix [E, M] from tokens to logits, by its name.

    Raises:
        ModelError: there is none, or there are more experts than numbers of a token.
    """
    found = [(name, p) for name, p in router.named_parameters() if p.ndim == 2 and len(p) > 1]
    if len(found) != 1 or found[0][1].shape[0] > found[0][1].shape[1]:
        raise ModelError(f"a router has one matrix from tokens to experts; {type(router).__name__} has others")
    return found[0]


def _shared(module: Any) -> Callable[[Tensor], Tensor] | None:
    shared = next((getattr(module, name) for name in SHARED if getattr(module, name, None) is not None), None)
    if shared is None:
        return None
    gate = getattr(module, "shared_expert_gate", None)
    return shared if gate is None else partial(_gated, shared, gate)


def _gated(shared: nn.Module, gate: nn.Module, x: Tensor) -> Tensor:
    return gate(x).sigmoid() * shared(x)
