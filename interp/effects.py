"""Effects of cells: what was measured, and its statistics over rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hooks import ResultError
from interp import stats
from interp.axes import Axis, some

STATUS = ("fired", "inert", "pruned")


@dataclass(frozen=True, eq=False)
class Effects:
    """The effects of a grid of interventions, cell by cell and row by row.

    A row is a prompt pair, and every statistic is over rows. A nan effect says that the row lacks the cell (a position
    beyond its end, say). Where there is one metric, no array carries a metric axis.

    Attributes:
        effect: float64 [metric?, *axes, row], metric(edited) - metric(base), in the metric's unit.
        axes: the grid's axes, in order.
        metrics: metric names.
        several: whether the arrays carry the metric axis.
        base: [metric?, row], metric of the edited world's base.
        source: [metric?, row], metric of the world patched from; None for ablations.
        status: int8 [*axes], an index into `STATUS`: 0 fired, 1 inert, 2 pruned.
        noise_floor: [metric?], the largest |effect| of a world recomputed but not edited.
        rows: label of each row.
        config: JSON data, as far as it applies: model, path (where it was loaded from), inputs, plan, grid,
            intervention, direction, seed, dtype, device, versions (and commit), executor, cost.

    Raises:
        ResultError: the arrays' shapes do not agree with the axes, metrics and rows.
    """

    effect: np.ndarray
    axes: tuple[Axis, ...]
    metrics: tuple[str, ...]
    several: bool
    base: np.ndarray
    source: np.ndarray | None
    status: np.ndarray
    noise_floor: np.ndarray
    rows: tuple[str, ...]
    config: dict

    def __post_init__(self) -> None:
        for name, kind in {"axes": Axis, "metrics": str, "rows": str}.items():
            given = getattr(self, name)
            if isinstance(given, str) or not all(isinstance(value, kind) for value in given):
                raise ResultError(f"{name} is a tuple of {kind.__name__}, got {some(given)}")
            object.__setattr__(self, name, tuple(given))
        if not isinstance(self.config, dict):
            raise ResultError(f"config is a dict of JSON data, got {type(self.config).__name__}")
        if len(self.metrics) != 1 and not (self.several and self.metrics):
            raise ResultError(f"a result has one metric, or several and an axis for them, got {self.metrics}")
        metric = (len(self.metrics),) if self.several else ()
        cells, rows = tuple(len(axis) for axis in self.axes), (len(self.rows),)
        shapes = {
            "effect": metric + cells + rows,
            "base": metric + rows,
            "source": metric + rows,
            "status": cells,
            "noise_floor": metric,
        }
        for name, shape in shapes.items():
            if name == "source" and self.source is None:
                continue
            array = np.asarray(getattr(self, name))
            if name == "status" and not np.isin(array, range(len(STATUS))).all():
                raise ResultError(f"status is 0, 1 or 2 ({', '.join(STATUS)}), got {some(np.unique(array).tolist())}")
            array = array.astype(np.int8 if name == "status" else np.float64, copy=False)
            if array.shape != shape:
                raise ResultError(f"{name} has shape {array.shape}, but the axes, metrics and rows make it {shape}")
            object.__setattr__(self, name, array)
        names = [axis.name for axis in self.axes]
        if len(set(names)) != len(names):
            raise ResultError(f"the axes of a result have different names, got {names}")

    # Statistics

    def mean(self) -> np.ndarray:
        """Return the mean effect over rows, [metric?, *axes], in the metric's unit; nan where no row has the cell."""
        return stats.row_mean(self.effect)

    def counts(self) -> np.ndarray:
        """Return how many rows have each cell, int [metric?, *axes]: those that every statistic of it is over."""
        return (~np.isnan(self.effect)).sum(-1)

    def normalized(self, per_row: bool = False, tol: float = 0.1) -> np.ndarray:
        """Return effects as a share of the whole difference: 0 leaves the base as it was, 1 reaches the source.

        Mean effect / mean(source - base), both over the rows that have the cell. The ratio of means is preferred to the
        mean of ratios, which rows with a small denominator rule.

        Args:
            per_row: return each row's own effect / (source - base) instead.
            tol: per row, a row is masked with nan where |source - base| < tol * mean |source - base|.

        Returns:
            [metric?, *axes], or [metric?, *axes, row] when `per_row`; nan where the denominator is within noise,
            as for a whole metric among several.

        Raises:
            ResultError: there is no source (an ablation), or the only metric's source and base do not differ beyond
                noise, or infinitely.
        """
        shares = []
        for effect, difference, floor in self._against_source():
            size = stats.row_mean(np.abs(difference) if per_row else difference)
            known = floor < abs(size) < np.inf
            if self.several and not known:
                # One metric that source and base agree on does not keep the others from being normalized.
                shares.append(np.full(effect.shape if per_row else effect.shape[:-1], np.nan))
                continue
            if not known:
                name = self.metrics[len(shares)]
                raise ResultError(
                    f"nothing to normalize by: {'|source - base|' if per_row else 'source - base'} of {name!r} is "
                    f"{size:.3g} on average over {len(self.rows)} rows, "
                    + (f"within the noise of {floor:.3g}; use mean()" if np.isfinite(size) else "no number; use mean()")
                )
            if per_row:
                kept = (np.abs(difference) >= tol * size) & (np.abs(difference) > floor) & np.isfinite(difference)
                shares.append(effect / np.where(kept, difference, np.nan))
            else:
                present = ~np.isnan(effect) & ~np.isnan(difference)
                reach = stats.row_mean(np.broadcast_to(difference, effect.shape), present)
                usable = (np.abs(reach) > floor) & np.isfinite(reach)
                shares.append(stats.row_mean(effect, present) / np.where(usable, reach, np.nan))
        return np.stack(shares) if self.several else shares[0]

    def ci(
        self, level: float = 0.95, n_boot: int = 2000, seed: int = 0, normalized: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return bootstrap intervals of `mean()`, or of `normalized()`, by resampling rows.

        One resample serves all cells, and numerator and denominator together.

        Args:
            level: coverage, in (0, 1).
            n_boot: number of resamples.
            seed: of the resamples.
            normalized: intervals of `normalized()`.

        Returns:
            (low, high), each [metric?, *axes]; nan where fewer than two rows have the cell, so all nan for one row.

        Raises:
            ResultError: as `normalized()`, or an argument out of range.
        """
        options = {"level": level, "n_boot": n_boot, "seed": seed}
        if not normalized:
            return stats.bootstrap_ci(self.effect, **options)
        undefined = np.isnan(self.normalized())
        pairs = [stats.bootstrap_ci(effect, difference, **options) for effect, difference, _ in self._against_source()]
        bounds = np.stack(pairs, axis=1) if self.several else np.stack(pairs[0])
        low, high = np.where(undefined, np.nan, bounds)
        return low, high

    def p_values(self, n_perm: int = 10_000, seed: int = 0) -> np.ndarray:
        """Return two-sided sign-flip p-values of a mean effect of zero, [metric?, *axes].

        Exact when 2**rows <= n_perm, otherwise drawn. No p-value is below 2 / 2**rows: with five rows none is below
        0.06. Not corrected for the number of cells: see `significant`.
        """
        return stats.sign_flip_p(self.effect, n_perm=n_perm, seed=seed)

    def significant(self, q: float = 0.05, n_perm: int = 10_000, seed: int = 0) -> np.ndarray:
        """Return which mean effects differ from zero, bool [metric?, *axes], by Benjamini-Hochberg over all cells.

        Among n cells, a lone one is found only with p <= q / n: raise `n_perm` above n / q for large grids.

        Args:
            q: false discovery rate, in (0, 1].
            n_perm: as in `p_values`.
            seed: as in `p_values`.
        """
        return stats.benjamini_hochberg(self.p_values(n_perm, seed), q)

    def above_noise(self) -> np.ndarray:
        """Return where |mean effect| exceeds what recomputing without an edit gives, bool [metric?, *axes]."""
        mean = self.mean()
        return np.abs(mean) > self.noise_floor.reshape(self.noise_floor.shape + (1,) * len(self.axes))

    # Views

    def _against_source(self) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
        """Yield for each metric its effect [*axes, row], source - base [row], and what of a difference may be noise."""
        if self.source is None:
            raise ResultError("an ablation has no source to normalize by; use mean(), or value='effect' in a plot")
        stacked = (self.effect, self.source, self.base, self.noise_floor)
        for effect, source, base, noise in zip(*stacked, strict=True) if self.several else [stacked]:
            # The second term stands in for rounding where no noise was measured.
            floor = np.fmax(noise, 1e-9 * stats.row_mean(np.abs(source) + np.abs(base)))
            with np.errstate(invalid="ignore"):  # infinite on both sides: no difference to speak of
                difference = source - base
            yield effect, difference, float(floor)
