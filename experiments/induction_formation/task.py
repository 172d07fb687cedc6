"""Exemplar, label, exemplar, label, query: a task that only copying from context can solve, drawn by counters.

Source: Singh et al., "What needs to go right for an induction head?" (ICML 2024). A batch is a function of a seed and a
step alone, so it is the same in a run of its own and in an ensemble, and a resumed run needs no generator's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import NamedTuple

import torch
from torch import Tensor

from hooks import InputsError, hash_counters, nearest, normal, uniform

SPLITS = ("train", "labels", "classes")
TOKENS = 5
QUERY = TOKENS - 1


class Batch(NamedTuple):
    """Sequences of one or more members, the batch on the last axis.

    Attributes:
        classes: the two context exemplars' classes, int64 [..., 2, B].
        labels: their labels, int64 [..., 2, B].
        target: which of the two the query repeats, int64 [..., B].
    """

    classes: Tensor
    labels: Tensor
    target: Tensor

    @property
    def answer(self) -> Tensor:
        """The query's label, int64 [..., B]."""
        return torch.where(self.target.bool(), self.labels[..., 1, :], self.labels[..., 0, :])

    def ids(self, n_exemplars: int) -> Tensor:
        """Token ids [..., B, 5]: exemplars as their class, labels after the `n_exemplars` classes."""
        first, second = self.classes.unbind(-2)
        label_a, label_b = (self.labels + n_exemplars).unbind(-2)
        query = torch.where(self.target.bool(), second, first)
        return torch.stack((first, label_a, second, label_b, query), dim=-1)


@dataclass(frozen=True)
class Task:
    """How many classes and labels there are, and which of them are held out.

    Attributes:
        n_classes: training classes.
        n_labels: labels; their unordered pairs are split, four fifths of them (rounded) for training.
        held_out_classes: classes that never occur in training; their exemplars follow the first `largest` ones.
        largest: exemplars before the held-out ones, so that tasks of several sizes share one table of exemplars.
        seed: of the order in which label pairs are held out.
    """

    n_classes: int = 50
    n_labels: int = 5
    held_out_classes: int = 100
    largest: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.n_classes <= self.largest:
            raise InputsError(f"n_classes must lie between 2 and largest ({self.largest}), got {self.n_classes}")
        if self.n_labels < 3:
            raise InputsError(f"n_labels must be at least 3, so that label pairs can be held out, got {self.n_labels}")
        if self.held_out_classes < 2:
            raise InputsError(f"held_out_classes must be at least 2, got {self.held_out_classes}")

    @property
    def n_exemplars(self) -> int:
        """Rows of the table of exemplars."""
        return self.largest + self.held_out_classes

    @property
    def pairs(self) -> Tensor:
        """Unordered label pairs, int64 [n_labels (n_labels - 1) / 2, 2]: training ones first, the held-out ones last.

        Every label occurs in a training pair: the order is drawn again until that is so.
        """
        every = torch.tensor(list(combinations(range(self.n_labels), 2)))
        for attempt in range(1000):
            order = hash_counters(self.seed, attempt, torch.arange(len(every))).argsort()
            found = every[order]
            if len(found[: self.n_training_pairs].unique()) == self.n_labels:
                return found
        raise InputsError(f"no split of label pairs keeps each of {self.n_labels} labels in training")

    @property
    def n_training_pairs(self) -> int:
        """How many of the unordered label pairs are for training."""
        return round(0.8 * self.n_labels * (self.n_labels - 1) / 2)

    def span(self, split: str) -> tuple[int, int, int, int]:
        """First class, number of classes, first label pair and number of label pairs of a split.

        Raises:
            InputsError: no such split.
        """
        if split not in SPLITS:
            raise InputsError(f"split must be one of {', '.join(SPLITS)}; got {split!r}{nearest(split, SPLITS)}")
        every, training = len(self.pairs), self.n_training_pairs
        first_class, classes = (self.largest, self.held_out_classes) if split == "classes" else (0, self.n_classes)
        first_pair, pairs = (training, every - training) if split == "labels" else (0, training)
        return first_class, classes, first_pair, pairs


def exemplars(task: Task, width: int = 512, seed: int = 0, cosine: float = 0.0) -> Tensor:
    """Gaussian class vectors, float64 [n_exemplars, width]; a row depends on the arguments and its number alone.

    Args:
        task: how many there are.
        width: numbers of each.
        seed: of the draw; the same one gives the same directions at every cosine.
        cosine: between two classes, in expectation, from 0 (independent vectors) to less than 1 (all share a mean, as
            features do that a network's rectified last layer gives). The variance of an entry is 1 at each.

    Raises:
        InputsError: a cosine out of range.
    """
    if not 0 <= cosine < 1:
        raise InputsError(f"the cosine between classes lies from 0 to less than 1, got {cosine}")
    own = normal(seed, torch.arange(task.n_exemplars)[:, None], torch.arange(width))
    shared = normal(seed, 0, torch.arange(width), 1)
    return cosine**0.5 * shared + (1 - cosine) ** 0.5 * own


def mean_cosine(table: torch.Tensor) -> float:
    """The mean cosine between two rows of a table of exemplars [n_exemplars, width]."""
    unit = torch.nn.functional.normalize(table.double(), dim=1)
    return float((unit.sum(0).square().sum() - len(unit)) / (len(unit) * (len(unit) - 1)))


def source(tasks: Sequence[Task], seeds: Sequence[int], split: str = "train") -> dict[str, Tensor]:
    """What `draw` needs to know of each member, as stacked tensors.

    Args:
        tasks: one a member; they share `largest` and `held_out_classes`.
        seeds: one a member, of its batches.
        split: "train", "labels" (held-out label pairs) or "classes" (held-out classes).

    Returns:
        ``seed`` [M], ``span`` [M, 4] (see `Task.span`) and ``pairs`` [M, most pairs, 2], all int64.

    Raises:
        InputsError: no such split, or tasks that do not share a table of exemplars.
    """
    if len({(task.largest, task.held_out_classes) for task in tasks}) != 1:
        raise InputsError("members share one table of exemplars: give their tasks the same largest, held_out_classes")
    every = [task.pairs for task in tasks]
    pairs = torch.zeros(len(tasks), max(map(len, every)), 2, dtype=torch.int64)
    for row, found in zip(pairs, every, strict=True):
        row[: len(found)] = found
    return {
        "seed": torch.tensor(list(seeds), dtype=torch.int64),
        "span": torch.tensor([task.span(split) for task in tasks], dtype=torch.int64),
        "pairs": pairs,
    }


def draw(source: dict[str, Tensor], step: Tensor | int, batch: int) -> Batch:
    """The batch of a step, for every member: classes [M, 2, B], labels [M, 2, B], target [M, B].

    Args:
        source: what `source` returned.
        step: which batch, an int or an int64 tensor [].
        batch: sequences B.
    """
    seed, pairs = source["seed"][:, None], source["pairs"]
    first_class, n_classes, first_pair, n_pairs = (column[:, None] for column in source["span"].unbind(1))
    row = torch.arange(batch, device=seed.device)

    def below(n: Tensor | int, which: int) -> Tensor:
        return (uniform(seed, step, row, which) * n).to(torch.int64)

    one = below(n_classes, 0)
    other = below(n_classes - 1, 1)
    other = other + (other >= one)
    pair = first_pair + below(n_pairs, 2)
    labels = torch.gather(pairs, 1, pair[..., None].expand(-1, -1, 2)).transpose(1, 2)
    labels = torch.where(below(2, 3)[:, None].bool(), labels.flip(1), labels)
    # A compiler would draw again wherever a number is read; what as_strided is taken of, it stores.
    drawn = (torch.stack((one, other), 1) + first_class[:, None], labels, below(2, 4))
    return Batch(*(value.as_strided(value.shape, value.stride()) for value in drawn))


def every_sequence(task: Task) -> Batch:
    """Each training sequence once: ordered class pairs x ordered training label pairs x which is asked; [2, B], [B]."""
    classes = torch.tensor(list(permutations(range(task.n_classes), 2)))
    pairs = task.pairs[: task.n_training_pairs]
    labels = torch.cat((pairs, pairs.flip(1)))
    c, p, t = torch.meshgrid(torch.arange(len(classes)), torch.arange(len(labels)), torch.arange(2), indexing="ij")
    return Batch(classes[c.flatten()].T, labels[p.flatten()].T, t.flatten())
