"""Functions of a pair that also take a model and its prompts: one front for all of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

from hooks import Inputs, Model, PathError
from interp.paths.pair import Pair

P = ParamSpec("P")
R = TypeVar("R")
OPTIONS = ("direction", "values", "reference", "pooled", "executor", "budget", "seed")


class OnPair(Protocol[P, R]):
    """A function of a pair, or of a model, clean and corrupt prompts and a pair's options, which make one.

    Attributes:
        bare: the function alone, of a pair of which it is known that what it keeps is of the model as it is.
    """

    bare: Callable[Concatenate[Pair, P], R]

    @overload
    def __call__(self, pair: Pair, /, *args: P.args, **kwargs: P.kwargs) -> R: ...
    @overload
    def __call__(self, model: Model, /, *args: Any, **kwargs: Any) -> R: ...


def on_pair(*, first: int = 0, directed: bool = True) -> Callable[[Callable[Concatenate[Pair, P], R]], OnPair[P, R]]:
    """Let a function of a pair be called with a model, clean and corrupt prompts and the pair's options as well.

    Args:
        first: how many of its arguments come before the prompts, when it is called so.
        directed: whether it edits in the pair's direction, or the clean run whatever that is.

    Returns:
        a decorator. The function that it makes raises PathError where a pair and other arguments contradict each other.
    """

    def front(fn: Callable[Concatenate[Pair, P], R]) -> OnPair[P, R]:
        names = OPTIONS if directed else OPTIONS[1:]
        alone, spelled = _signatures(fn, first, names)

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> R:
            if "pair" in kwargs:
                args = (kwargs.pop("pair"), *args)
            if args and isinstance(args[0], Pair):
                args, given = _prompts(args, first)
                given |= {name: kwargs.pop(name) for name in ("clean", "corrupt", *names) if name in kwargs}
                pair, bound = args[0], alone.bind(*args, **kwargs)
                require_agreement(pair, given)
                pair = pair.current()
            else:
                bound = spelled.bind(*args, **kwargs)
                taken = ("model", "clean", "corrupt", *names)
                given = {name: bound.arguments.pop(name) for name in taken if name in bound.arguments}
                pair = Pair.of(**({} if directed else {"direction": "noising"}), **given)
                bound = alone.bind(pair, **bound.arguments)
            bound.arguments[next(iter(alone.parameters))] = pair if directed else pair.noising()
            return fn(*bound.args, **bound.kwargs)

        call.__signature__, call.bare = spelled, fn  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return front


def _signatures(fn: Callable[..., Any], first: int, names: tuple[str, ...]) -> tuple[Signature, Signature]:
    """How a function is called with a pair, and how without one."""
    alone = inspect.signature(fn)
    mine = list(alone.parameters.values())[1:]
    places = [p for p in mine if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
    of = inspect.signature(Pair.of).parameters
    prompts = [of[name].replace(default=Parameter.empty) for name in ("clean", "corrupt")]
    model = of["model"].replace(annotation="Model | Pair")
    named = [p for p in mine if p.kind is Parameter.KEYWORD_ONLY] + [of[name] for name in names]
    return alone, alone.replace(parameters=[model, *places[:first], *prompts, *places[first:], *named])


def _prompts(args: tuple[Any, ...], first: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments without the prompts that are given beside a pair, and those."""
    at = 1 + first
    if len(args) <= at or not isinstance(args[at], Inputs):
        return args, {}
    several = len(args) > at + 1 and (args[at + 1] is None or isinstance(args[at + 1], Inputs))
    end = at + 1 + several
    return (*args[:at], *args[end:]), dict(zip(("clean", "corrupt"), args[at:end], strict=False))


def require_agreement(pair: Pair, given: dict[str, Any]) -> None:
    """Raise PathError where arguments say something else than the pair that they are given with."""
    apart = []
    for name, value in given.items():
        mine = getattr(pair, name)
        if value is not mine and (isinstance(value, Inputs) or isinstance(mine, Inputs) or value != mine):
            apart.append(f"{name}={value!r}, where the pair has {mine!r}")
    if apart:
        raise PathError(
            f"a pair brings its prompts and how they are run, and other arguments contradict it: {'; '.join(apart)}. "
            "Leave them out, or make another pair: dataclasses.replace(pair, ...)"
        )
