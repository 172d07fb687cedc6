"""What is measured: a metric says which values it reads, so that no others are computed, and is a function of those.

A metric gives one number for each row. It is stated before a model is known (its answers may be text), and bound to a
model and inputs when it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hooks import Inputs, Model, Site, World
from hooks.errors import MetricError
from hooks.plan.sites import Index, Span, sites_of
from interp.answers import Tokens, token_ids

Function = Callable[..., Tensor]
PositionMean = Callable[[slice, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Bound:
    """A metric on given inputs.

    Attributes:
        reads: the sites whose values it is a function of.
        fn: ``fn(rows, *values)``: a slice of the rows of the inputs, and for them the value of each read (then, if the
            metric compares with a reference, the reference's); returns [b].
    """

    reads: tuple[Site, ...]
    fn: Function


@dataclass(frozen=True, eq=False)
class Metric:
    """A quantity of interest.

    Attributes:
        name: what results call it.
        bind: from a model and inputs to a `Bound`.
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

    def bind(model: Model, inputs: Inputs) -> Bound:
        return Bound(listed, lambda rows, *values: fn(*values))

    return Metric(name or getattr(fn, "__name__", "metric"), bind, stated=(fn, listed))


def logit_diff(answer: Tokens, foil: Tokens, *, pos: Index = -1) -> Metric:
    """Logit of the answer minus logit of the foil, in nats.

    Args:
        answer: a token (id or text) for all rows; one for each row; or several for each row [B, n], whose mean is
            taken. Of a classifier, classes: ids or labels.
        foil: the same.
        pos: the position read; the mean where there are several. A classifier's logits have one, 0 and -1.

    Raises:
        MetricError: on use, where a text is not one token, or there are not as many as rows.
    """

    def bind(model: Model, inputs: Inputs) -> Bound:
        good, bad = token_ids(model, answer, len(inputs)), token_ids(model, foil, len(inputs))
        width, mean = good.shape[1], _position_mean(model, inputs, pos)

        def fn(rows: slice, logits: Tensor) -> Tensor:
            wide = _wide(logits)
            return mean(rows, wide[..., :width].mean(2) - wide[..., width:].mean(2))

        return Bound((Site("logits", pos=_positions(pos), dim=torch.cat([good, bad], 1)),), fn)

    return Metric("logit_diff", bind, stated=(answer, foil, pos))


def logit(answer: Tokens, *, pos: Index = -1) -> Metric:
    """Logit of the answer, in nats; see `logit_diff` for the arguments."""

    def bind(model: Model, inputs: Inputs) -> Bound:
        good, mean = token_ids(model, answer, len(inputs)), _position_mean(model, inputs, pos)
        return Bound(
            (Site("logits", pos=_positions(pos), dim=good),), lambda rows, logits: mean(rows, _wide(logits).mean(2))
        )

    return Metric("logit", bind, stated=(answer, pos))


def log_prob(answer: Tokens, *, pos: Index = -1) -> Metric:
    """Log-probability of the answer, in nats.

    With one position, several tokens of a row are alternatives, and their probabilities add. With n positions an answer
    has n tokens, one for each, and their log-probabilities add: an answer of several tokens that stands in the prompt
    is measured at the positions *before* each of them.
    """

    def fn_of(good: Tensor, mean: PositionMean) -> Function:
        def fn(rows: slice, logits: Tensor) -> Tensor:
            logp = _wide(logits).log_softmax(-1)
            chosen = good[rows].to(logits.device)
            if logits.shape[1] == 1:
                return logp[:, 0].gather(1, chosen).logsumexp(1)
            if chosen.shape[1] != logits.shape[1]:
                raise MetricError(f"{chosen.shape[1]} answer tokens for {logits.shape[1]} positions")
            return logp.gather(2, chosen[:, :, None])[:, :, 0].sum(1)

        return fn

    return Metric("log_prob", _bind_answers(answer, pos, fn_of), stated=(answer, pos))


def prob(answer: Tokens, *, pos: Index = -1) -> Metric:
    """Probability of the answer; see `log_prob`."""
    inner = log_prob(answer, pos=pos)

    def bind(model: Model, inputs: Inputs) -> Bound:
        bound = inner.bind(model, inputs)
        return Bound(bound.reads, lambda rows, *values: bound.fn(rows, *values).exp())

    return Metric("prob", bind, stated=inner.stated)


def rank(answer: Tokens, *, pos: Index = -1) -> Metric:
    """Number of tokens with a higher logit than the best of the answer's (0 is the top), the mean over positions."""

    def fn_of(good: Tensor, mean: PositionMean) -> Function:
        def fn(rows: slice, logits: Tensor) -> Tensor:
            chosen = good[rows].to(logits.device)[:, None].expand(-1, logits.shape[1], -1)
            best = logits.gather(2, chosen).amax(2, keepdim=True)
            return mean(rows, (logits > best).sum(2).to(_wide(logits).dtype))

        return fn

    return Metric("rank", _bind_answers(answer, pos, fn_of), stated=(answer, pos))


def accuracy(answer: Tokens, *, pos: Index = -1) -> Metric:
    """1 where one of the answer's tokens has the highest logit, else 0; the mean over positions."""

    def fn_of(good: Tensor, mean: PositionMean) -> Function:
        def fn(rows: slice, logits: Tensor) -> Tensor:
            top = logits.argmax(-1, keepdim=True)
            hit = (top == good[rows].to(logits.device)[:, None]).any(2)
            return mean(rows, hit.to(_wide(logits).dtype))

        return fn

    return Metric("accuracy", _bind_answers(answer, pos, fn_of), stated=(answer, pos))


def kl(reference: World | str = "source", *, pos: Index = -1) -> Metric:
    """KL divergence of the next-token distribution from a reference world's, KL(reference || run), in nats.

    Args:
        reference: a world, or ``"source"`` for the world that a sweep patches from.
        pos: the positions read, over which the mean is taken.
    """
    if reference != "source" and not isinstance(reference, World):
        raise MetricError(f"kl compares with a World or with 'source', not {reference!r}")

    def bind(model: Model, inputs: Inputs) -> Bound:
        mean = _position_mean(model, inputs, pos)

        def fn(rows: slice, logits: Tensor, other: Tensor) -> Tensor:
            ours, theirs = _wide(logits).log_softmax(-1), _wide(other).log_softmax(-1)
            return mean(rows, (theirs.exp() * (theirs - ours)).sum(-1))

        return Bound((Site("logits", pos=_positions(pos)),), fn)

    return Metric("kl", bind, reference, stated=(pos,))


def cross_entropy() -> Metric:
    """Mean loss of predicting each token of the prompt from those before it, in nats a token.

    Raises:
        MetricError: on use, where a prompt has only one token, or the inputs are images.
    """

    def bind(model: Model, inputs: Inputs) -> Bound:
        if inputs.pixels is not None:
            raise MetricError("cross_entropy predicts tokens of a prompt; of images, measure log_prob(label)")
        if int(inputs.lengths.min()) < 2:
            raise MetricError("cross_entropy predicts each token from those before it; a prompt has only one token")
        ids = inputs.ids.gather(1, inputs.order)
        most = int(inputs.lengths.max()) - 1
        target, weight = ids[:, 1 : most + 1], torch.arange(most) < (inputs.lengths - 1)[:, None]
        last = inputs.order.gather(1, inputs.lengths[:, None] - 1)
        predicting = inputs.mask.scatter(1, last, False)

        def fn(rows: slice, logits: Tensor) -> Tensor:
            chosen, counts = target[rows].to(logits.device), weight[rows].to(logits.device)
            loss = -_wide(logits).log_softmax(-1).gather(2, chosen[:, :, None])[:, :, 0]
            return torch.where(counts, loss, 0).sum(1) / counts.sum(1)

        return Bound((Site("logits", pos=predicting),), fn)

    return Metric("cross_entropy", bind)


def call(bound: Bound, name: str, rows: slice, values: Sequence[Tensor]) -> Tensor:
    """Apply a metric's function and check that it gives one number a row."""
    out = bound.fn(rows, *values)
    count = rows.stop - rows.start
    if not isinstance(out, Tensor) or out.shape != (count,):
        got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise MetricError(
            f"metric {name!r} returned {got} for {count} rows; it gives one number a row, shape [{count}]"
        )
    return out


def _bind_answers(
    answer: Tokens, pos: Index, fn_of: Callable[[Tensor, PositionMean], Function]
) -> Callable[[Model, Inputs], Bound]:
    """Bind a metric that reads every column at some positions and knows the answer's tokens."""

    def bind(model: Model, inputs: Inputs) -> Bound:
        return Bound(
            (Site("logits", pos=_positions(pos)),),
            fn_of(token_ids(model, answer, len(inputs)), _position_mean(model, inputs, pos)),
        )

    return bind


def _positions(pos: Index) -> Index:
    """All positions as a slice: a site without restriction has the columns of the batch, padding and all."""
    return Span() if pos is None else pos


def _position_mean(model: Model, inputs: Inputs, pos: Index) -> Callable[[slice, Tensor], Tensor]:
    """The mean over the positions [b, n] that each row has: a row with fewer than the widest is filled up."""
    place = Site("logits", pos=_positions(pos))
    valid = model.region(place, inputs).valid
    if valid is None:
        return lambda rows, x: x.mean(1)
    real = valid[..., 0]

    def mean(rows: slice, x: Tensor) -> Tensor:
        counts = real[rows].to(x.device)
        return torch.where(counts, x, 0).sum(1) / counts.sum(1)

    return mean


def _wide(x: Tensor) -> Tensor:
    """At least float32: half-precision logits lose differences that matter."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
