"""Run the notebooks and keep what their cells show: ``python -m experiments.notebooks.run``."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def run(path: Path) -> nbformat.NotebookNode:
    """A notebook with the outputs of its cells, and nothing that is another in every run (times, widgets)."""
    book = nbformat.read(path, as_version=4)
    root = {"metadata": {"path": str(FOLDER.parents[1])}}
    NotebookClient(book, timeout=600, kernel_name="python3", resources=root).execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)
    book.metadata.pop("widgets", None)
    book.metadata.language_info = {"name": "python"}
    return book


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(map(str, FOLDER.glob("*.ipynb"))):
        nbformat.write(run(Path(name)), name)
        print(f"{name}: {Path(name).stat().st_size / 1000:.0f} kB")
