"""MME: two yes-or-no questions a picture, in 14 tasks (Fu et al. 2023, arXiv 2306.13394; files of its release)."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hooks import InputsError
from interp.attention.evaluation.items import Item

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
IMAGES = (".jpg", ".png", ".jpeg")


def read_mme(folder: str | os.PathLike[str], tasks: Sequence[str] | None = None) -> list[Item]:
    """Read ``MME_Benchmark_release_version``: a folder for each task, with a text of two questions for each picture.

    The texts hold "question<tab>Yes" lines. They lie beside the pictures, or in ``questions_answers_YN`` with the
    pictures in ``images``.

    Args:
        folder: of the release.
        tasks: which; default all that are there.

    Raises:
        InputsError: a task is not there, a picture is missing, or a text holds something else than two questions.
    """
    root = Path(folder)
    chosen = [task for task in (*PERCEPTION, *COGNITION) if (root / task).is_dir()] if tasks is None else list(tasks)
    if not chosen:
        raise InputsError(
            f"{root} holds none of MME's tasks, which are folders: {', '.join((*PERCEPTION, *COGNITION))}"
        )
    items = []
    for task in chosen:
        home = root / task
        if not home.is_dir():
            raise InputsError(f"{root} has no task {task!r}")
        texts = home / "questions_answers_YN" if (home / "questions_answers_YN").is_dir() else home
        pictures = home / "images" if (home / "images").is_dir() else home
        found = sorted(texts.glob("*.txt"))
        if not found:
            raise InputsError(f"{texts} holds no questions")
        for text in found:
            items += _of_picture(task, text, pictures)
    return items


def _of_picture(task: str, text: Path, pictures: Path) -> list[Item]:
    image = next((pictures / (text.stem + end) for end in IMAGES if (pictures / (text.stem + end)).exists()), None)
    if image is None:
        raise InputsError(f"{text} asks about a picture that {pictures} does not hold")
    lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
    pairs = [line.rsplit("\t", 1) for line in lines]
    if len(pairs) != 2 or any(len(p) != 2 or p[1].strip().lower() not in ("yes", "no") for p in pairs):
        raise InputsError(f"{text} holds something else than two lines of a question, a tab, and Yes or No")
    return [
        Item(f"{task}/{image.name}/{n}", str(image), question, label.strip().lower())
        for n, (question, label) in enumerate(pairs)
    ]


def read_answer(text: str) -> str:
    """How MME reads an answer: "yes" or "no" where its first four letters hold that word, else "other"."""
    said = text.strip().lower()
    if said in ("yes", "no"):
        return said
    return "yes" if "yes" in said[:4] else "no" if "no" in said[:4] else "other"


@dataclass(frozen=True)
class TaskScore:
    """A task's accuracy over questions and over pictures with both right, in [0, 1], and its score, up to 200."""

    accuracy: float
    accuracy_plus: float
    other: int

    @property
    def score(self) -> float:
        """100 (accuracy + accuracy+)."""
        return 100 * (self.accuracy + self.accuracy_plus)


@dataclass(frozen=True)
class MmeScore:
    """Scores by task, and their sums over tasks of perception and of cognition."""

    tasks: dict[str, TaskScore]

    @property
    def perception(self) -> float:
        """Sum of the scores of perception's tasks, up to 2000."""
        return sum(found.score for task, found in self.tasks.items() if task in PERCEPTION)

    @property
    def cognition(self) -> float:
        """Sum of the scores of cognition's tasks, up to 800."""
        return sum(found.score for task, found in self.tasks.items() if task in COGNITION)


def score_mme(items: Sequence[Item], answers: Mapping[str, str]) -> MmeScore:
    """Score answers as MME does; an answer that is neither yes nor no is wrong.

    Raises:
        InputsError: a question has no answer, or a picture has not its two questions.
    """
    pictures: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    other: dict[str, int] = defaultdict(int)
    for item in items:
        if item.key not in answers:
            raise InputsError(f"question {item.key} has no answer")
        task, picture, _ = item.key.split("/")
        said = read_answer(answers[item.key])
        pictures[task][picture].append(said == item.label)
        other[task] += said == "other"
    scores = {}
    for task, found in pictures.items():
        short = next((picture for picture, marks in found.items() if len(marks) != 2), None)
        if short is not None:
            raise InputsError(f"{task}/{short} has {len(found[short])} questions, not two")
        marks = [mark for both in found.values() for mark in both]
        plus = sum(all(both) for both in found.values()) / len(found)
        scores[task] = TaskScore(sum(marks) / len(marks), plus, other[task])
    return MmeScore(scores)


def write_mme(items: Sequence[Item], answers: Mapping[str, str], folder: str | os.PathLike[str]) -> None:
    """Write a text for each task as MME's own calculation reads it: picture, question, label and answer, by tabs."""
    lines: dict[str, list[str]] = defaultdict(list)
    for item in items:
        task, picture, _ = item.key.split("/")
        said = " ".join(answers[item.key].split())
        lines[task].append("\t".join((picture, item.question, item.label.capitalize(), said)))
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    for task, found in lines.items():
        (root / f"{task}.txt").write_text("\n".join(found) + "\n", encoding="utf-8")
