"""A pair of runs, the one that is edited and the one it is edited with: stated once, run once, handed to everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hooks import Inputs, InputsError, Model, PathError, World, align, nearest
from interp.metrics import Metric
from interp.paths.nodes import Writer
from interp.paths.sources import VALUES, Means, Source, check_reference, donors, laid_like
from interp.paths.state import state_of
from interp.paths.streams import Streams, additive
from interp.sides import check_model

T = TypeVar("T")


@dataclass(eq=False)
class Kept:
    """What has been computed of a pair by now, and the state of the model that it is of.

    Attributes:
        state: of the model; see `state_of`.
        values: by name.
        measured: by metric, as long as that is in use, and name.
    """

    state: Any = None
    values: dict[Any, Any] = field(default_factory=dict)
    measured: WeakKeyDictionary[Metric, dict[Any, Any]] = field(default_factory=WeakKeyDictionary)

    def begin(self, state: Any) -> None:
        """Keep nothing of another state; None is of none."""
        if state is None or state != self.state:
            self.values.clear()
            self.measured.clear()
            self.state = state


@dataclass(frozen=True, eq=False)
class Pair:
    """Clean and corrupt prompts of a model, and which run is edited with which values.

    Every function of this package that runs prompts takes one in place of them. The prompts are run when they are first
    needed, and kept, so that scores, exact effects and faithfulness of one pair are all of the same two runs.

    What is kept is of the model as it was then, and every function looks whether it is still so: where parameters,
    buffers, modules or the configuration have changed, the prompts are run anew. While a plan is held on the model, or
    hooks or a forward of yours stand on it, which may do something else every time, nothing is kept from one function
    to the next. ``dataclasses.replace(pair, direction="noising")`` makes another pair, which keeps nothing yet.

    Attributes:
        model: a wrapped model, in evaluation mode.
        clean: the prompts that show the behaviour.
        corrupt: the prompts that do not, row by row of the same lengths; None where `values` needs none.
        direction: "denoising" edits the corrupt run (with clean values, where patching, whose default it is), "noising"
            the clean one. Circuits, and what is
            measured of them, edit the clean run whatever the direction.
        values: c_u: "patch" (the other run's), "zero", "mean" (over `reference`, at each position; at all of them
            if `pooled`), "resample" (a row of `reference`, drawn for each row by its id and the seed). All but "patch"
            edit the clean run where `corrupt` is not given, and have to be given a direction where it is.
        reference: the prompts of a mean or of a resampling.
        pooled: one mean over all positions.
        executor: see `run_worlds`; of every run, the two of the pair too.
        budget: bytes that the activations of a chunk may take.
        seed: of random interventions and of resampling.

    Raises:
        ModelError: the model is not wrapped, or in training mode.
        InputsError: prompts that are missing or do not correspond.
        PathError: an unknown kind of values.
    """

    model: Model
    clean: Inputs
    corrupt: Inputs | None = None
    direction: str = ""
    values: str = "patch"
    reference: Inputs | None = None
    pooled: bool = False
    executor: str = "auto"
    budget: int | None = None
    seed: int = 0
    _kept: Kept = field(default_factory=Kept, init=False, repr=False)

    @classmethod
    def of(
        cls,
        model: Model,
        clean: Inputs,
        corrupt: Inputs | None = None,
        *,
        direction: str = "",
        values: str = "patch",
        reference: Inputs | None = None,
        pooled: bool = False,
        executor: str = "auto",
        budget: int | None = None,
        seed: int = 0,
    ) -> Pair:
        """The pair of a model's clean and corrupt prompts; the arguments are its attributes."""
        return cls(model, clean, corrupt, direction, values, reference, pooled, executor, budget, seed)

    def __post_init__(self) -> None:
        check_model(self.model, self.direction or "denoising")
        if self.values not in VALUES:
            hint = nearest(str(self.values), VALUES)
            raise PathError(f"values is one of {', '.join(VALUES)}, not {self.values!r}{hint}")
        for name, given in (("clean", self.clean), ("corrupt", self.corrupt)):
            if not isinstance(given, Inputs) and (given is not None or name == "clean"):
                raise InputsError(f"{name} is {type(given).__name__}: prepare prompts with model.inputs(...)")
        check_reference(self.values, self.reference, self.pooled)
        if not self.direction:
            # As every result says: of the two runs the corrupt one is edited, whatever its edges are given.
            object.__setattr__(self, "direction", "denoising")
        if self.values == "patch":
            if self.corrupt is None:
                raise InputsError("patching takes values from another run: give corrupt prompts, or values='zero'")
            align(self.clean, self.corrupt)

    def __repr__(self) -> str:
        return f"Pair({self.role}, {self.values}: {self.edited!r} of {self.model!r})"

    @property
    def role(self) -> str:
        """The direction as results state it: "denoising", "noising" or "ablation"."""
        return self.direction if self.values == "patch" else "ablation"

    @property
    def edited(self) -> Inputs:
        """The prompts of the run that is edited."""
        return self._prompts(self._edited)

    @property
    def other(self) -> World | None:
        """The world that values are patched from; None where they are no counterpart's, as in an ablation."""
        return World(self.source.run.inputs) if self.values == "patch" and self.source.run is not None else None

    @property
    def base(self) -> Streams:
        """The run that is edited.

        Raises:
            PathError: the residual stream is not the sum of what the graph's writers add.
        """
        return self.once("base", lambda: self._run(self._edited))

    @property
    def source(self) -> Source:
        """What writers' outputs are replaced by.

        Raises:
            InputsError: reference prompts that are too short.
        """
        return self.once("source", self._source)

    @property
    def means(self) -> Means:
        """The means over the reference prompts."""
        reference = self.reference
        assert reference is not None
        return _first("means", lambda: Means.over(self._stream(reference), self.pooled), self._kept.values)

    def noising(self) -> Pair:
        """The same runs, the clean one edited."""
        if self.direction == "noising":
            return self
        made = replace(self, direction="noising")
        object.__setattr__(made, "_kept", self._kept)
        return made

    def current(self) -> Pair:
        """Itself, keeping nothing of the model as it was before.

        Raises:
            ModelError: the model is in training mode by now.
        """
        check_model(self.model, self.direction)
        self._kept.begin(state_of(self.model))
        return self

    def once(self, name: str, make: Callable[[], T], metric: Metric | None = None) -> T:
        """What `make` gives of this pair and direction (and a metric), computed the first time only."""
        values = self._kept.values if metric is None else self._kept.measured.setdefault(metric, {})
        return _first((name, self._edited), make, values)

    def rows(self, window: slice) -> Pair:
        """The same for a range of rows, with what has been run of them."""
        corrupt = None if self.corrupt is None else self.corrupt.rows(window)
        part = replace(self, clean=self.clean.rows(window), corrupt=corrupt)
        part.once("base", lambda: self.base.rows(window))
        part.once("source", lambda: self.source.rows(window))
        return part

    def stack(self, writers: Sequence[Writer]) -> Tensor:
        """d_u = c_u - a_u of several writers, [U, B, T, M]; zero at padding."""
        base, source = self.base, self.source
        real = base.inputs.mask.to(base.embedded.device)[..., None]
        found: dict[Writer, Tensor] = {}
        for layer, group in groupby(sorted(writers, key=lambda w: w.time), key=lambda w: w.layer):
            mine = list(group)
            heads = [w for w in mine if w.head is not None]
            if len(heads) > 2 and (source.run is not None or source.kind == "zero"):
                # All heads of a layer in one product.
                own = base.heads(layer)
                change = -own if source.run is None else source.run.heads(layer) - own
                found |= {w: change[:, :, w.head] for w in heads}
            for w in mine:
                if w not in found:
                    own = base.writer(w)
                    found[w] = source.writer(w, own) - own
        return torch.stack([torch.where(real, found[w], 0) for w in writers])

    @property
    def _edited(self) -> str:
        return "corrupt" if self.corrupt is not None and self.direction == "denoising" else "clean"

    def _prompts(self, name: str) -> Inputs:
        found = self.corrupt if name == "corrupt" else self.clean
        assert found is not None
        return found

    def _run(self, name: str) -> Streams:
        """A run of the clean or the corrupt prompts, laid as those that are edited."""
        laid = laid_like(self._prompts(name), self.edited)
        # Where both are padded alike, one run serves both directions.
        alike = laid is self._prompts(name)
        return _first(("run", name, None if alike else self._edited), lambda: self._stream(laid), self._kept.values)

    def _stream(self, inputs: Inputs) -> Streams:
        return additive(self.model, inputs, self.budget, self.seed, self.executor)

    def _source(self) -> Source:
        if self.values == "patch":
            run = self._run("clean" if self._edited == "corrupt" else "corrupt")
            return Source(self.values, self.edited, run=run)
        if self.reference is None:
            return Source(self.values, self.edited)
        if self.values == "mean":
            return Source(self.values, self.edited, means=self.means)
        return Source(self.values, self.edited, run=self._stream(donors(self.reference, self.edited, self.seed)))


def _first(name: Any, make: Callable[[], T], values: dict[Any, Any]) -> T:
    if name not in values:
        values[name] = make()
    return values[name]
