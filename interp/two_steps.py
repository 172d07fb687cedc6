"""A circuit of two steps, found by its effects: a head that says what came before, read by the keys of later heads.

On a list that is said twice, the next word can be told by looking back at what followed the last word the first time. A
head that finds it there has to know of each word which word came before it, so another head has to have written that
there (Elhage et al. 2021; Olsson et al. 2022).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hooks import Inputs, InputsError, Model, Site
from interp import plots
from interp.canvas import figure_of
from interp.evaluation import evaluate
from interp.metrics import accuracy, logit_diff
from interp.models import english
from interp.paths import Graph, Pair, edge_scores, path_patch
from interp.training.measures import prefix_matching

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENGTH, SAID_AGAIN = 6, 4
"""Words of a list, and how many of them are said again before the next one is asked for."""
RECEIVERS = 4
SHARE = 0.15
"""Keys count as the sender's where their score is at least this share of its largest."""


@dataclass(frozen=True)
class TwoSteps:
    """What was found, and what it does to the answer.

    Attributes:
        clean, corrupt, answer: a pair: lists of which one word, the one before the answer, differs in the first copy.
        pairs: how many there were.
        right: share of clean prompts that are answered rightly.
        sender: name of the head that writes what came before, as "a0.h1".
        to_previous: how much it attends to the token before, the mean over tokens.
        receivers: the heads whose keys read it; key/value heads where query heads share them.
        shared: how many query heads share a key.
        lost: share of the clean-corrupt difference that is lost where these keys, and they alone, read of the sender
            what it writes on the corrupt prompt.
        others: the largest share, in size, that another head of the sender's layer gives in its place.
        edges: how many edges were scored to find it.
    """

    clean: str
    corrupt: str
    answer: str
    pairs: int
    right: float
    sender: str
    to_previous: float
    receivers: tuple[str, ...]
    lost: float
    others: float
    edges: int
    shared: int = 1

    def headline(self) -> str:
        """The finding in a sentence."""
        keys = f"the keys of {self._listed()}"
        return (
            f"On a repeated list, {_head(self.sender)} tells {keys} which word came before: cutting that "
            f"alone loses {self.lost:.0%} of the answer, and cutting any other head of its layer there at most "
            f"{self.others:.0%}."
        )

    def _listed(self) -> str:
        shown = [name.removeprefix("a").replace(".h", ".") for name in self.receivers]
        kind = "head" if self.shared == 1 else "key/value head"
        return f"{kind} {shown[0]}" if len(shown) == 1 else f"{kind}s {', '.join(shown[:-1])} and {shown[-1]}"

    def lines(self) -> list[str]:
        """The finding as a part of a report."""
        return [
            f"  clean:   {self.clean!r} -> {self.answer!r}",
            f"  corrupt: {self.corrupt!r}",
            f"  {self.pairs} pairs of lists like these, {self.right:.0%} answered rightly. Of {self.edges:,} edges",
            f"  the strongest from a head into a key begin at {_head(self.sender)}, which gives {self.to_previous:.0%}",
            f"  of its attention to the token before, and lead to {self._listed()}.",
            f"  With what it writes on corrupt lists, in these keys alone: {-self.lost:+.0%} of the difference; with",
            f"  that of any other head of its layer: at most {self.others:.0%} in size.",
        ]


def _head(name: str) -> str:
    return "head " + name.removeprefix("a").replace(".h", ".")


def word_for(model: Model, word: str) -> str | None:
    """A word as one token of the model, with or without a space in front; None where it is none."""
    for text in (f" {word}", word):
        try:
            model.token(text)
        except InputsError:
            continue
        return text
    return None


def repeated_lists(model: Model, pairs: int, seed: int = 0) -> dict[str, list[str]]:
    """Lists of words that are one token each, said twice as far as the answer: "clean", "corrupt", "answer", "foil".

    Raises:
        InputsError: the model has too few such words.
    """
    words = [word for word in (*english.OBJECTS, *english.PLACES) if word_for(model, word) is not None]
    if len(words) < 2 * LENGTH:
        raise InputsError(f"of the words for lists only {len(words)} are one token of this model")
    rng, made = random.Random(seed), {name: [] for name in ("clean", "corrupt", "answer", "foil")}
    for _ in range(pairs):
        *words_of, other = rng.sample(words, LENGTH + 1)
        again = " ".join(words_of[:SAID_AGAIN])
        made["clean"].append(f"{' '.join(words_of)}. {again}")
        changed = [*words_of[: SAID_AGAIN - 1], other, *words_of[SAID_AGAIN:]]
        made["corrupt"].append(f"{' '.join(changed)}. {again}")
        for name, place in (("answer", SAID_AGAIN), ("foil", SAID_AGAIN + 1)):
            made[name].append(str(word_for(model, words_of[place])))
    return made


def two_steps(model: Model, pairs: int = 16, seed: int = 0) -> TwoSteps:
    """Find the head whose output the keys of later heads need most, where a list is repeated.

    Every edge is scored (EAP); of those from a head into a key the strongest sender is taken with the keys that it
    leads to, and what they carry together is then measured exactly, beside the other heads of the sender's layer.

    Args:
        model: a wrapped language model with a tokenizer.
        pairs: how many lists.
        seed: of the lists.

    Raises:
        InputsError: the model has too few words that are one token.
    """
    lists = repeated_lists(model, pairs, seed)
    clean, corrupt = model.inputs(lists["clean"]), model.inputs(lists["corrupt"])
    metric = logit_diff(lists["answer"], lists["foil"])
    pair = Pair.of(model, clean, corrupt, direction="noising")
    graph = Graph.of(model)
    scores = edge_scores(pair, metric=metric, graph=graph, progress=False).mean()
    # What is worth something to the answer is lost with its corrupt value, so its score is negative.
    found: dict[str, dict[str, float]] = {}
    for edge, score in zip(graph.listed, scores, strict=True):
        if edge.reader.kind == "k" and edge.writer.kind == "head" and score < 0:
            found.setdefault(edge.writer.name, {})[edge.reader.name] = -float(score)
    sender = max(found, key=lambda name: sum(found[name].values()))
    best = sorted(found[sender].items(), key=lambda item: -item[1])
    keys = [name for name, score in best if score >= SHARE * best[0][1]][:RECEIVERS]
    whole = float((evaluate(model, clean, metric) - evaluate(model, corrupt, metric)).mean())

    def lost(name: str) -> float:
        return -float(path_patch(pair, (name, keys), semantics="set", metric=metric, graph=graph).mean()) / whole

    layer, head = _place(sender)
    others = [w.name for w in graph.writers if w.kind == "head" and w.layer == layer and w.name != sender]
    pattern: Any = model.run(clean, capture=Site("pattern", layer, head=head)).tape[Site("pattern", layer, head=head)]
    before = torch.stack([p[0].diagonal(-1)[: n - 1].mean() for p, n in zip(pattern, clean.lengths, strict=True)])
    return TwoSteps(
        clean=lists["clean"][0], corrupt=lists["corrupt"][0], answer=lists["answer"][0], pairs=pairs,
        right=float(evaluate(model, clean, accuracy([[a] for a in lists["answer"]])).mean()),
        sender=sender, to_previous=float(before.mean()),
        receivers=tuple(dict.fromkeys(name.partition("<")[0] for name in keys)),
        lost=lost(sender), others=max((abs(lost(name)) for name in others), default=0.0), edges=len(graph),
        shared=_shared(model, keys[0]),
    )  # fmt: skip


def draw(model: Model, found: TwoSteps) -> Figure:
    """A figure of what the two heads attend to, on the list that `found` shows."""
    inputs = model.inputs([found.clean])
    places = [_place(found.sender), _looking(model, inputs, *_place(found.receivers[0]), found.shared)]
    sites = [Site("pattern", layer, head=head) for layer, head in places]
    tape = model.run(inputs, capture=sites).tape
    figure = figure_of(7.6, 4.0)
    for ax, (layer, head), place, what in zip(
        figure.subplots(1, 2), places, sites, ("to what came before", "to what followed the first time"), strict=True
    ):
        pattern = tape[place][0, 0].detach().float().cpu()
        plots.attention(pattern, inputs.labels(0), ax=ax, title=f"head {layer}.{head}: {what}")
    return figure


def _shared(model: Model, reader: str) -> int:
    """How many query heads share the key that a reader is."""
    attention = model.architecture.blocks[_place(reader.partition("<")[0])[0]].attention
    return attention.q.heads // attention.k.heads


def _looking(model: Model, inputs: Inputs, layer: int, head: int, shared: int) -> tuple[int, int]:
    """Of the query heads that share a key, the one that matches prefixes most."""
    mine = prefix_matching(model, inputs)[layer, head * shared : (head + 1) * shared]
    return layer, head * shared + int(mine.argmax())


def _place(name: str) -> tuple[int, int]:
    layer, _, head = name.removeprefix("a").partition(".h")
    return int(layer), int(head)
