"""What the demo asks the models that it knows."""

from __future__ import annotations

import random
from typing import Any

from hooks import InputsError

QUESTION = "Two people are named, one of them gives something: which parts make the model say who receives it?"
NAMES = [
    "Mary",
    "John",
    "Tom",
    "Anna",
    "James",
    "Emma",
    "Paul",
    "Kate",
    "Mark",
    "Lucy",
    "Peter",
    "Sarah",
    "David",
    "Jack",
]


def shipped_task(pairs: int) -> Any:
    """The indirect-object task of ``ioi-mini``: pairs of one template, so that a position means the same in all."""
    from interp.demo import Task
    from interp.models import english

    if pairs < 1:
        raise InputsError(f"--pairs {pairs}: at least one is needed")
    drawn = english.indirect_object(pairs, 0, "names", template=english.INDIRECT_OBJECT[0], order="ABBA")
    return Task(
        clean=tuple(e.clean for e in drawn),
        corrupt=tuple(e.corrupt for e in drawn),
        answer=tuple(e.answer for e in drawn),
        foil=tuple(e.foil for e in drawn),
        question=QUESTION,
        lists=True,
    )


def smollm2_task(pairs: int) -> Any:
    """The indirect-object task of SmolLM2: names that are one token each, in one sentence."""
    from interp.demo import Task

    if pairs < 1:
        raise InputsError(f"--pairs {pairs}: at least one is needed")
    drawn = [random.Random(i).sample(NAMES, 2) for i in range(pairs)]
    said = "When {0} and {1} went to the store, {2} gave a drink to"
    return Task(
        clean=tuple(said.format(a, b, b) for a, b in drawn),
        corrupt=tuple(said.format(a, b, a) for a, b in drawn),
        answer=tuple(f" {a}" for a, _ in drawn),
        foil=tuple(f" {b}" for _, b in drawn),
        question=QUESTION,
        about="SmolLM2-135M-Instruct, dequantised from 4 bits",
        lists=True,
    )
