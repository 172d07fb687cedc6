"""What results look like: scales, names, titles that say what was done; lenses and attention that draw themselves."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest

import interp as ip
from interp.cli import shipped_task
from interp.html import heatmap


@pytest.fixture(scope="module")
def sides():
    model, task = ip.load("ioi-mini"), shipped_task(4)
    metric = ip.logit_diff(list(task.answer), list(task.foil))
    return model, model.inputs(task.clean), model.inputs(task.corrupt), metric, task


@pytest.fixture(scope="module")
def three(sides):
    grid = ip.grid(["attn_out", "mlp_out"], layer="all", pos="all")
    return ip.sweep(*sides[:3], grid, metric=sides[3], progress=False)


def test_inline_pictures_have_scales_and_names(three):
    one = heatmap(three.sel(site="mlp_out"))
    largest = np.abs(three.sel(site="mlp_out").mean()).max()
    assert f">+{largest:.3g}<" in one and f">-{largest:.3g}<" in one
    assert ">position<" in one and ">layer<" in one and "mean of 4 rows" in one
    assert one.count("<svg") == 1


def test_three_axes_are_drawn_inline(three):
    text = three._repr_html_()
    assert text.count("<svg") == 1 and ">attn_out<" in text and ">mlp_out<" in text
    told = re.findall(r"<title>site (\w+), layer (\d+), pos (\d+).*?: ([+-][\d.e+-]+)", text)
    assert len(told) == three.status.size
    mean = three.mean()
    for site, layer, pos, effect in told:
        at = three.axes[0].values.index(site), int(layer), int(pos)
        assert float(effect) == pytest.approx(mean[at], rel=1e-3, abs=1e-12)


def test_thousands_of_edges_draw_a_summary(sides, three):
    edges = 5000
    effect = np.random.default_rng(0).normal(size=(edges, 4))
    effect[1234] = 50
    names = tuple(f"a0.h{i}->m1" for i in range(edges))
    many = replace(three, effect=effect, axes=(ip.Axis("edge", names),), status=np.zeros(edges), config={})
    text = heatmap(many)
    assert len(text) < 20_000 and max(map(int, re.findall(r"width='(\d+)'", text))) < 1000
    assert "a0.h1234-&gt;m1" in text and "30 largest of 5,000" in text and "the other 4,970" in text
    rest = np.sort(np.abs(many.mean()))[::-1][30]
    assert f"at most {rest:.3g}" in text
    figure = many.figure()
    assert figure.get_size_inches()[0] < 10 and "30 largest of 5,000" in figure.axes[0].get_title()
    assert figure.axes[0].get_xticklabels()[0].get_text() == "a0.h1234->m1"


def test_titles_say_what_was_done(sides, three):
    model, clean, corrupt, metric, task = sides
    grid = ip.grid("z", layer="all", head="all")
    tokens = (list(task.answer), list(task.foil))
    lens = ip.logit_lens(model, clean, metric)
    for result, title, numbers in (
        (three.sel(site="mlp_out"), "patch, denoising; site mlp_out", "normalized effect"),
        (ip.sweep(model, clean, None, grid, metric=metric, intervention=ip.zero, progress=False),
         "zero in the clean run", "edited"),
        (ip.attribution(model, clean, corrupt, grid, metric=metric), "patch, denoising, first order", "estimated"),
        (ip.direct_logit_attribution(model, clean, *tokens), "direct logit attribution", "direct contribution"),
        (lens, "logit lens", "metric read from the stream"),
    ):  # fmt: skip
        axes = result.figure().axes
        assert axes[0].get_title() == title
        said = " ".join(ax.get_ylabel().replace("\n", " ") for ax in axes)
        assert numbers in said and ("edited −" in said) == (numbers == "edited"), said
    reading = ip.direct_logit_attribution(model, clean, *tokens)
    assert "direct contribution on logit_diff" in heatmap(reading)


def test_a_title_colours_and_labels_of_ones_own(three):
    one = three.sel(site="mlp_out")
    ax = one.plot(title="mine", cmap="PiYG", labels={"pos": "word", "value": "nats"})
    assert ax.get_title() == "mine" and ax.get_xlabel() == "word" and ax.get_ylabel() == "layer"
    assert ax.images[0].get_cmap().name == "PiYG" and ax.figure.axes[1].get_ylabel() == "nats"
    bars = one.sel(pos=-1 % 15).plot(title="", labels={"layer": "block"})
    assert bars.get_title() == "" and bars.get_xlabel() == "block"
    ranked = ip.plots.ranked(one, 3, title="three", labels={"value": "nats"})
    assert ranked.get_title() == "three" and ranked.get_ylabel() == "nats"
    with pytest.raises(ip.ResultError, match="did you mean 'pos'"):
        one.plot(labels={"poss": "word"})
    with pytest.raises(ip.ResultError, match="did you mean 'RdBu'"):
        one.plot(cmap="RdBuu")


def test_a_circuits_legend_says_of_which_direction_its_colours_are(sides):
    model, clean, corrupt, metric, _ = sides
    graph = ip.paths.Graph.of(model)
    for direction, said in (
        ("noising", "corrupt value in\nthe clean run"),
        ("denoising", "clean value in\nthe corrupt"),
    ):
        scores = ip.paths.edge_scores(model, clean, corrupt, metric=metric, direction=direction)
        legend = ip.paths.greedy(scores, graph, 5).figure().axes[0].get_legend()
        assert said in legend.get_title().get_text()


def test_a_lens_draws_itself(sides):
    model, clean = sides[:2]
    lens = ip.logit_lens(model, clean)
    text = lens._repr_html_()
    expected = [line[0] for line in lens.top(model, 1, row=0, pos=-1)]
    last = [re.findall(r"<td.*?title='([\d.]+)%'>(.*?)</td>", line)[-1] for line in text.split("<tr>")[1:-1]]
    assert [f"·{name.strip()}" for name, _ in expected[::-1]] == [name for _, name in last]
    for (_, p), (share, _) in zip(expected[::-1], last, strict=True):
        assert float(share) == pytest.approx(100 * p, abs=0.051)
    figure = lens.figure(row=1, last=5)
    assert len(figure.axes[0].texts) == 5 * len(lens.points) and "row" not in repr(figure)
    assert len(repr(lens)) < 300
    with pytest.raises(ip.InputsError, match="row 9"):
        lens.figure(row=9)


def test_direct_attribution_by_layer_and_head(sides):
    model, clean, _, _, task = sides
    tokens = (list(task.answer), list(task.foil))
    flat = ip.direct_logit_attribution(model, clean, *tokens)
    table = ip.direct_logit_attribution(model, clean, *tokens, by="head")
    assert [axis.name for axis in table.axes] == ["layer", "head"] and np.abs(table.effect).max() > 0.1
    for layer in range(3):
        for head in range(4):
            one = flat.sel(component=f"{layer}.h{head}").effect
            np.testing.assert_array_equal(table.sel(layer=layer, head=head).effect, one)
    with pytest.raises(ip.MetricError, match="did you mean 'head'"):
        ip.direct_logit_attribution(model, clean, *tokens, by="heads")


def test_attention_of_all_heads_in_one_page(sides, tmp_path):
    model, clean = sides[:2]
    view = ip.attention_view(model, clean, 0, row=1)
    pattern = model.run(clean, capture="blocks.0.attn.hook_pattern").tape["blocks.0.attn.hook_pattern"][1]
    np.testing.assert_allclose(view.patterns, pattern.numpy(), atol=1e-6)
    page = view.save(tmp_path / "view.html").read_text()
    assert "http" not in page and page.count("<script>") == 1  # nothing from elsewhere
    data = json.loads(re.search(r"= (\{.*?\}), n =", page).group(1))
    assert len(data["tokens"]) == len(clean.labels(1)) and data["tokens"][0] == "<s>"
    np.testing.assert_allclose(data["patterns"], pattern.numpy(), atol=6e-5)
    assert "<s>" not in re.search(r"<script>(.*)</script>", page, re.S).group(1)
    assert view._repr_html_().startswith("<iframe sandbox='allow-scripts'")
    zeroed = ip.attention_view(model, clean, 1, plan=ip.scale(ip.site("attn_out", layer=0), 3.0))
    assert np.abs(zeroed.patterns - ip.attention_view(model, clean, -2).patterns).max() > 0.01
    ragged = model.inputs(["Mary gave a book to John", "Tom gave it"], padding="left")
    assert ip.attention_view(model, ragged, 0, row=1).patterns.shape == (4, 4, 4)
    with pytest.raises(ip.SiteError, match="layers 0 to 2"):
        ip.attention_view(model, clean, 3)
    with pytest.raises(ip.InputsError, match="row 4"):
        ip.attention_view(model, clean, 0, row=4)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node, to run the page's script")
def test_the_pages_script_runs(sides, tmp_path):
    page = ip.attention_view(sides[0], sides[1], 0).page()
    (tmp_path / "page.js").write_text(re.search(r"<script>(.*)</script>", page, re.S).group(1))
    (tmp_path / "stub.js").write_text(
        """
const fs = require("fs"), ids = {}, drawn = [];
const el = () => ({children: [], style: {}, classList: {toggle() {}}, append(...x) { this.children.push(...x) },
  getContext: () => ({fillRect() { drawn.push(1) }, strokeRect() {}})});
global.document = {getElementById: i => ids[i] ?? (ids[i] = el()), createElement: el};
eval(fs.readFileSync(process.argv[2], "utf8"));
ids.heads.children[1].onclick(); ids.text.children[3].onmouseenter();
ids.map.onmousemove({offsetX: 5, offsetY: 40});
console.log(drawn.length > 100, ids.said.textContent);
"""
    )
    command = ["node", tmp_path / "stub.js", tmp_path / "page.js"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("true head 1: ") and "(2) to" in done.stdout
