"""The answers that metrics look for: tokens, as a user writes them, made into ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooks import MetricError, Model, Site

Token = int | str
Tokens = Token | Sequence[Token] | Sequence[Sequence[Token]] | Sequence[Tensor] | Tensor
"""One token for all rows, one for each row, or several for each row."""


def token_ids(model: Model, tokens: Tokens, rows: int) -> Tensor:
    """Ids int64 [B, n] of what a user wrote for the tokens of each row.

    Raises:
        MetricError: not as many as rows, rows of different numbers of tokens, or ids outside the vocabulary.
        InputsError: a text that is not one token; the message shows its pieces.
        SiteError: the model has no logits.
    """
    model.require(Site("logits"))

    given: Any = plain(tokens)
    single = (int, str, np.integer)
    if isinstance(given, single):
        table = [[token_id(model, given)]] * rows
    elif isinstance(given, Sequence):
        table = [
            [token_id(model, plain(i)) for i in t]
            if isinstance(t, Sequence) and not isinstance(t, str)
            else [token_id(model, t)]
            for t in map(plain, given)
        ]
    else:
        raise MetricError(f"answers are a token, or one entry for each row, not {given!r}")
    if len(table) != rows:
        raise MetricError(f"{len(table)} answers for {rows} rows: give one token for all, or one entry for each row")
    if len({len(row) for row in table}) != 1 or not table[0]:
        raise MetricError("each row has the same number of answer tokens, at least one")
    vocabulary = model.architecture.vocabulary
    if not all(0 <= i < vocabulary for row in table for i in row):
        things = "tokens" if model.architecture.readout is None else "classes"
        raise MetricError(f"an answer is outside the vocabulary of {vocabulary} {things}")
    return torch.tensor(table)


def token_id(model: Model, token: Any) -> int:
    """The id of a token given by its text or its id.

    Raises:
        MetricError: it is neither.
        InputsError: a text that is not one token.
    """
    if isinstance(token, str):
        return model.token(token)
    if isinstance(token, (int, np.integer)) and not isinstance(token, bool):
        return int(token)
    raise MetricError(f"an answer is a token's text or its id, not {token!r}")


def plain(given: Any) -> Any:
    """Python's own numbers and lists in the place of arrays and tensors."""
    return given.tolist() if isinstance(given, (Tensor, np.ndarray)) else given


def repeats(ids: Tensor) -> Tensor:
    """bool [B, n]: which entries of each row stand in it before."""
    same = ids[:, :, None] == ids[:, None, :]
    return same.tril(-1).any(2)
