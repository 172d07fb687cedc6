"""Plans as tensors: what each member holds, read into masks and values with a leading axis of members.

Members under different plans then share one program (`network.forward`). A plan is read intervention by intervention:
each is compared with what the library's own builder makes, so that nothing about it is taken for granted, and what the
program has no tensor for is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import interp as ip
from experiments.induction_formation.task import QUERY, TOKENS, Batch, Task, every_sequence
from experiments.induction_formation.treatments import FIRST, LABELS, LAST, STREAMS, TO_THE_LEFT, Held
from hooks import PlanError
from interp import training

GROUPS = (
    ("previous",),
    ("blocked",),
    ("scale_first",),
    ("scale_last",),
    ("gate_first",),
    ("gate_last",),
    ("bare",),
    ("moved",),
    ("preserve", "stopped"),
    ("match", "given"),
    ("copy", "rest"),
)
"""Tensors that are there together: where the first says that no member holds anything, the program goes without."""
SUFFIX = {FIRST: "first", LAST: "last"}
PARTS = tuple(STREAMS)
Row = dict[str, Tensor]


def stack(held: Sequence[Held], n_heads: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Masks and values of what many members hold; a group that no member uses is left out.

    Args:
        held: one a member.
        n_heads: heads a layer H.
        dtype: of the values.

    Returns:
        Some of: ``previous`` [M, H], ``blocked`` bool [M, H, T, S], ``scale_first`` and ``scale_last``, ``gate_first``
        and ``gate_last`` [M, H], ``bare`` [M] (the residual is the embedding), ``moved`` [M, 3] (of q, k, v),
        ``preserve`` and ``stopped`` [M, 3], ``match`` [M, H] with ``given`` [M, 2, S] (the query's pattern by which
        exemplar it repeats), ``copy`` [M, H] with ``rest`` [M].

    Raises:
        PlanError: an intervention that the program cannot express, or a head that the layer lacks.
    """
    known: dict[Held, Row] = {}  # members that differ by their seeds alone are read once
    for index, one in enumerate(held):
        try:
            known[one] = known[one] if one in known else read(one, n_heads)
        except PlanError as error:
            raise PlanError(f"member {index}: {error}") from None
    rows, nothing = [known[one] for one in held], _nothing(n_heads)
    out = {}
    for names in GROUPS:
        if any(not torch.equal(row[names[0]], nothing[names[0]]) for row in rows):
            for name in names:
                value = torch.stack([row[name] for row in rows])
                out[name] = value if value.dtype == torch.bool else value.to(dtype)
    return out


def read(held: Held, n_heads: int) -> Row:
    """One member's masks and values in float64, without a leading axis; see `stack`.

    What depends on the batch is seen on sequences with every combination of target, label and class: the query's
    pattern may follow the target, and copied scores the labels, and nothing else may vary.
    """
    batch = every_sequence(Task(n_classes=2, n_labels=3))
    return _read(ip.Plan() + (held if isinstance(held, ip.Plan) else held(batch)), batch, n_heads)


def _read(plan: ip.Plan, batch: Batch, n_heads: int) -> Row:
    row = _nothing(n_heads)
    # What is preserved is compared with all that else is in force, so it comes last.
    for item in sorted(plan, key=lambda item: item.op.name.startswith("patch")):
        reader = _READERS.get((item.site.name, item.op.name))
        if reader is None or item.site.layer not in (FIRST, LAST, None) or not reader(item, row, batch):
            raise PlanError(
                f"the stacked program cannot hold {item}. It holds, of whole heads and at full strength: "
                "previous_token, forbid_previous, temperature and ablate_heads in layer 0; temperature, ablate_heads, "
                "match_pattern at the query, copy_to_logits of both labels, and the residual_from, attention_from "
                "and preserving that a Treatment makes, in layer 1"
            )
    return row


def _nothing(n_heads: int) -> Row:
    """A member that holds nothing."""
    heads, streams = (n_heads,), (len(PARTS),)
    zero = {"previous": heads, "match": heads, "copy": heads, "moved": streams, "preserve": streams}
    zero |= {"given": (2, TOKENS), "rest": (), "bare": ()}
    one = [f"{what}_{layer}" for what in ("scale", "gate") for layer in SUFFIX.values()]
    no = {"blocked": (n_heads, TOKENS, TOKENS), "stopped": streams}
    return {
        **{name: torch.zeros(size, dtype=torch.float64) for name, size in zero.items()},
        **{name: torch.ones(heads, dtype=torch.float64) for name in one},
        **{name: torch.zeros(size, dtype=torch.bool) for name, size in no.items()},
    }


# One reader for each site and operation: whether the row can say what the intervention does; if so, it now says it.


def _previous(item: ip.Intervention, row: Row, batch: Batch) -> bool:
    where: Any = item.site
    row["previous"][_heads(where, row)] = 1
    return item == training.previous_token(FIRST, where.head)


def _blocked(item: ip.Intervention, row: Row, batch: Batch) -> bool:
    where: Any = item.site
    offset = item.op.parameters()["offset"]
    if isinstance(where.pos, Tensor) or offset < 1:
        return False
    for query in _entries(where.pos, TOKENS, "positions"):
        if query >= offset:
            row["blocked"][_heads(where, row), query, query - offset] = True
    return item == training.forbid_previous(FIRST, where.head, pos=where.pos, offset=offset)


def _scaled(item: ip.Intervention, row: Row, batch: Batch) -> bool:
    where: Any = item.site
    factor = item.op.parameters()["factor"]
    if isinstance(factor, Tensor) or not factor > 0:
        return False
    row[f"scale_{SUFFIX[where.layer]}"][_heads(where, row)] *= factor
    return item == ip.scale(ip.site("scores", where.layer, head=where.head), factor)


def _gated(item: ip.Intervention, row: Row, batch: Batch) -> bool:
    where: Any = item.site
    row[f"gate_{SUFFIX[where.layer]}"][_heads(where, row)] = 0
    return item == training.ablate_heads(where.layer, where.head)


def _bare(item: ip.Intervention, row: Row, batch: Batch) -> bool:
    row["bare"].fill_(1)
    return item == training.residual_from(LAST, range(TOKENS))


def _moved(item: ip.Intervention, row: Row, batch: Batch) -> bool:
    part = item.site.name[0]
    row["moved"][PARTS.index(part)] = 1
    source = range(TOKENS) if part == "v" else TO_THE_LEFT
    return ip.Plan((item,)) == training.attention_from(LAST, source, parts=(part,))


def _preserved(item: ip.Intervention, row: Row, batch: Batch) -> bool:
    part, source, constant = PARTS.index(item.site.name), item.reads[0].source, item.op.reads_constants
    if not isinstance(source, ip.Plan) or row["moved"][part] or row["preserve"][part]:
        return False
    row["preserve"][part], row["stopped"][part] = 1, constant
    # The program has one other residual stream after the first layer: under all that is held there, but for ablations.
    n_heads = len(row["previous"])
    other, nothing = _read(source, batch, n_heads), _nothing(n_heads)
    expected = {name: row[name] for name in ("previous", "blocked", "scale_first")}
    expected |= {name: nothing[name] for name in ("gate_first", "bare", "moved", "preserve")}
    alike = all(torch.equal(other[name], value) for name, value in expected.items())
    return alike and item == ip.patch(ip.site(item.site.name, LAST), source, stop_gradient=constant)


def _matched(item: ip.Intervention, row: Row, batch: Batch) -> bool:
    pattern = item.op.parameters()["pattern"]
    if pattern.shape[-1] < TOKENS or (pattern.ndim == 3 and len(pattern) != len(batch.target)):
        return False
    at_query = pattern[..., QUERY, :TOKENS].double().expand(len(batch.target), TOKENS)
    given = torch.stack([at_query[batch.target == target][0] for target in (0, 1)])
    alike = torch.equal(given[batch.target], at_query) and bool(given.any(1).all())
    if not alike or (row["match"].any() and not torch.equal(row["given"], given)):
        return False
    row["match"][_heads(item.site, row)] = 1
    row["given"].copy_(given)
    return item == ip.Intervention(ip.site("pattern", LAST, head=item.site.head), item.op)


def _copied(item: ip.Intervention, row: Row, batch: Batch) -> bool:
    read: Any = item.reads[0].site
    head, rest = read.head, item.op.parameters()["rest"]
    if not isinstance(head, int) or row["copy"].any():
        return False
    row["copy"][_entries(head, len(row["copy"]), "heads")] = 1
    row["rest"].fill_(rest)
    return item == training.copy_to_logits(LAST, head, QUERY, torch.tensor(LABELS), batch.labels.T, rest=rest)


_READERS: dict[tuple[str, str], Callable[[ip.Intervention, Row, Batch], bool]] = {
    ("pattern", "attend_back"): _previous,
    ("pattern", "attend"): _matched,
    ("scores", "forbid_back"): _blocked,
    ("scores", "scale"): _scaled,
    ("z", "zero"): _gated,
    ("logits", "copy_scores"): _copied,
    ("resid_pre", "from_positions"): _bare,
    **{(f"{part}_input", "from_positions"): _moved for part in PARTS},
    **{(part, patch): _preserved for part in PARTS for patch in ("patch", "patch_constant")},
}


def _heads(where: ip.Site, row: Row) -> list[int]:
    return _entries(where.head, len(row["previous"]), "heads")


def _entries(index: Any, size: int, what: str) -> list[int]:
    """Heads or positions, counted from 0, that an index of a site means.

    Raises:
        PlanError: there is no such one.
    """
    if index is None or isinstance(index, ip.Span):
        return list(range(size)[slice(index.start, index.stop) if index else slice(None)])
    listed = [index] if isinstance(index, int) else list(index)
    if bad := [i for i in listed if not -size <= i < size]:
        raise PlanError(f"{what} {bad} do not exist: there are {size}, counted from 0")
    return [i % size for i in listed]
