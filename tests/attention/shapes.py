"""The small model that sees and ships, in float64, with questions about pictures."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

import interp as ip
from experiments.modality_priors.pictures import draw_scenes, paint
from experiments.modality_priors.questions import DESCRIBE, IDS, Batch, batch, colour_question

OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@cache
def model() -> ip.Model:
    return ip.load("shapes-vlm", dtype=torch.float64)


def questions(has_image: tuple[bool, ...] = (True, True, True)) -> Batch:
    """A description, a question for a colour, and one after a hint: of different lengths, padded on the left."""
    scenes = draw_scenes(3, 3)
    pictures, _ = paint(scenes, 4)
    asked = [DESCRIBE, colour_question(int(scenes.shape[1])), colour_question(int(scenes.shape[2]), 1)]
    found = batch(asked, pictures, torch.tensor(has_image))
    pixels = None if found.pixel_values is None else found.pixel_values.double()
    return Batch(found.input_ids, found.attention_mask, found.labels, pixels)


def image_of(found: Batch) -> Tensor:
    return found.input_ids == IDS["<image>"]


def generate(found: Batch, **options: Any) -> Tensor:
    return model().module.generate(**found.arguments(), **{**OPTIONS, **options})
