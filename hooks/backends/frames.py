"""Which calls of which models are under way in a thread: what tells a hook whether a value is its own."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import nn
from torch._C._dynamo.eval_frame import set_eval_frame


@dataclass(eq=False)
class Call:
    """One call of a model that is under way.

    Attributes:
        module: the model that is called.
        stood: the stack frame that called; once it is gone, so is the call, however it ended.
        run: the pass whose call it is; None for one that is of nobody's.
        close: what ends it.
        returned: what is told of the value that it returns, before it ends.
        changed: from that to what its caller gets; None for the value itself.
        compiler: what looks into the thread's frames outside the call, and not within it; None for nothing.
    """

    module: nn.Module
    stood: FrameType
    run: Any = None
    close: Callable[[], None] | None = None
    returned: Callable[[Any], None] | None = None
    changed: Callable[[Any], Any] | None = None
    compiler: Any = None


class _Calls(threading.local):
    def __init__(self) -> None:
        self.stack: list[Call] = []


_CALLS = _Calls()


def innermost() -> Call | None:
    """The call that is under way in this thread, the innermost of several."""
    return _CALLS.stack[-1] if _CALLS.stack else None


def inside(module: nn.Module) -> bool:
    """Whether this thread is within a call of a model."""
    drop_ended()
    return any(call.module is module for call in _CALLS.stack)


def runs(module: nn.Module) -> list[Any]:
    """The passes of a model that this thread is within, the outermost first."""
    return [call.run for call in _CALLS.stack if call.module is module]


def push(call: Call) -> None:
    """Begin a call."""
    drop_ended()
    _CALLS.stack.append(call)


def pop(module: nn.Module, output: Any = None) -> Any:
    """End the innermost call, if it is one of this model; what it returns is None where it raised.

    Returns:
        What its caller is to get in place of that; None for the value itself.
    """
    if _CALLS.stack and _CALLS.stack[-1].module is module:
        call = _CALLS.stack.pop()
        if call.compiler is not None:
            set_eval_frame(call.compiler)
        try:
            if call.returned is not None and output is not None:
                call.returned(output)
            if call.changed is not None and output is not None:
                return call.changed(output)
        finally:
            _end(call)
    return None


def drop_ended() -> None:
    """End calls that nothing ended: a keyboard interrupt leaves a model without calling its hooks."""
    while _CALLS.stack and not _stands(_CALLS.stack[-1].stood):
        _end(_CALLS.stack.pop())


def _end(call: Call) -> None:
    if call.close is not None:
        call.close()


def _stands(frame: FrameType) -> bool:
    here: FrameType | None = sys._getframe(1)
    while here is not None:
        if here is frame:
            return True
        here = here.f_back
    return False
