"""What the study trains: sizes, and the members that its figures need."""

from __future__ import annotations

from dataclasses import dataclass, replace

from experiments.induction_formation.members import Member
from experiments.induction_formation.task import Task
from experiments.induction_formation.treatments import Treatment, only_head

HEADS = 8
KEPT = 0
"""The last-layer head that stays where the circuit is single; heads differ by their random start alone."""
ALL = tuple(range(HEADS))

TREATMENTS: dict[str, Treatment] = {
    "none": only_head(KEPT),
    "previous token": only_head(KEPT, previous_token=(0,)),
    "layer 1": only_head(KEPT, first_layer=True),
    "copy": only_head(KEPT, copy=KEPT),
    "layer 1 + copy": only_head(KEPT, first_layer=True, copy=KEPT),
    "match": only_head(KEPT, match=KEPT),
}
"""Figure 5b: what is held, in order of the circuit, with one last-layer head throughout."""
PROGRESS = ("layer 1", "copy", "layer 1 + copy", "match")
ISOLATED = {"normal": Treatment(), "B: match (layer 1 + copy clamped)": TREATMENTS["layer 1 + copy"],
            "C: copy (match clamped)": TREATMENTS["match"]}  # fmt: skip
"""Figure 6: the whole network, and the treatments that leave one subcircuit to learn; named as in saved results."""
SIZES = ((50, 5), (100, 5), (200, 5), (50, 10), (50, 15))


@dataclass(frozen=True)
class Settings:
    """What a run depends on; by default the paper's settings.

    Attributes:
        name: of the results.
        rate: Adam's learning rate.
        batch: sequences a step.
        steps: updates.
        seeds: members a condition.
        alone_seeds: members a head in figure 4b.
        every: steps between measurements; training losses are averaged over as many.
        evaluated: sequences of a measurement.
        checkpoint: steps between checkpoints, a multiple of `every`.
        reduced: whether this is not the paper's setting.
    """

    name: str = "full"
    rate: float = 1e-5
    batch: int = 32
    steps: int = 300_000
    seeds: int = 5
    alone_seeds: int = 5
    every: int = 500
    evaluated: int = 1024
    checkpoint: int = 10_000
    reduced: bool = False


SHORT = Settings(
    name="short",
    steps=24_000,
    alone_seeds=2,
    every=150,
    evaluated=128,
    checkpoint=1500,
    reduced=True,
)
"""The paper's rate, batch and sizes, for as many steps as every member needs to get past its phase change."""
QUICK = replace(SHORT, name="quick", rate=1e-4, steps=8000, every=40, checkpoint=400)


@dataclass(frozen=True)
class Roster:
    """Every member once, and where each figure finds its own.

    Attributes:
        members: all of them, in a fixed order.
        free: indices of normal training, by seed.
        alone: by head, then by seed.
        treated: by name of `TREATMENTS`, then by seed.
        sizes: by (kind of `ISOLATED`, classes, labels), then by seed.
    """

    members: tuple[Member, ...]
    free: list[int]
    alone: list[list[int]]
    treated: dict[str, list[int]]
    sizes: dict[tuple[str, int, int], list[int]]


def roster(settings: Settings) -> Roster:
    """The members of all figures together; a run that two figures need is trained once."""
    index: dict[Member, int] = {}

    def add(treatment: Treatment, seeds: int, task: Task) -> list[int]:
        return [index.setdefault(Member(seed, treatment, task), len(index)) for seed in range(seeds)]

    plain = Task()
    free = add(Treatment(), settings.seeds, plain)
    treated = {name: add(treatment, settings.seeds, plain) for name, treatment in TREATMENTS.items()}
    alone = [add(only_head(head), settings.alone_seeds, plain) for head in ALL]
    sizes = {
        (kind, classes, labels): add(treatment, settings.seeds, Task(n_classes=classes, n_labels=labels))
        for kind, treatment in ISOLATED.items()
        for classes, labels in SIZES
    }
    return Roster(tuple(index), free, alone, treated, sizes)
