"""The questions that decoders are compared on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from experiments.modality_priors.pictures import (
    COLOURS,
    NONE,
    Scenes,
    draw_scenes,
    log_language_prior,
    log_visual_prior,
    paint,
)
from experiments.modality_priors.questions import NO, YES, Batch, batch, claim_question, colour_question


@dataclass(frozen=True, eq=False)
class Split:
    """Questions with all that is known about them.

    Attributes:
        batch: as a model is given them.
        scenes: what their pictures show.
        evidence: log L of each colour [B, 4].
        language, vision: log priors of each colour [B, 4].
        answer: the token that is right, int64 [B].
        favourite: the colour that both priors together like best, int64 [B].
    """

    batch: Batch
    scenes: Scenes
    evidence: Tensor
    language: Tensor
    vision: Tensor
    answer: Tensor
    favourite: Tensor


def counter_prior(n: int, seed: int, planted: bool = True) -> Scenes:
    """Scenes whose colour is the favourite neither of the shape nor of the texture."""
    scenes = draw_scenes(16 * n, seed, planted)
    keep = (scenes.colour != scenes.shape) & (scenes.colour != (scenes.texture + 1) % len(COLOURS))
    rows = keep.nonzero().flatten()[:n]
    assert len(rows) == n
    return scenes.take(rows)


def asked(scenes: Scenes, seed: int, colour_ids: Tensor) -> Split:
    """What colour the shape has."""
    pictures, evidence = paint(scenes, seed)
    found = batch([colour_question(shape) for shape in scenes.shape.tolist()], pictures)
    return _split(found, scenes, evidence, colour_ids[scenes.colour])


def blank(scenes: Scenes, seed: int, colour_ids: Tensor) -> Split:
    """The same of pictures that show the texture alone, where only the priors say anything."""
    empty = replace(scenes, shown=torch.zeros(len(scenes), dtype=torch.bool))
    return asked(empty, seed, colour_ids)


def claims(scenes: Scenes, seed: int, kind: str) -> Split:
    """Whether the shape has a colour, true of every other row; else another one, drawn by kind as POPE draws objects.

    Args:
        kind: ``"random"``, or ``"adversarial"``, the colour that the priors like best of the others.
    """
    draw = torch.Generator().manual_seed(seed)
    pictures, evidence = paint(scenes, seed)
    prior = log_language_prior(scenes.shape) + log_visual_prior(scenes.texture)
    others = prior if kind == "adversarial" else torch.rand(prior.shape, generator=draw)
    wrong = others.scatter(1, scenes.colour[:, None], -torch.inf).argmax(1)
    true = torch.arange(len(scenes)) % 2 == 0
    claimed = torch.where(true, scenes.colour, wrong)
    questions = [claim_question(s, c) for s, c in zip(scenes.shape.tolist(), claimed.tolist(), strict=True)]
    return _split(batch(questions, pictures), scenes, evidence, torch.where(true, YES, NO))


def hinted(scenes: Scenes, seed: int, colour_ids: Tensor, honest: bool) -> tuple[Split, Tensor]:
    """What colour the shape has, after a hint that is true, or is not; and what was hinted, int64 [B]."""
    draw = torch.Generator().manual_seed(seed + 1)
    other = (scenes.colour + torch.randint(1, len(COLOURS), scenes.colour.shape, generator=draw)) % len(COLOURS)
    hints = scenes.colour if honest else other
    pictures, evidence = paint(scenes, seed)
    questions = [colour_question(s, h) for s, h in zip(scenes.shape.tolist(), hints.tolist(), strict=True)]
    return _split(batch(questions, pictures), scenes, evidence, colour_ids[scenes.colour]), hints


def misnamed(scenes: Scenes, seed: int, colour_ids: Tensor) -> tuple[Split, Split]:
    """The same pictures asked about with another shape's word, and with their own."""
    draw = torch.Generator().manual_seed(seed + 1)
    word = (scenes.shape + torch.randint(1, 4, scenes.shape.shape, generator=draw)) % 4
    pictures, evidence = paint(scenes, seed)
    both = []
    for shape in (word, scenes.shape):
        named = replace(scenes, shape=shape)
        found = batch([colour_question(s) for s in shape.tolist()], pictures)
        both.append(_split(found, named, evidence, colour_ids[scenes.colour]))
    return both[0], both[1]


def _split(found: Batch, scenes: Scenes, evidence: Tensor, answer: Tensor) -> Split:
    language, vision = log_language_prior(scenes.shape), log_visual_prior(scenes.texture)
    return Split(found, scenes, evidence, language, vision, answer, (language + vision).argmax(1))


def without_texture(scenes: Scenes) -> Scenes:
    """The same scenes on plain grey."""
    return replace(scenes, texture=torch.full_like(scenes.texture, NONE))
