"""Plots: the right number in the right place, words that can be read, and nothing left behind."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from dataclasses import replace
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
from matplotlib.cbook import is_math_text
from matplotlib.figure import Figure

from hooks.errors import ResultError
from interp.axes import Axis
from interp.plots import heatmap
from interp.results import Result
from interp.typesetting import visible

TOKENS = (
    "<|endoftext|>",
    " When",
    " Mary",
    "\n",
    "$5",
    " $a_b$",
    "  x\t",
    "\\frac{$",
    "é",
    " store",
    ",",
    "^_{",
    "%#&",
)
LAYER = Axis("layer", tuple(range(12)))
POS = Axis("pos", tuple(range(13)), TOKENS)
HEAD = Axis("head", tuple(range(12)))
SITE = Axis("site", ("attn_out", "mlp_out", "resid_post"))


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(autouse=True)
def nothing_global_changes():
    before = copy.deepcopy(dict(matplotlib.rcParams))
    yield
    assert dict(matplotlib.rcParams) == before


def make(*axes: Axis, rows: int = 5, metrics: tuple[str, ...] = ("logit_diff",), source: bool = True) -> Result:
    rng = np.random.default_rng(0)
    several = len(metrics) > 1
    metric = (len(metrics),) if several else ()
    shape = tuple(len(axis) for axis in axes)
    return Result(
        effect=rng.normal(size=(*metric, *shape, rows)),
        axes=axes,
        metrics=metrics,
        several=several,
        base=np.full((*metric, rows), -1.0),
        source=np.full((*metric, rows), 1.0) if source else None,
        status=np.zeros(shape, dtype=np.int8),
        noise_floor=np.zeros(metric),
        rows=tuple(f"pair {i}" for i in range(rows)),
        config={},
    )


def shown(ax) -> np.ndarray:
    (image,) = ax.get_images()
    return np.ma.filled(image.get_array().astype(float), np.nan)


def words(axis) -> list[str]:
    """What the tick labels read as, in print."""
    for label in axis.get_ticklabels():
        assert not is_math_text(label.get_text()) or not label.get_text()
    return [label.get_text().replace(r"\$", "$") for label in axis.get_ticklabels()]


def label_of_colourbar(ax) -> str:
    return ax.get_images()[0].colorbar.ax.get_ylabel().replace("\n", " ")


# visible


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Mary", "·Mary"),
        ("  a b ", "··a b·"),
        ("   ", "···"),
        ("", ""),
        ("\n\n", r"\n\n"),
        (" \t", r"·\t"),
        ("a\x00\u200b\xa0\ud800", r"a\x00\u200b\xa0\ud800"),
        ("$é末", "$é末"),
    ],
)
def test_visible(text, expected):
    assert visible(text) == expected


# Numbers in their places


def test_heatmap_has_layers_upwards_and_positions_to_the_right():
    result = make(LAYER, POS)
    ax = heatmap(result)
    np.testing.assert_allclose(shown(ax), result.normalized())
    assert ax.get_images()[0].origin == "lower" and not ax.yaxis_inverted()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("position", "layer")
    assert words(ax.xaxis) == [visible(token) for token in TOKENS] and words(ax.yaxis) == list(LAYER.labels)
    assert list(ax.get_xticks()) == list(range(13))


@pytest.mark.parametrize(
    ("axes", "x", "y"),
    [
        ((POS, LAYER), "position", "layer"),
        ((HEAD, LAYER), "head", "layer"),
        ((HEAD, POS), "head", "position"),
        ((POS, Axis("key_pos", (0, 1))), "key position", "position"),
        ((SITE, LAYER), "site", "layer"),
        ((POS, SITE), "position", "site"),
        ((Axis("one", (0, 1)), Axis("two", (0, 1, 2))), "two", "one"),
    ],
)
def test_which_axis_is_vertical(axes, x, y):
    result = make(*axes)
    ax = result.plot(value="effect")
    if (x, y) == ("head", "position"):
        x, y = y, x
    assert (ax.get_xlabel(), ax.get_ylabel()) == (x, y)
    first = {"pos": "position", "key_pos": "key position"}.get(axes[0].name, axes[0].name)
    np.testing.assert_allclose(shown(ax), result.mean() if first == y else result.mean().T)
    assert ax.yaxis_inverted() == (y != "layer")


def test_colours_are_centred_on_zero_and_span_the_largest():
    result = make(LAYER, POS)
    result.effect[3, 4] = -40
    (image,) = result.plot(value="effect").get_images()
    assert image.get_clim() == (-40.0, 40.0)
    red, white, blue = image.to_rgba(np.array([[40.0, 0.0, -40.0]]))[0]
    assert red[0] > red[2] + 0.2 and blue[2] > blue[0] + 0.2 and min(white[:3]) > 0.95


def test_missing_cells_are_grey_and_said_to_be():
    result = make(LAYER, POS)
    assert "grey" not in result.plot().get_xlabel()
    result.effect[:, -1] = np.nan
    ax = result.plot()
    assert np.isnan(shown(ax)[:, -1]).all() and np.isfinite(shown(ax)[:, :-1]).all()
    assert "grey: in no row" in ax.get_xlabel() and ax.get_facecolor()[:3] == (0.82, 0.82, 0.82)
    assert ax.get_images()[0].to_rgba(np.ma.masked_invalid([[np.nan]]))[0, 0, 3] == 0  # the grey shows through


def test_what_is_shown_is_said():
    result = make(LAYER, POS, metrics=("logit_diff", "kl"))
    assert label_of_colourbar(result.plot()).startswith("normalized effect on logit_diff")
    ax = result.plot(metric="kl", value="effect")
    np.testing.assert_allclose(shown(ax), result.mean()[1])
    label = label_of_colourbar(ax)
    assert "normalized" not in label
    for part in ("effect on kl", "edited − base", "mean of 5 rows"):
        assert part in label
    assert "mean of 1 row" in label_of_colourbar(make(LAYER, POS, rows=1).plot()) + " "


def test_value_falls_back_to_effects_where_nothing_normalizes():
    for result in (make(LAYER, POS, source=False), replace(make(LAYER, POS), source=np.full(5, -1.0))):
        ax = result.plot()
        np.testing.assert_allclose(shown(ax), result.mean())
        assert label_of_colourbar(ax).startswith("effect on")
        with pytest.raises(ResultError):
            result.plot(value="normalized")


def test_bars_have_heights_and_intervals():
    result = make(LAYER)
    for value in ("effect", "normalized"):
        ax = result.plot(value=value)
        heights = [bar.get_height() for bar in ax.patches]
        np.testing.assert_allclose(heights, result.mean() if value == "effect" else result.normalized())
        lines = np.array(ax.collections[0].get_segments())  # [bar, end, (x, y)]
        np.testing.assert_allclose(lines[:, :, 1].T, result.ci(normalized=value == "normalized"))
        np.testing.assert_allclose(lines[:, :, 0], np.arange(12)[:, None] * [1, 1])
        assert (
            "95% intervals" in ax.get_ylabel() and ax.get_xlabel() == "layer" and words(ax.xaxis) == list(LAYER.labels)
        )
        colours = {height > 0: bar.get_facecolor() for height, bar in zip(heights, ax.patches, strict=True)}
        assert colours[True][0] > colours[True][2] and colours[False][2] > colours[False][0]
    assert "interval" not in make(LAYER, rows=1).plot().get_ylabel()


def test_an_interval_may_leave_out_the_mean():
    result = make(LAYER, rows=3)
    result.effect[:] = [0, 0, 1000]
    heatmap(result).figure.draw_without_rendering()


@pytest.mark.parametrize("order", [(SITE, LAYER, POS), (LAYER, SITE, POS), (POS, LAYER, SITE)])
def test_three_axes_make_a_panel_a_site_on_one_scale(order):
    result = make(*order)
    panels = result.plot()
    assert isinstance(panels, list) and [ax.get_title() for ax in panels] == list(SITE.values)
    for ax, site in zip(panels, SITE.values, strict=True):
        one = result.sel(site=site).normalized()
        np.testing.assert_allclose(shown(ax), one if order[0] is not POS else one.T)
    limits = {ax.get_images()[0].get_clim() for ax in panels}
    assert limits == {(-np.abs(result.normalized()).max(), np.abs(result.normalized()).max())}
    figure = panels[0].figure
    assert len(figure.axes) == 4  # one colour bar
    assert words(panels[0].yaxis) == list(LAYER.labels) and set(words(panels[1].yaxis)) == {""}


def test_three_axes_without_a_site_make_a_panel_for_each_of_the_first():
    result = make(Axis("pos", (3, 4, 5, 6)), LAYER, HEAD)
    panels = result.plot()
    assert [ax.get_title() for ax in panels] == [f"position {i}" for i in (3, 4, 5, 6)]
    np.testing.assert_allclose(shown(panels[2]), result.sel(pos=5).normalized())
    assert len(panels[0].figure.axes) == 5  # the spare places of the second row are gone
    assert [bool(ax.get_xlabel()) for ax in panels] == [False, True, True, True]  # the lowest of each column


def test_what_was_selected_is_the_title():
    result = make(SITE, LAYER, POS).sel(site="mlp_out")
    assert result.plot().get_title() == "site mlp_out"
    assert result.sel(layer=3).plot().get_title() == "site mlp_out, layer 3"
    assert replace(result, config={"selected": ["anything"]}).plot().get_title() == ""
    four = make(SITE, HEAD, LAYER, POS).sel(head=3)
    assert four.plot()[0].figure.get_suptitle() == "head 3"


# Words


def test_no_label_is_mathematics():
    odd = Axis("$x^2$", ("$a$", "$$", "$", r"\$b$", "a$b$c"))
    result = replace(make(odd, LAYER, metrics=("$p(x)$",)), config={"selected": {"$k$": "$v$"}})
    ax = result.plot()
    ax.figure.draw_without_rendering()
    texts = [ax.get_xlabel(), ax.get_title(), ax.get_images()[0].colorbar.ax.get_ylabel()]
    texts += [label.get_text() for label in ax.get_xticklabels()]
    assert sum(text.count("$") for text in texts) >= 15
    assert not any(is_math_text(text) is True for text in texts)
    assert words(ax.xaxis) == list(odd.labels)


def test_tokens_are_not_handed_to_tex():
    with matplotlib.rc_context({"text.usetex": True}):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Figure, "draw_without_rendering", lambda self: None)  # LaTeX need not be there
            ax = make(LAYER, POS).plot()
        assert not any(label.get_usetex() for label in ax.get_xticklabels())
        assert not ax.xaxis.label.get_usetex()


def test_long_labels_lose_their_middle():
    names = tuple(f"blocks.{i}.attn.hook_z[{i}, pos=5, and more]" for i in range(4))
    labels = words(make(Axis("cell", names)).plot().xaxis)
    assert len(set(labels)) == 4 and all(len(label) == 22 and "…" in label for label in labels)
    assert labels[1].startswith("blocks.1.") and labels[1].endswith("and more]")


CROWDED = [
    (LAYER, POS),
    (LAYER, HEAD),
    (LAYER,),
    (POS,),
    (SITE, LAYER, POS),
    (Axis("pos", tuple(range(6))), LAYER, Axis("head", tuple(range(8)))),
    (LAYER, Axis("pos", tuple(range(64)), tuple(f" tok{i}" for i in range(64)))),
    (LAYER, Axis("pos", tuple(range(64)))),
    (Axis("layer", tuple(range(80))), Axis("pos", tuple(range(300)), tuple(f" token{i}" for i in range(300)))),
    (Axis("layer", ((0, 1, 2), (3, 4, 5))), Axis("site", ("z", "blocks.3.attn.hook_result_of_all_heads"))),
    (Axis("layer", (5,)), Axis("pos", (0,))),
    (Axis("cell", tuple(f"blocks.{i}.attn.hook_z[{i}]" for i in range(40))),),
    (Axis("layer", (0,)),),
]


@pytest.mark.parametrize("axes", CROWDED, ids=lambda axes: "-".join(f"{axis.name}{len(axis)}" for axis in axes))
def test_nothing_is_cut_off_or_overlaps(axes):
    figure = make(*axes, metrics=("log probability of a rather long answer, minus all of the foils",)).figure()
    figure.draw_without_rendering()
    box, size = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 > -0.02 and box.y0 > -0.02 and box.x1 < size[0] + 0.02 and box.y1 < size[1] + 0.02
    assert 2 < size[0] < 9 and size[1] < 9
    for ax in figure.axes:
        for axis, ends in ((ax.xaxis, ("x0", "x1")), (ax.yaxis, ("y0", "y1"))):
            labels = [label for label in axis.get_ticklabels() if label.get_text()]
            assert all(label.get_fontsize() >= 6 for label in labels)
            boxes = sorted((tuple(getattr(label.get_window_extent(), end) for end in ends)) for label in labels)
            # Descenders and line gaps may touch; letters may not: a fifth of the smallest type.
            assert all(low[1] < high[0] + 0.2 * 6 * figure.dpi / 72 for low, high in pairwise(boxes))


def test_every_token_of_64_is_printed_and_300_are_thinned():
    long = Axis("pos", tuple(range(64)), tuple(f" t{i}" for i in range(64)))
    assert len(words(make(LAYER, long).plot().xaxis)) == 64
    long = Axis("pos", tuple(range(300)), tuple(f" t{i}" for i in range(300)))
    ax = make(LAYER, long).plot()
    assert 30 < len(words(ax.xaxis)) < 150
    assert all(label == f"·t{at:.0f}" for at, label in zip(ax.get_xticks(), words(ax.xaxis), strict=True))


def test_numbers_are_thinned_to_round_ones():
    ax = make(LAYER, Axis("pos", tuple(range(64)))).plot()
    ticks = ax.get_xticks()
    assert words(ax.xaxis) == [str(int(at)) for at in ticks]
    assert len(ticks) > 5 and ticks[1] - ticks[0] in (2, 5, 10) and ax.get_xticklabels()[0].get_rotation() == 0


# Odd results


@pytest.mark.parametrize("axes", [(LAYER,), (LAYER, POS), (SITE, LAYER, POS)])
@pytest.mark.parametrize("fill", [0.0, np.nan, np.inf, 1e-300])
def test_flat_empty_and_infinite_results_are_drawn(axes, fill):
    result = make(*axes)
    result.effect[:] = fill
    figure = result.figure()
    figure.draw_without_rendering()
    assert figure._repr_png_()[:4] == b"\x89PNG"


def test_refusals_teach():
    with pytest.raises(ResultError, match=r"this result has 4 .*sel"):
        make(SITE, LAYER, HEAD, POS).plot()
    with pytest.raises(ResultError, match=r"0 \(none\)"):
        make(LAYER).sel(layer=3).plot()
    with pytest.raises(ResultError, match="did you mean 'normalized'"):
        make(LAYER).plot(value="normalised")
    with pytest.raises(ResultError, match="did you mean 'logit_diff'"):
        make(LAYER).plot(metric="logitdiff")
    three = Figure().subplots(1, 3)
    with pytest.raises(ResultError, match="1 panel and needs as many axes, got 3"):
        make(LAYER, POS).plot(ax=three)
    with pytest.raises(ResultError, match="1 panel and"):
        make(LAYER).plot(ax=three)
    with pytest.raises(ResultError, match="3 panels and needs as many axes, got 1"):
        make(SITE, LAYER, POS).plot(ax=three[0])
    assert not any(ax.get_images() or ax.patches for ax in three)


# Figures


def test_given_axes_are_drawn_into():
    figure = Figure(figsize=(8, 3))
    left, right = figure.subplots(1, 2)
    assert make(LAYER, POS).plot(ax=left) is left
    assert make(LAYER).plot(ax=right) is right
    assert left.get_images() and right.patches and len(figure.axes) == 3
    three = Figure(layout="constrained").subplots(1, 3)
    assert make(SITE, LAYER, POS).plot(ax=three) == list(three)
    assert all(words(ax.yaxis) == list(LAYER.labels) for ax in three)
    inner = Figure(layout="constrained").subfigures(1, 2)[0].subplots()
    assert make(LAYER, POS).plot(ax=inner) is inner


def test_given_axes_of_column_width_stay_legible():
    figure = Figure(figsize=(3.3, 2.4), layout="constrained")
    ax = make(LAYER, POS).plot(ax=figure.subplots())
    figure.draw_without_rendering()
    boxes = sorted((b.y0, b.y1) for b in (label.get_window_extent() for label in ax.get_yticklabels()))
    assert all(low[1] < high[0] + 2 for low, high in pairwise(boxes))


def test_figure_shows_itself_in_a_notebook_and_can_be_copied():
    figure = make(LAYER, POS).figure()
    assert isinstance(figure, Figure) and figure._repr_png_()[:4] == b"\x89PNG"
    for twin in (pickle.loads(pickle.dumps(figure)), copy.deepcopy(figure)):
        assert twin is not figure and len(twin.axes) == 2
    assert isinstance(make(SITE, LAYER, POS).figure(value="effect"), Figure)


RESULT = """
import sys
import numpy as np
from interp.axes import Axis
from interp.results import Result
r = Result(
    np.ones((2, 3)), (Axis("layer", (0, 1)),), ("m",), False, np.zeros(3), None, np.zeros(2), 0.0, ("a", "b", "c"), {}
)
"""


def run(code: str) -> list[str]:
    """In a process of its own: pyplot, once imported, stays."""
    done = subprocess.run([sys.executable, "-c", RESULT + code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_pyplot_is_not_imported():
    code = """
r.figure()._repr_png_()
print("matplotlib.pyplot" in sys.modules, "matplotlib.figure" in sys.modules)
"""
    assert run(code) == ["False", "True"]


def test_pyplot_is_given_no_figure():
    code = """
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
_, (ax, other) = plt.subplots(1, 2)
before, current = plt.get_fignums(), plt.gca()
r.plot(ax=ax)
r.figure()
print(plt.get_fignums() == before == [1], plt.gca() is current is other)
"""
    assert run(code) == ["True", "True"]
