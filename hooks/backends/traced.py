"""A model and a plan as one function of tensors, which a compiler makes one graph of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..lowering import Lowered
from ..models.architecture import Architecture
from ..models.hook import TracedHook
from ..models.network import Network, logits_of
from ..models.twin import Twin
from ..plan.region import Entries
from ..plan.sites import Key
from ..program import Guard, State, visit
from .exposing import swap_attentions
from .placing import place_hooks

Captures = Sequence[tuple[Key, Entries | None, Tensor | None]]
"""For each value that is kept: its site, its entries (None for all), and what takes its gradient, of its shape."""


class _Tap(torch.autograd.Function):
    """The value itself, whose gradient another tensor gets as well: an output of a graph is not on the path."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tap: Tensor) -> Tensor:
        if x.shape != tap.shape:
            raise ModelError(f"a value of shape {list(x.shape)} was to be {list(tap.shape)}")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return gradient, gradient


class _Pass:
    """One forward pass, as the hooks see it."""

    def __init__(self, rows: int, program: Lowered, captures: Captures, here: Mapping[Any, Tensor]) -> None:
        self.rows, self.program, self.captures = rows, program, captures
        self.state = State(here)
        self.scratch: dict[Any, Any] = {}
        self.kept: dict[int, Tensor] = {}

    def keys(self, layer: int) -> tuple[int, int | None]:
        """The key column that is the first query's own: a graph is of whole texts, without a cache."""
        return 0, None

    def fold(self, stack: str, embedded: bool = False) -> None:
        """Which images a tower sees is no tensor, so a graph has no sites there."""

    def visit(self, key: Key, x: Tensor, guard: Guard | None = None) -> Tensor:
        """Edit and keep the value of a site."""
        if key in self.program.steps or key in self.program.held_back:
            self.state, x = visit(self.program, self.state, key, x, guard)
        for number, (place, entries, tap) in enumerate(self.captures):
            if place == key:
                part = x if entries is None else entries.get(x)
                if tap is not None:
                    part = _Tap.apply(part, tap)
                    assert isinstance(part, Tensor)
                    x = part if entries is None else entries.put(x, part)
                self.kept[number] = part.clone()
        return x


class Traced:
    """A twin of a model with hooks that stay, as a function of tensors.

    Args:
        network: the model.
        keys: the sites at which something is edited, read or kept.
        expose: layers whose attention is computed with its inside exposed.

    Raises:
        ModelError: the adapter finds parts that are not of the module that it is given.
    """

    def __init__(self, network: Network, keys: Iterable[Key], expose: Iterable[int]) -> None:
        self.twin = Twin(network.module)
        self.module = self.twin.module
        self.architecture = network.adapter(self.module)
        _require_own(self.architecture, self.module)
        self.keys = frozenset(keys)
        self._run: _Pass | None = None
        # The twin is dropped with the hooks on it.
        stack = ExitStack()
        place_hooks(self.architecture, self.keys, self.running, lambda: False, stack, False, TracedHook)
        swap_attentions(self.architecture, self.keys, expose, self.running, stack)
        self.hooks = stack

    def running(self) -> _Pass | None:
        """The pass that is under way."""
        return self._run

    def __call__(
        self, arguments: dict[str, Tensor], rows: int, program: Lowered, captures: Captures
    ) -> tuple[Tensor, dict[int, Tensor], Mapping[int, Tensor]]:
        """Run the model once.

        Returns:
            The logits, what was kept by its place among the captures, and the largest change [] that each step made.
        """
        output, kept, changes = self.call(lambda: self.module(**arguments), rows, program, captures, {})
        return logits_of(output), kept, changes

    def call(
        self,
        function: Callable[[], Any],
        rows: int,
        program: Lowered,
        captures: Captures,
        here: Mapping[Any, Tensor],
    ) -> tuple[Any, dict[int, Tensor], Mapping[int, Tensor]]:
        """Call a function that runs the twin once.

        Args:
            here: values that the program reads, as if this world had computed them.

        Returns:
            What it returns, what was kept, and the largest change that each step made.
        """
        run = _Pass(rows, program, captures, here)
        self._run = run
        output = function()
        self._run = None
        return output, run.kept, run.state.changes


def _require_own(architecture: Architecture, module: nn.Module) -> None:
    own = set(module.modules())
    parts = [architecture.embed, architecture.norm, architecture.unembed]
    # What stands for a part that there is none of is nobody's.
    parts = [part for part in parts if not isinstance(part, nn.Identity)]
    parts += [part for block in architecture.blocks for part in (block.module, block.attention.module)]
    if not own.issuperset(parts):
        raise ModelError(
            "the adapter finds parts of another module than the one that it is given; a compiled model is a twin of "
            "the model, whose parts it has to find: have it look them up in its argument"
        )
