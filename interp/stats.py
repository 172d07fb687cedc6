"""Statistics over rows (prompt pairs): means, bootstrap intervals, sign-flip tests, false discovery.

Every function takes values whose last axis is the row and treats the leading axes as cells. A nan says that the row
lacks the cell (a shorter prompt, say): it is left out, and a cell that no row has stays nan. Work goes through blocks
of about `memory` bytes, and the answer does not depend on how it was cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from hooks import ResultError

MEMORY = 2**26


def row_mean(values: np.ndarray, present: np.ndarray | None = None) -> np.ndarray:
    """Return the mean over rows of the entries that are present.

    Args:
        values: [..., row].
        present: bool [..., row], which entries count; by default those that are not nan.

    Returns:
        [...]; nan where nothing is present.
    """
    present = ~np.isnan(values) if present is None else present
    count = np.asarray(present.sum(axis=-1))
    with np.errstate(invalid="ignore"):  # inf - inf is nan, which is the right answer
        total = np.sum(values, axis=-1, where=present)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def bootstrap_ci(
    values: np.ndarray,
    denominator: np.ndarray | None = None,
    *,
    level: float = 0.95,
    n_boot: int = 2000,
    seed: int = 0,
    memory: int = MEMORY,
) -> tuple[np.ndarray, np.ndarray]:
    """Return percentile bootstrap intervals of each cell's mean, or of a ratio of means (Efron and Tibshirani 1993).

    One draw of rows serves all cells, and numerator and denominator together. A draw that holds none of a cell's rows
    is left out for that cell. With few rows (under about ten) the interval is narrower than its level says.

    Args:
        values: [..., row].
        denominator: [row]; the interval is then of mean(values) / mean(denominator), each over the rows the cell has.
        level: coverage, in (0, 1).
        n_boot: number of draws.
        seed: of the draws.
        memory: bytes that the blocks may take.

    Returns:
        (low, high), each [...]; nan where fewer than two rows have the cell or a value is infinite.

    Raises:
        ResultError: `level` or `n_boot` out of range.
    """
    if not 0 < level < 1:
        raise ResultError(f"level is the coverage of the interval and lies between 0 and 1, got {level}")
    if n_boot < 1:
        raise ResultError(f"n_boot must be at least 1, got {n_boot}")
    cells, shape = _as_cells(values)
    rows = cells.shape[1]
    weight = np.ones(rows) if denominator is None else np.asarray(denominator, dtype=np.float64)
    bounds = np.full((2, len(cells)), np.nan)
    # A block of cells holds its draws [cell, draw] twice (a sort) and its rows [cell, row] three times.
    cell_step = max(1, memory // (8 * 4 * max(n_boot, rows)))
    draw_step = max(1, memory // (8 * 4 * max(rows, 1)))
    for cell in _blocks(len(cells), cell_step):
        present = ~np.isnan(cells[cell]) & ~np.isnan(weight)
        top, bottom = np.where(present, cells[cell], 0.0), np.where(present, weight, 0.0)
        everywhere = present.all()
        means = np.empty((len(top), n_boot))
        rng = np.random.default_rng(seed)  # every block of cells sees the same draws
        with np.errstate(invalid="ignore", divide="ignore"):
            for draw in _blocks(n_boot, draw_step):
                times = _times_drawn(rng, draw.stop - draw.start, rows)
                means[:, draw] = (top @ times) / (weight @ times if everywhere else bottom @ times)
            means.sort(axis=1)
            usable = (present.sum(axis=1) >= 2) & np.isfinite(top).all(axis=1)
            for bound, q in zip(bounds, ((1 - level) / 2, (1 + level) / 2), strict=True):
                bound[cell] = np.where(usable, _quantile_of_sorted(means, q), np.nan)
    return bounds[0].reshape(shape), bounds[1].reshape(shape)


def sign_flip_p(values: np.ndarray, *, n_perm: int = 10_000, seed: int = 0, memory: int = MEMORY) -> np.ndarray:
    """Return two-sided p-values of mean zero, by flipping the signs of rows (Fisher 1935).

    The null hypothesis is that a row's effect is symmetric about zero. All sign patterns are enumerated when there are
    at most `n_perm` of them (2**rows); otherwise `n_perm` are drawn, the same for all cells, and
    p = (1 + as extreme) / (1 + n_perm), which is valid at any `n_perm` (Phipson and Smyth 2010). No p-value is below
    2 / 2**rows, or below 1 / (1 + n_perm) when drawn.

    Args:
        values: [..., row].
        n_perm: largest number of sign patterns to look at.
        seed: of the drawn patterns.
        memory: bytes that the blocks may take.

    Returns:
        [...]; nan where no row has the cell or a value is infinite.

    Raises:
        ResultError: `n_perm` is below 1.
    """
    if n_perm < 1:
        raise ResultError(f"n_perm must be at least 1, got {n_perm}")
    cells, shape = _as_cells(values)
    rows = cells.shape[1]
    exact = rows <= n_perm.bit_length() - 1  # 2**rows <= n_perm
    p = np.full(len(cells), np.nan)
    cell_step = max(1, memory // (8 * 4 * max(rows, 1)))
    sign_step = max(1, memory // (8 * 4 * max(rows, min(cell_step, len(cells)), 1)))
    for cell in _blocks(len(cells), cell_step):
        x = np.nan_to_num(cells[cell], nan=0.0, posinf=np.inf, neginf=-np.inf)
        usable = ~np.isnan(cells[cell]).all(axis=1) & np.isfinite(x).all(axis=1)
        x[~usable] = 0.0
        # Sums that tie in exact arithmetic differ in rounding, by no more than rows * eps * sum|x|.
        least = np.abs(x.sum(axis=1)) - 1e-12 * np.abs(x).sum(axis=1)
        extreme, seen = np.zeros(len(x), dtype=np.int64), 0
        for signs in _all_signs(rows, sign_step) if exact else _drawn_signs(rows, n_perm, seed, sign_step):
            extreme += (np.abs(x @ signs) >= least[:, None]).sum(axis=1)
            seen += signs.shape[1]
        p[cell] = np.where(usable, extreme / seen if exact else (extreme + 1) / (seen + 1), np.nan)
    return p.reshape(shape)


def benjamini_hochberg(p: np.ndarray, q: float = 0.05) -> np.ndarray:
    """Return which hypotheses are rejected with the false discovery rate held at `q` (Benjamini and Hochberg 1995).

    Args:
        p: p-values of any shape, one family; a nan is not a hypothesis.
        q: expected share of false ones among the rejected, in (0, 1].

    Returns:
        bool, the shape of `p`; False at nan.

    Raises:
        ResultError: `q` or a p-value out of range.
    """
    p = np.asarray(p, dtype=np.float64)
    tested = np.sort(p[~np.isnan(p)])
    if not 0 < q <= 1:
        raise ResultError(f"q is a false discovery rate and lies between 0 and 1, got {q}")
    if tested.size and not (tested[0] >= 0 and tested[-1] <= 1):
        raise ResultError(f"p-values lie between 0 and 1, got {tested[0]} to {tested[-1]}")
    passing = tested[tested <= q * np.arange(1, tested.size + 1) / max(tested.size, 1)]
    return p <= passing[-1] if passing.size else np.zeros(p.shape, dtype=bool)


def _as_cells(values: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return values as [cell, row], and the shape of the cells."""
    values = np.asarray(values, dtype=np.float64)
    shape = values.shape[:-1]
    return values.reshape(math.prod(shape), values.shape[-1]), shape


def _blocks(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def _times_drawn(rng: np.random.Generator, draws: int, rows: int) -> np.ndarray:
    """Return how often each draw of `rows` rows with replacement holds each row: [row, draw]."""
    drawn = rng.integers(0, rows, size=(draws, rows)) + rows * np.arange(draws)[:, None]
    return np.bincount(drawn.ravel(), minlength=draws * rows).reshape(draws, rows).T.astype(np.float64)


def _quantile_of_sorted(values: np.ndarray, q: float) -> np.ndarray:
    """Return the linear-interpolation quantile over draws of [cell, draw], sorted; nans come last and do not count."""
    at = q * np.maximum((~np.isnan(values)).sum(axis=1) - 1, 0)
    below = np.floor(at).astype(np.int64)
    above = np.ceil(at).astype(np.int64)
    every = np.arange(len(values))
    low, high = values[every, below], values[every, above]
    return low + np.where(high == low, 0.0, (at - below) * (high - low))


def _all_signs(rows: int, step: int) -> Iterator[np.ndarray]:
    """Yield sign patterns [row, pattern], the first row as it is: a pattern and its negative are equally extreme."""
    bits = np.arange(max(rows - 1, 0))[:, None]
    for block in _blocks(2 ** len(bits), step):
        flipped = (np.arange(block.start, block.stop) >> bits) & 1
        yield np.concatenate([np.ones((min(rows, 1), flipped.shape[1])), 1.0 - 2.0 * flipped])


def _drawn_signs(rows: int, total: int, seed: int, step: int) -> Iterator[np.ndarray]:
    """Yield `total` random sign patterns [row, pattern]."""
    rng = np.random.default_rng(seed)
    for block in _blocks(total, step):
        yield 1.0 - 2.0 * rng.integers(0, 2, size=(block.stop - block.start, rows)).T
