"""A model's twin: modules of its own that share its parameters and buffers, to place on what is to stay there."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from ..errors import ModelError
from .hook import Hook

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
# What a call of the model may change, and what the twin follows or does not need.
_PASSING = {"training", "max_seq_len_cached", "_modules"}


class Twin:
    """A copy of a tree of modules, but for its parameters and buffers, which it shares.

    It has the user's hooks as they are when it is made, and none of the engine's.

    Attributes:
        module: the twin of the model.

    Raises:
        ModelError: a module's forward is an object of its own, which would call the parts of the model.
    """

    def __init__(self, module: nn.Module) -> None:
        self._pairs: dict[nn.Module, nn.Module] = {}
        self.original = module
        self.module = self._of(module, "the model")
        self._state = self._states()

    @property
    def stale(self) -> bool:
        """Whether the model has changed: an attribute or a hook of the user's is another one."""
        now = self._states()
        return len(now) != len(self._state) or any(
            len(a) != len(b) or any(x is not y for x, y in zip(a, b, strict=True))
            for a, b in zip(now, self._state, strict=True)
        )

    def follow(self) -> None:
        """Be in training mode where the model is."""
        for original, twin in self._pairs.items():
            twin.training = original.training

    def _of(self, module: nn.Module, name: str) -> nn.Module:
        if module in self._pairs:
            return self._pairs[module]
        own = vars(module)
        forward = own.get("forward")
        if forward is not None and getattr(forward, "__self__", None) is not module:
            raise ModelError(
                f"the forward of {name} was replaced by {forward!r}, which calls parts of this very model: a compiled "
                "model is a twin of it with parts of its own. Use run(), or give the class a forward"
            )
        twin = object.__new__(type(module))
        self._pairs[module] = twin
        vars(twin).update(own)
        if forward is not None:
            vars(twin)["forward"] = forward.__func__.__get__(twin)
        for which in _HOOKS:
            if which in own:
                vars(twin)[which] = OrderedDict(own[which])
        for hooks in (twin._forward_hooks, twin._forward_pre_hooks):
            for number in [number for number, hook in hooks.items() if isinstance(hook, Hook)]:
                for which in _HOOKS:
                    vars(twin)[which].pop(number, None)
        vars(twin)["_modules"] = type(own["_modules"])(
            (part, None if child is None else self._of(child, f"{name}.{part}"))
            for part, child in own["_modules"].items()
        )
        return twin

    def _states(self) -> list[list[Any]]:
        """The attributes and the user's hooks of every module, to be compared by identity."""
        return [_state(module) for module in self._pairs]


def _state(module: nn.Module) -> list[Any]:
    own = vars(module)
    found = [value for name, value in own.items() if name not in _PASSING]
    found += own["_modules"].values()
    for which in ("_forward_hooks", "_forward_pre_hooks"):
        found += [hook for hook in own[which].values() if not isinstance(hook, Hook)]
    return found
