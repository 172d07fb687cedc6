"""What is asked of a cache: contexts, what follows them, and the units that are removed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from hooks import Inputs, InputsError, Model, nearest
from interp.axes import Axis

AXES = ("layer", "head", "token")
Text = str | Sequence[Any] | Tensor | Inputs


@dataclass(frozen=True, eq=False)
class Asked:
    """One context and what follows it.

    Attributes:
        ids: int64 [T], both.
        context: how many tokens are context.
        queries: the positions whose predictions are read, the last token's excepted: nothing follows it.
        labels: the text of each token.
    """

    ids: Tensor
    context: int
    queries: tuple[int, ...]
    labels: tuple[str, ...]

    @property
    def targets(self) -> Tensor:
        """int64 [m], the token that follows each query."""
        return self.ids[torch.tensor(self.queries) + 1]


def asked(model: Model, context: Text, suffix: Text, answer: int | None = None) -> list[Asked]:
    """Pair contexts with what follows them, row by row.

    Args:
        model: the wrapped model.
        context: a text, token ids, several of either, or `Inputs`.
        suffix: likewise, one for each context: the question and its answer. A text is encoded without the special
            tokens
            that a tokenizer puts in front.
        answer: how many of its last tokens are the answer, whose prediction is measured; None for all but the first.

    Raises:
        InputsError: other numbers of rows, an empty context, a suffix shorter than two tokens or than its answer, or
            one
            that begins with the token that begins the context.
    """
    contexts, suffixes = _rows(model, context, True), _rows(model, suffix, False)
    if len(contexts) != len(suffixes):
        raise InputsError(f"{len(contexts)} contexts and {len(suffixes)} suffixes: one follows the other, row by row")
    begin = getattr(model.tokenizer, "bos_token_id", None)
    found = []
    for row, (before, after) in enumerate(zip(contexts, suffixes, strict=True)):
        if not before:
            raise InputsError(f"row {row} has no context, so nothing is cached")
        if len(after) < 2:
            raise InputsError(f"row {row}: a suffix has at least two tokens, one that asks and one that answers")
        if begin is not None and after[0] == begin and isinstance(suffix, Inputs):
            raise InputsError(
                f"row {row}: the suffix begins with {model.decode([begin])!r}, which begins a text: give it "
                f"as a text or as "
                "ids without special tokens"
            )
        count = len(after) - 1 if answer is None else answer
        if not 0 < count < len(after):
            raise InputsError(f"row {row}: answer is from 1 to {len(after) - 1} tokens of the suffix, not {answer}")
        ids, total = torch.tensor([*before, *after]), len(before) + len(after)
        inputs = model.inputs(ids[None])
        queries = tuple(range(total - count - 1, total - 1))
        found.append(Asked(inputs.ids[0], len(before), queries, inputs.labels(0)))
    return found


def _rows(model: Model, given: Text, special: bool) -> list[list[int]]:
    """Lists of token ids."""
    if isinstance(given, Inputs):
        return [row[mask].tolist() for row, mask in zip(given.ids, given.mask, strict=True)]
    if isinstance(given, Tensor):
        return given.reshape(-1, given.shape[-1]).tolist() if given.ndim in (1, 2) else _refuse(given)
    if isinstance(given, str):
        return [_encoded(model, given, special)]
    if isinstance(given, Sequence) and len(given):
        if all(isinstance(x, int) and not isinstance(x, bool) for x in given):
            return [list(given)]
        return [_encoded(model, x, special) if isinstance(x, str) else [int(i) for i in x] for x in given]
    return _refuse(given)


def _refuse(given: Any) -> list[list[int]]:
    raise InputsError(f"contexts and suffixes are texts, token ids or Inputs, not {type(given).__name__}")


def _encoded(model: Model, text: str, special: bool) -> list[int]:
    if special:
        return model.encode(text)
    if model.tokenizer is None:
        raise InputsError("a text needs a tokenizer: give token ids, or ip.wrap(model, tokenizer)")
    try:
        return list(model.tokenizer.encode(text, add_special_tokens=False))
    except TypeError:  # a tokenizer of the project's own, which adds nothing
        return model.encode(text)


@dataclass(frozen=True, eq=False)
class Units:
    """The things that are removed, one at a time: the product of some axes, whole along the others.

    Attributes:
        names: which of layer, head (of keys and values) and token; ``span`` in place of token where they are spans.
        layers, heads: how many the model has.
        spans: the half-open ranges of context tokens that the last axis goes through; None without one.
    """

    names: tuple[str, ...]
    layers: int
    heads: int
    spans: tuple[tuple[int, int], ...] | None

    def axes(self, labels: Sequence[str]) -> tuple[Axis, ...]:
        """The axes of a result, given the labels of the context's tokens."""
        made = []
        for name in self.names:
            if name == "layer":
                made.append(Axis("layer", tuple(range(self.layers))))
            elif name == "head":
                made.append(Axis("head", tuple(range(self.heads))))
            else:
                spans = self.spans or ()
                alone = name == "token"
                values = tuple(a if alone else f"{a}:{b}" for a, b in spans)
                made.append(Axis(name, values, tuple("".join(labels[a:b]) for a, b in spans) if labels else ()))
        return tuple(made)

    @property
    def shape(self) -> tuple[int, ...]:
        """How many values each axis has."""
        sizes = {"layer": self.layers, "head": self.heads}
        return tuple(sizes.get(name, len(self.spans or ())) for name in self.names)

    def cells(self) -> Iterator[tuple[int, ...]]:
        """The units, the last axis fastest."""
        return product(*map(range, self.shape))

    def removed(self, cells: Sequence[tuple[int, ...]], total: int, device: torch.device) -> Tensor:
        """bool [W, L, K, T]: what each of some units removes from keys of `total` tokens."""
        gone = torch.zeros(len(cells), self.layers, self.heads, total, dtype=torch.bool)
        for w, cell in enumerate(cells):
            at = dict(zip(self.names, cell, strict=True))
            span = at.get("token", at.get("span"))
            where = slice(0, total) if span is None else slice(*(self.spans or ())[span])
            gone[w, _one(at.get("layer")), _one(at.get("head")), where] = True
        return gone.to(device)


def _one(index: int | None) -> slice:
    return slice(None) if index is None else slice(index, index + 1)


def units_of(unit: Any, model: Model, context: int) -> Units:
    """The units that a caller means.

    Args:
        unit: ``"token"``; a tuple of ``"layer"``, ``"head"`` and ``"token"``; or a list of spans, each a pair (start,
            stop) of context tokens or a slice.
        model: the wrapped model.
        context: tokens of the context.

    Raises:
        InputsError: it is none of these, or a span that does not lie in the context.
    """
    attentions = [block.attention for block in model.architecture.blocks]
    heads = attentions[0].k.heads
    if any(a.k.heads != heads for a in attentions):
        raise InputsError("layers with different numbers of key/value heads are not supported here")
    layers = len(attentions)
    if isinstance(unit, str):
        unit = (unit,)
    if isinstance(unit, tuple) and unit and all(isinstance(name, str) for name in unit):
        for name in unit:
            if name not in AXES:
                raise InputsError(
                    f"a unit is made of {', '.join(AXES)}, or is a list of spans; not {name!r}{nearest(name, AXES)}"
                )
        names = tuple(name for name in AXES if name in unit)
        spans = tuple((i, i + 1) for i in range(context)) if "token" in names else None
        return Units(names, layers, heads, spans)
    if isinstance(unit, list) and unit:
        return Units(("span",), layers, heads, tuple(_span(one, context) for one in unit))
    raise InputsError(
        f"a unit is 'token', a tuple of {', '.join(AXES)}, or a list of spans (start, stop); not {unit!r}"
    )


def _span(given: Any, context: int) -> tuple[int, int]:
    if isinstance(given, slice) and given.step in (None, 1):
        start, stop, _ = given.indices(context)
    elif isinstance(given, tuple) and len(given) == 2 and all(isinstance(x, int) for x in given):
        start, stop = given
    else:
        raise InputsError(f"a span is a pair (start, stop) or a slice of context tokens, not {given!r}")
    if not 0 <= start < stop <= context:
        raise InputsError(f"the span {given!r} does not lie in a context of {context} tokens")
    return start, stop
