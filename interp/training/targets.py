"""Which keys a query should attend to: patterns by absolute position, made of positions or found in the tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hooks import Inputs, InputsError, ShapeError

Positions = int | Sequence[int] | Tensor
"""Absolute positions: one for all rows and queries, or int [B] (one query a row), or int [B, n]."""


def table(positions: Positions, what: str) -> Tensor:
    """Positions as int64 [B, n]; one row where all rows share them.

    Raises:
        ShapeError: they are not integers, have more than two axes, or are negative.
    """
    found = torch.as_tensor(positions)
    if found.is_floating_point() or found.dtype == torch.bool or found.ndim > 2:
        raise ShapeError(f"{what}: expected positions int [B] or [B, n], got {found.dtype} {list(found.shape)}")
    found = found.detach().to("cpu", torch.int64)
    found = found.reshape(1, 1) if found.ndim == 0 else found[:, None] if found.ndim == 1 else found
    if not found.numel() or int(found.min()) < 0:
        raise ShapeError(
            f"{what}: positions count from the row's first token and are not negative; "
            "the last one is inputs.lengths - 1"
        )
    return found


def match_targets(
    query: Positions, right: Positions, wrong: Positions | None = None, *, sharpness: float | Tensor = 1.0
) -> Tensor:
    """The pattern in which each query attends to the right keys with weight s, and to the wrong ones with the rest.

    Args:
        query: absolute query position, int or int [B].
        right: key positions int, int [B] or int [B, n], which share s equally.
        wrong: key positions that share 1 - s equally; needed where s is not 1.
        sharpness: s, from 0 to 1; a number, or one for each row [B].

    Returns:
        float [B, P, P] by absolute position, or [P, P] for all rows, zero wherever the query is another.

    Raises:
        ShapeError: a key after its query, one that is named twice, other numbers of rows, or s without wrong keys.
    """
    queries, good = table(query, "query"), table(right, "right")
    if queries.shape[1] != 1:
        raise ShapeError(f"query: one position a row, got {queries.shape[1]}; add one intervention for each")
    s = torch.as_tensor(sharpness, dtype=torch.float64)
    if s.ndim > 1 or not bool(((s >= 0) & (s <= 1)).all()):
        raise ShapeError(f"a sharpness is a number from 0 to 1, or one a row, got {sharpness!r}")
    if wrong is None and bool((s != 1).any()):
        raise ShapeError("a sharpness below 1 leaves weight over: name the wrong keys, wrong=")
    bad = None if wrong is None else table(wrong, "wrong")
    rows = max(len(t) for t in (queries, good, bad, s.reshape(-1)) if t is not None)
    keys = good if bad is None else torch.cat([t.expand(max(len(good), len(bad)), -1) for t in (good, bad)], 1)
    for name, t in (("query", queries), ("right and wrong", keys), ("sharpness", s.reshape(-1))):
        if len(t) not in (1, rows):
            raise ShapeError(f"{name}: {len(t)} rows where others have {rows}")
    queries, keys = queries.expand(rows, -1), keys.expand(rows, -1)
    ordered = keys.sort(1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise ShapeError("right and wrong: a row names one key twice")
    if bool((keys > queries).any()):
        raise ShapeError("right and wrong: a key comes after its query, where no attention can go")
    size, n = int(queries.max()) + 1, good.shape[1]
    s = s.reshape(-1, 1).expand(rows, 1)
    weights = torch.cat([(s / n).expand(-1, n), ((1 - s) / max(keys.shape[1] - n, 1)).expand(-1, keys.shape[1] - n)], 1)
    at_query = torch.zeros(rows, size, dtype=torch.float64).scatter(1, keys, weights)
    pattern = torch.zeros(rows, size, size, dtype=torch.float64)
    pattern = pattern.scatter(1, queries[:, :, None].expand(-1, -1, size), at_query[:, None])
    return pattern if rows > 1 else pattern[0]


def induction_targets(inputs: Inputs) -> Tensor:
    """Which keys hold what came after an earlier occurrence of the query's token: bool [B, P, P], by absolute position.

    (Elhage et al. 2021; Olsson et al. 2022.)

    Raises:
        InputsError: these are token ids, or anything else than inputs.
    """
    if not isinstance(inputs, Inputs):
        raise InputsError(
            f"expected Inputs (from model.inputs, or what a held function is given), not {type(inputs).__name__}"
        )
    width = int(inputs.lengths.max())
    ids = inputs.ids.gather(1, inputs.order)[:, :width]
    real = torch.arange(width) < inputs.lengths[:, None]
    before = torch.cat([ids.new_full((len(ids), 1), -1), ids[:, :-1]], 1)
    matches = ids[:, :, None] == before[:, None, :]
    earlier = torch.ones(width, width, dtype=torch.bool).tril()
    return matches & earlier & real[:, :, None] & real[:, None, :]


def induction_pattern_of(inputs: Inputs, *, sharpness: float = 1.0) -> Tensor:
    """The pattern of an ideal induction head: s on the `induction_targets`, the rest on the other earlier keys.

    Args:
        inputs: the prompts.
        sharpness: s, from 0 to 1.

    Returns:
        float [B, P, P] by absolute position, zero in the rows of queries whose token has not occurred before.

    Raises:
        ShapeError: s is out of range.
    """
    if not 0 <= sharpness <= 1:
        raise ShapeError(f"a sharpness is a number from 0 to 1, got {sharpness!r}")
    right = induction_targets(inputs)
    size = right.shape[-1]
    wrong = torch.ones(size, size, dtype=torch.bool).tril() & ~right & right.any(-1, keepdim=True)
    good, bad = right.sum(-1, keepdim=True), wrong.sum(-1, keepdim=True)
    # A query all of whose keys are right has no other key to share with.
    s = torch.where(bad > 0, torch.tensor(sharpness, dtype=torch.float64), 1.0)
    return right * s / good.clamp_min(1) + wrong * (1 - s) / bad.clamp_min(1)
