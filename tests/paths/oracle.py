"""A transformer run node by node, every reader on an input of its own: what path interventions mean, written out.

Nothing of the engine is used; the weights come from `tests.oracle.read`. A writer adds to the residual stream: `input`,
`a0.h1`, `m0`. A reader takes from it: `a0.h1<q>`, `a0.h1<k>`, `a0.h1<v>` (k and v by key/value head, or by query head
where `query_heads` says so), `m0`, `logits`. An edge `u->v` may end in `@3` or `@name`: it is at those positions alone.

Letters: B rows, T columns, P positions, M model width, D head width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests import oracle
from tests.oracle import LayerWeights, NoNorm, Norm, Spec

Written = Mapping[str, Tensor]
Override = Callable[[str, Tensor, Written], Tensor]
"""From a reader, what it would read [B,T,M] and what has been written so far to what it reads instead."""
Spans = Mapping[str, "int | Sequence[int]"]


@dataclass(frozen=True)
class Prompts:
    """Token ids [B,T] and which of them are real [B,T]."""

    ids: Tensor
    mask: Tensor

    def columns(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Where the positions are [B,T], counting real tokens (from the end if negative); which rows have them [B]."""
        place, length = oracle.positions(self.mask), self.mask.sum(1)
        where, has = torch.zeros_like(self.mask), torch.ones_like(length, dtype=torch.bool)
        for p in positions:
            wanted = torch.full_like(length, p) if p >= 0 else length + p
            where = where | (self.mask & (place == wanted[:, None]))
            has = has & (wanted >= 0) & (wanted < length)
        return where, has


@dataclass(frozen=True)
class Trace:
    """One run: the logits [B,T,V], and by name what each writer wrote and each reader read, [B,T,M]."""

    logits: Tensor
    writers: dict[str, Tensor]
    readers: dict[str, Tensor]


# Nodes


def normed(norm: Norm | NoNorm, x: Tensor, held: Tensor | None) -> Tensor:
    """Normalise x; with `held`, by the scale that the norm has there instead (x loses its own mean either way)."""
    if isinstance(norm, NoNorm) or held is None:
        return norm(x)
    if norm.centered:
        x, held = x - x.mean(-1, keepdim=True), held - held.mean(-1, keepdim=True)
    x = x / torch.sqrt((held * held).mean(-1, keepdim=True) + norm.eps) * norm.weight
    return x if norm.bias is None else x + norm.bias


def project(spec: Spec, w: LayerWeights, letter: str, head: int, x: Tensor, position: Tensor, held: Tensor | None):
    """The queries, keys or values [B,T,D] of one of the heads that the weights have, from its input [B,T,M]."""
    a = w.attn
    weight, bias = {"q": (a.W_Q, a.b_Q), "k": (a.W_K, a.b_K), "v": (a.W_V, a.b_V)}[letter]
    y = normed(w.norm1, x, held) @ weight[head].T + bias[head]
    if letter == "v":
        return y
    qk_norm = a.q_norm if letter == "q" else a.k_norm
    if qk_norm is not None:
        y = qk_norm(y)
    if spec.rotary_base is not None:
        y = oracle.rotate_some(y[:, :, None], position, spec)[:, :, 0]
    return y


def attend(w: LayerWeights, head: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """What one query head adds to the residual [B,T,M], the layer's own bias left out."""
    T = mask.shape[1]
    query, key = torch.arange(T)[:, None], torch.arange(T)[None, :]
    allowed = (key <= query) & mask[:, None, :]
    if w.attn.window is not None:
        allowed = allowed & (key > query - w.attn.window)
    scores = q @ k.transpose(1, 2) * (1 / math.sqrt(q.shape[-1]) if w.attn.scale is None else w.attn.scale)
    if w.attn.cap is not None:
        scores = w.attn.cap * torch.tanh(scores / w.attn.cap)
    scores = scores.masked_fill(~allowed, -torch.inf)
    return oracle.softmax(scores).masked_fill(~allowed, 0.0) @ v @ w.attn.W_O[head]


def gain(norm: Norm, x: Tensor) -> Tensor:
    """What an RMSNorm multiplies x by, [B,T,M]."""
    assert not norm.centered and norm.bias is None
    return norm.weight / torch.sqrt((x * x).mean(-1, keepdim=True) + norm.eps)


def feed_forward(w: LayerWeights, x: Tensor, held: Tensor | None) -> Tensor:
    """What the MLP adds to the residual [B,T,M], its bias and the norm after it included."""
    m = w.mlp
    x = normed(w.norm2, x, held)
    up = x @ m.W_up.T + m.b_up
    hidden = m.act(up) if m.W_gate is None else m.act(x @ m.W_gate.T + m.b_gate) * up
    out = hidden @ m.W_down.T + m.b_down
    return out if w.post2 is None else w.post2(out)


def unembed(spec: Spec, x: Tensor, held: Tensor | None) -> Tensor:
    """The logits [B,T,V]."""
    return spec.logits(normed(spec.norm, x, held))


def key_value_head(w: LayerWeights, head: int) -> int:
    """The key/value head that a query head reads."""
    return head // (w.attn.W_Q.shape[0] // w.attn.W_K.shape[0])


# The whole network


def forward(
    model: nn.Module,
    prompts: Prompts,
    override: Override | None = None,
    *,
    held: Mapping[str, Tensor] | None = None,
    query_heads: bool = False,
    embedded: Tensor | None = None,
) -> Trace:
    """Run a model of a family that `tests.oracle` reads.

    Args:
        model: only its parameters and config are read.
        prompts: what it is run on.
        override: what each reader reads; by default the residual stream as it is there.
        held: for some readers an input [B,T,M], whose norm scale is used instead of that of what they read.
        query_heads: whether each query head has key and value readers of its own.
        embedded: embeddings [B,T,M] instead of the tokens'.
    """
    spec, mask, position = oracle.read(model), prompts.mask, oracle.positions(prompts.mask)
    held = held or {}
    writers: dict[str, Tensor] = {}
    readers: dict[str, Tensor] = {}

    def read(name: str, resid: Tensor, written: Written | None = None) -> Tensor:
        seen = dict(writers) if written is None else written
        readers[name] = resid if override is None else override(name, resid, seen)
        return readers[name]

    resid = spec.W_E[prompts.ids] * spec.embed_scale
    if spec.W_pos is not None:
        resid = resid + spec.W_pos[position]
    resid = resid if embedded is None else embedded
    writers["input"] = resid

    for layer, w in enumerate(spec.layers):
        heads = range(w.attn.W_Q.shape[0])
        group = [key_value_head(w, h) for h in heads]
        sources = {"q": list(heads)}
        sources["k"] = sources["v"] = group if query_heads else list(range(w.attn.W_K.shape[0]))
        made: dict[str, list[Tensor]] = {}
        for letter in "qkv":
            made[letter] = []
            for i, source in enumerate(sources[letter]):
                name = f"a{layer}.h{i}<{letter}>"
                made[letter].append(project(spec, w, letter, source, read(name, resid), position, held.get(name)))
        before, earlier, results = resid, dict(writers), []
        for h in heads:
            own = h if query_heads else group[h]
            results.append(attend(w, h, made["q"][h], made["k"][own], made["v"][own], mask))
        total = sum(results) + w.attn.b_O
        for h in heads:
            # A norm on the sum scales every head's part of it alike.
            writers[f"a{layer}.h{h}"] = results[h] if w.post1 is None else results[h] * gain(w.post1, total)
            resid = resid + writers[f"a{layer}.h{h}"]
        resid = resid + (w.attn.b_O if w.post1 is None else w.attn.b_O * gain(w.post1, total))
        if w.mlp is not None:
            seen = read(f"m{layer}", before, earlier) if w.parallel else read(f"m{layer}", resid)
            writers[f"m{layer}"] = feed_forward(w, seen, held.get(f"m{layer}"))
            resid = resid + writers[f"m{layer}"]

    logits = unembed(spec, read("logits", resid), held.get("logits"))
    return Trace(logits, writers, readers)


def edges(model: nn.Module, query_heads: bool = False) -> list[str]:
    """Every edge: each reader with what has been written when it reads."""
    found = []

    def record(name: str, live: Tensor, written: Written) -> Tensor:
        found.extend(f"{u}->{name}" for u in written)
        return live

    token = Prompts(torch.ones(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool))
    forward(model, token, record, query_heads=query_heads)
    return found


def block_edge(edge: str, model: nn.Module) -> list[str]:
    """The edges between heads, k and v by key/value head, of an edge between whole attention layers."""
    sender, receiver = edge.split("->")

    def inside(found: str, node: str) -> bool:
        return found == node or (node.startswith("a") and found.startswith(f"{node}."))

    return [e for e in edges(model) if inside(e.split("->")[0], sender) and inside(e.split("->")[1], receiver)]


# What is written instead


def by_position(x: Tensor, mask: Tensor) -> Tensor:
    """Values [R,P,M] by position from values [R,T,M] by column, nan beyond a row's end."""
    out = x.new_full((len(x), int(mask.sum(1).max()), x.shape[2]), torch.nan)
    for row, real in enumerate(mask):
        out[row, : int(real.sum())] = x[row, real]
    return out


def by_column(x: Tensor, mask: Tensor) -> Tensor:
    """Values [B,T,M] in the columns of `mask` from values [B,P,M] by position, zero at padding."""
    out = x.new_zeros(*mask.shape, x.shape[2])
    for row, real in enumerate(mask):
        out[row, real] = x[row, : int(real.sum())]
    return out


def replaced(
    model: nn.Module,
    edited: Prompts,
    values: str,
    other: Prompts | None = None,
    *,
    pooled: bool = False,
    donors: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """What each writer is replaced by, in the columns of the run that is edited, [B,T,M].

    Args:
        model: as in `forward`.
        edited: the prompts of the run that is edited.
        values: "patch" (`other`, row by row), "zero", "mean" (over the rows of `other` that have the position; over all
            their real tokens if `pooled`), "resample" (row `donors[b]` of `other`).
        other: the prompts that values are taken from.
        pooled: as above.
        donors: as above.
    """
    own = forward(model, edited).writers
    if values == "zero":
        return {name: torch.zeros_like(x) for name, x in own.items()}
    taken = {name: by_position(x, other.mask) for name, x in forward(model, other).writers.items()}
    rows = len(edited.ids)
    if values == "mean":
        over = (0, 1) if pooled else (0,)
        taken = {name: x.nanmean(over, keepdim=True).expand(rows, x.shape[1], -1) for name, x in taken.items()}
    elif values == "resample":
        taken = {name: x[list(donors)] for name, x in taken.items()}
    else:
        assert values == "patch"
    return {name: by_column(x, edited.mask) for name, x in taken.items()}


# Semantics: each returns the logits [B,T,V] of the edited run


def parse(edge: str, prompts: Prompts, spans: Spans | None = None) -> tuple[str, str, Tensor, Tensor]:
    """Writer and reader of an edge, the real columns [B,T,1] that it is at, and which rows have all of those [B]."""
    body, _, place = edge.partition("@")
    sender, receiver = body.split("->")
    if not place:
        return sender, receiver, prompts.mask[:, :, None], torch.ones(len(prompts.ids), dtype=torch.bool)
    span = spans[place] if spans and place in spans else int(place)
    where, has = prompts.columns([span] if isinstance(span, int) else list(span))
    return sender, receiver, where[:, :, None], has


def edge(
    model: nn.Module,
    edited: Prompts,
    copied: Written,
    which: str,
    *,
    norms: str = "recompute",
    spans: Spans | None = None,
    query_heads: bool = False,
    base: Trace | None = None,
) -> Tensor:
    """The reader alone reads what it read plus what the writer would have written more; all after it recomputes."""
    base = base or forward(model, edited, query_heads=query_heads)
    sender, receiver, where, _ = parse(which, edited, spans)
    new = base.readers[receiver] + torch.where(where, copied[sender] - base.writers[sender], 0.0)

    def override(name: str, live: Tensor, written: Written) -> Tensor:
        return new if name == receiver else live

    held = {receiver: base.readers[receiver]} if norms == "frozen" else None
    return forward(model, edited, override, held=held, query_heads=query_heads).logits


def edge_set(
    model: nn.Module,
    edited: Prompts,
    copied: Written,
    which: Iterable[str],
    *,
    norms: str = "recompute",
    spans: Spans | None = None,
    query_heads: bool = False,
) -> Tensor:
    """Every listed reader reads its listed writers as they are replaced, all else as the edited run itself has it."""
    into: dict[str, list[tuple[str, Tensor]]] = {}
    for one in which:
        sender, receiver, where, _ = parse(one, edited, spans)
        into.setdefault(receiver, []).append((sender, where))

    def override(name: str, live: Tensor, written: Written) -> Tensor:
        for sender, where in into.get(name, ()):
            live = live + torch.where(where, copied[sender] - written[sender], 0.0)
        return live

    held = None
    if norms == "frozen":
        readers = forward(model, edited, query_heads=query_heads).readers
        held = {name: readers[name] for name in into}
    return forward(model, edited, override, held=held, query_heads=query_heads).logits


def frozen_path(model: nn.Module, edited: Prompts, copied: Written, path: str, *, norms: str = "recompute") -> Tensor:
    """Node by node, what each writes more because the node before it writes more; all off the path is held.

    A node of the path is a writer, so its head is a query head, and the input in brackets is the one it is entered by:
    of a key/value head's change only the share that this query head makes of it goes on.
    """
    spec, position = oracle.read(model), oracle.positions(edited.mask)
    base = forward(model, edited, query_heads=True)
    first, *middle, last = path.split("->")
    assert last == "logits"
    frozen = norms == "frozen"
    more = copied[first] - base.writers[first]
    for node in middle:
        name, _, letter = node.rstrip(">").partition("<")
        layer = int(name[1:].split(".")[0])
        w = spec.layers[layer]
        if name.startswith("m"):
            new = feed_forward(w, base.readers[name] + more, base.readers[name] if frozen else None)
        else:
            head = int(name.split(".h")[1])

            def alone(more: Tensor, head: int, letter: str, layer: int = layer, w: LayerWeights = w) -> Tensor:
                made = {}
                for each in "qkv":
                    was = base.readers[f"a{layer}.h{head}<{each}>"]
                    source = head if each == "q" else key_value_head(w, head)
                    x = was + more if each == letter else was
                    made[each] = project(spec, w, each, source, x, position, was if frozen else None)
                return attend(w, head, made["q"], made["k"], made["v"], edited.mask)

            new = alone(more, head, letter)
            if w.post1 is not None:  # the sum that is normed has this head's change and no other
                others = sum(alone(torch.zeros_like(more), h, "q") for h in range(w.attn.W_Q.shape[0]) if h != head)
                new = new * gain(w.post1, others + new + w.attn.b_O)
        more = new - base.writers[name]
    was = base.readers["logits"]
    return unembed(spec, was + more, was if frozen else None)
