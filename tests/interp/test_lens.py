"""The logit lens and direct logit attribution against the same written by hand on the oracle's activations."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

import interp as ip
from hooks.errors import InterpError, MetricError
from tests import oracle, zoo

CLOSE = {"rtol": 0, "atol": 1e-10}
LENGTHS = (5, 3, 6)
ANSWER, FOIL = 7, 9


def prompts(lengths=LENGTHS, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, zoo.VOCAB, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module", params=zoo.FAMILIES)
def model(request) -> ip.Model:
    return ip.wrap(zoo.make(request.param))


@pytest.fixture(scope="module", params=["right", "left"])
def padding(request) -> str:
    return request.param


def caches(model: ip.Model, rows: list[list[int]]) -> list[dict]:
    found = []
    with torch.no_grad():
        for row in rows:
            found.append(
                oracle.forward(model.module, torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool))[1]
            )
    return found


def columns(inputs: ip.Inputs, row: int) -> Tensor:
    """The columns of a row's real tokens, by position."""
    return inputs.mask[row].nonzero().flatten()


# The logit lens


def test_every_residual_read_out_as_if_it_were_the_last(model, padding):
    rows = prompts()
    inputs, spec = model.inputs(rows, padding=padding), oracle.read(model.module)
    lens = ip.logit_lens(model, inputs)
    assert lens.points == ("embed", *map(str, range(model.n_layers)))
    assert lens.logits.shape == (model.n_layers + 1, 3, 6, zoo.VOCAB)
    for row, cache in enumerate(caches(model, rows)):
        residuals = [cache["resid_pre", 0]] + [cache["resid_post", layer] for layer in range(model.n_layers)]
        for point, residual in enumerate(residuals):
            expected = spec.logits(spec.norm(residual))[0].detach()
            torch.testing.assert_close(lens.logits[point, row, columns(inputs, row)], expected, **CLOSE)
        torch.testing.assert_close(lens.logits[-1, row, columns(inputs, row)], cache["logits", None][0], **CLOSE)
    assert not lens.logits.requires_grad


def test_the_likeliest_tokens_at_each_point(model, padding):
    inputs = model.inputs(prompts(), padding=padding)
    lens = ip.logit_lens(model, inputs)
    for row, pos in ((0, -1), (1, 0), (1, -2), (2, 5)):
        column = columns(inputs, row)[pos]
        top = lens.top(model, k=4, row=row, pos=pos)
        assert len(top) == model.n_layers + 1
        for point, listed in enumerate(top):
            chances = lens.logits[point, row, column].softmax(-1)
            best = chances.argsort(descending=True)[:4]
            assert [name for name, _ in listed] == [str(int(i)) for i in best]
            np.testing.assert_allclose([p for _, p in listed], chances[best], rtol=0, atol=1e-6)
    for row, pos in ((1, 3), (1, -4), (0, 9)):
        with pytest.raises(InterpError):  # a row's padding, and the last column of another row, are no positions
            lens.top(model, row=row, pos=pos)
    with pytest.raises((InterpError, IndexError)):
        lens.top(model, row=7)


def test_a_metric_of_every_point(model, padding):
    rows = prompts()
    inputs, spec = model.inputs(rows, padding=padding), oracle.read(model.module)
    logits = []
    for cache in caches(model, rows):
        residuals = [cache["resid_pre", 0]] + [cache["resid_post", layer] for layer in range(model.n_layers)]
        logits.append([spec.logits(spec.norm(r))[0].detach() for r in residuals])
    for metric, by_hand in (
        (ip.logit_diff(ANSWER, FOIL), lambda x: x[-1, ANSWER] - x[-1, FOIL]),
        (ip.log_prob(ANSWER, pos=1), lambda x: x[1].log_softmax(-1)[ANSWER]),
        (ip.rank(ANSWER), lambda x: (x[-1] > x[-1, ANSWER]).sum()),
        (ip.logit([1, 2, 3]), None),
    ):
        result = ip.logit_lens(model, inputs, metric)
        assert isinstance(result, ip.Result) and result.metrics == (metric.name,)
        assert [(a.name, a.values) for a in result.axes] == [("layer", ("embed", *map(str, range(model.n_layers))))]
        expected = np.array(
            [
                [float(by_hand(points[p]) if by_hand else points[p][-1, row + 1]) for row, points in enumerate(logits)]
                for p in range(model.n_layers + 1)
            ]
        )
        np.testing.assert_allclose(result.effect, expected, **CLOSE)
        np.testing.assert_allclose(result.effect[-1], ip.evaluate(model, inputs, metric), **CLOSE)
        assert (result.base == 0).all() and result.source is None


def test_the_mean_over_positions_is_of_each_rows_own(model, padding):
    inputs = model.inputs(prompts(), padding=padding)
    result = ip.logit_lens(model, inputs, ip.logit(ANSWER, pos=None))
    lens = ip.logit_lens(model, inputs)
    expected = torch.stack([lens.logits[:, row, columns(inputs, row), ANSWER].mean(1) for row in range(3)], 1)
    np.testing.assert_allclose(result.effect, expected, **CLOSE)


def test_what_the_lens_does_not_measure():
    model = ip.wrap(zoo.make("gpt2"))
    inputs = model.inputs(prompts())
    for metric in (
        ip.kl(ip.World(inputs)),
        ip.kl(),
        ip.metric(lambda x: x[:, 0, 0], ip.site("resid_post", layer=0, pos=-1)),
    ):
        with pytest.raises(MetricError, match="logits alone"):
            ip.logit_lens(model, inputs, metric)


# Direct logit attribution


def uncapped(model: ip.Model) -> ip.Model:
    """The same model without the cap of its logits, which attribution is not of."""
    if model.architecture.cap is None:
        return model
    module = copy.deepcopy(model.module)
    module.config.final_logit_softcapping = None
    return ip.wrap(module)


def held(norm: oracle.Norm, x: Tensor, part: Tensor) -> Tensor:
    """What a norm makes of a part of x [M]: its own centring, the scale of the whole, and the gain."""
    centre = (lambda x: x - x.mean()) if norm.centered else (lambda x: x)
    return centre(part) / (centre(x).pow(2).mean() + norm.eps).sqrt() * norm.weight


def by_hand(model: ip.Model, cache: dict, pos: int, direction: Tensor) -> dict[str, float]:
    """Each component's share."""
    spec = oracle.read(model.module)
    norm, last = spec.norm, cache["resid_post", model.n_layers - 1][0, pos]

    def share(x: Tensor) -> float:
        return float((held(norm, last, x) * direction).sum().detach())

    found = {"embed": share(cache["resid_pre", 0][0, pos])}
    for layer, weights in enumerate(spec.layers):
        for head, W_O in enumerate(weights.attn.W_O):
            result = cache["z", layer][0, pos, head] @ W_O
            if weights.post1 is not None:
                result = held(weights.post1, cache["result", layer][0, pos].sum(0) + weights.attn.b_O, result)
            found[f"{layer}.h{head}"] = share(result)
        if bool(weights.attn.b_O.any()):
            found[f"{layer}.attn_bias"] = share(weights.attn.b_O)
        if weights.mlp is not None:
            found[f"{layer}.mlp"] = share(cache["mlp_out", layer][0, pos])
    if norm.bias is not None:
        found["norm_bias"] = float((norm.bias * direction).sum().detach())
    return found


@pytest.mark.parametrize("pos", [-1, 1])
def test_components_by_hand_and_their_sum(model, padding, pos):
    rows = prompts()
    inputs, spec = model.inputs(rows, padding=padding), oracle.read(model.module)
    result = ip.direct_logit_attribution(model, inputs, ANSWER, FOIL, pos=pos)
    assert result.metrics == ("logit_diff",) and result.axes[0].name == "component"
    names = result.axes[0].values
    direction = (spec.W_U[ANSWER] - spec.W_U[FOIL]).detach()
    for row, cache in enumerate(caches(model, rows)):
        expected = by_hand(model, cache, pos, direction)
        assert list(names) == list(expected)  # what a model has, and nothing that is only rounding
        np.testing.assert_allclose(result.effect[:, row], list(expected.values()), **CLOSE)
        whole = spec.W_U @ cache["ln_final", None][0, pos]
        np.testing.assert_allclose(result.effect[:, row].sum(), float((whole[ANSWER] - whole[FOIL]).detach()), **CLOSE)
    assert np.abs(result.effect).max() > 1e-2
    value = ip.evaluate(uncapped(model), inputs, ip.logit_diff(ANSWER, FOIL, pos=pos))
    np.testing.assert_allclose(result.effect.sum(0), value, **CLOSE)


def test_layers_in_place_of_heads(model):
    inputs = model.inputs(prompts())
    heads = ip.direct_logit_attribution(model, inputs, ANSWER, FOIL)
    layers = ip.direct_logit_attribution(model, inputs, ANSWER, FOIL, heads=False)
    assert not any(".h" in name for name in layers.axes[0].values)
    for layer in range(model.n_layers):
        of = [n for n in heads.axes[0].values if n.startswith((f"{layer}.h", f"{layer}.attn_bias"))]
        assert len(of) >= 4
        summed = heads.sel(component=of).effect.sum(0)
        np.testing.assert_allclose(layers.sel(component=f"{layer}.attn").effect, summed, **CLOSE)
    np.testing.assert_allclose(layers.effect.sum(0), heads.effect.sum(0), **CLOSE)


def test_answers_of_each_row_and_of_several_tokens(model):
    inputs = model.inputs(prompts())
    for answer, foil in (
        ([7, 8, 9], [1, 2, 3]),
        ([[7, 8], [9, 10], [11, 12]], 4),
        (7, [[1, 2, 3], [4, 5, 6], [8, 9, 10]]),
        (7, None),
        ([7, 8, 9], None),
    ):
        result = ip.direct_logit_attribution(model, inputs, answer, foil)
        metric = ip.logit(answer) if foil is None else ip.logit_diff(answer, foil)
        assert result.metrics == (metric.name,)
        np.testing.assert_allclose(result.effect.sum(0), ip.evaluate(uncapped(model), inputs, metric), **CLOSE)


def test_what_attribution_of_logits_refuses():
    model = ip.wrap(zoo.make("gpt2"))
    inputs = model.inputs(prompts())
    with pytest.raises(InterpError, match="row 1"):
        ip.direct_logit_attribution(model, inputs, ANSWER, FOIL, pos=4)
    with pytest.raises(MetricError, match="2 answers for 3 rows"):
        ip.direct_logit_attribution(model, inputs, [1, 2])
    for pos in ((0, 1), slice(0, 2), None):  # one position is split; several are not silently cut to the first
        with pytest.raises(InterpError):
            ip.direct_logit_attribution(model, inputs, ANSWER, FOIL, pos=pos)
