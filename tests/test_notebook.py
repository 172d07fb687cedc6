"""The notebooks run from top to bottom, and their cells show what they promise."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "experiments" / "notebooks"


def shown_by(name: str) -> tuple[list[dict], str]:
    """What the cells of a notebook show, and all text that they print."""
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient").NotebookClient
    book = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    client(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOKS.parents[1])}}
    ).execute()
    outputs = [out for cell in book.cells if cell.cell_type == "code" for out in cell.outputs]
    return [out.get("data", {}) for out in outputs], "".join(out.get("text", "") for out in outputs)


def test_patching_in_ten_minutes():
    shown, _ = shown_by("patching_in_ten_minutes")
    html = " ".join(str(data.get("text/html", "")) for data in shown)
    assert "blocks.{}.attn.hook_z" in html  # the model shows its sites
    assert "<title>" in html and "<svg" in html  # a sweep its heatmap, with effects on hover
    assert "largest change" in html and "reads" in html  # a run its audit, a plan its interventions
    assert sum("image/png" in data for data in shown) >= 3


def test_circuits_in_ten_minutes():
    shown, text = shown_by("circuits_in_ten_minutes")
    drawn = [data["text/html"] for data in shown if "<svg" in str(data.get("text/html", ""))]
    assert any("a0.h1" in html and "Circuit(" in html for html in drawn)  # the circuit draws itself
    assert "Warning" not in text and "12 after pruning) keep 1.0" in text


def test_every_notebook_is_tested():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == {"patching_in_ten_minutes", "circuits_in_ten_minutes"}


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_shipped_with_what_their_cells_show(path):
    """`python -m experiments.notebooks.run` writes it; who reads a notebook without running it sees the pictures."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    shown = [kind for cell in cells for out in cell["outputs"] for kind in out.get("data", {})]
    assert sum(bool(cell["outputs"]) for cell in cells) >= len(cells) - 1
    assert "text/html" in shown and not any(out["output_type"] == "error" for c in cells for out in c["outputs"])
    assert path.stat().st_size < 1_000_000
