"""Judging: agreement by its definitions, and a judge that knows a good score from a bad one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp as ip
from interp.kv import agreement, policies
from tests import zoo
from tests.kv.test_effects import CONTEXT, texts


def test_correlations_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for a, b in ((rng.normal(size=40), rng.normal(size=40)), (rng.integers(0, 4, 40), rng.integers(0, 4, 40))):
        assert agreement.spearman(a, b) == pytest.approx(stats.spearmanr(a, b)[0])
        assert agreement.tau(a, b) == pytest.approx(stats.kendalltau(a, b)[0])
    assert np.isnan(agreement.spearman(np.ones(4), np.arange(4)))


def test_recall():
    effects = np.array([[5.0, 1.0, 4.0], [0.0, 3.0, 2.0]])
    assert agreement.recall(np.array([[True, False, True], [False, True, False]]), effects) == 1
    assert agreement.recall(np.array([[True, True, False], [True, False, False]]), effects) == pytest.approx(1 / 3)


@pytest.fixture(scope="module")
def judged():
    model = zoo.wrapped("llama")
    contexts, suffixes = texts(1, rows=2)
    exact = ip.kv.kv_effects(model, contexts, suffixes).effect
    known = policies.given(np.abs(exact[..., 0]), "first row's")
    found = ip.kv.judge(
        model, contexts, suffixes, [known, policies.h2o(), policies.value_gradient], budgets=(0.3, 0.6, 1.0)
    )
    return model, contexts, suffixes, found


def test_a_judge_knows_the_effects(judged):
    model, contexts, suffixes, found = judged
    names = list(found.policies)
    assert names[:5] == ["first row's", "H2O", "attention x value x gradient", "random", "leave-one-out"]
    assert found.spearman[0, 0] == pytest.approx(1) and found.kendall[0, 0] == pytest.approx(1)
    assert found.spearman[0, 1] < 0.9
    inverse = names.index("inverted H2O")
    np.testing.assert_allclose(found.spearman[inverse], -found.spearman[1], atol=1e-12)
    np.testing.assert_allclose(found.per_head[0, ..., 0], 1)
    # With the whole budget nothing is lost, whoever chooses.
    np.testing.assert_allclose(found.nll[:, 2], np.broadcast_to(found.full, found.nll[:, 2].shape), atol=1e-10)
    assert (found.recall[:, 2] == 1).all() and np.abs(found.regret[:, 0]).max() > 1e-2
    cached = ip.kv.Cached.of(model, contexts[0], suffixes[0])
    scores = torch.from_numpy(ip.kv.scores_of(model, model.inputs([contexts[0]]), policies.h2o()))
    gone = scores.argsort(-1, descending=True).argsort(-1) >= round(0.3 * CONTEXT)
    assert found.nll[1, 0, 0] == pytest.approx(cached.without(gone[None])[0], abs=1e-9)


def test_a_table_a_figure_and_what_is_misjudged(judged):
    found = judged[-1]
    table = found.table()
    assert len(table) == len(found.policies) * 3
    line = next(x for x in table if x["policy"] == "H2O" and x["budget"] == 0.3)
    assert line["regret"] == pytest.approx(found.regret[1, 0].mean()) and line["regret_low"] <= line["regret_high"]
    assert len(found.to_frame()) == len(table)
    drawn = found.figure()
    assert len(drawn.axes) == 3
    row, layer, head, token, text, effect, by_effect, by_score = found.misjudged["random"][0]
    assert by_effect > by_score and text == str(judged[1][row][token])
    exact = ip.kv.kv_effects(judged[0], judged[1][row], judged[2][row]).effect[layer, head, token, 0]
    assert effect == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policies": []}, "different names"),
        ({"policies": [policies.h2o(), policies.h2o()]}, "different names"),
        ({"budgets": (0.0,)}, "shares"),
        ({"budgets": ()}, "shares"),
    ],
)
def test_bad_input(change, message):
    (context,), (suffix,) = texts()
    given = {"policies": [policies.h2o()], **change}
    with pytest.raises(ip.InputsError, match=message):
        ip.kv.judge(zoo.wrapped("llama"), context, suffix, **given)
