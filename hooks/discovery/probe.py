"""One forward pass of an unknown model, with what every module of it was given and returned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..models.hook import Hook
from ..models.huggingface import swap_attention
from ..models.network import logits_of

TOKENS = 8
"""Tokens of the row that is run."""
CLOSE = {torch.float64: 1e-5, torch.float32: 1e-4}
"""Largest difference between two ways of computing one value, relative to its largest entry; 2e-2 in half precision."""


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a module: what it read, and what it returned."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def read(self) -> Tensor | None:
        """The first tensor that it was given."""
        named = self.kwargs.get("hidden_states")
        values = (*self.args, named, *self.kwargs.values())
        return next((value for value in values if isinstance(value, Tensor)), None)

    @property
    def returned(self) -> Tensor | None:
        """What it returned, or the first of several values."""
        value = self.output[0] if isinstance(self.output, tuple) and self.output else self.output
        return value if isinstance(value, Tensor) else None


@dataclass(frozen=True, eq=False)
class Mixing:
    """A call of an attention function: queries [1, H, T, D], keys, values, mask, and what else it was given."""

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    given: dict[str, Any]
    z: Tensor


@dataclass(eq=False)
class Probe:
    """What was seen of one forward pass.

    Attributes:
        ids: [1, T].
        logits: what the model returned.
        calls: of modules, in the order in which they returned.
        mixings: of attention functions, in order.
    """

    ids: Tensor
    logits: Tensor = field(init=False)
    calls: list[Call] = field(default_factory=list)
    mixings: list[Mixing] = field(default_factory=list)

    def of(self, module: nn.Module) -> list[Call]:
        """The calls of a module."""
        return [call for call in self.calls if call.module is module]

    def within(self, module: nn.Module) -> list[Call]:
        """The calls of a module's parts."""
        parts = set(module.modules()) - {module}
        return [call for call in self.calls if call.module in parts]


def near(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two values are the same but for rounding; [T, M] and [1, T, M] may be."""
    if a is None or b is None or a.numel() != b.numel() or a.shape[-1] != b.shape[-1]:
        return False
    if a.is_floating_point() != b.is_floating_point():
        return False
    one, two = a.reshape(b.shape).double(), b.double()
    most = float(two.abs().max()) if two.numel() else 0.0
    return float((one - two).abs().max()) <= CLOSE.get(b.dtype, 2e-2) * max(most, 1e-30)


def factor(product: Tensor, x: Tensor, *homes: Any) -> float | None:
    """The number by which x was multiplied, if it was.

    Args:
        homes: modules or configs, one of whose numbers it is likely to be, or one over that.
    """
    if product.shape != x.shape or not bool(x.any()):
        return None
    a, b = product.double().flatten(), x.double().flatten()
    s = float((a @ b) / (b @ b))
    told = [v for home in homes if hasattr(home, "__dict__") for v in vars(home).values() if isinstance(v, float) and v]
    likely = [1.0, *told, *(1 / v for v in told)]
    s = next((value for value in likely if abs(s - value) < 1e-3 * abs(value)), s)
    return s if s and near((b * s).to(product.dtype), product.flatten()) else None


@torch.no_grad()
def probe(module: nn.Module, vocabulary: int) -> Probe:
    """Run a model on one row of tokens.

    Raises:
        ModelError: it cannot be run.
    """
    config: Any = getattr(module, "config", None)
    usable = ordinary(config, vocabulary)
    draw = torch.randint(len(usable), (TOKENS,), generator=torch.Generator().manual_seed(0))
    device = next(module.parameters()).device
    seen = Probe(torch.tensor([[usable[i] for i in draw]], device=device))
    with ExitStack() as stack:
        for part in module.modules():
            hook = Hook(lambda m, args, kwargs, out: seen.calls.append(Call(m, args, kwargs, _kept(out))))
            stack.callback(part.register_forward_hook(hook, with_kwargs=True).remove)
            if hasattr(getattr(part, "config", None), "_attn_implementation") and _attends(part):
                try:
                    stack.enter_context(swap_attention(part, _recorder(seen)))
                except ModelError:  # nobody knows its own function, so it calls none that could be replaced
                    continue
        try:
            cached = {"use_cache": False} if hasattr(config, "use_cache") else {}
            seen.logits = logits_of(module(input_ids=seen.ids, **cached))
        except Exception as error:
            raise ModelError(f"it does not run on token ids alone: {type(error).__name__}: {error}") from error
    return seen


def ordinary(config: Any, vocabulary: int) -> list[int]:
    """Token ids that a config does not name as special ones."""
    told = [v for n, v in vars(config).items() if n.endswith("token_id")] if hasattr(config, "__dict__") else []
    special = {one for value in told for one in (value if isinstance(value, (list, tuple)) else [value])}
    return [i for i in range(vocabulary) if i not in special] or [0]


def _kept(out: Any) -> Any:
    # Some models go on to change what a module returned in place.
    if isinstance(out, tuple):
        return tuple(each.clone() if isinstance(each, Tensor) else each for each in out)
    return out.clone() if isinstance(out, Tensor) else out


def _attends(part: nn.Module) -> bool:
    return "attention" in type(part).__name__.lower() and not isinstance(part, nn.ModuleList)


def _recorder(seen: Probe) -> Any:
    # Some models give the mask by its name.
    def function(
        module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any = None, *, own: Any, **given: Any
    ) -> Any:
        out = own(module, q, k, v, attention_mask, **given)
        seen.mixings.append(Mixing(module, q, k, v, attention_mask, given, out[0]))
        return out

    return function


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Put every part into eval mode, and back into its own."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes:
            part.training = mode
