"""Where the figures find their numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from interp.results import Result

SCRIPTS = tuple(
    sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in ("__init__", "__main__", "data"))
)
"""The figures, by the names of their scripts."""
EXPERIMENTS = Path(__file__).parents[1] / "experiments"
PATCHING = EXPERIMENTS / "patching_ioi_mini" / "results"


def result(name: str) -> Result:
    """A sweep of the patching study."""
    return Result.load(PATCHING / name)


def read(*parts: str) -> dict[str, Any]:
    """A JSON file of a study."""
    return json.loads(EXPERIMENTS.joinpath(*parts).read_text())


def induction() -> dict[str, Any]:
    """The study of induction heads: the full setting where it was run, else the reduced one that is nearest to it."""
    names = ("full.json", "short.json", "quick.json")
    folder = EXPERIMENTS / "induction_formation" / "results"
    return json.loads(next(folder / name for name in names if (folder / name).exists()).read_text())


def mark_reduced(figure: Figure, record: dict[str, Any]) -> None:
    """Say under a figure that its numbers are from a reduced setting, where they are."""
    setting = record["setting"]
    if setting["reduced"]:
        figure.supxlabel(f"reduced setting: learning rate {setting['rate']:g}, {setting['steps']} steps", fontsize=8)
