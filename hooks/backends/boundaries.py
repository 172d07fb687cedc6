"""Forward hooks on the inputs and outputs of a model's modules."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from ..models.hook import Hook
from ..plan.sites import Key
from ..program import Guard
from .caching import Entering, is_cache
from .folding import Fold


class Running(Protocol):
    """The pass that a hook shows its value to."""

    scratch: dict[Any, Any]

    @property
    def rows(self) -> int:
        """Rows of the whole batch."""
        ...

    def keys(self, layer: int) -> tuple[int, int | None]:
        """The key column of a layer's attention that is the first query's own, and how many there are to be."""
        ...

    def visit(self, key: Key, x: Tensor, guard: Guard | None = None) -> Tensor:
        """Edit and keep a value."""
        ...

    def fold(self, stack: str, embedded: bool = False) -> Fold | None:
        """How a tower's values are rows; None where nobody knows of its images, and none is edited or kept."""
        ...


Find = Callable[[], Running | None]
"""The pass that this thread is in, or None where a value is nobody's."""
Edit = Callable[[Running, Tensor], Tensor]


class Hooks:
    """Places hooks that show a module's input or output to the pass that is under way.

    Args:
        find: which pass that is.
        within: whether this thread is in a call that is nobody's, within one that these hooks were placed for.
        stack: where the removal of every hook is registered, at the moment at which it is placed.
        kind: of the hooks.
        first: whether they come before all that look at outputs already. Models read the features of images off a hook
            of theirs, and what comes after it reaches nothing.
    """

    def __init__(
        self,
        find: Find,
        within: Callable[[], bool],
        stack: ExitStack,
        kind: type[Hook] = Hook,
        first: bool = False,
    ) -> None:
        self.find, self.within, self.stack, self.kind, self.first = find, within, stack, kind, first

    def on_output(self, module: nn.Module, edit: Edit, within: Callable[[Tensor], Tensor] | None = None) -> None:
        """Edit what a module returns, or the first of several values.

        Args:
            within: what it is to a call that is nobody's, within one of ours, which shares what is swapped for it.
        """

        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            run = self.find()
            if run is None:
                return within(output) if within is not None and self.within() else None
            if isinstance(output, tuple):
                return (edit(run, output[0]), *output[1:])
            return edit(run, output)

        self.stack.callback(module.register_forward_hook(self.kind(hook), prepend=self.first).remove)

    def on_call(self, module: nn.Module, edit: Callable[[Running, tuple[Any, ...], Any], Any]) -> None:
        """Replace what a module returns, given its arguments in order and all that it returns."""

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            run = self.find()
            return None if run is None else edit(run, (*args, *kwargs.values()), output)

        self.stack.callback(module.register_forward_hook(self.kind(hook), with_kwargs=True).remove)

    def on_input(self, module: nn.Module, edit: Edit, first: bool = False) -> None:
        """Edit what a module is called with: its first argument, or its hidden states.

        Args:
            first: before other hooks.
        """

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            run = self.find()
            if run is None:
                return None
            if args:
                return (edit(run, args[0]), *args[1:]), kwargs
            name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
            return args, {**kwargs, name: edit(run, kwargs[name])}

        handle = module.register_forward_pre_hook(self.kind(hook), with_kwargs=True, prepend=first)
        self.stack.callback(handle.remove)

    def on_keys(self, module: nn.Module, edit: Edit) -> None:
        """Edit the keys [B, K, T, D] that an attention module writes into a cache, if it is called with one."""

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            run = self.find()
            if run is None:
                return None
            entering = lambda x: Entering(x, partial(edit, run)) if is_cache(x) else x  # noqa: E731
            return tuple(map(entering, args)), {name: entering(value) for name, value in kwargs.items()}

        self.stack.callback(module.register_forward_pre_hook(self.kind(hook), with_kwargs=True).remove)

    def watch(self, module: nn.Module) -> None:
        """Notice a call of a module by itself."""

        def hook(_module: nn.Module, _args: Any) -> None:
            self.find()

        self.stack.callback(module.register_forward_pre_hook(self.kind(hook)).remove)


def scaled(edit: Edit, factor: float) -> Edit:
    """The edit of a value that the model goes on to multiply by a factor, where what is meant is the product."""
    if factor == 1.0:
        return edit

    def change(run: Running, x: Tensor) -> Tensor:
        product = x * factor
        new = edit(run, product)
        return x if new is product else new / factor

    return change
