"""A real language model end to end: which pronoun follows, where the model keeps it, and what others measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp as ip

GIRL = "Once upon a time, there was a little girl named Lily. One day,"
BOY = "Once upon a time, there was a little boy named Tim. One day,"
METRIC = ip.logit_diff("she", "he")
EXECUTORS = ("sequential", "batched", "shared")


@pytest.fixture(scope="module")
def model(stories) -> ip.Model:
    return ip.load(stories)


@pytest.fixture(scope="module")
def pair(model) -> tuple[ip.Inputs, ip.Inputs]:
    return model.inputs(GIRL), model.inputs(BOY)


@pytest.fixture(scope="module")
def residual(model, pair) -> ip.Result:
    return ip.sweep(model, *pair, ip.grid("resid_pre", layer="all", pos="all"), metric=METRIC)


def test_the_model_is_the_one_described(model):
    arch = model.architecture
    assert (model.n_layers, arch.width, arch.vocabulary) == (5, 64, 512)
    assert (arch.blocks[0].attention.q.heads, arch.blocks[0].attention.k.heads, arch.blocks[0].attention.q.width) == (
        8,
        4,
        8,
    )
    assert model.dtype == torch.float32


def test_published_next_tokens(model):
    """The table of the model's README, from the engine and from the model itself."""
    published = {GIRL: {" Lily": 0.51, " she": 0.41}, BOY: {" he": 0.42, " Tim": 0.31}}
    for text, expected in published.items():
        inputs = model.inputs(text)
        with torch.no_grad():
            theirs = model.module(inputs.ids).logits[0, -1].softmax(-1)
        best = theirs.argsort(descending=True)[:2].tolist()
        assert [model.decode([i]) for i in best] == list(expected)
        for token, chance in zip(best, expected.values(), strict=True):
            assert float(theirs[token]) == pytest.approx(chance, abs=0.01)
            assert float(ip.evaluate(model, inputs, ip.prob(token))) == pytest.approx(chance, abs=0.01)
        assert [float(ip.evaluate(model, inputs, ip.rank(token))) for token in best] == [0, 1]
        assert ip.evaluate(model, inputs, ip.accuracy(best[1])).tolist() == [0.0]


def test_the_prompts_align_token_by_token(model, pair):
    alignment = ip.align(*pair)
    assert alignment.clean.lengths.tolist() == alignment.corrupt.lengths.tolist() == [19]
    assert alignment.differs[0].nonzero().flatten().tolist() == [10, 11, 12, 14]
    assert "".join(pair[0].tokens[0]) == f"<s> {GIRL}"
    assert "g" in str(alignment) and "Lily" in str(alignment)


def test_the_task_works(model, pair):
    clean, corrupt = (float(ip.evaluate(model, inputs, METRIC)) for inputs in pair)
    assert clean > 1 and corrupt < -1
    both = model.inputs([GIRL, BOY, "Tim was a boy."], padding="left")
    together = ip.evaluate(model, both, METRIC)
    np.testing.assert_allclose(together[:2], [clean, corrupt], rtol=0, atol=1e-4)


def test_every_executor_says_the_same(model, pair, residual):
    assert residual.config["executor"] == "shared" and residual.effect.shape == (5, 19, 1)
    for executor in EXECUTORS:
        for budget in (None, 1 << 19):
            other = ip.sweep(
                model,
                *pair,
                ip.grid("resid_pre", layer="all", pos="all"),
                metric=METRIC,
                executor=executor,
                budget=budget,
            )
            np.testing.assert_allclose(other.effect, residual.effect, rtol=0, atol=1e-4)
            assert (other.status == 1).sum() == (residual.status == 1).sum()
    assert 0 <= residual.noise_floor < 1e-4


def test_where_the_pronoun_comes_from(model, pair, residual):
    """In the embeddings it is in the noun and the name; at the end it is at the last position, and all of it."""
    shares = residual.normalized()
    assert set(np.flatnonzero(shares[0])) == {10, 11, 12, 14}
    assert (residual.effect[:, :10] == 0).all()
    assert (residual.status[:, :10] != 0).all()
    last = ip.sweep(model, *pair, ip.grid("resid_post", layer=[-1], pos=[-1]), metric=METRIC)
    assert last.normalized()[0, 0] == pytest.approx(1, abs=1e-3)
    assert last.axes[0].values == (-1,)
    top = residual.sel(layer=0).top(1)[0]
    assert top["pos"] in (10, 11, 12, 14) and top["effect"] > 1
    assert shares[0, 18] == 0 and shares[4, 18] > 0.1
    everything = ip.sweep(model, *pair, ip.grid("resid_pre", layer=[0]), metric=METRIC)
    assert everything.normalized()[0] == pytest.approx(1, abs=1e-3)
    noising = ip.sweep(model, *pair, ip.grid("resid_post", layer=[4], pos=[-1]), metric=METRIC, direction="noising")
    assert noising.normalized()[0, 0] == pytest.approx(1, abs=1e-3)
    assert noising.effect[0, 0, 0] == pytest.approx(-last.effect[0, 0, 0], abs=1e-3)


def test_labels_are_the_tokens(pair, residual):
    assert residual.axes[1].labels == pair[1].tokens[0]
    assert residual.rows == (f"<s> {BOY}",)


def test_attribution_finds_the_same_places(model, pair):
    for grid in (
        ip.grid("resid_pre", layer="all", pos="all"),
        ip.grid(["attn_out", "mlp_out"], layer="all", pos="all"),
        ip.grid("z", layer="all", head="all"),
    ):
        exact = ip.sweep(model, *pair, grid, metric=METRIC)
        estimate = ip.attribution(model, *pair, grid, metric=METRIC)
        assert np.corrcoef(exact.effect.ravel(), estimate.effect.ravel())[0, 1] > 0.8


def test_the_lens_and_the_parts(model, pair):
    lens = ip.logit_lens(model, pair[0])
    assert {name for name, _ in lens.top(model, k=2)[-1]} == {" Lily", " she"}
    assert lens.top(model, k=1)[-1][0][1] == pytest.approx(0.51, abs=0.01)
    measured = ip.logit_lens(model, pair[0], METRIC)
    value = float(ip.evaluate(model, pair[0], METRIC))
    assert measured.effect[-1, 0] == pytest.approx(value, abs=1e-4)
    parts = ip.direct_logit_attribution(model, pair[0], "she", "he")
    assert parts.effect.sum() == pytest.approx(value, abs=1e-4)
    assert len(parts.axes[0]) == 1 + 5 * (8 + 1)  # embed, and of each layer eight heads and an MLP; no biases


def test_a_figure_a_table_and_a_file(residual, tmp_path):
    import matplotlib.pyplot as plt

    figure = residual.figure()
    figure.savefig(tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes()[1:4] == b"PNG"
    assert len([text for axes in figure.axes for text in axes.get_xticklabels() if text.get_text()]) >= 19
    plt.close("all")
    frame = residual.to_frame()
    assert len(frame) == 5 * 19 and frame.effect.abs().max() == np.abs(residual.effect).max()
    residual.save(tmp_path / "r")
    np.testing.assert_array_equal(ip.Result.load(tmp_path / "r").effect, residual.effect)


def test_half_precision(stories, pair, residual):
    model = ip.load(stories, dtype=torch.bfloat16)
    result = ip.sweep(model, *pair, ip.grid("resid_pre", layer="all", pos="all"), metric=METRIC)
    large = np.abs(residual.effect) > 0.5
    assert large.sum() > 10
    np.testing.assert_allclose(result.effect[large], residual.effect[large], rtol=0.2, atol=0.3)
    assert result.noise_floor > residual.noise_floor
