"""A model of each family with clean and corrupt prompts, and what path interventions on them come to by the oracle."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import interp as ip
from tests import zoo
from tests.paths import oracle

CLOSE = {"rtol": 0, "atol": 1e-10}
RAGGED = (5, 3, 6)
ANSWER, FOIL = 7, 9
METRIC = ip.logit_diff(ANSWER, FOIL)
DIRECTIONS = ("denoising", "noising")
REFERENCE = (6, 4, 6, 5)  # lengths of the reference rows; those of 6 can stand in for any prompt

Edit = Callable[[oracle.Prompts, dict[str, Tensor]], Tensor]
"""From the prompts of the run that is edited and what is written instead to the logits of edited runs [run,B,T,V]."""
Measure = Callable[[Tensor, Tensor], Tensor]
"""From logits [B,T,V] and the mask [B,T] to a number for each row [B]."""


def at_last(logits: Tensor, mask: Tensor) -> Tensor:
    """The logits [B,V] at each row's last real token."""
    last = torch.arange(mask.shape[1]).where(mask, -1).amax(1)
    return logits[torch.arange(len(logits)), last]


def logit_diff(answer: int, foil: int) -> Measure:
    """Logit of the answer minus logit of the foil."""
    return lambda logits, mask: at_last(logits, mask)[:, answer] - at_last(logits, mask)[:, foil]


def kl(other: Tensor, other_mask: Tensor) -> Measure:
    """KL(other || run) of the next token, from the other run's logits [B,T,V]."""
    theirs = at_last(other, other_mask).log_softmax(-1)
    return lambda logits, mask: (theirs.exp() * (theirs - at_last(logits, mask).log_softmax(-1))).sum(-1)


MEASURE = logit_diff(ANSWER, FOIL)


class Case:
    """A family's tiny model, wrapped and bare, with pairs of prompts.

    Args:
        family: one of `zoo.FAMILIES`.
        lengths: tokens of each pair.
        shared: how many tokens at the start the two prompts of a pair have in common.
    """

    def __init__(self, family: str, lengths: Sequence[int] = RAGGED, shared: int = 0) -> None:
        self.module = zoo.make(family)
        self.model = ip.wrap(self.module)
        clean, corrupt, reference = (self.rows(seed, n) for seed, n in ((0, lengths), (1, lengths), (2, REFERENCE)))
        corrupt = [a[:shared] + b[shared:] for a, b in zip(clean, corrupt, strict=True)]
        self.tokens = {"clean": clean, "corrupt": corrupt, "reference": reference}

    @staticmethod
    def rows(seed: int, lengths: Sequence[int]) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(1, zoo.VOCAB, (n,), generator=generator).tolist() for n in lengths]

    def inputs(self, name: str, padding: str = "right") -> ip.Inputs:
        """The engine's inputs of the "clean", "corrupt" or "reference" prompts."""
        return self.model.inputs(self.tokens[name], padding=padding)

    def pair(self, padding: str = "right") -> tuple[ip.Inputs, ip.Inputs]:
        return self.inputs("clean", padding), self.inputs("corrupt", padding)

    def prompts(self, name: str) -> oracle.Prompts:
        """The oracle's prompts, padded on the right."""
        given = self.inputs(name)
        return oracle.Prompts(given.ids, given.mask)

    @functools.cached_property
    def edges(self) -> list[str]:
        return oracle.edges(self.module)

    def effects(
        self,
        edit: Edit,
        *,
        direction: str = "denoising",
        values: str = "patch",
        measure: Measure = MEASURE,
        **options,
    ) -> np.ndarray:
        """The effect of each edited run, [run, row]; `options` go to `oracle.replaced`."""
        edited, other = ("clean", "corrupt") if direction == "noising" or values != "patch" else ("corrupt", "clean")
        run = self.prompts(edited)
        with torch.no_grad():
            source = self.prompts(other if values == "patch" else "reference")
            copied = oracle.replaced(self.module, run, values, source, **options)
            base = measure(oracle.forward(self.module, run).logits, run.mask)
            return np.stack([(measure(logits, run.mask) - base).numpy() for logits in edit(run, copied)])

    def edge_effects(self, which: Sequence[str], *, spans=None, query_heads=False, norms="recompute", **options):
        """The effect of each edge [edge, row], nan where a row lacks the place; `options` go to `effects`."""

        def apply(run: oracle.Prompts, copied: dict[str, Tensor]) -> Tensor:
            base = oracle.forward(self.module, run, query_heads=query_heads)
            given = {"spans": spans, "query_heads": query_heads, "base": base}
            if norms == "recompute":
                return all_edges(self.module, run, copied, which, **given)
            return torch.stack([oracle.edge(self.module, run, copied, e, norms=norms, **given) for e in which])

        found = self.effects(apply, **options)
        run = self.prompts("clean")
        found[np.stack([~oracle.parse(e, run, spans)[3].numpy() for e in which])] = np.nan
        return found

    def set_effect(self, which: Sequence[str], *, norms="recompute", query_heads=False, **options) -> np.ndarray:
        """The effect of a set of edges, [row]."""

        def apply(run: oracle.Prompts, copied: dict[str, Tensor]) -> Tensor:
            return oracle.edge_set(self.module, run, copied, which, norms=norms, query_heads=query_heads)[None]

        return self.effects(apply, **options)[0]

    def path_effect(self, path: str, *, norms="recompute", **options) -> np.ndarray:
        """The effect of a frozen path, [row]."""

        def apply(run: oracle.Prompts, copied: dict[str, Tensor]) -> Tensor:
            return oracle.frozen_path(self.module, run, copied, path, norms=norms)[None]

        return self.effects(apply, **options)[0]

    def measured(self, name: str, measure: Measure = MEASURE) -> np.ndarray:
        """A measure of one of the runs unedited, [row]."""
        run = self.prompts(name)
        with torch.no_grad():
            return measure(oracle.forward(self.module, run).logits, run.mask).numpy()

    def random_paths(self, count: int, seed: int = 0) -> list[str]:
        """Random walks to the logits, of at least one node between."""
        draw = random.Random(seed)
        after: dict[str, list[str]] = {}
        for edge in oracle.edges(self.module, query_heads=True):
            sender, reader = edge.split("->")
            after.setdefault(sender, []).append(reader)
        found: set[str] = set()
        while len(found) < count:
            path = [draw.choice(list(after))]
            while path[-1] != "logits":
                path.append(draw.choice(after[path[-1].split("<")[0]]))
            if len(path) > 2:
                found.add("->".join(path))
        return sorted(found)


@functools.cache
def case(family: str, lengths: Sequence[int] = RAGGED, shared: int = 0) -> Case:
    """The same case for every test that asks for it; nobody changes one."""
    return Case(family, lengths, shared)


def all_edges(
    module: nn.Module,
    edited: oracle.Prompts,
    copied: dict[str, Tensor],
    which: Sequence[str],
    *,
    base: oracle.Trace,
    spans: oracle.Spans | None = None,
    query_heads: bool = False,
) -> Tensor:
    """`oracle.edge` for many edges [edge,B,T,V] in one run, in which each edge has a copy of the rows."""
    copies = oracle.Prompts(edited.ids.repeat(len(which), 1), edited.mask.repeat(len(which), 1))
    into: dict[str, list[tuple[int, Tensor]]] = {}
    for i, edge in enumerate(which):
        sender, receiver, where, _ = oracle.parse(edge, edited, spans)
        new = base.readers[receiver] + torch.where(where, copied[sender] - base.writers[sender], 0.0)
        into.setdefault(receiver, []).append((i, new))

    def override(name: str, live: Tensor, written: oracle.Written) -> Tensor:
        read = list(live.unflatten(0, (len(which), -1)))
        for i, new in into.get(name, ()):
            read[i] = new
        return torch.cat(read)

    logits = oracle.forward(module, copies, override, query_heads=query_heads).logits
    return logits.unflatten(0, (len(which), -1))


def agrees(result: ip.Result, names: Sequence[str], expected: np.ndarray) -> None:
    """The result has these edges in any order, with these effects [edge, row], and they are not all zero."""
    (axis,) = result.axes
    assert axis.name == "edge"
    assert sorted(axis.values) == sorted(names)
    order = [axis.values.index(name) for name in names]
    np.testing.assert_allclose(np.asarray(result.effect)[order], expected, **CLOSE)
    assert np.nanmax(np.abs(expected)) > 1e-3


def stop_after(patched: pytest.MonkeyPatch, count: int) -> None:
    """Have sweeps of edges interrupted when so much was measured."""
    import interp.streaming as streaming

    real, seen = streaming.Stream.write, []

    def cut(self, values, cells, rows, status):
        room = min(len(cells), count - len(seen))
        if room:
            real(self, values[:, :room], cells[:room], rows, status[:room])
            seen.extend(cells[:room])
        if room < len(cells):
            raise KeyboardInterrupt

    patched.setattr(streaming.Stream, "write", cut)
