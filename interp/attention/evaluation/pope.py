"""POPE: is there such an object in the picture? (Li et al. 2023, arXiv 2305.10355; the files of AoiDragon/POPE)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hooks import InputsError
from interp.attention.evaluation.items import Item, read_lines

SUFFIX = "\nAnswer the question using a single word or phrase."


def read_pope(path: str | os.PathLike[str], images: str | os.PathLike[str], *, suffix: str = "") -> list[Item]:
    """Read ``coco_pope_random.json`` and its like: JSON lines with question_id, image, text and label.

    Args:
        path: the file.
        images: the folder of the pictures.
        suffix: put after each question (LLaVA's evaluation has `SUFFIX`).

    Raises:
        InputsError: the file is none of these, or a label is neither yes nor no.
    """
    items = []
    for number, entry in enumerate(read_lines(path, ("image", "text", "label"))):
        label = str(entry["label"]).strip().lower()
        if label not in ("yes", "no"):
            raise InputsError(f"{path}: the label of question {entry.get('question_id', number)} is {entry['label']!r}")
        key = str(entry.get("question_id", number))
        items.append(Item(key, str(Path(images) / entry["image"]), entry["text"] + suffix, label))
    return items


def says_yes(text: str) -> bool:
    """How POPE reads an answer: no, where "no", "No" or "not" is a word of its first sentence; else yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


@dataclass(frozen=True)
class PopeScore:
    """Shares in [0, 1]; yes is the positive class. A ratio whose denominator is 0 is 0."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    questions: int


def score_pope(items: Sequence[Item], answers: Mapping[str, str]) -> PopeScore:
    """Score answers as POPE does.

    Raises:
        InputsError: a question has no answer, or there is no question.
    """
    if not items:
        raise InputsError("there are no questions to score")
    lacking = next((item.key for item in items if item.key not in answers), None)
    if lacking is not None:
        raise InputsError(f"question {lacking} has no answer")
    pairs = [(says_yes(answers[item.key]), item.label == "yes") for item in items]
    true = sum(said and right for said, right in pairs)
    said, right = sum(p for p, _ in pairs), sum(r for _, r in pairs)
    precision, recall = (true / said if said else 0.0), (true / right if right else 0.0)
    f1 = 2 * precision * recall / (precision + recall) if true else 0.0
    accuracy = sum(p == r for p, r in pairs) / len(pairs)
    return PopeScore(accuracy, precision, recall, f1, said / len(pairs), len(pairs))
