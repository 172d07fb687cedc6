"""Answers of several tokens at the end of a text, against plain torch on the bare model, each row alone."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

import interp as ip
from hooks.errors import MetricError, ResultError
from interp.cli import main
from interp.tasks import shipped_task
from tests import zoo
from tests.interp.test_metrics import bare, check, prompts

ANSWERS = ([7, 8, 9], [10], [11, 12], [13, 14, 15, 16])
FOILS = ([7, 8, 10], [3], [11, 2], [13, 5])


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request) -> ip.Model:
    return ip.wrap(zoo.make(request.param))


@pytest.fixture(scope="module", params=["right", "left"])
def told(request, model):
    """Texts that end with their answers, of other lengths in other rows, and the bare model's log-probabilities."""
    rows = [row + answer for row, answer in zip(prompts(), ANSWERS, strict=True)]
    return model.inputs(rows, padding=request.param), [x.log_softmax(-1) for x in bare(model, rows)]


def summed(logp, answer, spelled):
    """The log-probability of an answer at the positions before the tokens of one that is spelled out."""
    return sum(logp[len(logp) - len(spelled) - 1 + i, token] for i, token in enumerate(answer))


def test_each_token_is_read_before_it(model, told):
    inputs, logp = told
    each = [summed(x, a, a) for x, a in zip(logp, ANSWERS, strict=True)]
    check(model, inputs, ip.log_prob(ANSWERS, pos="answer"), each)
    check(model, inputs, ip.prob(ANSWERS, pos="answer"), [e.exp() for e in each])
    less = [e - summed(x, f, a) for e, x, a, f in zip(each, logp, ANSWERS, FOILS, strict=True)]
    check(model, inputs, ip.logit_diff(ANSWERS, FOILS, pos="answer"), less)
    ranks = [
        max(int((x[len(x) - len(a) - 1 + i] > x[len(x) - len(a) - 1 + i, t]).sum()) for i, t in enumerate(a))
        for x, a in zip(logp, ANSWERS, strict=True)
    ]
    assert len(set(ranks)) > 2
    check(model, inputs, ip.rank(ANSWERS, pos="answer"), ranks)


def test_accuracy_is_that_of_the_whole_answer(model):
    [row] = prompts((5,))
    decoded = list(row)
    for _ in range(3):
        decoded.append(int(bare(model, [decoded])[0][-1].argmax()))
    wrong = [*decoded[:-2], (decoded[-2] + 1) % zoo.VOCAB or 1, decoded[-1]]
    inputs = model.inputs([decoded, wrong])
    metric = ip.accuracy([decoded[-3:], wrong[-3:]], pos="answer")
    assert ip.evaluate(model, inputs, metric).tolist() == [1.0, 0.0]
    assert float(ip.evaluate(model, inputs, ip.rank([decoded[-3:], wrong[-3:]], pos="answer"))[0]) == 0.0


def test_tokens_for_listed_positions(model):
    rows, ways = prompts(), [[7, 8], [9, 10], [11, 12], [13, 14]]
    inputs, logits = model.inputs(rows), bare(model, rows)
    foils = [[t + 1 for t in w] for w in ways]
    each = [x[-3, w[0]] - x[-3, f[0]] + x[-2, w[1]] - x[-2, f[1]] for x, w, f in zip(logits, ways, foils, strict=True)]
    check(model, inputs, ip.logit_diff(ways, foils, pos=(-3, -2)), each)
    for refused in (ip.logit_diff(ways, 5, pos=(-3, -2)), ip.logit(ways, pos=(-3, -2)), ip.rank(ways, pos=(0, 1, 2))):
        with pytest.raises(MetricError):
            ip.evaluate(model, inputs, refused)


def test_what_an_answer_is_not(model, told):
    inputs, _ = told
    with pytest.raises(MetricError, match=r"parts from the answer .* Result\.minus"):
        ip.evaluate(model, inputs, ip.logit_diff(ANSWERS, [[7, 1, 9], *FOILS[1:]], pos="answer"))
    with pytest.raises(MetricError, match="row 2 does not go on to the answer"):
        ip.evaluate(model, inputs, ip.log_prob([*ANSWERS[:2], [12, 11], ANSWERS[3]], pos="answer"))
    with pytest.raises(MetricError, match="constants"):
        ip.evaluate(model, inputs, ip.logit(ANSWERS, pos="answer"))
    with pytest.raises(MetricError, match="knows of no answer"):
        ip.kl(ip.World(inputs), pos="answer")  # type: ignore[arg-type]
    with pytest.raises(MetricError, match="at least one token"):
        ip.evaluate(model, inputs, ip.log_prob([[], *ANSWERS[1:]], pos="answer"))
    with pytest.raises(MetricError, match="does not go on"):  # nothing comes before it
        ip.evaluate(model, model.inputs([[7, 8]]), ip.log_prob([[7, 8]], pos="answer"))
    config = BertConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    bert = ip.wrap(BertForMaskedLM(config).eval())
    with pytest.raises(MetricError, match="see later ones"):
        ip.evaluate(bert, bert.inputs([[5, 7, 8]]), ip.log_prob([[7, 8]], pos="answer"))


def test_sweeps_edges_and_gradients_measure_it(model, told):
    """Effects on an answer are those on its parts together, whichever executor; attribution and edges take it too."""
    inputs, _ = told
    others = [row + a for row, a in zip(prompts(seed=1), ANSWERS, strict=True)]
    corrupt = model.inputs(others)
    cells = ip.grid("resid_pre", layer="all", pos=[0, 1])
    metric = ip.log_prob(ANSWERS, pos="answer")
    found = [ip.sweep(model, inputs, corrupt, cells, metric=metric, executor=e) for e in ("sequential", "shared")]
    assert abs(found[0].effect).max() > 1e-3
    torch.testing.assert_close(*(torch.tensor(f.effect) for f in found), rtol=0, atol=1e-10)
    again = ip.evaluate(
        model,
        ip.World(corrupt, ip.Plan((ip.patch(ip.site("resid_pre", 1, pos=1), ip.World(inputs)),))),
        metric,
    )
    torch.testing.assert_close(torch.tensor(found[0].effect[1, 1] + found[0].base), again, rtol=0, atol=1e-10)
    first = ip.attribution(model, inputs, corrupt, cells, metric=metric)
    assert abs(first.effect).max() > 1e-3
    pair = ip.paths.Pair.of(model, inputs, corrupt, direction="noising")
    edges = ip.paths.edge_sweep(pair, metric=ip.logit_diff(ANSWERS, FOILS, pos="answer"))
    assert abs(edges.effect).max() > 1e-3


def test_a_foil_in_a_text_of_its_own(model):
    """The effect on answer less foil, each after its own tokens, is one result less the other."""
    start, other = prompts(), prompts(seed=1)
    foils = [[a + 3 for a in answer] for answer in ANSWERS]
    cells = ip.grid("z", layer="all", pos=[1])
    parts = []
    for ends in (ANSWERS, foils):
        sides = [model.inputs([row + end for row, end in zip(rows, ends, strict=True)]) for rows in (start, other)]
        parts.append(ip.sweep(model, *sides, cells, metric=ip.log_prob(ends, pos="answer")))
    less = parts[0].minus(parts[1], "answer - foil")
    assert less.metrics == ("answer - foil",)
    torch.testing.assert_close(torch.tensor(less.effect), torch.tensor(parts[0].effect - parts[1].effect))
    assert abs(less.effect).max() > 1e-4
    assert less.source is not None
    assert float(less.noise_floor) >= float(parts[0].noise_floor)
    with pytest.raises(ResultError, match="axis 'pos'"):
        parts[0].minus(ip.sweep(model, *sides, ip.grid("z", layer="all", pos=[2]), metric=ip.log_prob(5)))


def test_a_text_is_its_answer_in_words(capsys):
    """Texts of several tokens, in words and at the command line."""
    model = ip.load("ioi-mini")
    task = shipped_task(2)
    answers = [f"{a} {b}" for a, b in zip(task.answer, task.foil, strict=True)]
    clean = model.inputs([f"{t} {a}" for t, a in zip(task.clean, answers, strict=True)])
    ids = torch.tensor([[model.token(a), model.token(b)] for a, b in zip(task.answer, task.foil, strict=True)])
    expected = ip.evaluate(model, clean, ip.log_prob(ids, pos=(-3, -2)))
    torch.testing.assert_close(ip.evaluate(model, clean, ip.log_prob(answers, pos="answer")), expected)
    given = ["--clean", task.clean[0], "--corrupt", task.corrupt[0], "--answer", answers[0]]
    assert main(["patch", "--site", "resid_pre", "--axes", "layer", *given]) == 0
    assert "log_prob" in capsys.readouterr().out
    swapped = " ".join(reversed(answers[0].split()))
    assert main(["patch", "--site", "resid_pre", "--axes", "layer", *given, "--foil", swapped]) == 2
    assert "parts from the answer" in capsys.readouterr().err
