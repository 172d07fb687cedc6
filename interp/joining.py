"""Several results made one: batches of rows, shards of a grid, or the difference of two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from hooks import ResultError, nearest
from interp.axes import Axis, some
from interp.effects import STATUS, Effects

E = TypeVar("E", bound=Effects)

ALIKE = ("direction", "intervention", "model", "semantics", "norms", "values")
"""What results say of how they were made that has to be one thing for all parts of a whole."""


def concat(results: Sequence[E], along: str = "row") -> E:
    """One result of several; see `Result.concat`."""
    results = list(results)
    odd = next((r for r in results if not isinstance(r, Effects)), None)
    if not results or odd is not None:
        raise ResultError(f"concat joins a list of results, not {type(odd).__name__ if results else 'nothing'}")
    first = results[0]
    names = [axis.name for axis in first.axes]
    if along not in ("row", *names):
        raise ResultError(f"results are joined along 'row' or an axis, not {along!r}{nearest(along, ['row', *names])}")
    for other in results[1:]:
        _require_alike(first, other)
    return _rows(results) if along == "row" else _shards(results, names.index(along))


def _require_alike(first: Effects, other: Effects, *free: str) -> None:
    """Raise ResultError where results are not of one kind, but for what is free."""
    for what, a, b in (
        ("metrics", (first.metrics, first.several), (other.metrics, other.several)),
        ("axes", [axis.name for axis in first.axes], [axis.name for axis in other.axes]),
        ("a source", first.source is not None, other.source is not None),
        *((name, first.config.get(name), other.config.get(name)) for name in ALIKE),
    ):
        if a != b and what not in free:
            raise ResultError(f"results that are not of one sweep: they differ in {what}, {a!r} and {b!r}")


def _rows(results: list[E]) -> E:
    """Batches of rows of one grid."""
    first = results[0]
    for other in results[1:]:
        for mine, theirs in zip(first.axes, other.axes, strict=True):
            if mine.values != theirs.values:
                raise ResultError(
                    f"batches of rows have the same cells, and axis {mine.name!r} is {some(mine.values)} in one, "
                    f"{some(theirs.values)} in another"
                )
    axes = []
    for number, axis in enumerate(first.axes):
        each = zip(*(r.axes[number].labels for r in results), strict=True)
        # A label that is one batch's alone is marked as a first row's is.
        axes.append(replace(axis, labels=tuple(a[0] if len(set(a)) == 1 else a[0].rstrip("…") + "…" for a in each)))
    return replace(
        first,
        effect=np.concatenate([r.effect for r in results], -1),
        axes=tuple(axes),
        base=np.concatenate([r.base for r in results], -1),
        source=None if first.source is None else np.concatenate([_source(r) for r in results], -1),
        status=_together([r.status for r in results]),
        noise_floor=np.max([r.noise_floor for r in results], 0),
        rows=_labels(results),
        config=_config(results, tokens=_tokens(results)),
    )


def difference(first: E, second: E, name: str | None = None) -> E:
    """One result less another, cell by cell and row by row; see `Result.minus`."""
    if not isinstance(second, Effects):
        raise ResultError(f"a result is taken from a result, not {type(second).__name__}")
    _require_alike(first, second, "metrics")
    for mine, theirs in zip(first.axes, second.axes, strict=True):
        if mine.values != theirs.values:
            raise ResultError(
                f"results of the same cells, and axis {mine.name!r} is {some(mine.values)} in one, "
                f"{some(theirs.values)} in the other"
            )
    if len(first.rows) != len(second.rows) or len(first.metrics) != len(second.metrics):
        counts = [(len(r.rows), len(r.metrics)) for r in (first, second)]
        raise ResultError(f"results of as many rows and metrics, not {counts[0]} and {counts[1]}")
    arrays = {}
    for what in ("effect", "base", "source"):
        a, b = getattr(first, what), getattr(second, what)
        if a is None:
            continue
        with np.errstate(invalid="ignore"):
            arrays[what] = a - b
        lost = np.isnan(arrays[what]) & ~np.isnan(a) & ~np.isnan(b)
        if lost.any():
            raise ResultError(f"both results are infinite in {int(lost.sum())} entries of {what}: no difference")
    names = [x if x == y else f"{x} - {y}" for x, y in zip(first.metrics, second.metrics, strict=True)]
    if name is not None:
        names = [name] if not first.several else [f"{name} ({n})" for n in names]
    each = [zip(a.labels, b.labels, strict=True) for a, b in zip(first.axes, second.axes, strict=True)]
    axes = (
        replace(axis, labels=tuple(x if x == y else x.rstrip("…") + "…" for x, y in pair))
        for axis, pair in zip(first.axes, each, strict=True)
    )
    return replace(
        first,
        **arrays,
        axes=tuple(axes),
        metrics=tuple(names),
        status=_together([first.status, second.status]),
        noise_floor=first.noise_floor + second.noise_floor,
        rows=tuple(a if a == b else f"{a} | {b}" for a, b in zip(first.rows, second.rows, strict=True)),
        config=_config([first, second]),
    )


def _labels(results: list[E]) -> tuple[str, ...]:
    """The labels of all rows; rows that are known by their numbers alone are numbered anew."""
    if all(r.rows == tuple(f"row {i}" for i in range(len(r.rows))) for r in results):
        return tuple(f"row {i}" for i in range(sum(len(r.rows) for r in results)))
    return tuple(row for r in results for row in r.rows)


def _shards(results: list[E], dim: int) -> E:
    """Parts of one grid on the same rows."""
    first = results[0]
    axis = first.axes[dim]
    for other in results[1:]:
        for mine, theirs in zip(first.axes, other.axes, strict=True):
            if mine.name != axis.name and mine != theirs:
                raise ResultError(
                    f"shards along {axis.name!r} have the other axes in common, and {mine.name!r} differs"
                )
        if first.rows != other.rows:
            raise ResultError("shards of a grid are of the same rows, in the same order; along='row' joins batches")
        for name, a, b in (("base", first.base, other.base), ("source", first.source, other.source)):
            if a is not None and b is not None and not _equal(a, b, np.fmax(first.noise_floor, other.noise_floor)):
                raise ResultError(f"shards of a grid are of the same runs, and the metric of the {name} differs")
    values = tuple(value for r in results for value in r.axes[dim].values)
    again = next((value for i, value in enumerate(values) if value in values[:i]), None)
    if again is not None:
        raise ResultError(f"axis {axis.name!r}: {again!r} is in two of the results")
    joined = Axis(axis.name, values, tuple(label for r in results for label in r.axes[dim].labels))
    return replace(
        first,
        effect=np.concatenate([r.effect for r in results], dim + first.several),
        axes=(*first.axes[:dim], joined, *first.axes[dim + 1 :]),
        status=np.concatenate([r.status for r in results], dim),
        noise_floor=np.max([r.noise_floor for r in results], 0),
        config=_config(results, tokens=first.config.get("tokens")),
    )


def _source(result: Effects) -> np.ndarray:
    assert result.source is not None
    return result.source


def _equal(a: np.ndarray, b: np.ndarray, floor: np.ndarray) -> bool:
    """Whether a metric [metric?, row] is the same, but for a multiple of its rounding [metric?]."""
    slack = 16 * floor[..., None] + 1e-5 * np.abs(a)
    return bool((np.isclose(a, b, rtol=0, atol=0, equal_nan=True) | (np.abs(a - b) <= slack)).all())


def _together(statuses: list[np.ndarray]) -> np.ndarray:
    """What happened in each cell in any of several batches: fired if it did in one, pruned if in all."""
    stacked = np.stack(statuses)
    fired, pruned = (stacked == STATUS.index("fired")).any(0), (stacked == STATUS.index("pruned")).all(0)
    return np.where(fired, 0, np.where(pruned, 2, 1)).astype(np.int8)


def _tokens(results: list[E]) -> list | None:
    """The tokens of all rows, where every batch says its own."""
    lists: list[Any] = [r.config.get("tokens") for r in results]
    return [row for rows in lists for row in rows] if all(isinstance(rows, list) for rows in lists) else None


def _config(results: list[E], **own: Any) -> dict:
    """What all results say of themselves, and what each says alone, under "parts"."""
    common = {k: v for k, v in results[0].config.items() if all(r.config.get(k) == v for r in results[1:])}
    common = {k: v for k, v in common.items() if k not in ("identity", *own)}
    parts = [{k: v for k, v in r.config.items() if k not in common and k not in own} for r in results]
    return {**common, **{k: v for k, v in own.items() if v is not None}, "parts": parts}
