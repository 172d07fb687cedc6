"""Graphs that torch.compile made of a model before hooks were placed on it, and would go on to use in silence."""

from __future__ import annotations

import re
import sys
import threading
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..models.hook import Hook
from . import frames
from .gate import Gate
from .traced import Traced

_IDS = re.compile(r"___check_(?:type|obj)_id\(.*?, (\d+)\)")
_KNOWN: WeakKeyDictionary[Any, frozenset[int]] = WeakKeyDictionary()
"""The objects and types that the guards of a graph name."""


def forget_graphs(module: nn.Module) -> None:
    """Have every graph that may hold a model's forward pass made anew when it is called next.

    A graph made of modules without hooks does not notice those that are placed later
    (`torch._dynamo.config.skip_nnmodule_hook_guards`); one made of modules with hooks notices when these are gone.

    Args:
        module: the model. Graphs of other modules of its class go too, which costs a compilation.
    """
    if "torch._dynamo.convert_frame" not in sys.modules:
        return
    from torch._C._dynamo import eval_frame
    from torch._dynamo.convert_frame import compile_lock, input_codes

    wanted = {id(part) for part in module.modules()}
    wanted |= {id(kind) for kind in {type(part) for part in module.modules()} if not _of_torch(kind)}
    wanted.add(id(type(module)))
    # A compiler that looks into these would warn of what they ask the interpreter.
    skip, default = eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT
    for function in (Hook.__call__, Gate._begin, frames.push):
        eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, default))
    with compile_lock:
        for seen in tuple(input_codes.seen):
            code = seen()
            if code is None or code is Traced.__call__.__code__:
                continue
            entries = eval_frame._debug_get_cache_entry_list(code)
            if any(_named(entry.guard_manager) & wanted for entry in entries):
                eval_frame.reset_code(code)


class HookGuards(threading.local):
    """While any hooks stay on a model, graphs are made so that they notice hooks: layers share code, and so graphs.

    The compiler's settings are a thread's own, and so is how many holds there are.
    """

    def __init__(self) -> None:
        self.users = 0
        self.before: bool | None = None

    def open(self) -> None:
        """For one more user, whose graphs are made from now on."""
        config: Any = sys.modules.get("torch._dynamo.config")
        self.users += 1
        if self.before is None and config is not None:
            self.before, config.skip_nnmodule_hook_guards = config.skip_nnmodule_hook_guards, False

    def close(self) -> None:
        """Leave the setting as it was found, with the last user."""
        self.users = max(0, self.users - 1)  # a context may be left by another thread
        if not self.users and self.before is not None:
            config: Any = sys.modules["torch._dynamo.config"]
            config.skip_nnmodule_hook_guards = self.before
            self.before = None


HOOK_GUARDS = HookGuards()


def _of_torch(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "torch"


def _named(guards: Any) -> frozenset[int]:
    """The ids of objects and types that the guards of a graph ask for."""
    if guards not in _KNOWN:
        _KNOWN[guards] = frozenset(map(int, _IDS.findall(str(guards))))
    return _KNOWN[guards]
