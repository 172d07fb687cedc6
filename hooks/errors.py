"""The errors that users meet: one family, each naming what was given, what was expected, and the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InterpError(ValueError):
    """Base of every error that a user's input can cause."""


class SiteError(InterpError):
    """A site that does not parse, or that the model does not have."""


class ElsewhereError(SiteError):
    """Tokens that a site means are all in other calls of the same text, or not generated yet."""


class ShapeError(InterpError):
    """A value whose shape does not match the site it is meant for."""


class PlanError(InterpError):
    """A plan that cannot be stated, saved, loaded or run."""


class CycleError(PlanError):
    """A read of a value that would depend on itself."""


class UnfiredError(InterpError):
    """An intervention that never fired, or a sweep in which nothing changed anything."""


class InputsError(InterpError):
    """Inputs that are empty, ragged where they must align, or packed."""


class ModelError(InterpError):
    """A model that cannot be wrapped, or cannot be run as asked."""


class MetricError(InterpError):
    """A metric that cannot be evaluated on these inputs."""


class ResultError(InterpError):
    """A result that cannot be read, selected from, or computed."""


class PathError(InterpError):
    """A graph, an edge, a path or a circuit that the model does not have or that cannot be meant."""


def nearest(name: object, options: Iterable[object]) -> str:
    """Return ``", did you mean 'x'?"`` for the closest of `options`, or an empty string when none is close."""
    found = difflib.get_close_matches(str(name), [str(option) for option in options], n=1, cutoff=0.5)
    return f", did you mean {found[0]!r}?" if found else ""
