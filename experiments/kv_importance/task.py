"""Marked recall: pairs of a key and a value among fillers and decoys, one of which is asked for at the end.

Five arms: ``before`` (a marker stands before the pair that will be asked for: what matters can be known when it is
written), ``unmarked`` (any pair may be asked for), ``after`` (the marker comes after the pair, too late for a score
that is
given once), ``question`` (the question comes first), ``duplicated`` (the pair stands there twice).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ARMS = ("before", "unmarked", "after", "question", "duplicated")
KEYS, VALUES, FILLERS = range(8, 24), range(24, 40), range(40, 56)
BOS, MARK, ASK, LATE = 1, 2, 3, 4
VOCABULARY, CONTEXT, PAIRS = 56, 48, 4


@dataclass(frozen=True)
class Recall:
    """Rows of the task.

    Attributes:
        context: int64 [B, `CONTEXT`]; suffix: int64 [B, 3], the question's mark, the key, and the value: the answer.
        arms: which arm each row is of.
        where: int64 [B], the column of the value that answers (of one of the two, where there are two).
        drill: int64 [B, 3 `PAIRS`], every pair asked for and answered, in any order: what the model is trained on.
    """

    context: Tensor
    suffix: Tensor
    arms: tuple[str, ...]
    where: Tensor
    drill: Tensor


def draw(rows: int, seed: int, arm: str | None = None, length: int = CONTEXT) -> Recall:
    """Rows of an arm, or of all arms in turn, with contexts of `length` tokens."""
    generator = torch.Generator().manual_seed(seed)
    contexts, suffixes, arms, places, drills = [], [], [], [], []
    for row in range(rows):
        mine = ARMS[row % len(ARMS)] if arm is None else arm
        context, suffix, where, drill = _row(mine, generator, length)
        contexts.append(context)
        suffixes.append(suffix)
        arms.append(mine)
        places.append(where)
        drills.append(drill)
    return Recall(
        torch.tensor(contexts), torch.tensor(suffixes), tuple(arms), torch.tensor(places), torch.tensor(drills)
    )


def _row(arm: str, generator: torch.Generator, length: int) -> tuple[list[int], list[int], int, list[int]]:
    keys = [KEYS[i] for i in torch.randperm(len(KEYS), generator=generator)[:PAIRS].tolist()]
    values = [VALUES[i] for i in torch.randint(len(VALUES), (PAIRS,), generator=generator).tolist()]
    asked = int(torch.randint(PAIRS, (1,), generator=generator))
    pieces = [[key, value] for key, value in zip(keys, values, strict=True)]
    chosen = pieces[asked]
    if arm == "before":
        pieces[asked] = [MARK, *chosen]
    if arm == "after":
        pieces[asked] = [*chosen, LATE]
    if arm == "duplicated":
        pieces.append(list(chosen))
    head = [BOS, *([ASK, keys[asked]] if arm == "question" else [])]
    # Fillers fall between the pieces, anywhere; the pieces come in any order.
    order = torch.randperm(len(pieces), generator=generator).tolist()
    free = length - len(head) - sum(map(len, pieces))
    cuts = sorted(torch.randint(free + 1, (len(pieces),), generator=generator).tolist())
    fill = [FILLERS[i] for i in torch.randint(len(FILLERS), (free,), generator=generator).tolist()]
    context, used, where = head, 0, 0
    for number, cut in zip(order, cuts, strict=True):
        context = context + fill[used:cut] + pieces[number]
        used = cut
        if number == asked:
            where = len(context) - 1 - (arm == "after")
    context = context + fill[used:]
    drill = [t for i in torch.randperm(PAIRS, generator=generator).tolist() for t in (ASK, keys[i], values[i])]
    return context, [ASK, keys[asked], values[asked]], where, drill
