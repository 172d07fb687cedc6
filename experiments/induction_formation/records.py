"""What the trainings came to, as the report and the figures read it: by figure and condition."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.induction_formation.settings import FIGURES, TRAININGS
from hooks import ResultError

RESULTS = Path(__file__).parent / "results"
BATCH = 32
"""Sequences an update."""
PLATEAU = (0.8, 0.6)
"""The plateau is where the loss is between these, in nats: 15 % and 13 % off ln 2."""
Record = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """What came out for one condition of a figure.

    Attributes:
        name: what is held, of the figure's names.
        classes, labels, cosine: of the task and its exemplars.
        changes: the update of each member's phase change; None where there was none.
        at: updates [n] at the end of what each loss is averaged over.
        loss: training losses [members, n], in nats.
    """

    name: str
    classes: int
    labels: int
    cosine: float
    changes: tuple[int | None, ...]
    at: np.ndarray
    loss: np.ndarray

    @property
    def middle(self) -> float:
        """The median update of the phase change; infinite where half of the members have none."""
        return float(np.median([np.inf if change is None else change for change in self.changes]))

    @property
    def plateaus(self) -> list[float]:
        """Updates that each member's loss takes through `PLATEAU`; nan where it does not leave it."""
        first, last = (crossings(self.at, self.loss, level) for level in PLATEAU)
        return [end - start for start, end in zip(first, last, strict=True)]


def committed(suffix: str = "") -> dict[str, Record]:
    """The results that there are, by the name of their training.

    Args:
        suffix: of the files' names: "-quick" for the reduced settings.
    """
    paths = {name: RESULTS / f"{name}{suffix}.json" for name in TRAININGS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def find(records: dict[str, Record], figure: str, name: str | None = None, **of: float) -> list[Found]:
    """The conditions of a figure, of every training that has some, each for as many updates as the figure shows.

    Args:
        records: by the name of their training.
        figure: one of `settings.FIGURES`.
        name: what is held; None for all.
        **of: classes, labels or cosine.

    Raises:
        ResultError: there is no such condition.
    """
    found = []
    for record in records.values():
        for condition in record["conditions"]:
            same = condition["figure"] == figure and name in (None, condition["name"])
            if not same or any(condition[key] != value for key, value in of.items()):
                continue
            members, asked = [record["members"][i] for i in condition["members"]], record["figures"][figure]["asked"]
            points = min(len(member["loss"]) for member in members)
            at = np.array([update for update in record["updates_at"][:points] if update <= asked])
            loss = np.array([member["loss"][: len(at)] for member in members])
            changes = [member["phase_change"] for member in members]
            inside = tuple(None if change is None or change > asked else change for change in changes)
            of_task = {key: condition[key] for key in ("classes", "labels", "cosine")}
            found.append(Found(condition["name"], **of_task, changes=inside, at=at, loss=loss))
    if not found:
        raise ResultError(f"no results of figure {figure}{f', {name}' if name else ''}: train what it shows first")
    return found


def one(records: dict[str, Record], figure: str, name: str | None = None, **of: float) -> Found:
    """The one condition that `find` finds.

    Raises:
        ResultError: there is none, or several.
    """
    found = find(records, figure, name, **of)
    if len(found) > 1:
        raise ResultError(f"figure {figure} has {len(found)} conditions of {name!r} and {of}: say which")
    return found[0]


def crossings(at: np.ndarray, losses: np.ndarray, level: float) -> list[float]:
    """Where each loss [members, n] is first below a level, interpolated between updates; nan where it never is."""
    found = []
    for loss in losses:
        below = np.flatnonzero(loss < level)
        if not len(below):
            found.append(float("nan"))
        elif (i := below[0]) == 0:
            found.append(float(at[0]))
        else:
            share = (loss[i - 1] - level) / (loss[i - 1] - loss[i])
            found.append(float(at[i - 1] + share * (at[i] - at[i - 1])))
    return found


def trained(record: Record, figure: str) -> tuple[int, int]:
    """The fewest and the most updates that a figure's members of a training had."""
    members = {i for c in record["conditions"] if c["figure"] == figure for i in c["members"]}
    asked, every = record["figures"][figure]["asked"], record["setting"]["every"]
    done = [min(every * len(record["members"][i]["loss"]), asked) for i in members]
    return min(done), max(done)


def lengths(records: dict[str, Record], figures: Sequence[str]) -> str:
    """How long the members of figures were trained, beside the paper: in updates, and in sequences as it counts."""
    said = []
    for figure in figures:
        done = [trained(record, figure) for record in records.values() if figure in record["figures"]]
        least, most, paper = min(low for low, _ in done), max(high for _, high in done), FIGURES[figure].updates
        text = f"{least:,} updates" if least == most else f"{least:,} to {most:,} updates"
        said.append(f"{figure}: {text}" + (f" of {paper:,}" if least < paper else ""))
    reduced = any(r["reduced"] for r in records.values() if set(figures) & set(r["figures"]))
    rate = f"; reduced setting, learning rate {next(iter(records.values()))['setting']['rate']:g}" if reduced else ""
    return f"trained for figure {'; '.join(said)}{rate}"
