"""The gallery draws from what is committed, without recomputing anything, and within its frame."""

import importlib
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from figures.data import SCRIPTS

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_figure_draws_with_labels_and_nothing_cut_off(name, monkeypatch):
    monkeypatch.setattr("hooks.model.Model.run", None)  # a figure that computes fails
    figure = importlib.import_module(f"figures.{name}").draw()
    FigureCanvasAgg(figure).draw()
    width, height = figure.get_size_inches() * figure.dpi
    assert figure.axes
    for ax in figure.axes:
        if not ax.axison or not ax.get_visible():
            continue
        assert ax.get_xlabel() or ax.get_ylabel() or ax.get_title()
        box = ax.get_tightbbox()
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
    assert (ROOT / "figures" / "gallery" / f"{name}.png").is_file()


def test_every_picture_of_the_gallery_has_its_script():
    assert sorted(path.stem for path in (ROOT / "figures" / "gallery").glob("*.png")) == list(SCRIPTS)
