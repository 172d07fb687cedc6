"""Tables in Markdown, and where a README keeps those of a record."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def times(found: dict[str, float], digits: int = 1) -> str:
    """A ratio with its smallest and largest."""
    middle, low, high = (f"{found[key]:.{digits}f}" for key in ("ratio", "min", "max"))
    return f"{middle} ({low} to {high})"


def table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    padded = (" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(f"| {line} |" for line in padded)


def written(path: Path, readme: Path, of: Callable[[dict[str, Any]], str]) -> None:
    """Put a text made of a record between the README's markers for its file, at the end where there are none yet."""
    begin, end = f"<!-- begin {path.name} -->", f"<!-- end {path.name} -->"
    block = f"{begin}\n\n{of(json.loads(path.read_text()))}\n\n{end}"
    text = readme.read_text()
    if begin in text:
        text = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: block, text, flags=re.DOTALL)
    else:
        text = f"{text.rstrip()}\n\n{block}\n"
    readme.write_text(text)
