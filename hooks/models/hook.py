"""The hooks that the engine places on modules, told from the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

UNTRACED = (
    "run() and apply() know whose call this is by the thread and the stack, which no graph holds. Compile the model "
    "and the plan as one with model.compile(plan), or leave out fullgraph=True"
)


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


class Hook:
    """A hook of the engine's. In a copy of the model, which has the copy of the hook on it, it does nothing."""

    __slots__ = ("function",)
    passing = True
    """It is there for a while, and is no part of the model."""

    def __init__(self, function: Callable[..., Any] = _nothing) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(msg=UNTRACED)
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


class TracedHook(Hook):
    """A hook that a compiler looks into."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)
