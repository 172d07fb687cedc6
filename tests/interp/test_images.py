"""Sweeps, metrics, attribution, lenses and pictures of an image classifier."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import interp as ip
from hooks.errors import InputsError, InterpError, MetricError, ModelError, ResultError, SiteError
from hooks.random import choice
from interp import paths
from interp.streaming import Stream
from tests import oracle, zoo

CLOSE = {"rtol": 0, "atol": 1e-10}
RUNS = [("sequential", None), ("batched", None), ("shared", None), ("batched", 1), ("shared", 1), ("shared", 30_000)]
NAMES = ("cat", "dog", "fox", "owl", "hen", "bee")
ROWS, TOKENS, LAYERS, HEADS = 3, 5, 3, 4
POSITIONS = ("[cls]", "0,0", "0,1", "1,0", "1,1")
METRIC = ip.logit_diff(1, 4)


@pytest.fixture(scope="module")
def model() -> ip.Model:
    module = zoo.make("vit")
    module.config.id2label = dict(enumerate(NAMES))
    module.config.label2id = {name: i for i, name in enumerate(NAMES)}
    return ip.wrap(module)


@pytest.fixture(scope="module")
def clean(model) -> ip.Inputs:
    return model.inputs(zoo.random_images(ROWS, 1))


@pytest.fixture(scope="module")
def corrupt(model, clean) -> ip.Inputs:
    """The same images but for the two patches on the right."""
    pixels = clean.pixels.clone()
    pixels[..., 4:] = zoo.random_images(ROWS, 2)[..., 4:]
    return model.inputs(pixels)


def values(model: ip.Model, inputs: ip.Inputs, edits: dict | None = None) -> dict:
    with torch.no_grad():
        return oracle.forward(model.module, inputs.pixels, inputs.mask, edits)[1]


def diff(logits: Tensor) -> np.ndarray:
    return (logits[:, 0, 1] - logits[:, 0, 4]).numpy()


def brute(model: ip.Model, base: ip.Inputs, source: ip.Inputs, name: str) -> np.ndarray:
    """Effects [layer, pos, row] of patching a site ([layer, head, pos, row] where it has heads)."""
    donor, unedited = values(model, source), diff(values(model, base)["logits", None])
    heads = range(HEADS) if name == "z" else [slice(None)]
    effect = np.zeros((LAYERS, len(heads), TOKENS, ROWS))
    for layer in range(LAYERS):
        for h, head in enumerate(heads):
            for pos in range(TOKENS):

                def edit(x: Tensor, layer: int = layer, pos: int = pos, head: int | slice = head) -> Tensor:
                    x = x.clone()
                    x[:, pos, head] = donor[name, layer][:, pos, head]
                    return x

                logits = values(model, base, {(name, layer): edit})["logits", None]
                effect[layer, h, pos] = diff(logits) - unedited
    return effect if name == "z" else effect[:, 0]


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("name", ["resid_pre", "z", "mlp_out"])
def test_sweeps_against_brute_force(model, clean, corrupt, name, direction):
    base, source = (corrupt, clean) if direction == "denoising" else (clean, corrupt)
    expected = brute(model, base, source, name)
    assert np.abs(expected).max() > 0.1
    axes = {"layer": "all", **({"head": "all"} if name == "z" else {}), "pos": "all"}
    for executor, budget in RUNS[direction == "noising" :: 2]:
        options = {"metric": METRIC, "direction": direction, "executor": executor, "budget": budget}
        result = ip.sweep(model, clean, corrupt, ip.grid(name, **axes), **options)
        np.testing.assert_allclose(result.effect, expected, **CLOSE)
        np.testing.assert_allclose(result.base, diff(values(model, base)["logits", None]), **CLOSE)
        np.testing.assert_allclose(result.source, diff(values(model, source)["logits", None]), **CLOSE)
        assert result.axes[-1].labels == POSITIONS and result.rows == ("row 0", "row 1", "row 2")
        assert result.config["executor"] == executor and float(result.noise_floor) < 1e-12


def test_patches_in_which_both_images_agree_are_inert(model, clean, corrupt):
    """And of the last layer everything is out of reach but the class token."""
    result = ip.sweep(model, clean, corrupt, ip.grid("resid_pre", layer="all", pos="all"), metric=METRIC)
    assert result.config["executor"] == "shared"
    assert result.status[0].tolist() == [1, 1, 0, 1, 0]
    assert result.status[1:].max() == 0
    assert (result.effect[0, [0, 1, 3]] == 0).all()
    result = ip.sweep(model, clean, corrupt, ip.grid("z", layer="all", pos="all"), metric=METRIC)
    assert result.status[-1].tolist() == [0, 2, 2, 2, 2] and (result.effect[-1, 1:] == 0).all()


def test_a_whole_residual_is_the_whole_effect(model, clean, corrupt):
    for name in ("resid_pre", "resid_post", "logits", "ln_final", "embed"):
        axes = {"layer": "all"} if name.startswith("resid") else {}
        result = ip.sweep(model, clean, corrupt, ip.grid(name, **axes), metric=METRIC)
        np.testing.assert_allclose(result.normalized(), 1.0, **CLOSE)
    result = ip.sweep(model, clean, corrupt, ip.grid("resid_post", layer=[2], pos="all"), metric=METRIC)
    np.testing.assert_allclose(result.normalized()[0], [1, 0, 0, 0, 0], **CLOSE)


def test_a_grid_over_the_logits_has_one_position(model, clean, corrupt):
    result = ip.sweep(model, clean, corrupt, ip.grid("logits", pos="all"), metric=METRIC)
    assert len(result.axes[0]) == 1
    np.testing.assert_allclose(result.normalized(), [1.0], **CLOSE)
    result = ip.sweep(model, clean, corrupt, ip.grid("logits", pos=[-1], dim=[1, 2]), metric=METRIC)
    expected = values(model, clean)["logits", None] - values(model, corrupt)["logits", None]
    np.testing.assert_allclose(result.effect[0], [expected[:, 0, 1], np.zeros(ROWS)], **CLOSE)
    with pytest.raises(SiteError, match="different numbers of pos"):
        ip.sweep(model, clean, corrupt, ip.grid(["embed", "logits"], pos="all"), metric=METRIC)
    with pytest.raises(SiteError, match="1 position"):
        ip.sweep(model, clean, corrupt, ip.grid("logits", pos=[2]), metric=METRIC)


def test_ablations(model, clean):
    """Zero, mean over other images, noise; one image set and no other."""
    reference = ip.World(model.inputs(zoo.random_images(6, 5)))
    grid = ip.grid("z", layer="all", head="all")
    for intervention in (
        ip.zero,
        lambda place: ip.mean(place, reference),
        lambda place: ip.noise(place, 0.5),
        lambda place: ip.resample(place, reference),
    ):
        found = [
            ip.sweep(model, clean, None, grid, metric=METRIC, intervention=intervention, executor=e, budget=b).effect
            for e, b in RUNS
        ]
        for effect in found[1:]:
            np.testing.assert_allclose(effect, found[0], **CLOSE)
        assert np.abs(found[0]).min(axis=-1).max() > 1e-3
    donor = values(model, reference.inputs)["z", 1][:, :, 2].mean(0)

    def edit(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, :, 2] = donor
        return x

    expected = diff(values(model, clean, {("z", 1): edit})["logits", None]) - diff(values(model, clean)["logits", None])
    result = ip.sweep(model, clean, None, grid, metric=METRIC, intervention=lambda p: ip.mean(p, reference))
    np.testing.assert_allclose(result.effect[1, 2], expected, **CLOSE)


def test_edges_of_attention_in_both_directions(model, clean):
    grid = ip.grid("scores", layer=[1], pos=[0, 3], key_pos="all")
    result = ip.sweep(model, clean, None, grid, metric=METRIC, intervention=ip.knockout)
    assert result.axes[2].labels == POSITIONS
    assert np.abs(result.effect).min(axis=-1).min() > 1e-6  # the keys after a query count too


# Resuming


def test_a_sweep_saved_and_resumed(model, clean, corrupt, tmp_path):
    """Whatever interrupts it, with inputs made anew; other images are another sweep."""
    grid, path = ip.grid("resid_pre", layer="all", pos="all"), tmp_path / "sweep"
    whole = ip.sweep(model, clean, corrupt, grid, metric=METRIC)
    stop_after(7, lambda: ip.sweep(model, clean, corrupt, grid, metric=METRIC, path=path, budget=1))
    assert np.load(tmp_path / "sweep.partial" / "done.npy").sum() == 7
    moved = corrupt.pixels.clone()
    moved[0, 0, 0, 0] += 1e-9
    for pair, what in (((clean, model.inputs(moved)), "inputs"), ((model.inputs(moved), corrupt), "source")):
        with pytest.raises(ResultError, match=f"belongs to another sweep: it differs in {what}"):
            ip.sweep(model, *pair, grid, metric=METRIC, path=path)
    again = [model.inputs(x.pixels.clone()) for x in (clean, corrupt)]
    result = ip.sweep(model, *again, grid, metric=METRIC, path=path)
    np.testing.assert_allclose(result.effect, whole.effect, **CLOSE)
    assert not (tmp_path / "sweep.partial").exists()
    loaded = ip.Result.load(path)
    np.testing.assert_array_equal(loaded.effect, result.effect)
    assert loaded.axes[1].labels == POSITIONS


def stop_after(calls: int, sweep: Callable[[], object]) -> None:
    """Run a sweep until it has written some values, and interrupt it."""
    done, write = [], Stream.write

    def writing(self, *args, **kwargs) -> None:
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(1)
        write(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Stream, "write", writing)
        with pytest.raises(KeyboardInterrupt):
            sweep()


# Metrics


def test_metrics_of_classes(model, clean, corrupt):
    logits = values(model, clean)["logits", None][:, 0]
    logp, rows = logits.log_softmax(-1), torch.arange(ROWS)
    expected = {
        ip.logit("dog"): logits[:, 1],
        ip.logit_diff("dog", "hen"): logits[:, 1] - logits[:, 4],
        ip.logit_diff(["dog", "cat", "bee"], [4, 4, "fox"]): logits[rows, [1, 0, 5]] - logits[rows, [4, 4, 2]],
        ip.logit([[0, "dog"]] * 3): logits[:, :2].mean(1),
        ip.log_prob("owl"): logp[:, 3],
        ip.prob(3, pos=0): logp[:, 3].exp(),
        ip.prob([["owl", "bee"]] * 3, pos=None): logp[:, [3, 5]].exp().sum(1),
        ip.rank("fox"): (logits > logits[:, 2:3]).sum(1).double(),
        ip.accuracy(logits.argmax(1)): torch.ones(ROWS).double(),
        ip.accuracy([NAMES[i] for i in logits.argmin(1).tolist()]): torch.zeros(ROWS).double(),
    }
    for metric, value in expected.items():
        for executor in ("sequential", "batched", "shared"):
            found = ip.evaluate(model, clean, metric, executor=executor)
            torch.testing.assert_close(found, value, **CLOSE, msg=lambda text, m=metric: f"{m}: {text}")
    other = values(model, corrupt)["logits", None][:, 0].log_softmax(-1)
    for pos in (-1, 0, None):
        found = ip.evaluate(model, clean, ip.kl(ip.World(corrupt), pos=pos))
        torch.testing.assert_close(found, (other.exp() * (other - logp)).sum(1), **CLOSE)
    result = ip.sweep(model, clean, corrupt, ip.grid("resid_post", layer=[2]), metric=[ip.kl(), ip.logit("dog")])
    np.testing.assert_allclose(result.sel(metric="kl").effect[0], -result.sel(metric="kl").base, **CLOSE)


def test_metrics_that_images_do_not_have(model, clean):
    with pytest.raises(MetricError, match="log_prob"):
        ip.evaluate(model, clean, ip.cross_entropy())
    with pytest.raises(InputsError, match="did you mean 'dog'"):
        ip.evaluate(model, clean, ip.logit("dogs"))
    with pytest.raises(MetricError, match="6 classes"):
        ip.evaluate(model, clean, ip.logit(6))
    with pytest.raises(SiteError, match="1 position"):
        ip.evaluate(model, clean, ip.logit(1, pos=3))


def test_labels_are_for_classifiers_only():
    """Every config of transformers has labels, of a language model too, where they mean nothing."""
    language = ip.wrap(zoo.make("gpt2"))
    assert language.module.config.label2id
    with pytest.raises(InputsError, match="tokenizer"):
        ip.evaluate(language, language.inputs([[1, 2]]), ip.logit("LABEL_0"))


# First order


def test_attribution(model, clean, corrupt):
    """Exact after the last norm; elsewhere the gradient times the change, and first order in it."""
    for name in ("ln_final", "logits"):
        pair = [f(model, clean, corrupt, ip.grid(name), metric=METRIC) for f in (ip.attribution, ip.sweep)]
        np.testing.assert_allclose(pair[0].effect, pair[1].effect, **CLOSE)
        assert np.abs(pair[0].effect).min() > 1e-3
    grid = ip.grid("z", layer="all", pos="all")
    result = ip.attribution(model, clean, corrupt, grid, metric=METRIC)
    assert result.axes[1].labels == POSITIONS
    donor = values(model, clean)
    for layer in range(LAYERS):
        leaf = values(model, corrupt)["z", layer].requires_grad_()
        edits = {("z", layer): lambda x, leaf=leaf: leaf}
        logits, _ = oracle.forward(model.module, corrupt.pixels, corrupt.mask, edits)
        (gradient,) = torch.autograd.grad((logits[:, 0, 1] - logits[:, 0, 4]).sum(), leaf)
        product = (gradient * (donor["z", layer] - leaf.detach())).sum((2, 3))
        np.testing.assert_allclose(result.effect[layer], product.T, **CLOSE)
    small = model.inputs(corrupt.pixels + 1e-5 * (clean.pixels - corrupt.pixels))
    pair = [f(model, small, corrupt, grid, metric=METRIC).effect for f in (ip.attribution, ip.sweep)]
    assert np.abs(pair[0] - pair[1]).max() < 1e-3 * np.abs(pair[1]).max()


# Lenses


def test_the_logit_lens(model, clean):
    found, spec = values(model, clean), oracle.read(model.module)
    lens = ip.logit_lens(model, clean)
    points = [found["resid_pre", 0], *(found["resid_post", layer] for layer in range(LAYERS))]
    for point, residual in zip(lens.logits, points, strict=True):
        torch.testing.assert_close(point, (spec.norm(residual) @ spec.W_U.T + spec.b_U).detach(), **CLOSE)
    top = lens.top(model, k=2, row=1)
    for point, listed in enumerate(top):
        chances = lens.logits[point, 1, 0].softmax(-1)
        best = chances.argsort(descending=True)[:2]
        assert [name for name, _ in listed] == [NAMES[i] for i in best]
    assert lens.top(model, row=1, pos=4) != lens.top(model, row=1)
    result = ip.logit_lens(model, clean, METRIC)
    expected = [diff(point[:, :1]) for point in lens.logits]
    np.testing.assert_allclose(result.effect, expected, **CLOSE)
    np.testing.assert_allclose(result.effect[-1], ip.evaluate(model, clean, METRIC), **CLOSE)


@pytest.mark.parametrize("heads", [True, False])
def test_the_parts_of_a_logit_add_up_to_it(model, clean, heads):
    logits = values(model, clean)["logits", None][:, 0]
    for foil, whole in ((None, logits[:, 1]), ("hen", logits[:, 1] - logits[:, 4])):
        for pos in (-1, 0):
            result = ip.direct_logit_attribution(model, clean, "dog", foil, pos=pos, heads=heads)
            np.testing.assert_allclose(result.effect.sum(0), whole, **CLOSE)
            assert result.axes[0].labels[-2:] == ("norm_bias", "unembed_bias")
    with pytest.raises(MetricError, match="one position"):
        ip.direct_logit_attribution(model, clean, "dog", pos=2)


# Paths


def edges_by_hand(model: ip.Model, base: ip.Inputs, changes: dict, names: list[str]) -> np.ndarray:
    """The effect [edge, row] of adding what a writer's change is to what one reader reads, in the oracle."""
    unedited, effect = diff(values(model, base)["logits", None]), []
    for name in names:
        writer, reader = name.split("->")
        if reader == "logits":
            edits = {("resid_post", LAYERS - 1): lambda x, d=changes[writer]: x + d}
        elif reader.startswith("m"):
            edits = {("mlp_in", int(reader[1:])): lambda x, d=changes[writer]: x + d}
        else:
            layer, rest = reader[1:].split(".h")
            head = int(rest[0])

            def add(x: Tensor, d: Tensor = changes[writer], head: int = head) -> Tensor:
                x = x.clone()
                x[:, :, head] += d
                return x

            edits = {(f"{rest[2]}_input", int(layer)): add}
        effect.append(diff(values(model, base, edits)["logits", None]) - unedited)
    return np.array(effect)


def writers(found: dict) -> dict[str, Tensor]:
    """What each part adds to the residual stream, by the name that a graph has for it."""
    heads = {f"a{i}.h{h}": found["result", i][:, :, h] for i in range(LAYERS) for h in range(HEADS)}
    return {"input": found["resid_pre", 0], **heads, **{f"m{i}": found["mlp_out", i] for i in range(LAYERS)}}


def test_edges_between_patches_and_the_class_token(model, clean, corrupt):
    names = [edge.name for edge in paths.Graph.of(model).select(None, None, None)]
    some = [name for i, name in enumerate(names) if i % 11 == 0 or name.endswith("logits")]
    kinds = ("<q>", "<k>", "<v>", "logits", "m2")
    assert all(any(name.endswith(kind) for name in some) for kind in kinds)
    here, there = (writers(values(model, x)) for x in (corrupt, clean))
    expected = edges_by_hand(model, corrupt, {name: there[name] - here[name] for name in here}, some)
    # The class token's embedding is the same of every image: it changes nothing that reads it in the last layer.
    idle = [name for name, row in zip(some, np.abs(expected).max(1), strict=True) if row < 1e-9]
    last = {"m2", "logits", *(f"a2.h{head}<q>" for head in range(HEADS))}
    assert set(idle) == {name for name in some if name.startswith("input->") and name.split("->")[1] in last} != set()
    for executor in ("sequential", "batched", "shared"):
        result = paths.edge_sweep(model, clean, corrupt, metric=METRIC, edges=some, executor=executor)
        np.testing.assert_allclose(result.effect, expected, **CLOSE)


def test_edges_resampled_from_other_images(model, clean):
    reference, names = model.inputs(zoo.random_images(4, 8)), ["a0.h1->logits", "m1->m2", "input->a2.h3<v>"]
    drawn = choice(4, 5, clean.row_ids)
    here, there = (writers(values(model, x)) for x in (clean, model.inputs(reference.pixels[drawn])))
    expected = edges_by_hand(model, clean, {name: there[name] - here[name] for name in here}, names)
    options = {"metric": METRIC, "edges": names, "values": "resample", "reference": reference, "seed": 5}
    result = paths.edge_sweep(model, clean, None, **options)
    np.testing.assert_allclose(result.effect, expected, **CLOSE)
    assert np.abs(expected).max() > 1e-3


# Pictures


def test_heatmaps_and_tables(model, clean, corrupt):
    result = ip.sweep(model, clean, corrupt, ip.grid("resid_pre", layer="all", pos="all"), metric=METRIC)
    ax = ip.plots.heatmap(result)
    ax.figure.canvas.draw()
    assert [tick.get_text() for tick in ax.get_xticklabels()] == list(POSITIONS)
    assert set(result.to_frame()["pos"]) == set(range(TOKENS))


def test_a_pattern_that_looks_both_ways_is_drawn_whole(model, clean):
    pattern = model.run(clean, capture="blocks.1.attn.hook_pattern").tape["blocks.1.attn.hook_pattern"][0, 0]
    drawn = ip.plots.attention(pattern, clean.labels()).images[0].get_array()
    np.testing.assert_allclose(np.ma.filled(drawn, np.nan), pattern)
    causal = ip.plots.attention(pattern.tril(), clean.labels()).images[0].get_array()
    assert np.isnan(np.ma.filled(causal, np.nan)).sum() == 10


# Loading, and what is refused


def test_a_folder_with_an_image_classifier(model, tmp_path):
    module = zoo.make("vit", dtype=torch.float32)
    module.config.id2label, module.config.label2id = model.module.config.id2label, model.module.config.label2id
    module.save_pretrained(tmp_path / "m")
    pixels = zoo.random_images(2).float()
    loaded = ip.load(tmp_path / "m")
    assert type(loaded.module) is type(module) and loaded.tokenizer is None and not loaded.module.training
    with torch.no_grad():
        assert torch.equal(loaded.run(loaded.inputs(pixels)).logits[:, 0], module(pixels).logits)
    assert loaded.token("owl") == 3
    assert ip.load(tmp_path / "m", dtype=torch.float64).dtype == torch.float64
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": "three"}))
    with pytest.raises(ModelError, match="m"):
        ip.load(tmp_path / "m")


def test_prompts_are_refused_before_anything_is_written(model, clean, corrupt, tmp_path):
    words = ip.wrap(zoo.make("gpt2")).inputs([[1, 2, 3, 4, 5]] * ROWS)
    grid = ip.grid("resid_pre", layer="all")
    for pair in ((words, words), (clean, words), (words, corrupt), (clean, model.inputs(corrupt.pixels[:2]))):
        for f in (ip.attribution, ip.sweep):
            options = {"path": tmp_path / "s"} if f is ip.sweep else {}
            with pytest.raises(InputsError):
                f(model, *pair, grid, metric=METRIC, **options)
    with pytest.raises(InputsError):
        ip.sweep(ip.wrap(zoo.make("gpt2")), clean, corrupt, grid, metric=METRIC, path=tmp_path / "s")
    with pytest.raises(InterpError):
        ip.sweep(model, clean.pixels, corrupt.pixels, grid, metric=METRIC)
    assert list(tmp_path.iterdir()) == []
