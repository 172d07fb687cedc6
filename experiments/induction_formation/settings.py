"""What the study trains: for each figure its members, and the updates that the paper ran it for.

The authors count sequences, 32 an update: an axis of theirs that says 1,000,000 is 31,250 updates. Every number here is
in updates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from experiments.induction_formation.members import Member
from experiments.induction_formation.task import Task
from experiments.induction_formation.treatments import Treatment, only_head
from hooks import InputsError, nearest

HEADS = 8
KEPT = 0
"""The last-layer head that stays where the circuit is single; heads differ by their random start alone."""
ALL = tuple(range(HEADS))

TREATMENTS: dict[str, Treatment] = {
    "none": only_head(KEPT),
    "previous token": only_head(KEPT, previous_token=(0,)),
    "layer 1": only_head(KEPT, first_layer=True),
    "copy": only_head(KEPT, copy=KEPT),
    "match": only_head(KEPT, match=KEPT),
    "layer 1 + copy": only_head(KEPT, first_layer=True, copy=KEPT),
}
"""Figure 5b: what is held, with one last-layer head throughout."""
ISOLATED = {
    "normal training": "none",
    "B: match (layer 1 + copy held)": "layer 1 + copy",
    "C: copy (match held)": "match",
    "B and C (layer 1 held)": "layer 1",
}
"""Figure 6: its four panels, each with the treatment that leaves these subcircuits to learn."""
SIZES = ((50, 5), (100, 5), (200, 5), (50, 10), (50, 15))
COSINES = (0.0, 0.3, 0.5, 0.8)
"""Between the exemplars of two classes, which share a mean; the program's tables of exemplars, in this order."""
VARIED = ("both", "initialisation", "batches")


@dataclass(frozen=True)
class Figure:
    """How long the paper trained what a figure shows.

    Attributes:
        updates: of the paper's runs.
        sequences: what the paper calls iterations.
        change_only: whether it can do with less: nothing is read of its members long after their phase change.
    """

    updates: int
    change_only: bool

    @property
    def sequences(self) -> int:
        return 32 * self.updates


FIGURES = {
    "3 and 4": Figure(31_250, change_only=False),
    "5b": Figure(18_750, change_only=True),
    "6": Figure(62_500, change_only=True),
    "6, clamped": Figure(9_375, change_only=True),
    "10": Figure(18_750, change_only=False),
    "plateau": Figure(20_000, change_only=False),
    "plateau, clamped": Figure(9_375, change_only=True),
}
"""The paper's figures (10, of progress measures, is in its appendix), and this study's own of the plateau."""


@dataclass(frozen=True)
class Setting:
    """One training, of many members together.

    Attributes:
        name: of its results.
        training: which of `TRAININGS` it is, or a variant of.
        figures: whose members it trains.
        rate: Adam's learning rate.
        batch: sequences an update.
        shorter: what the figures' updates are divided by; above 1 in a reduced setting.
        seeds: members a condition where all heads are kept.
        clamp_seeds: members a treatment in figures 5b and 10.
        size_seeds: members a condition in figure 6, and where the plateau's clamps are.
        alone_seeds: members a head in figure 4b.
        vary: what differs between seeds: "both", "initialisation" or "batches" (the other is then seed 0's).
        cosines: which of `COSINES` it has tables of exemplars for.
        every: updates between measurements; losses are kept as means over as many.
        window: updates that a loss is averaged over to find the phase change; divides `every`.
        evaluated: sequences of a measurement.
        checkpoint: updates between checkpoints, a multiple of `every`.
    """

    name: str
    training: str
    figures: tuple[str, ...]
    rate: float = 1e-5
    batch: int = 32
    shorter: int = 1
    seeds: int = 5
    clamp_seeds: int = 3
    size_seeds: int = 2
    alone_seeds: int = 1
    vary: str = "both"
    cosines: tuple[float, ...] = COSINES
    every: int = 125
    window: int = 25
    evaluated: int = 128
    checkpoint: int = 625

    def __post_init__(self) -> None:
        if self.training not in _ADD:
            raise InputsError(f"training is {', '.join(_ADD)}; got {self.training!r}{nearest(self.training, _ADD)}")
        if self.vary not in VARIED:
            raise InputsError(f"vary is {', '.join(VARIED)}; got {self.vary!r}{nearest(self.vary, VARIED)}")
        if self.every % self.window or self.checkpoint % self.every:
            raise InputsError(
                f"window {self.window}, every {self.every}, checkpoint {self.checkpoint}: each divides on"
            )

    @property
    def updates(self) -> int:
        """The longest that one of its figures takes."""
        return max(self.of(figure) for figure in self.figures)

    def of(self, figure: str) -> int:
        """Updates that a figure's members are trained for: the paper's, down to a whole number of measurements."""
        return FIGURES[figure].updates // self.shorter // self.every * self.every

    @property
    def reduced(self) -> bool:
        """Whether this is not what the paper trained, but for the number of seeds."""
        return self.shorter != 1 or (self.rate, self.batch) != (1e-5, 32)


def quick(setting: Setting) -> Setting:
    """A reduced setting of a training: ten times the learning rate for a tenth of the updates."""
    fewer = {"every": setting.every // 5, "window": max(5, setting.window // 5), "checkpoint": setting.checkpoint // 5}
    return replace(setting, name=f"{setting.name}-quick", rate=1e-4, shorter=10, seeds=2, clamp_seeds=2, **fewer)


@dataclass(frozen=True)
class Condition:
    """Members that differ by their seeds alone.

    Attributes:
        figure: one of `FIGURES`.
        name: what is held, of the figure's names.
        members: indices, by seed.
        classes, labels: of the task.
        cosine: between exemplars.
    """

    figure: str
    name: str
    members: tuple[int, ...]
    classes: int = 50
    labels: int = 5
    cosine: float = 0.0


@dataclass(frozen=True)
class Roster:
    """Every member of a training once, and the conditions that they are.

    Attributes:
        members: all of them, in a fixed order.
        conditions: of every figure.
    """

    members: tuple[Member, ...]
    conditions: tuple[Condition, ...]

    def find(self, figure: str, name: str | None = None) -> list[Condition]:
        """The conditions of a figure, or those of one name."""
        return [c for c in self.conditions if c.figure == figure and name in (None, c.name)]


def roster(setting: Setting) -> Roster:
    """The members of a training; a run that two figures need is trained once."""
    index: dict[Member, int] = {}
    conditions: list[Condition] = []

    def add(
        figure: str, name: str, treatment: Treatment, seeds: int, size: tuple[int, int] = SIZES[0], cosine: float = 0.0
    ) -> None:
        task, table = Task(n_classes=size[0], n_labels=size[1]), setting.cosines.index(cosine)
        pairs = [seeds_of(setting.vary, seed) for seed in range(seeds)]
        people = [Member(start, treatment, task, batches, table) for start, batches in pairs]
        members = tuple(index.setdefault(each, len(index)) for each in people)
        conditions.append(Condition(figure, name, members, *size, cosine))

    _ADD[setting.training](setting, add)
    return Roster(tuple(index), tuple(conditions))


def seeds_of(vary: str, seed: int) -> tuple[int, int]:
    """The seeds of initialisation and batches of the members with a number, by what is varied (see `Setting.vary`)."""
    return {"both": (seed, seed), "initialisation": (seed, 0), "batches": (0, seed)}[vary]


def _free(setting: Setting, add: Callable[..., None]) -> None:
    add("3 and 4", "all heads", Treatment(), setting.seeds)
    for head in ALL:
        add("3 and 4", f"head {head}", only_head(head), setting.alone_seeds)
    for name in ("none", "previous token"):
        add("5b", name, TREATMENTS[name], setting.clamp_seeds)
    add("6", "normal training", TREATMENTS["none"], setting.clamp_seeds)
    add("plateau", "all heads", Treatment(), setting.seeds)


def _clamped(setting: Setting, add: Callable[..., None]) -> None:
    for name in ("layer 1", "copy", "match", "layer 1 + copy"):
        add("5b", name, TREATMENTS[name], setting.clamp_seeds)
    for panel, name in ISOLATED.items():
        for size in SIZES if name != "none" else ():
            add("6, clamped", panel, TREATMENTS[name], setting.size_seeds, size)
    for cosine in setting.cosines:
        for name in ("layer 1 + copy", "match", "copy", "layer 1"):
            if name == "layer 1 + copy" or cosine in (0.0, 0.8):
                add("plateau, clamped", name, TREATMENTS[name], setting.size_seeds, cosine=cosine)


def _shared(setting: Setting, add: Callable[..., None]) -> None:
    for cosine in setting.cosines:
        if cosine:
            add("plateau", "all heads", Treatment(), setting.seeds, cosine=cosine)
    add("10", "none", TREATMENTS["none"], setting.clamp_seeds)


def _sized(setting: Setting, add: Callable[..., None]) -> None:
    for size in SIZES[1:]:
        add("6", "normal training", TREATMENTS["none"], setting.size_seeds, size)


_ADD = {"free": _free, "clamped": _clamped, "shared": _shared, "sizes": _sized}

CLAMPED = Setting("clamped", "clamped", ("5b", "6, clamped", "plateau, clamped"))
FREE = Setting(
    "free",
    "free",
    ("3 and 4", "5b", "6", "plateau"),
    clamp_seeds=5,
    alone_seeds=2,
    cosines=(0.0,),
    every=150,
    window=150,
    checkpoint=1500,
)
SHARED = Setting("shared", "shared", ("plateau", "10"), clamp_seeds=2, every=250, checkpoint=1250)
SIZED = Setting("sizes", "sizes", ("6",), size_seeds=1, cosines=(0.0,), every=250, checkpoint=1250)
TRAININGS = {setting.name: setting for setting in (FREE, CLAMPED, SHARED, SIZED)}
"""The trainings of the study: figures share one where they share members, or are about as long."""
