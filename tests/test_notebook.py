"""The notebook runs from top to bottom, and its cells show what they promise."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "experiments" / "notebooks" / "patching_in_ten_minutes.ipynb"


def test_the_notebook_runs_from_top_to_bottom():
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient").NotebookClient
    book = nbformat.read(NOTEBOOK, as_version=4)
    client(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parents[2])}}
    ).execute()
    shown = [out.get("data", {}) for cell in book.cells if cell.cell_type == "code" for out in cell.outputs]
    html = " ".join(str(data.get("text/html", "")) for data in shown)
    assert "blocks.{}.attn.hook_z" in html  # the model shows its sites
    assert "<title>" in html and "<svg" in html  # a sweep its heatmap, with effects on hover
    assert "largest change" in html and "reads" in html  # a run its audit, a plan its interventions
    assert sum("image/png" in data for data in shown) >= 3
