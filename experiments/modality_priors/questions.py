"""What is asked of the pictures, as words and as batches for a model of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.modality_priors.pictures import COLOURS, NONE, SHAPES, SIDE, TEXTURES

PATCH = 8
IMAGE_TOKENS = (SIDE // PATCH) ** 2
SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<unk>")
OTHER = ("what", "color", "is", "the", "?", "yes", "no", "describe", "a", "on", ",", ".", "they", "say")
WORDS = (*SPECIAL, *OTHER, *SHAPES, *COLOURS, *TEXTURES)
IDS = {word: number for number, word in enumerate(WORDS)}
COLOUR_IDS = torch.tensor([IDS[word] for word in COLOURS])
YES, NO = IDS["yes"], IDS["no"]


def colour_question(shape: int, hint: int = NONE) -> str:
    """What colour a shape has; a hint is what they say."""
    said = "" if hint == NONE else f"they say {COLOURS[hint]} . "
    return f"{said}what color is the {SHAPES[shape]} ?"


def claim_question(shape: int, colour: int) -> str:
    """Whether a shape has some colour."""
    return f"is the {SHAPES[shape]} {COLOURS[colour]} ?"


DESCRIBE = "describe"


def description(shape: int, colour: int, texture: int) -> str:
    """What a picture shows: the shape's word comes before its colour."""
    return f"a {SHAPES[shape]} , {COLOURS[colour]} , on {TEXTURES[texture]} ."


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows for a model: tokens and their mask [B, T], labels [B, T] (-100 where none), pixels [N, 3, 24, 24]."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    pixel_values: Tensor | None

    def arguments(self, labels: bool = False) -> dict[str, Any]:
        """As the model's keyword arguments."""
        given = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.pixel_values is not None:
            given["pixel_values"] = self.pixel_values
        return given | ({"labels": self.labels} if labels else {})


def batch(
    questions: list[str], pictures: Tensor | None, has_image: Tensor | None = None, answers: list[str] | None = None
) -> Batch:
    """Put questions, and pictures in front of those that have one, into a batch.

    Args:
        questions: the words of each row.
        pictures: [B, 3, 24, 24], or None for no picture at all.
        has_image: bool [B], rows with a picture; default all.
        answers: what the model should say, in training; rows are then padded on the right, and otherwise on the left.
    """
    n = len(questions)
    if has_image is None:
        has_image = torch.full((n,), pictures is not None)
    rows, starts = [], []
    for number, question in enumerate(questions):
        head = [IDS["<s>"], *([IDS["<image>"]] * IMAGE_TOKENS if has_image[number] else []), *encode(question)]
        tail = [] if answers is None else [*encode(answers[number]), IDS["</s>"]]
        rows.append(head + tail)
        starts.append(len(head))
    width = max(map(len, rows))
    ids = torch.full((n, width), IDS["<pad>"])
    mask, labels = torch.zeros(n, width, dtype=torch.int64), torch.full((n, width), -100)
    for number, row in enumerate(rows):
        at = slice(0, len(row)) if answers is not None else slice(width - len(row), width)
        ids[number, at] = torch.tensor(row)
        mask[number, at] = 1
        if answers is not None:
            labels[number, starts[number] : len(row)] = torch.tensor(row[starts[number] :])
    pixels = None if pictures is None or not has_image.any() else scaled(pictures[has_image])
    return Batch(ids, mask, labels, pixels)


def scaled(pictures: Tensor) -> Tensor:
    """Pictures as the image encoder takes them, about -1 to 1."""
    return (pictures - 0.5) / 0.5


def encode(text: str) -> list[int]:
    """Ids of words."""
    return [IDS[word] for word in text.split()]


def decode(ids: Tensor) -> str:
    """Words of ids, without special ones."""
    return " ".join(WORDS[i] for i in ids.tolist() if WORDS[i] not in SPECIAL)
