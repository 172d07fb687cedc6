"""What is measured: a metric says which values it reads, so that no others are computed, and is a function of those.

A metric gives one number for each row. It is stated before a model is known (its answers may be text), and bound to a
model and inputs when it is used. Both are data and functions of modules, so that they cross to other processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hooks import Index, Inputs, MetricError, Model, Site, World, sites_of
from interp import readouts
from interp.answers import Tokens, repeats
from interp.readouts import Places, Spelling
from interp.spelling import asked, foil_of, require_positions

Function = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class Bound:
    """A metric on given inputs.

    Attributes:
        reads: the sites whose values it is a function of.
        fn: ``fn(rows, *values)``: rows of the inputs (a slice, or an index in which a row stands once for each of
            several worlds), and for them the value of each read (then, if the metric compares with a reference, the
            reference's); returns one number for each of these rows.
    """

    reads: tuple[Site, ...]
    fn: Function

    @property
    def alone(self) -> bool:
        """Whether the function is to be given one world at a time, in the order of the inputs' rows."""
        return getattr(self.fn, "alone", False)


@dataclass(frozen=True, eq=False)
class Metric:
    """A quantity of interest.

    Attributes:
        name: what results call it.
        bind: from a model and inputs to an `interp.metrics.Bound`.
        reference: a world whose values of the same reads are handed to the function after the run's own; ``"source"``
            means the world that a sweep patches from. None if the metric compares with nothing.
        stated: what it was stated with, by which an interrupted sweep knows it again.
    """

    name: str
    bind: Callable[[Model, Inputs], Bound]
    reference: World | str | None = None
    stated: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        return f"Metric({self.name})"


def metric(fn: Callable[..., Tensor], reads: Sequence[Site | str] | Site | str, *, name: str | None = None) -> Metric:
    """A metric of your own.

    Args:
        fn: from the value of each read, [B, ...], to one number a row, [B].
        reads: what it reads: sites, restricted as far as possible. ``site("logits", pos=-1)`` has values [B, 1, V].
        name: what results call it; default the function's name.
    """
    listed = tuple(sites_of(reads))
    if not listed:
        raise MetricError("a metric reads something: name the sites")
    if not callable(fn):
        raise MetricError(f"a metric is a function of what it reads, not {fn!r}")
    return Metric(name or getattr(fn, "__name__", "metric"), _Own(fn, listed), stated=(fn, listed))


@dataclass(frozen=True, eq=False)
class _Own:
    fn: Callable[..., Tensor]
    reads: tuple[Site, ...]

    def __call__(self, model: Model, inputs: Inputs) -> Bound:
        return Bound(self.reads, readouts.Own(self.fn))


def logit_diff(answer: Tokens, foil: Tokens, *, pos: Index | str = -1) -> Metric:
    """Logit of the answer minus logit of the foil, in nats; of answers of several tokens, the difference of their
    summed log-probabilities (for one token that is the same number).

    Args:
        answer: a token (id or text) for all rows; one for each row; or several for each row [B, n]. At one position
            these are alternatives, whose mean is taken; at n positions they are one token for each. Of a classifier,
            classes: ids or labels.
        foil: the same.
        pos: the position read; of one token the mean where there are several. A classifier's logits have one, 0 and -1.
            ``"answer"``: each row's text ends with its answer, of one token or several (a text, or a list of tokens; as
            many in each row as it has), and each token is read at the position before it. A foil is scored in the same
            text, so it has the answer's tokens up to its own last one.

    Raises:
        MetricError: on use, where a text is not one token, there are not as many as rows, a row has no such position,
            or a text does not end with its answer.
    """
    return Metric("logit_diff", _LogitDiff(answer, foil, pos), stated=(answer, foil, pos))


@dataclass(frozen=True, eq=False)
class _LogitDiff:
    answer: Tokens
    foil: Tokens
    pos: Index | str

    def __call__(self, model: Model, inputs: Inputs) -> Bound:
        good = asked(model, inputs, self.answer, self.pos)
        bad = foil_of(model, inputs, self.foil, good, self.pos)
        if good.spelled:
            return Bound((good.places.site(),), readouts.SpelledDiff(*(Spelling(x.ids, x.real) for x in (good, bad))))
        reads = good.places.site(torch.cat([good.ids, bad.ids], 1))
        return Bound((reads,), readouts.LogitDiff(good.ids.shape[1], good.places.mean))


def logit(answer: Tokens, *, pos: Index | str = -1) -> Metric:
    """Logit of the answer, in nats; see `logit_diff` for the arguments.

    Raises:
        MetricError: on use, as `logit_diff`; or an answer of several tokens, whose logits at different positions have
            different constants, so that their sum says nothing.
    """
    return Metric("logit", _Logit(answer, pos), stated=(answer, pos))


@dataclass(frozen=True, eq=False)
class _Logit:
    answer: Tokens
    pos: Index | str

    def __call__(self, model: Model, inputs: Inputs) -> Bound:
        one = asked(model, inputs, self.answer, self.pos)
        if one.spelled and one.ids.shape[1] > 1:
            raise MetricError(
                "logit is of one token: logits at different positions have different constants, so their sum says "
                "nothing; measure log_prob, which adds up"
            )
        return Bound((one.places.site(one.ids),), readouts.Logit(one.places.mean))


def log_prob(answer: Tokens, *, pos: Index | str = -1) -> Metric:
    """Log-probability of the answer, in nats.

    At one position (an int, a slice of length 1, one for each row) several tokens of a row are alternatives, and the
    probabilities of different ones add. At n positions an answer has n tokens, one for each, and their
    log-probabilities add: an answer of several tokens that stands in the prompt is measured at the positions *before*
    each of them. ``pos="answer"`` says so of texts that end with it, whatever the lengths; see `logit_diff`.

    Raises:
        MetricError: on use, where a row has another number of positions than an answer has tokens, or a text does not
            end with its answer.
    """
    return Metric("log_prob", _LogProb(answer, pos), stated=(answer, pos))


def prob(answer: Tokens, *, pos: Index | str = -1) -> Metric:
    """Probability of the answer; see `log_prob`."""
    return Metric("prob", _LogProb(answer, pos, exp=True), stated=(answer, pos))


@dataclass(frozen=True, eq=False)
class _LogProb:
    answer: Tokens
    pos: Index | str
    exp: bool = False

    def __call__(self, model: Model, inputs: Inputs) -> Bound:
        one = asked(model, inputs, self.answer, self.pos)
        if one.spelled:
            return Bound((one.places.site(),), readouts.SpelledLogProb(Spelling(one.ids, one.real), self.exp))
        if not one.places.single:
            one.places.require(1)
        again = repeats(one.ids)
        return Bound((one.places.site(),), readouts.LogProb(one.ids, again if bool(again.any()) else None, self.exp))


def rank(answer: Tokens, *, pos: Index | str = -1) -> Metric:
    """Number of tokens with a higher logit than the best of the answer's (0 is the top), the mean over positions.

    Of an answer of several tokens (see `logit_diff`), that of the token which has most above it: 0 where it is what is
    decoded greedily.
    """
    return Metric("rank", _Rank(answer, pos), stated=(answer, pos))


@dataclass(frozen=True, eq=False)
class _Rank:
    answer: Tokens
    pos: Index | str

    def __call__(self, model: Model, inputs: Inputs) -> Bound:
        one = asked(model, inputs, self.answer, self.pos)
        spelled = readouts.SpelledRank(Spelling(one.ids, one.real))
        return Bound((one.places.site(),), spelled if one.spelled else readouts.Rank(one.ids, one.places.mean))


def accuracy(answer: Tokens, *, pos: Index | str = -1) -> Metric:
    """1 where one of the answer's tokens has the highest logit, else 0; the mean over positions.

    Of an answer of several tokens (see `logit_diff`), 1 where each of them has in its turn, so that it is what is
    decoded greedily.
    """
    return Metric("accuracy", _Accuracy(answer, pos), stated=(answer, pos))


@dataclass(frozen=True, eq=False)
class _Accuracy:
    answer: Tokens
    pos: Index | str

    def __call__(self, model: Model, inputs: Inputs) -> Bound:
        one = asked(model, inputs, self.answer, self.pos)
        spelled = readouts.SpelledAccuracy(Spelling(one.ids, one.real))
        return Bound((one.places.site(),), spelled if one.spelled else readouts.Accuracy(one.ids, one.places.mean))


def kl(reference: World | str = "source", *, pos: Index = -1) -> Metric:
    """KL divergence of the next-token distribution from a reference world's, KL(reference || run), in nats.

    Args:
        reference: a world, or ``"source"`` for the world that a sweep patches from.
        pos: the positions read, over which the mean is taken; those of no answer, since it knows of none.
    """
    if not isinstance(reference, World) and reference != "source":
        raise MetricError(f"kl compares with a World or with 'source', not {reference!r}")
    place = require_positions("kl", pos, "it compares distributions and knows of no answer; list the positions")
    return Metric("kl", _Divergence(place), reference, stated=(place,))


@dataclass(frozen=True, eq=False)
class _Divergence:
    pos: Index

    def __call__(self, model: Model, inputs: Inputs) -> Bound:
        places = Places.of(model, inputs, self.pos)
        return Bound((places.site(),), readouts.Divergence(places.mean))


def cross_entropy() -> Metric:
    """Mean loss of predicting each token of the prompt from those before it, in nats a token.

    Raises:
        MetricError: on use, where a prompt has only one token, or the inputs are images.
    """
    return Metric("cross_entropy", _bind_cross_entropy)


def _bind_cross_entropy(model: Model, inputs: Inputs) -> Bound:
    if inputs.pixels is not None:
        raise MetricError("cross_entropy predicts tokens of a prompt; of images, measure log_prob(label)")
    if int(inputs.lengths.min()) < 2:
        raise MetricError("cross_entropy predicts each token from those before it; a prompt has only one token")
    ids = inputs.ids.gather(1, inputs.order)
    most = int(inputs.lengths.max()) - 1
    target, weight = ids[:, 1 : most + 1], torch.arange(most) < (inputs.lengths - 1)[:, None]
    last = inputs.order.gather(1, inputs.lengths[:, None] - 1)
    return Bound((Site("logits", pos=inputs.mask.scatter(1, last, False)),), readouts.CrossEntropy(target, weight))


def call(bound: Bound, name: str, rows: slice, values: Sequence[Tensor], where: str = "") -> Tensor:
    """Apply a metric's function to one world and check that it gives one number a row.

    Args:
        bound, name: the metric.
        rows: of which rows the values are.
        values: what it reads, and what it compares with.
        where: what they were read of, for messages, as `` in the cell layer=3``.

    Raises:
        MetricError: it gives anything else, or nan, which in a result would say that the row lacks the cell.
    """
    out = _numbers(bound.fn(rows, *values), name, rows.stop - rows.start)
    _require_no_nan(out[None], name, rows, lambda _: where)
    return out


def call_each(
    bound: Bound,
    name: str,
    rows: slice,
    values: Sequence[Tensor],
    compared: Sequence[Tensor],
    where: Callable[[int], str],
) -> Tensor:
    """Apply a metric's function to several worlds at once.

    Args:
        bound, name: the metric.
        rows: of which rows the values are.
        values: what it reads, [W, b, ...].
        compared: what it compares with, [b, ...].
        where: what the values of a world were read of, for messages.

    Returns:
        One number for each world and row, [W, b].

    Raises:
        MetricError: as `call`.
    """
    worlds, count = len(values[0]), rows.stop - rows.start
    if bound.alone or worlds == 1:
        each = [bound.fn(rows, *(v[w] for v in values), *compared) for w in range(worlds)]
        out = torch.stack([_numbers(one, name, count) for one in each])
    else:
        index = torch.arange(rows.start, rows.stop).repeat(worlds)
        others = [o.expand(worlds, *o.shape).flatten(0, 1) for o in compared]
        out = _numbers(bound.fn(index, *(v.flatten(0, 1) for v in values), *others), name, worlds * count)
        out = out.unflatten(0, (worlds, count))
    _require_no_nan(out, name, rows, where)
    return out


def _numbers(out: Any, name: str, count: int) -> Tensor:
    if not isinstance(out, Tensor) or out.shape != (count,) or out.is_complex():
        got = type(out).__name__ if not isinstance(out, Tensor) else f"{list(out.shape)}{' complex' * out.is_complex()}"
        raise MetricError(
            f"metric {name!r} returned {got} for {count} rows; it gives one number a row, shape [{count}]"
        )
    return out


def _require_no_nan(out: Tensor, name: str, rows: slice, where: Callable[[int], str]) -> None:
    missing = out.detach().isnan()
    if bool(missing.any()):
        world = int(missing.any(1).nonzero()[0])
        at = [rows.start + i for i in missing[world].nonzero().flatten().tolist()]
        raise MetricError(f"metric {name!r} is nan on rows {at}{where(world)}: give it numbers, or leave them out")
