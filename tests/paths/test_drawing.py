"""Pictures of circuits: where nodes stand, that all of it can be seen and read, and what a notebook shows."""

from __future__ import annotations

from itertools import combinations
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from interp import paths
from interp.paths.drawing import MOST_EDGES, NEGATIVE, POSITIVE, UNSIGNED, layout, svg
from tests.paths import checks
from tests.paths.cases import case

SPANS = {"subject": 1, "rest": [2, 3], "end": -1}


def made(count: int, *, layers: int = 6, heads: int = 8, group: int = 1, spans=None, seed: int = 0) -> paths.Circuit:
    """A circuit of the best of random scores."""
    graph = paths.Graph(
        (heads,) * layers, (group,) * layers, (True,) * layers, parallel=False, width=16,
        spans=None if spans is None else tuple((name, 0) for name in spans),
    )  # fmt: skip
    scores = np.random.default_rng(seed).standard_normal(len(graph))
    return paths.greedy(checks.made_up(graph, scores[:, None]), graph, count, prune=False)


CIRCUITS = {
    "ten edges": made(10),
    "two hundred": made(200, layers=12, heads=12),
    "shared keys": made(60, group=4),
    "by position": made(40, spans=SPANS),
    "one edge": paths.Circuit.of(made(0).graph, ["input->logits"]),
    "no edge": paths.Circuit.of(made(0).graph, []),
}
each_circuit = pytest.mark.parametrize("circuit", CIRCUITS.values(), ids=CIRCUITS)


@each_circuit
def test_no_two_nodes_stand_in_one_place(circuit):
    places = layout(circuit)
    assert {name for name, _ in places} == set(circuit.nodes)
    for one, two in combinations(places.values(), 2):
        assert abs(one[0] - two[0]) >= 0.99 or abs(one[1] - two[1]) >= 0.99


@each_circuit
def test_edges_go_upwards(circuit):
    places = layout(circuit)
    for edge in circuit.edges:
        writer, reader = checks.ends(edge)
        span = edge.partition("@")[2] or None
        group = circuit.graph.groups[0]
        ends = [places[name, span] for name in checks.fed(reader, group) if (name, span) in places]
        assert ends and all(end[1] > places[writer, span][1] for end in ends)


def test_rows_are_in_the_order_of_layers():
    places = {name: y for (name, _), (_, y) in layout(CIRCUITS["two hundred"]).items()}
    order = sorted(places, key=lambda name: checks.time(name) if name != "input" else -1)
    assert [places[name] for name in order] == sorted(places.values())
    rows = {checks.time(name) if name != "input" else -1: places[name] for name in places}
    assert len(set(rows.values())) == len(rows) and min(rows.values()) == 0 and max(rows.values()) == len(rows) - 1


def test_spans_stand_side_by_side():
    places = layout(CIRCUITS["by position"])
    across = {span: [x for (_, s), (x, _) in places.items() if s == span] for span in SPANS}
    assert max(across["subject"]) < min(across["rest"]) and max(across["rest"]) < min(across["end"])
    rows = {}
    for (name, _), (_, y) in places.items():
        assert rows.setdefault(name, y) == y  # a node is as high in every span


def drawn(circuit: paths.Circuit, **options) -> Figure:
    figure = circuit.figure(**options)
    figure.canvas.draw()
    return figure


@each_circuit
def test_everything_is_inside_and_can_be_read(circuit):
    figure = drawn(circuit)
    (ax,) = figure.axes
    box, page = ax.get_window_extent(), figure.bbox
    texts = [text for text in ax.texts if text.get_text()]
    assert {text.get_text() for text in texts} >= set(circuit.nodes)
    for text in texts:
        extent = text.get_window_extent()
        assert text.get_fontsize() >= 6
        assert page.x0 <= extent.x0 and extent.x1 <= page.x1 and page.y0 <= extent.y0 and extent.y1 <= page.y1
        if text.get_text() in circuit.nodes:
            assert box.contains(extent.x0, extent.y0) and box.contains(extent.x1, extent.y1)


@each_circuit
def test_names_do_not_cover_one_another(circuit):
    (ax,) = drawn(circuit).axes
    boxes = [text.get_window_extent() for text in ax.texts if text.get_text() in circuit.nodes]
    assert not any(one.overlaps(two) for one, two in combinations(boxes, 2))


def test_arrows_tell_size_and_sign():
    graph = made(0).graph
    scores = np.full(len(graph), np.nan)
    names = ["input->m0", "m0->a1.h2<q>", "a1.h2->logits"]
    for name, score in zip(names, (2.0, -0.5, np.nan), strict=True):
        scores[graph.index[name]] = score
    (ax,) = drawn(paths.Circuit.of(graph, names, scores), title="three").axes
    arrows = [arrow for arrow in ax.patches if isinstance(arrow, FancyArrowPatch)]
    widths = {to_hex(arrow.get_edgecolor()): arrow.get_linewidth() for arrow in arrows}
    assert set(widths) == {POSITIVE, NEGATIVE, UNSIGNED} and len(arrows) == 3
    assert widths[POSITIVE] == max(widths.values()) == 4.0 and widths[NEGATIVE] < 2.0
    assert ax.get_title() == "three" and [t.get_text() for t in ax.get_legend().texts][-1] == "widest: 2"


def test_a_shared_key_is_drawn_at_the_heads_that_read_it():
    graph = paths.Graph.of(case("llama").model)
    edges = ["input->a0.h1<k>", "a0.h2->logits", "a0.h3->logits"]
    (ax,) = drawn(paths.Circuit.of(graph, edges)).axes
    assert sum(isinstance(patch, FancyArrowPatch) for patch in ax.patches) == 4
    assert sum(text.get_text() == "k" for text in ax.texts) == 2


def test_drawing_on_axes_that_are_given():
    figure = Figure()
    ax = figure.subplots(1, 2)[1]
    assert CIRCUITS["ten edges"].draw(ax) is ax and len(ax.patches) >= 10
    assert CIRCUITS["ten edges"].draw().get_title() == f"10 of {len(CIRCUITS['ten edges'].graph)} edges"


# Notebooks


@pytest.mark.parametrize("name", ["ten edges", "by position", "one edge"])
def test_the_svg_parses(name):
    root = ElementTree.fromstring(svg(CIRCUITS[name]))
    assert root.tag.endswith("svg") and len(list(root.iter())) > 20


def test_what_a_notebook_shows():
    circuit = CIRCUITS["ten edges"]
    shown = circuit._repr_html_()
    assert "<svg" in shown and "10 of" in shown
    sizes = {edge: abs(circuit.scores[circuit.graph.index[edge]]) for edge in circuit.edges}
    strongest = max(sizes, key=sizes.__getitem__)
    assert shown.index(strongest.replace(">", "&gt;").replace("<", "&lt;")) < shown.index("<svg")
    unscored = CIRCUITS["one edge"]._repr_html_()
    assert "nan" not in unscored.partition("<svg")[0] and "input-&gt;logits" in unscored
    assert "no edges" in CIRCUITS["no edge"]._repr_html_()


def test_too_many_edges_are_not_drawn():
    circuit = made(MOST_EDGES + 1, layers=12, heads=12)
    assert svg(circuit) == f"<div>{MOST_EDGES + 1} edges: too many to draw; take the strongest</div>"
    assert "too many" in circuit._repr_html_()
