"""Answers of several tokens, which stand at the end of a text: each token is read at the position before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hooks import Index, Inputs, MetricError, Model, joined, text_ids
from interp.answers import Tokens, plain, token_id, token_ids
from interp.readouts import Places

ANSWER = "answer"
"""The positions before the tokens of an answer with which a text ends."""


@dataclass(frozen=True, eq=False)
class Asked:
    """The tokens of an answer, and where they are read.

    Attributes:
        ids: int64 [B, n]; filled up in rows whose answer is shorter.
        real: bool [B, n], False where a row is filled up.
        places: the positions.
        spelled: whether each token has a position of its own; else they are alternatives at every position.
    """

    ids: Tensor
    real: Tensor
    places: Places
    spelled: bool


def asked(model: Model, inputs: Inputs, answer: Tokens, pos: Index | str) -> Asked:
    """Resolve an answer on inputs: alternatives at each of some positions, or one token for each of them.

    Raises:
        MetricError: several tokens for another number of positions, or a text that does not end with its answer.
    """
    if isinstance(pos, str) and pos == ANSWER:
        ids, real = _spelled(model, inputs, answer)
        _require_ends(model, inputs, answer, ids, real)
        ahead = inputs.lengths[:, None] - 1 - inputs.positions
        before = inputs.mask & (ahead >= 1) & (ahead <= real.sum(1, keepdim=True))
        return Asked(ids, real, Places.of(model, inputs, before), True)
    ids, places = token_ids(model, answer, len(inputs)), Places.of(model, inputs, _index(pos))
    if not places.single and ids.shape[1] > 1:
        places.require(ids.shape[1])
    return Asked(ids, torch.ones_like(ids, dtype=torch.bool), places, not places.single and ids.shape[1] > 1)


def foil_of(model: Model, inputs: Inputs, foil: Tokens, good: Asked, pos: Index | str) -> Asked:
    """A foil that is read where its answer is.

    Raises:
        MetricError: its tokens would follow the answer's, and not its own.
    """
    if not (isinstance(pos, str) and pos == ANSWER):
        bad = asked(model, inputs, foil, pos)
        if bad.spelled != good.spelled:
            many = " and ".join(str(one.ids.shape[1]) for one in (good, bad))
            raise MetricError(f"an answer and a foil of {many} tokens at several positions: give one token for each")
        return bad
    ids, real = _spelled(model, inputs, foil)
    for row, (mine, theirs) in enumerate(zip(_rows(ids, real), _rows(good.ids, good.real), strict=True)):
        if len(mine) > len(theirs) or mine[:-1] != theirs[: len(mine) - 1]:
            raise MetricError(
                f"row {row}: the foil {_shown(model, mine)} parts from the answer {_shown(model, theirs)} before its "
                "last token, so what follows would be scored after the answer's tokens and not its own: measure "
                "log_prob(pos='answer') on texts that end with the answer, and on others that end with the foil, and "
                "take one result from the other with Result.minus"
            )
    return Asked(ids, real, good.places, True)


def require_positions(name: str, pos: Index | str, why: str) -> Index:
    """Positions that are none of an answer's.

    Raises:
        MetricError: they are.
    """
    if isinstance(pos, str) and pos == ANSWER:
        raise MetricError(f"{name} is not measured at pos='answer': {why}")
    return _index(pos)


def _index(pos: Index | str) -> Index:
    return pos  # type: ignore[return-value] # a word is judged by the site that takes it


def _spelled(model: Model, inputs: Inputs, answer: Tokens) -> tuple[Tensor, Tensor]:
    """Ids int64 [B, n] of the answer of each row, one token or several, and which of them are its own."""
    if model.architecture.readout is not None or inputs.pixels is not None:
        raise MetricError("pos='answer' is of texts that end with an answer; a classifier has one position")
    if not all(block.attention.causal for block in model.architecture.blocks):
        raise MetricError("pos='answer': tokens of this model see later ones, so the text says what its answer is")
    given: Any = plain(answer)
    entries: list[Any] = (
        list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given] * len(inputs)
    )
    if len(entries) != len(inputs):
        raise MetricError(f"{len(entries)} answers for {len(inputs)} rows: give one for all, or one entry for each row")
    table = [_one(model, inputs, row, plain(entry)) for row, entry in enumerate(entries)]
    vocabulary = model.architecture.vocabulary
    if not all(table) or not all(0 <= token < vocabulary for ids in table for token in ids):
        raise MetricError(f"an answer has at least one token, and ids of a vocabulary of {vocabulary}")
    lengths = torch.tensor([len(ids) for ids in table])
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in table], batch_first=True)
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def _one(model: Model, inputs: Inputs, row: int, entry: Any) -> list[int]:
    """The tokens of one row's answer, those of its text where it ends with the same words in other pieces."""
    if isinstance(entry, str):
        ids, own = text_ids(model.tokenizer, entry), inputs.ids[row][inputs.mask[row]].tolist()
        if inputs.tokens is None or own[-len(ids) :] == ids:
            return ids
        labels = inputs.tokens[row]
        same = (n for n in range(1, len(labels)) if joined(labels[-n:]) == entry)
        return next((own[-n:] for n in same), ids)
    if isinstance(entry, Sequence):
        return [token_id(model, plain(token)) for token in entry]
    return [token_id(model, entry)]


def _require_ends(model: Model, inputs: Inputs, answer: Tokens, ids: Tensor, real: Tensor) -> None:
    for row, wanted in enumerate(_rows(ids, real)):
        own = inputs.ids[row][inputs.mask[row]].tolist()
        if len(own) <= len(wanted) or own[-len(wanted) :] != wanted:
            raise MetricError(
                f"row {row} does not go on to the answer: it ends with {_shown(model, own[-len(wanted) - 1 :])}, the "
                f"answer is {_shown(model, wanted)}; prepare prompt and answer as one text, without a full stop after"
            )


def _rows(ids: Tensor, real: Tensor) -> list[list[int]]:
    return [row[kept].tolist() for row, kept in zip(ids, real, strict=True)]


def _shown(model: Model, ids: list[int]) -> str:
    if model.tokenizer is None:
        return str(ids)
    return str([model.tokenizer.decode([token]) for token in ids])
