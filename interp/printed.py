"""Results as the command line prints them."""

from __future__ import annotations

import json
from typing import Any


def as_json(result: Any) -> str:
    """A result as JSON, every cell of it."""
    cells = result.top(k=int(result.status.size))
    for cell in cells:
        for name in ("low", "high"):
            cell[name] = None if cell[name] != cell[name] else cell[name]  # JSON has no nan
    summary = {
        "model": result.config["model"],
        "metric": result.metrics[0],
        "pairs": len(result.rows),
        "base": float(result.base.mean()),
        "source": None if result.source is None else float(result.source.mean()),
        "noise_floor": float(result.noise_floor),
        "cells": cells,
    }
    return json.dumps(summary, indent=1)


def as_table(result: Any, k: int) -> str:
    """The strongest cells of a result, as a table of text."""
    names = [axis.name for axis in result.axes]
    normalized = result.source is not None
    header = [*names, "effect", *(["share"] if normalized else []), "95% interval"]
    share = result.normalized() if normalized else None
    rows = [header]
    for cell in result.top(k):
        index = tuple(axis.values.index(cell[axis.name]) for axis in result.axes)
        labels = [_cell_label(axis, i) for axis, i in zip(result.axes, index, strict=True)]
        interval = "" if cell["low"] != cell["low"] else f"{cell['low']:+.3f} to {cell['high']:+.3f}"
        rows.append(
            [*labels, f"{cell['effect']:+.3f}", *([f"{share[index]:+.1%}"] if share is not None else []), interval]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(text.rjust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    about = f"{result.metrics[0]}: {float(result.base.mean()):+.3f} where edited"
    if normalized:
        about += f", {float(result.source.mean()):+.3f} where values come from"
    return "\n".join([f"{about}; {len(result.rows)} pair(s), {result.status.size} cells, the strongest:", *lines])


def _cell_label(axis: Any, i: int) -> str:
    value, label = str(axis.values[i]), axis.labels[i]
    return value if label == value else f"{value} {label.strip()!r}"
