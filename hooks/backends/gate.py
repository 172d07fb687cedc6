"""The one way into a model while something of ours is on it: whose call is this?"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch._C._dynamo.eval_frame import set_eval_frame

from ..models import hook as hook_module
from ..models.hook import Hook
from . import frames

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Start = Callable[[frames.Call, tuple[Any, ...], dict[str, Any]], "Arguments | None"]
"""Begins a call of the user's: says which pass it is (none where it is nobody's) and what ends it.

It returns other arguments to make it with, or None.
"""


class Gate:
    """Hooks on a model itself, which learn of every call as it begins and ends.

    A call that is made for a pass of ours is that pass; one within another call of the model (from a function of the
    user's, say) is nobody's; any other is what is held on the model, as far as its thread has not suspended it.

    Attributes:
        lock: held by whoever runs the model under hooks: one forward pass at a time.
        start: begins a pass for a call of the user's; None while nothing is held.
        holding: whether a call in this thread would be under a plan; None while nothing is held.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.start: Start | None = None
        self.holding: Callable[[], bool] | None = None
        self._expected: dict[int, Any] = {}
        self._suspended: Counter[int] = Counter()
        self._handles: list[Any] = []
        self._users = 0

    def open(self, module: nn.Module) -> None:
        """Place the hooks, for one more user."""
        with self.lock:
            if not self._users:
                # First of all, so that the user's own hooks are within the call.
                before = module.register_forward_pre_hook(Hook(self._begin), with_kwargs=True, prepend=True)
                self._handles.append(before)
                try:
                    self._handles.append(module.register_forward_hook(Hook(_end), always_call=True))
                except BaseException:
                    self._remove()
                    raise
            self._users += 1

    def close(self) -> None:
        """Take the hooks away, with the last user."""
        with self.lock:
            self._users -= 1
            if not self._users:
                self._remove()

    def _remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    @contextmanager
    def expecting(self, module: nn.Module, run: Any) -> Iterator[None]:
        """Within it, the next call of the model in this thread is a pass."""
        me = threading.get_ident()
        with self.lock:
            self.open(module)
            self._expected[me] = run
            try:
                yield
            finally:
                self._expected.pop(me, None)
                self.close()

    def claimed(self) -> Any:
        """The pass that the next call in this thread was to be, for what stands in that call's place."""
        return self._expected.pop(threading.get_ident(), None)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Within it, calls in this thread are as if nothing were held that is held when it begins."""
        me = threading.get_ident()
        self._suspended[me] += 1
        try:
            yield
        finally:
            self._suspended[me] -= 1
            if not self._suspended[me]:
                del self._suspended[me]

    @property
    def depth(self) -> int:
        """How many times this thread has suspended what is held."""
        return self._suspended.get(threading.get_ident(), 0)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        # Within a compiled call of the user's, the model runs as it is written until this call ends.
        compiler = set_eval_frame(None)
        nested = frames.inside(module)
        call = frames.Call(module, _caller(), compiler=compiler)
        frames.push(call)
        run = self._expected.pop(threading.get_ident(), None)
        if run is not None:
            call.run = run
        elif not nested and self.start is not None:
            return self.start(call, args, kwargs)
        return None


def _caller() -> FrameType:
    """The frame that called the model: a compiler may have cut that of a hook in two."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename == hook_module.__file__ and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _end(module: nn.Module, _args: Any, output: Any) -> Any:
    return frames.pop(module, output)


_GATES: WeakKeyDictionary[nn.Module, Gate] = WeakKeyDictionary()


def gate_of(module: nn.Module) -> Gate:
    """The gate of a model, whichever of its wrappers asks."""
    return _GATES.setdefault(module, Gate())
