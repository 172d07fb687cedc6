"""Metrics against plain formulas on the bare model's logits, each row alone, without padding and without the engine."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

import interp as ip
from hooks import Span
from hooks.errors import InputsError, InterpError, MetricError, SiteError
from hooks.record import run_worlds
from tests import oracle, zoo

FAMILIES = ["gpt2", "llama", "mistral", "small_attn_only"]
LENGTHS = (5, 3, 6, 6)
EXECUTORS = ("sequential", "batched", "shared")
CLOSE = {"rtol": 0, "atol": 1e-10}


def prompts(lengths=LENGTHS, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, zoo.VOCAB, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> ip.Model:
    return ip.wrap(zoo.make(request.param))


@pytest.fixture(scope="module", params=["right", "left"])
def padding(request) -> str:
    return request.param


def bare(model: ip.Model, rows: list[list[int]]) -> list[Tensor]:
    """The logits [T, V] of each row, from the user's own model called on that row alone."""
    found = []
    with torch.no_grad():
        for row in rows:
            output = model.module(torch.tensor([row]))
            found.append((output if isinstance(output, Tensor) else output.logits)[0])
    return found


def check(model: ip.Model, inputs: ip.Inputs | ip.World, metric: ip.Metric, expected) -> None:
    expected = torch.stack([torch.as_tensor(e, dtype=torch.float64) for e in expected])
    assert len(set(expected.tolist())) > 1 or metric.name in ("accuracy", "rank"), "a formula that cannot be wrong"
    for executor in EXECUTORS:
        found = ip.evaluate(model, inputs, metric, executor=executor)
        torch.testing.assert_close(found, expected, **CLOSE)


# One formula each


def test_logit_and_logit_diff(model, padding):
    rows = prompts()
    inputs, logits = model.inputs(rows, padding=padding), bare(model, rows)
    check(model, inputs, ip.logit(7), [x[-1, 7] for x in logits])
    check(model, inputs, ip.logit_diff(7, 9), [x[-1, 7] - x[-1, 9] for x in logits])

    good, bad = [7, 8, 9, 10], [11, 12, 13, 14]
    check(model, inputs, ip.logit(good), [x[-1, g] for x, g in zip(logits, good, strict=True)])
    each = [x[-1, g] - x[-1, b] for x, g, b in zip(logits, good, bad, strict=True)]
    check(model, inputs, ip.logit_diff(good, bad), each)
    check(model, inputs, ip.logit_diff(torch.tensor(good), torch.tensor(bad)), each)

    # Several answers of a row: their mean, against the mean of another number of foils.
    good, bad = [[7, 8], [9, 10], [11, 12], [13, 14]], [[1, 2, 3], [4, 5, 6], [7, 8, 9], [3, 2, 1]]
    several = [x[-1, g].mean() - x[-1, b].mean() for x, g, b in zip(logits, good, bad, strict=True)]
    check(model, inputs, ip.logit_diff(good, bad), several)
    check(model, inputs, ip.logit_diff(torch.tensor(good), torch.tensor(bad)), several)
    check(model, inputs, ip.logit_diff(7, bad), [x[-1, 7] - x[-1, b].mean() for x, b in zip(logits, bad, strict=True)])


def test_positions_of_a_metric(model, padding):
    rows = prompts()
    inputs, logits = model.inputs(rows, padding=padding), bare(model, rows)
    check(model, inputs, ip.logit_diff(7, 9, pos=1), [x[1, 7] - x[1, 9] for x in logits])
    check(model, inputs, ip.logit_diff(7, 9, pos=-3), [x[-3, 7] - x[-3, 9] for x in logits])
    check(model, inputs, ip.logit(7, pos=(0, 2)), [(x[0, 7] + x[2, 7]) / 2 for x in logits])
    at = [4, 0, 3, 5]
    check(model, inputs, ip.logit(7, pos=torch.tensor(at)), [x[p, 7] for x, p in zip(logits, at, strict=True)])
    check(model, inputs, ip.prob(7, pos=1), [x[1].softmax(-1)[7] for x in logits])
    with pytest.raises(InterpError, match="row 1"):
        ip.evaluate(model, inputs, ip.logit(7, pos=3))


def test_positions_that_are_more_in_some_rows_than_in_others(model, padding):
    """A mean over positions is over those that the row has: no padding, and no position of another row, is in it."""
    rows, others = prompts(), prompts(seed=1)
    inputs, logits = model.inputs(rows, padding=padding), bare(model, rows)
    reference, other = ip.World(model.inputs(others, padding=padding)), bare(model, others)
    check(model, inputs, ip.logit(7, pos=None), [x[:, 7].mean() for x in logits])
    check(model, inputs, ip.logit_diff(7, 9, pos=slice(1, None)), [(x[1:, 7] - x[1:, 9]).mean() for x in logits])
    divergence = [
        (b.softmax(-1) * (b.log_softmax(-1) - a.log_softmax(-1))).sum(-1) for a, b in zip(logits, other, strict=True)
    ]
    check(model, inputs, ip.kl(reference, pos=None), [d.mean() for d in divergence])
    check(model, inputs, ip.kl(reference, pos=slice(-4, None)), [d[-4:].mean() for d in divergence])
    check(model, inputs, ip.rank(7, pos=None), [(x > x[:, 7:8]).sum(-1).double().mean() for x in logits])
    check(model, inputs, ip.accuracy(7, pos=None), [(x.argmax(-1) == 7).double().mean() for x in logits])


def test_log_prob_and_prob(model, padding):
    rows = prompts()
    inputs, logits = model.inputs(rows, padding=padding), bare(model, rows)
    check(model, inputs, ip.log_prob(7), [x[-1].log_softmax(-1)[7] for x in logits])
    check(model, inputs, ip.prob(7), [x[-1].softmax(-1)[7] for x in logits])

    ways = [[7, 8], [9, 10], [11, 12], [13, 14]]  # at one position: alternatives, of which either will do
    both = [x[-1].softmax(-1)[w].sum() for x, w in zip(logits, ways, strict=True)]
    check(model, inputs, ip.prob(ways), both)
    check(model, inputs, ip.log_prob(ways), [p.log() for p in both])

    # At n positions: an answer of n tokens, each at its own position.
    spelled = [x[-3].log_softmax(-1)[w[0]] + x[-2].log_softmax(-1)[w[1]] for x, w in zip(logits, ways, strict=True)]
    check(model, inputs, ip.log_prob(ways, pos=(-3, -2)), spelled)
    check(model, inputs, ip.prob(ways, pos=(-3, -2)), [s.exp() for s in spelled])
    with pytest.raises(MetricError, match=r"2 .*3"):
        ip.evaluate(model, inputs, ip.log_prob(ways, pos=(-3, -2, -1)))


def test_an_answer_of_several_tokens_needs_as_many_positions_in_every_row(model, padding):
    """Refused or right, however the positions are stated: what a short row is filled up with is never read."""
    rows, ways = prompts((5, 2, 3, 2)), [[7, 8, 9], [9, 10, 1], [11, 12, 3], [13, 14, 2]]
    inputs, logits = model.inputs(rows, padding=padding), bare(model, rows)
    two = [w[:2] for w in ways]
    mask = inputs.mask & (inputs.positions >= inputs.lengths[:, None] - 3)
    for metric in (ip.log_prob, ip.prob):
        for pos in (slice(-3, None), Span(-3), slice(0, 3), slice(-3, -1), slice(1, None), None, mask):
            with pytest.raises(MetricError, match=r"answer tokens for \d to \d positions"):
                ip.evaluate(model, inputs, metric(ways, pos=pos))
        with pytest.raises(InterpError, match="row 1"):
            ip.evaluate(model, inputs, metric(ways, pos=(-3, -2, -1)))
        # As many positions as tokens in this batch, but only because all of its rows are short.
        with pytest.raises(MetricError, match="3 answer tokens for 1 positions"):
            ip.evaluate(model, model.inputs([[3], [4]], padding=padding), metric(ways[:2], pos=slice(-3, None)))
    spelled = [x[-2].log_softmax(-1)[w[0]] + x[-1].log_softmax(-1)[w[1]] for x, w in zip(logits, two, strict=True)]
    last = mask & (inputs.positions >= inputs.lengths[:, None] - 2)
    for pos in (slice(-2, None), (-2, -1), last, torch.stack([inputs.lengths - 2, inputs.lengths - 1], 1)):
        check(model, inputs, ip.log_prob(two, pos=pos), spelled)
    either = [x[-1].softmax(-1)[w].sum() for x, w in zip(logits, ways, strict=True)]
    final = inputs.mask & (inputs.positions == inputs.lengths[:, None] - 1)
    for pos in (slice(-1, None), (-1,), inputs.lengths - 1, (inputs.lengths - 1)[:, None], final):
        check(model, inputs, ip.prob(ways, pos=pos), either)


def test_a_row_without_a_position_has_no_value(model, padding):
    inputs = model.inputs(prompts((5, 2, 3, 2)), padding=padding)
    for metric in (
        ip.logit(7, pos=slice(2, None)),
        ip.log_prob(7, pos=slice(2, 3)),
        ip.kl(ip.World(inputs), pos=Span(2)),
    ):
        with pytest.raises(MetricError, match=r"rows \[1, 3\] have no position"):
            ip.evaluate(model, inputs, metric)


def test_an_answer_that_stands_in_the_prompt(model, padding):
    """The probability of a continuation is the product of the conditionals, read before each of its tokens."""
    rows = prompts()
    inputs, logits = model.inputs(rows, padding=padding), bare(model, rows)
    expected = [
        x[-3].log_softmax(-1)[row[-2]] + x[-2].log_softmax(-1)[row[-1]] for x, row in zip(logits, rows, strict=True)
    ]
    check(model, inputs, ip.log_prob([row[-2:] for row in rows], pos=(-3, -2)), expected)


def test_rank_and_accuracy(model, padding):
    rows = prompts()
    inputs, logits = model.inputs(rows, padding=padding), bare(model, rows)
    check(model, inputs, ip.rank(7), [(x[-1] > x[-1, 7]).sum() for x in logits])
    order = [x[-1].argsort(descending=True) for x in logits]
    for place in (0, 1, 30):
        check(model, inputs, ip.rank([int(o[place]) for o in order]), [place] * len(rows))
    several = [[int(o[9]), int(o[4])] for o in order]
    check(model, inputs, ip.rank(several), [4] * len(rows))

    hits = [int(order[0][0]), int(order[1][1]), int(order[2][0]), int(order[3][1])]
    check(model, inputs, ip.accuracy(hits), [1, 0, 1, 0])
    check(model, inputs, ip.accuracy([[int(o[1]), int(o[0])] for o in order]), [1, 1, 1, 1])


def test_answers_of_each_row_when_rows_are_run_one_at_a_time(model, padding):
    """A metric knows which rows it is given the values of: a budget that cuts after every row changes nothing."""
    rows, others = prompts(), prompts(seed=1)
    clean, corrupt = model.inputs(rows, padding=padding), model.inputs(others, padding=padding)
    best = [x[-1].argsort(descending=True) for x in bare(model, others)]
    each = [int(order[place]) for order, place in zip(best, (25, 11, 16, 0), strict=True)]
    foils, pairs = [12, 3, 44, 31], [[7, 8], [9, 10], [11, 12], [13, 14]]
    last = [slice(-2, None), slice(1, None)]
    metrics = [
        *(ip.logit_diff(each, foils, pos=pos) for pos in (-1, 1, torch.tensor([4, 0, 3, 5]), *last)),
        *(ip.logit(each, pos=pos) for pos in (-1, *last)),
        *(make(pairs, pos=pos) for make in (ip.log_prob, ip.prob) for pos in (-1, (-3, -2))),
        *(make(each, pos=pos) for make in (ip.rank, ip.accuracy) for pos in (-1, *last)),
        *(ip.kl(source, pos=pos) for source in ("source", ip.World(clean)) for pos in (-1, slice(1, None))),
        ip.cross_entropy(),
        ip.metric(lambda x: x.flatten(1).norm(dim=1), ip.site("z", layer=1, pos=-1, head=0), name="size"),
    ]
    metrics = [dataclasses.replace(m, name=f"{number} {m.name}") for number, m in enumerate(metrics)]
    grid = ip.grid("resid_pre", layer=[1], pos=[1, -1])
    executor = "sequential" if padding == "right" else "shared"
    whole, cut = (
        ip.sweep(model, clean, corrupt, grid, metric=metrics, executor=executor, budget=budget) for budget in (None, 1)
    )
    for name in ("base", "source", "effect"):
        np.testing.assert_allclose(getattr(cut, name), getattr(whole, name), **CLOSE, err_msg=name)
    ranks = whole.metrics.index(next(m.name for m in metrics if m.name.endswith("rank")))
    assert whole.base[ranks].tolist() == [25, 11, 16, 0]
    assert all(len(set(row)) > 1 for row in whole.base.round(9).tolist())
    assert (np.abs(whole.effect).max((1, 2, 3)) > 1e-6).mean() > 0.8


def test_kl(model, padding):
    rows, others = prompts(), prompts(seed=1)
    inputs, logits, other = model.inputs(rows, padding=padding), bare(model, rows), bare(model, others)
    reference = ip.World(model.inputs(others, padding=padding))

    def divergence(a: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.kl_div(a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="sum")

    pairs = list(zip(logits, other, strict=True))
    check(model, inputs, ip.kl(reference), [divergence(a[-1], b[-1]) for a, b in pairs])
    check(model, inputs, ip.kl(reference, pos=2), [divergence(a[2], b[2]) for a, b in pairs])
    check(model, inputs, ip.kl(reference, pos=(0, -1)), [divergence(a[[0, -1]], b[[0, -1]]) / 2 for a, b in pairs])
    # A reference may be edited, and of other lengths where one position is read.
    longer = prompts(lengths=(6, 6, 6, 3), seed=2)
    muted = ip.World(model.inputs(longer), ip.zero(ip.site("attn_out", layer=0)))
    edited = [
        oracle.forward(
            model.module,
            torch.tensor([row]),
            torch.ones(1, len(row), dtype=torch.bool),
            {("attn_out", 0): lambda x: 0 * x},
        )[0][0].detach()
        for row in longer
    ]
    check(model, inputs, ip.kl(muted), [divergence(a[-1], b[-1]) for a, b in zip(logits, edited, strict=True)])
    assert ip.evaluate(model, inputs, ip.kl(ip.World(inputs))).abs().max() < 1e-12


def test_kl_of_the_source(model, padding):
    """In a sweep, kl() compares with the world that is patched from: all of it patched in leaves no divergence."""
    rows, others = prompts(), prompts(seed=1)
    clean, corrupt = model.inputs(rows, padding=padding), model.inputs(others, padding=padding)
    result = ip.sweep(model, clean, corrupt, ip.grid("resid_pre", layer=(0,)), metric=ip.kl())
    a, b = bare(model, others), bare(model, rows)
    expected = [
        float((q[-1].softmax(-1) * (q[-1].log_softmax(-1) - p[-1].log_softmax(-1))).sum())
        for p, q in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(result.base, expected, **CLOSE)
    np.testing.assert_allclose(result.source, 0, **CLOSE)
    np.testing.assert_allclose(result.effect[0], -np.array(expected), **CLOSE)


def test_cross_entropy(model, padding):
    rows = prompts()
    inputs, logits = model.inputs(rows, padding=padding), bare(model, rows)
    losses = [
        torch.nn.functional.cross_entropy(x[:-1], torch.tensor(row[1:])) for x, row in zip(logits, rows, strict=True)
    ]
    check(model, inputs, ip.cross_entropy(), losses)
    if hasattr(model.module, "generate"):
        with torch.no_grad():
            ids = [torch.tensor([row]) for row in rows]
            theirs = [model.module(x, labels=x).loss for x in ids]  # Hugging Face's own loss, row by row
        # transformers computes its loss in float32.
        torch.testing.assert_close(
            ip.evaluate(model, inputs, ip.cross_entropy()), torch.stack(theirs).double(), rtol=0, atol=1e-5
        )
    with pytest.raises(MetricError, match="one token"):
        ip.evaluate(model, model.inputs([[1, 2], [3]]), ip.cross_entropy())


# Metrics of the user's own


def test_own_metric_of_the_logits(model, padding):
    rows = prompts()
    inputs, logits = model.inputs(rows, padding=padding), bare(model, rows)

    def entropy(x: Tensor) -> Tensor:
        assert x.shape == (len(rows), 1, zoo.VOCAB)
        return -(x[:, 0].softmax(-1) * x[:, 0].log_softmax(-1)).sum(-1)

    own = ip.metric(entropy, ip.site("logits", pos=-1))
    assert own.name == "entropy"
    check(model, inputs, own, [-(x[-1].softmax(-1) * x[-1].log_softmax(-1)).sum() for x in logits])


@pytest.mark.parametrize(
    ("site", "key", "value"),
    [
        (ip.site("resid_post", layer=1, pos=-1), ("resid_post", 1), lambda x: x[-1].norm()),
        (ip.site("pattern", layer=0, head=2, pos=-1, key_pos=0), ("pattern", 0), lambda x: x[2, -1, 0]),
        ("blocks.1.attn.hook_z", ("z", 1), None),
        (ip.site("attn_out", layer=0, pos=1, dim=(3, 5)), ("attn_out", 0), lambda x: x[1, [3, 5]].norm()),
    ],
    ids=["resid_post", "pattern", "z", "attn_out"],
)
def test_own_metric_of_another_site(model, padding, site, key, value):
    rows = prompts((4, 4, 4)) if value is None else prompts()
    value = value or (lambda x: x.norm())
    inputs = model.inputs(rows, padding=padding)
    own = ip.metric(lambda x: x.flatten(1).norm(dim=1), site, name="size")
    expected = []
    for row in rows:
        _, cache = oracle.forward(model.module, torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool))
        expected.append(value(cache[key][0]).detach())
    check(model, inputs, own, expected)


def test_own_metric_of_several_sites(model):
    rows = prompts((4, 4))
    inputs = model.inputs(rows)
    own = ip.metric(
        lambda z, logits: z.flatten(1).sum(1) * logits[:, 0, 0],
        ["blocks.0.attn.hook_z", ip.site("logits", pos=-1, dim=7)],
        name="product",
    )
    expected = []
    for row in rows:
        logits, cache = oracle.forward(model.module, torch.tensor([row]), torch.ones(1, 4, dtype=torch.bool))
        expected.append((cache["z", 0].sum() * logits[0, -1, 7]).detach())
    check(model, inputs, own, expected)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x.mean(),
        lambda x: x[:, 0, :2],
        lambda x: float(x.mean()),
        lambda x: x.mean((1, 2))[:1],
        lambda x: x.mean((1, 2))[:, None],
    ],
    ids=["one number", "two a row", "a float", "the first row's", "a column"],
)
def test_a_metric_gives_one_number_a_row(model, wrong):
    rows = model.inputs(prompts())
    own = ip.metric(wrong, ip.site("logits", pos=-1), name="wrong")
    with pytest.raises(MetricError, match=r"'wrong'.*one number a row.*\[4\]"):
        ip.evaluate(model, rows, own)
    with pytest.raises(MetricError, match="one number a row"):
        ip.sweep(model, rows, model.inputs(prompts(seed=1)), ip.grid("resid_pre", layer=(0,)), metric=own)


def test_metrics_of_a_world_and_of_half_precision():
    model = ip.wrap(zoo.make("llama"))
    rows = prompts()
    world = ip.World(model.inputs(rows), ip.zero(ip.site("z", layer=1, head=2)))

    def without(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, :, 2] = 0
        return x

    expected = []
    for row in rows:
        mask = torch.ones(1, len(row), dtype=torch.bool)
        logits, _ = oracle.forward(model.module, torch.tensor([row]), mask, {("z", 1): without})
        expected.append((logits[0, -1, 7] - logits[0, -1, 9]).detach())
    check(model, world, ip.logit_diff(7, 9), expected)
    assert (torch.stack(expected) - ip.evaluate(model, world.inputs, ip.logit_diff(7, 9))).abs().min() > 1e-3

    half = ip.wrap(zoo.make("llama", dtype=torch.bfloat16))
    inputs = half.inputs(rows)
    for metric in (
        ip.logit_diff(7, 9),
        ip.log_prob(7),
        ip.kl(ip.World(half.inputs(prompts(seed=1)))),
        ip.cross_entropy(),
    ):
        assert ip.evaluate(half, inputs, metric).dtype == torch.float32


# What a metric reads


def test_only_what_is_needed_is_read():
    model = ip.wrap(zoo.make("gpt2"))
    inputs = model.inputs(prompts())

    def shapes(metric: ip.Metric) -> list[tuple[int, ...]]:
        bound = metric.bind(model, inputs)
        (outcome,) = run_worlds(model, [ip.World(inputs)], bound.reads)
        return [tuple(v.shape) for v in outcome.values]

    assert shapes(ip.logit_diff(7, 9)) == [(4, 1, 2)]
    assert shapes(ip.logit_diff([[1, 2]] * 4, [3, 4, 5, 6], pos=1)) == [(4, 1, 3)]
    assert shapes(ip.logit(7)) == [(4, 1, 1)]
    assert shapes(ip.log_prob(7)) == [(4, 1, zoo.VOCAB)]
    assert shapes(ip.kl(ip.World(inputs))) == [(4, 1, zoo.VOCAB)]
    assert shapes(ip.metric(lambda x: x[:, 0, 0, 0], ip.site("z", layer=0, pos=0, head=1, dim=3))) == [(4, 1, 1, 1)]


def test_less_is_computed_where_less_is_read():
    from torch.utils.flop_counter import FlopCounterMode

    model = ip.wrap(zoo.make("gpt2"))
    clean, corrupt = model.inputs(prompts((8, 8))), model.inputs(prompts((8, 8), seed=1))
    grid = ip.grid("attn_out", layer=(1,), pos="all")

    def work(metric: ip.Metric) -> int:
        with FlopCounterMode(display=False) as counter:
            ip.sweep(model, clean, corrupt, grid, metric=metric)
        return counter.get_total_flops()

    work(ip.logit(7))  # the first time, the model's description is compared with the model
    last, column, first = work(ip.log_prob(7)), work(ip.logit_diff(7, 9)), work(ip.log_prob(7, pos=0))
    everything = work(ip.kl(pos=None))
    assert column < last < everything
    assert first < last
    result = ip.sweep(model, clean, corrupt, ip.grid("resid_pre", layer=(0,), pos="all"), metric=ip.logit(7, pos=3))
    assert (result.status[0, 4:] == 2).all() and (result.status[0, :4] != 2).all()


# Answers


def test_answers_that_do_not_fit(model):
    inputs = model.inputs(prompts())
    for answer, match in [
        ([1, 2], "2 answers for 4 rows"),
        ([1, 2, 3, 4, 5], "5 answers for 4 rows"),
        ([[1], [2], [3], [4, 5]], "same number"),
        ([[], [], [], []], "at least one"),
        (zoo.VOCAB, "vocabulary"),
        (10**20, "vocabulary"),
        ([True, False, True, True], "True"),
        (torch.tensor([True, False, True, True]), "True"),
        (-1, "vocabulary"),
        ([1, 2, 3, zoo.VOCAB], "vocabulary"),
        (torch.tensor([1.0, 2.5, 3.0, 4.0]), None),  # not to be rounded
        (1.5, None),
        (None, None),
    ]:
        for metric in (ip.logit(answer), ip.logit_diff(answer, 1), ip.logit_diff(1, answer), ip.log_prob(answer)):
            with pytest.raises(MetricError, match=match):
                ip.evaluate(model, inputs, metric)
    with pytest.raises(InputsError, match="needs a tokenizer"):
        ip.evaluate(model, inputs, ip.logit("she"))


@pytest.mark.parametrize(
    "array",
    [np.array, lambda x: torch.tensor(x, dtype=torch.int32), lambda x: list(map(np.int64, x))],
    ids=["numpy", "torch", "numpy's numbers"],
)
def test_answers_in_arrays(model, array):
    rows = prompts()
    inputs, logits = model.inputs(rows), bare(model, rows)
    answers = [7, 8, 9, 10]
    check(model, inputs, ip.logit(array(answers)), [x[-1, a] for x, a in zip(logits, answers, strict=True)])
    check(model, inputs, ip.logit(array([7])[0]), [x[-1, 7] for x in logits])


def test_answers_in_lists_of_tensors(model):
    inputs = model.inputs(prompts())
    expected = ip.evaluate(model, inputs, ip.logit([[7, 8], [8, 9], [9, 1], [1, 7]]))
    rows = list(torch.tensor([[7, 8], [8, 9], [9, 1], [1, 7]]))
    for given in (rows, [list(row) for row in rows], [row.numpy() for row in rows]):
        torch.testing.assert_close(ip.evaluate(model, inputs, ip.logit(given)), expected, rtol=0, atol=0)


def test_an_alternative_that_is_named_twice_counts_once(model, padding):
    rows = prompts()
    inputs, logits = model.inputs(rows, padding=padding), bare(model, rows)
    chances = [x[-1].softmax(-1) for x in logits]
    named = [[7, 7, 8], [9, 8, 9], [7, 8, 9], [5, 5, 5]]
    expected = [p[sorted(set(some))].sum() for p, some in zip(chances, named, strict=True)]
    check(model, inputs, ip.prob(named), expected)
    check(model, inputs, ip.log_prob(named), [p.log() for p in expected])


def test_text_that_is_not_one_token_shows_its_pieces(stories):
    model = ip.load(stories)
    inputs = model.inputs("Once upon a time")
    value = ip.evaluate(model, inputs, ip.logit_diff("she", "he"))
    she, he = (model.tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("she", "he"))
    assert len(she) == len(he) == 1
    expected = bare(model, [inputs.ids[0].tolist()])[0][-1]
    torch.testing.assert_close(value, (expected[she[0]] - expected[he[0]])[None], rtol=0, atol=1e-4)
    for metric in (ip.logit_diff(" she", "he"), ip.logit_diff("she", [" she"]), ip.log_prob([[" she"]])):
        with pytest.raises(InputsError) as caught:
            ip.evaluate(model, inputs, metric)
        assert "' she' is 2 tokens" in str(caught.value) and "[' ', ' she']" in str(caught.value)
        assert "'she' is one token" in str(caught.value)
    with pytest.raises(InputsError, match="tokens"):
        ip.evaluate(model, inputs, ip.logit("elephant"))


# Refusals


def test_what_metrics_refuse(model):
    inputs = model.inputs(prompts())
    with pytest.raises(MetricError, match="'source'"):
        ip.kl("sauce")
    with pytest.raises(MetricError):
        ip.kl(inputs)
    with pytest.raises(MetricError, match="World"):
        ip.evaluate(model, inputs, ip.kl())
    with pytest.raises(MetricError, match="name the sites"):
        ip.metric(lambda: 0, [])
    with pytest.raises(SiteError, match="resid_pre"):
        ip.metric(lambda x: x, "resid_prre")
    with pytest.raises(SiteError):
        ip.evaluate(model, inputs, ip.metric(lambda x: x, ip.site("z", layer=99)))


def test_a_reference_of_other_rows_is_refused(model):
    """One reference row for four rows would broadcast in silence, and two for four would pair the wrong ones."""
    inputs = model.inputs(prompts())
    for lengths in ((6,), (6, 6), (6,) * 5):
        reference = ip.World(model.inputs(prompts(lengths, seed=1)))
        with pytest.raises(InterpError):
            ip.evaluate(model, inputs, ip.kl(reference))
        with pytest.raises(InterpError):
            ip.sweep(model, inputs, None, ip.grid("z", layer=(0,)), metric=ip.kl(reference), intervention=ip.zero)
    with pytest.raises(InterpError):  # other lengths, all positions: they do not correspond
        ip.evaluate(model, inputs, ip.kl(ip.World(model.inputs(prompts((6, 6, 6, 6)))), pos=None))


def test_a_plain_function_is_no_metric():
    model = ip.wrap(zoo.make("gpt2"))
    with pytest.raises(MetricError, match="is not a metric; wrap a function of yours"):
        ip.evaluate(model, model.inputs(torch.tensor([[1, 2]])), lambda x: x)
