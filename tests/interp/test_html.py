"""What a notebook shows of a result: a heatmap without scripts, whose squares tell their effect."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

import interp as ip
from interp.cli import shipped_task
from interp.html import heatmap


@pytest.fixture(scope="module")
def sides():
    model, task = ip.load("ioi-mini"), shipped_task(8)
    metric = ip.logit_diff(list(task.answer), list(task.foil))
    return model, model.inputs(task.clean), model.inputs(task.corrupt), metric


def squares(text: str) -> list[tuple[dict[str, str], str]]:
    """Attributes and hover text of every square, in the order of the SVG."""
    root = ElementTree.fromstring(text[text.index("<svg") :])
    return [(dict(r.attrib), r[0].text or "") for r in root.iter("rect")]


def test_every_cell_is_a_square_that_tells_its_effect(sides):
    result = ip.sweep(*sides[:3], ip.grid("resid_pre", layer="all", pos="all"), metric=sides[3], progress=False)
    found = squares(heatmap(result))
    assert len(found) == result.status.size
    means = result.mean()
    for attributes, told in found:
        layer, pos, effect = re.match(r"layer (\d+), pos (\d+).*?: ([+-][\d.e+-]+)", told).groups()
        assert float(effect) == pytest.approx(means[int(layer), int(pos)], rel=1e-3, abs=1e-12)
        row, column = float(attributes["y"]), float(attributes["x"])
        assert row < 8 + 18 * 3 and column >= 64
    assert all("'" in told for _, told in found)  # and the token that is patched


def test_layers_go_upwards_and_signs_have_colours(sides):
    result = ip.sweep(*sides[:3], ip.grid("z", layer="all", head="all"), metric=sides[3], progress=False)
    found = squares(heatmap(result))
    means = result.mean()
    height = {}
    for (attributes, _), (layer, head) in zip(found, np.ndindex(means.shape), strict=True):
        height[layer] = float(attributes["y"])
        red, _, blue = (int(attributes["fill"][i : i + 2], 16) for i in (1, 3, 5))
        assert (red > blue) == (means[layer, head] > 0) or red == blue
    assert height[0] > height[1] > height[2]


def test_one_axis_and_words_that_html_would_read(sides):
    result = ip.sweep(*sides[:3], ip.grid("mlp_out", layer="all"), metric=sides[3], progress=False)
    assert len(squares(heatmap(result))) == 3
    assert result._repr_html_().count("<svg") == 1
    named = ip.sweep(*sides[:3], ip.grid("resid_pre", layer=0, pos="all"), metric=sides[3], progress=False)
    assert "<s>" not in heatmap(named) and "&lt;s&gt;" in heatmap(named)
