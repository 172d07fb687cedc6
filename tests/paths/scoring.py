"""Fast scores of edges by their definitions: gradients of the interpreter that runs a model node by node."""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import interp as ip
from tests import oracle as families
from tests.paths import oracle
from tests.paths.cases import CLOSE, MEASURE, Case, Measure

Pulls = dict[str, Tensor]
"""By reader the gradient of the measure [B,T,M] at what it reads, or at its normed input."""


def pair(given: Case, direction: str, values: str = "patch", **options) -> tuple[oracle.Prompts, dict[str, Tensor]]:
    """The prompts of the run that is edited, and what each writer is replaced by."""
    edited, other = ("clean", "corrupt") if direction == "noising" or values != "patch" else ("corrupt", "clean")
    run, source = given.prompts(edited), given.prompts(other if values == "patch" else "reference")
    with torch.no_grad():
        return run, oracle.replaced(given.module, run, values, source, **options)


def gradients(
    given: Case, run: oracle.Prompts, measure: Measure, embedded: Tensor | None = None
) -> tuple[oracle.Trace, Pulls, Pulls, Pulls]:
    """The run, and gradients by reader at what it reads and at its normed input, and by writer at what it writes."""
    leaves: dict[str, Tensor] = {}
    inside: list[Tensor] = []
    plain = oracle.normed

    def override(name: str, live: Tensor, written: oracle.Written) -> Tensor:
        leaves[name] = torch.zeros_like(live, requires_grad=True)
        return live + leaves[name]

    def normed(norm, x: Tensor, held: Tensor | None) -> Tensor:
        inside.append(torch.zeros_like(x, requires_grad=True))
        return plain(norm, x, held) + inside[-1]

    with mock.patch.object(oracle, "normed", normed):
        trace = oracle.forward(given.module, run, override, embedded=embedded)
    assert len(inside) == len(leaves)  # every reader has one norm, in the order in which they read
    total = measure(trace.logits, run.mask).sum()
    written = {name: x for name, x in trace.writers.items() if name != "input"}
    wanted = [*leaves.values(), *inside, *written.values()]
    found = torch.autograd.grad(total, wanted, allow_unused=True)
    pulls = iter(torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True))
    return trace, *({name: next(pulls) for name in names} for names in (leaves, leaves, written))


def _ends(given: Case, edge: str) -> tuple[list[str], list[str]]:
    """The writers and the readers between heads of an edge, which may be one between whole layers."""
    names = oracle.block_edge(edge, given.module) if _block(edge) else [edge]
    return sorted({e.split("->")[0] for e in names}), sorted({e.split("->")[1] for e in names})


def _block(edge: str) -> bool:
    return any(end.startswith("a") and "." not in end for end in edge.split("->"))


def _each(given: Case, run: oracle.Prompts, copied: dict[str, Tensor], names: Sequence[str], trace, spans, score):
    """score(writers' change at the edge's places [B,T,M], readers) of every edge, [edge, row]; nan: no such place."""
    out = []
    for name in names:
        body, _, place = name.partition("@")
        where, has = run.mask[:, :, None], torch.ones(len(run.ids), dtype=torch.bool)
        if place:
            at = spans[place]
            where, has = run.columns([at] if isinstance(at, int) else list(at))
            where = where[:, :, None]
        senders, readers = _ends(given, body)
        change = sum(torch.where(where, copied[u] - trace.writers[u], 0.0) for u in senders)
        out.append(torch.where(has, score(change, readers), torch.nan).detach().numpy())
    return np.stack(out)


def eap(
    given: Case,
    names: Sequence[str],
    *,
    direction: str = "denoising",
    values: str = "patch",
    steps: int | None = None,
    spans: oracle.Spans | None = None,
    measure: Measure = MEASURE,
    **options,
) -> np.ndarray:
    """Sum over positions of <d_u, dM/d in_v> [edge, row]; with `steps`, the gradient averaged on the straight line."""
    run, copied = pair(given, direction, values, **options)
    trace, pull, _, _ = gradients(given, run, measure)
    if steps is not None:
        mine, theirs = trace.writers["input"].detach(), copied["input"]
        theirs = torch.where(run.mask[:, :, None], theirs, mine)
        clean, corrupt = (theirs, mine) if (direction, values) == ("denoising", "patch") else (mine, theirs)
        pull = dict.fromkeys(pull, 0)
        for k in range(1, steps + 1):
            there = gradients(given, run, measure, corrupt + k / steps * (clean - corrupt))[1]
            pull = {name: pull[name] + g / steps for name, g in there.items()}

    def score(change: Tensor, readers: list[str]) -> Tensor:
        return sum((change * pull[v]).sum((1, 2)) for v in readers)

    return _each(given, run, copied, names, trace, spans, score)


def receiver_exact(
    given: Case,
    names: Sequence[str],
    *,
    direction: str = "denoising",
    values: str = "patch",
    spans: oracle.Spans | None = None,
    measure: Measure = MEASURE,
    **options,
) -> np.ndarray:
    """<dM/d o_v, o_v(in_v + d_u) - o_v(in_v)> [edge, row], and into the logits the exact effect.

    Queries, keys and values are linear in the normed input n, so theirs is <dM/dn, n(in_v + d_u) - n(in_v)>.
    """
    run, copied = pair(given, direction, values, **options)
    trace, _, within, written = gradients(given, run, measure)
    spec = families.read(given.module)

    def score(change: Tensor, readers: list[str]) -> Tensor:
        total = torch.zeros(len(run.ids), dtype=change.dtype)
        for v in readers:
            read = trace.readers[v]
            if v == "logits":
                now = oracle.unembed(spec, read + change, None)
                total = total + measure(now, run.mask) - measure(trace.logits, run.mask)
                continue
            w = spec.layers[int(v[1:].split(".")[0])]
            if v.startswith("m"):
                moved = oracle.feed_forward(w, read + change, None) - oracle.feed_forward(w, read, None)
                total = total + (moved * written[v]).sum((1, 2))
            else:
                moved = oracle.normed(w.norm1, read + change, None) - oracle.normed(w.norm1, read, None)
                total = total + (moved * within[v]).sum((1, 2))
        return total

    return _each(given, run, copied, names, trace, spans, score)


def agrees(result: ip.Result, names: Sequence[str], expected: np.ndarray) -> None:
    """The result has these edges in any order, with these scores [edge, row], and each of them is not zero."""
    (axis,) = result.axes
    assert axis.name == "edge" and sorted(axis.values) == sorted(names)
    order = [axis.values.index(name) for name in names]
    np.testing.assert_allclose(result.effect[order], expected, **CLOSE)
    assert (np.nanmax(np.abs(expected), 1) > 1e-12).all()
