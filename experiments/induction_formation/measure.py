"""What is measured while the members train, and on the trained ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.induction_formation.members import (
    Member,
    constants_of,
    evaluate,
    previous_token_strengths,
    strengths,
)
from experiments.induction_formation.network import Shape
from experiments.induction_formation.settings import ALL, KEPT, TREATMENTS, Roster, Setting
from experiments.induction_formation.task import SPLITS, Batch, Task, draw, every_sequence
from experiments.induction_formation.treatments import Treatment, only_head
from interp.training.ensemble import Ensemble, Params

FRESH = 1_000_000
"""Added to a member's seed for what it is measured on, so that no sequence is drawn as in training."""
PROGRESS = ("copy", "match", "layer 1 + copy")
"""Treatments under which members that train without one are evaluated, besides a previous-token head."""


def during(
    run: Ensemble, went: Sequence[int], setting: Setting, people: Roster, table: Tensor, shape: Shape
) -> dict[str, Any]:
    """Splits, strengths and progress measures at the present step, for the figures that show them.

    Args:
        run: the ensemble in training.
        went: which of the people its members are.
        setting: sizes.
        people: all members.
        table: exemplars, one table or several.
        shape: sizes of the network.

    Returns:
        Of the members with all heads, ``splits``: by split, accuracy and loss of each; ``strengths``: by member and
        last-layer head; ``previous``: by member and first-layer head. Of those with one last-layer head that hold
        nothing, ``progress``: by treatment, the loss under it of each; under "previous token", by member and the
        first-layer head that attends so; and ``previous_single``.
    """
    found: dict[str, Any] = {}
    place = {member: index for index, member in enumerate(went)}
    for condition in people.find("3 and 4", "all heads"):
        if not place.keys() >= set(condition.members):
            continue
        free = [place[i] for i in condition.members]
        found["splits"] = {}
        for split in SPLITS:
            measured, output, batch = measure(run, free, None, split, setting.evaluated, table, shape)
            kept = ("accuracy", "loss", "context_accuracy")
            found["splits"][split] = {name: rounded(measured[name]) for name in kept}
            if split == "train":
                found["strengths"] = rounded(strengths(output, batch))
                found["previous"] = rounded(previous_token_strengths(output))
    for condition in people.find("10"):
        if not place.keys() >= set(condition.members):
            continue
        found["progress"], single = {}, [place[i] for i in condition.members]
        for name in PROGRESS:
            treatments = [TREATMENTS[name]] * len(single)
            measured, _, _ = measure(run, single, treatments, "train", setting.evaluated, table, shape)
            found["progress"][name] = rounded(measured["loss"])
        held = [only_head(KEPT, previous_token=(head,)) for head in ALL]
        each = [index for index in single for _ in ALL]
        measured, _, _ = measure(run, each, held * len(single), "train", setting.evaluated, table, shape)
        found["progress"]["previous token"] = rounded(measured["loss"].view(len(single), len(ALL)))
        _, output, _ = measure(run, single, None, "train", setting.evaluated, table, shape)
        found["previous_single"] = rounded(previous_token_strengths(output))
    return found


def at_the_end(
    run: Ensemble, free: Sequence[int], table: Tensor, shape: Shape, sequences: int = 4096
) -> dict[str, Any]:
    """Trained members without a treatment: strengths over every sequence, and accuracy with each head alone or removed.

    Args:
        run: the trained ensemble.
        free: which members.
        table: exemplars, one table or several.
        shape: sizes of the network.
        sequences: fresh ones that accuracies are over.

    Returns:
        ``strengths`` [member][head]; ``whole``, ``direct_path_ablated``, ``first_layer_ablated``: accuracy by member;
        ``only``, ``without``: accuracy [member][head].
    """

    def accuracy(treatment: Treatment) -> list[float]:
        return rounded(measure(run, free, [treatment] * len(free), "train", sequences, table, shape)[0]["accuracy"])

    return {
        "sequences": sequences,
        "strengths": rounded(_strengths(run, free, table, shape)),
        "whole": accuracy(Treatment()),
        "direct_path_ablated": accuracy(Treatment(ablate_first=ALL, preserve=("q", "k", "v"))),
        "first_layer_ablated": accuracy(Treatment(ablate_first=ALL)),
        "only": np.transpose([accuracy(only_head(head)) for head in ALL]).tolist(),
        "without": np.transpose([accuracy(Treatment(ablate_last=(head,))) for head in ALL]).tolist(),
    }


def measure(
    run: Ensemble,
    indices: Sequence[int],
    treatments: Sequence[Treatment] | None,
    split: str,
    sequences: int,
    table: Tensor,
    shape: Shape,
) -> tuple[dict[str, Tensor], Any, Batch]:
    """Evaluate some members on fresh sequences of a split, under other treatments than their own where given."""
    members = [replace(run.members[i], batches=FRESH + run.members[i].data_seed) for i in indices]
    params, constants = _of(run, indices, members, treatments, split, table, shape)
    batch = draw(constants, 0, sequences)
    return *evaluate(params, constants, shape, batch), batch


def _of(
    run: Ensemble,
    indices: Sequence[int],
    members: Sequence[Member],
    treatments: Sequence[Treatment] | None,
    split: str,
    table: Tensor,
    shape: Shape,
) -> tuple[Params, dict[str, Tensor]]:
    device = run.rates.device
    constants = constants_of(members, table, shape, treatments=treatments, split=split)
    labels = constants["unused"].shape[1]
    params = {name: value[list(indices)] for name, value in run.params.items()}
    for name in ("label", "read.weight", "read.bias"):  # rows of labels that none of these members has
        params[name] = params[name][:, :labels]
    return params, {name: value.to(device) for name, value in constants.items()}


def _strengths(run: Ensemble, indices: Sequence[int], table: Tensor, shape: Shape, chunk: int = 2800) -> Tensor:
    """Strengths [M, H] over every training sequence, in equal chunks."""
    members = [run.members[i] for i in indices]
    params, constants = _of(run, indices, members, None, "train", table, shape)
    parts = [value.to(run.rates.device).split(chunk, dim=-1) for value in every_sequence(Task())]
    found = []
    for pieces in zip(*parts, strict=True):
        batch = Batch(*(piece.expand(len(indices), *piece.shape) for piece in pieces))
        found.append(strengths(evaluate(params, constants, shape, batch)[1], batch))
    return torch.stack(found).mean(0)


def rounded(values: Tensor) -> Any:
    """Numbers to four digits, nested as the tensor is."""
    return np.round(values.double().cpu().numpy(), 4).tolist()
