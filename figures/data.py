"""Where the figures find their numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

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


def sequences_above(ax: Axes) -> None:
    """Say above an axis of updates how many sequences they are, which is what the induction paper counts."""
    above = ax.secondary_xaxis("top", functions=(_sequences, _updates))
    above.xaxis.set_major_locator(MaxNLocator(4))
    above.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:,.0f}k" if x else "0")
    above.set_xlabel("sequences", fontsize=8)
    above.tick_params(labelsize=7)


def _sequences(updates: Any) -> Any:
    return 32 * updates


def _updates(sequences: Any) -> Any:
    return sequences / 32
