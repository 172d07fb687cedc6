"""VLind-Bench: language priors, behind tests of what else may fail (Lee et al. 2024, arXiv 2406.08702).

An instance asks in turn for commonsense knowledge (on a factual picture), visual perception, following a context, and
the language prior itself (on counterfactual pictures). Each is a pair, of which the first is true and the second false;
a later test counts only where those before it are passed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hooks import InputsError
from interp.attention.evaluation.items import Item

FIELDS = (
    "concept", "context_id", "context", "factual_context", "true_statement", "false_statement", "existent_noun",
    "non-existent_noun", "best_img_id", "aggregated_human_label_good_images",
)  # fmt: skip
STYLES = {"photorealistic": range(0, 4), "illustration": range(4, 8), "cartoon": range(8, 12), "all": range(0, 12)}
ONLY = "Only respond in True or False."


@dataclass(frozen=True)
class Instance:
    """One context.

    Attributes:
        number: its place in the file.
        concept: its group.
        good: the counterfactual pictures that people found to show it.
    """

    number: int
    concept: str
    good: tuple[str, ...]


def read_vlind(
    path: str | os.PathLike[str],
    counterfactual: str | os.PathLike[str],
    factual: str | os.PathLike[str],
    *,
    votes: int = 2,
    style: str = "all",
) -> tuple[list[Instance], list[Item]]:
    """Read ``data.json``, and make the questions of every instance.

    Args:
        path: the file.
        counterfactual, factual: the folders of pictures, as they are published:
            ``<concept>/<context_id>_<context>/<n>.jpg``.
        votes: how many people must have found a counterfactual picture good.
        style: of the pictures, ``"all"``, ``"photorealistic"``, ``"illustration"`` or ``"cartoon"``.

    Raises:
        InputsError: the file is none of these, an unknown style, or no instance has a good picture.
    """
    if style not in STYLES:
        raise InputsError(f"style is one of {', '.join(STYLES)}, not {style!r}")
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputsError(f"{path} holds no JSON: {error}") from error
    if not isinstance(data, list):
        raise InputsError(f"{path} holds a {type(data).__name__}, not a list of instances")
    instances, items = [], []
    for number, entry in enumerate(data):
        lacking = [name for name in FIELDS if not isinstance(entry, dict) or name not in entry]
        if lacking:
            raise InputsError(f"{path}, instance {number}, lacks {', '.join(lacking)}")
        marks = entry["aggregated_human_label_good_images"]
        good = tuple(n for n, count in marks.items() if count >= votes and int(n) in STYLES[style])
        if good:
            instances.append(Instance(number, entry["concept"], good))
            items += _questions(number, entry, good, Path(counterfactual), Path(factual))
    if not instances:
        raise InputsError(f"{path}: no instance has a picture that {votes} people found good")
    return instances, items


def _questions(number: int, entry: dict[str, Any], good: Sequence[str], other: Path, real: Path) -> list[Item]:
    true, false = entry["true_statement"], entry["false_statement"]
    home = other / entry["concept"] / f"{entry['context_id']}_{entry['context']}"
    factual = real / entry["concept"] / f"{entry['context_id']}_{entry['factual_context']}" / "0.jpg"
    best = home / f"{entry['best_img_id']}.jpg"
    seen = [f"There is {entry[noun]} in the given image." for noun in ("existent_noun", "non-existent_noun")]
    told = f"Context: {entry['context']}\n"
    pairs = {
        # What common sense says is the other way round on a counterfactual context.
        "knowledge": (factual, "", (false, true), "common sense"),
        "perception": (best, "", seen, "the image"),
        "context": (best, told, (true, false), "the context"),
    }
    pairs |= {f"prior/{n}": (home / f"{n}.jpg", "", (true, false), "the image") for n in good}
    return [
        Item(
            f"{number}/{test}/{label.lower()}",
            str(image),
            f"{ONLY}\n{before}Statement: {statement}\nBased on {ground}, is the given statement true or false?",
            label,
        )
        for test, (image, before, statements, ground) in pairs.items()
        for statement, label in zip(statements, ("True", "False"), strict=True)
    ]


def read_truth(text: str) -> str:
    """How VLind-Bench reads an answer: its first word that is true or false, or "NA"."""
    words = text.lower().replace("\n", " ").replace(",", "").replace(".", "").split(" ")
    return next((word.capitalize() for word in words if word in ("true", "false")), "NA")


@dataclass(frozen=True)
class VlindScore:
    """Shares in [0, 1].

    Attributes:
        knowledge, perception: of instances that pass these tests.
        bias: that pass the context test, of those that pass that of knowledge.
        prior: of good pictures, averaged by instance, of those that pass all before.
        context_accuracy, prior_accuracy: without regard to what was passed before.
    """

    knowledge: float
    perception: float
    bias: float
    prior: float
    context_accuracy: float
    prior_accuracy: float


def score_vlind(instances: Sequence[Instance], items: Sequence[Item], answers: Mapping[str, str]) -> VlindScore:
    """Score answers as VLind-Bench does (its pipeline and accuracy scores).

    Raises:
        InputsError: a question has no answer.
    """
    right = {}
    for item in items:
        if item.key not in answers:
            raise InputsError(f"question {item.key} has no answer")
        right[item.key] = read_truth(answers[item.key]) == item.label

    def passed(number: int, test: str) -> bool:
        return right[f"{number}/{test}/true"] and right[f"{number}/{test}/false"]

    knowledge = [passed(one.number, "knowledge") for one in instances]
    perception = [passed(one.number, "perception") for one in instances]
    context = [passed(one.number, "context") for one in instances]
    prior = [sum(passed(one.number, f"prior/{n}") for n in one.good) / len(one.good) for one in instances]
    both = [k and c for k, c in zip(knowledge, context, strict=True)]
    every = [b and p for b, p in zip(both, perception, strict=True)]
    count = len(instances)
    return VlindScore(
        sum(knowledge) / count,
        sum(perception) / count,
        sum(both) / sum(knowledge) if any(knowledge) else 0.0,
        sum(p for p, e in zip(prior, every, strict=True) if e) / sum(every) if any(every) else 0.0,
        sum(context) / count,
        sum(prior) / count,
    )
