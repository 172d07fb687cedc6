"""A small induction study: its network, task and exemplars, and a treatment of every kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from experiments.induction_formation.members import Member, program
from experiments.induction_formation.network import Shape
from experiments.induction_formation.task import Task, exemplars
from experiments.induction_formation.treatments import Treatment, only_head
from interp.training.ensemble import Ensemble

SHAPE = Shape(d_input=12, d_model=16, n_heads=4)
TASK = Task(n_classes=6, largest=8, held_out_classes=4)
TABLE = exemplars(TASK, 12)
ROWS, RATE = 5, 1e-2

TREATMENTS = {
    "none": Treatment(),
    "previous token": Treatment(previous_token=(1,)),
    "previous token, two heads": Treatment(previous_token=(0, 2)),
    "no previous token": Treatment(no_previous_token=(0, 1, 2, 3)),
    "no previous token at labels": Treatment(no_previous_token=(0, 3), labels_only=True),
    "first layer": only_head(2, 4, first_layer=True),
    "match": only_head(1, 4, match=1),
    "match, blunt": Treatment(match=0, sharpness=0.7),
    "copy": Treatment(copy=3),
    "first layer and copy": only_head(0, 4, first_layer=True, copy=0),
    "first layer, match and copy": only_head(0, 4, first_layer=True, match=0, copy=0),
    "ablate first": Treatment(ablate_first=(0, 2)),
    "ablate last": Treatment(ablate_last=(1, 2)),
    "pattern-preserving": Treatment(ablate_first=(0, 1), preserve=("q", "k")),
    "pattern-preserving, gradients through both": Treatment(
        ablate_first=(0, 1), preserve=("q", "k"), stop_gradient=False
    ),
    "value-preserving": Treatment(ablate_first=(0, 1), preserve=("v",)),
    "direct path": Treatment(ablate_first=(0, 1, 2, 3), preserve=("q", "k", "v")),
    "temperature": Treatment(temperature_first=((0, 0.5),), temperature_last=((3, 2.0), (1, 0.3))),
    "many": Treatment(
        (1,), (0,), match=2, sharpness=0.9, ablate_first=(3,), preserve=("v",), temperature_last=((2, 3.0),)
    ),
}
MEMBERS = [Member(seed, treatment, TASK) for seed, treatment in enumerate(TREATMENTS.values())]


def ensemble(members: Sequence[Member], **options: Any) -> Ensemble:
    """The small study's ensemble, in float64."""
    grafts = options.pop("grafts", None)
    build = program(TABLE, shape=SHAPE, batch=ROWS, dtype=torch.float64, grafts=grafts)
    return Ensemble(build, members, rate=options.pop("rate", RATE), **options)
