"""What is done inside a trace of nnsight, in the order in which a model computes its sites.

All of it may run elsewhere: it knows envoys, numbers and tensors, and no module of ours but pure functions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..lowering import Lowered, leaves, rebuilt
from ..models.network import logits_of
from ..models.projections import linear_weight
from ..plan.region import Entries
from ..plan.sites import Key
from ..program import Guard, State, visit
from .exposing import exposed
from .reaching import BlockParts, Parts


@dataclass(frozen=True, eq=False)
class Named:
    """A site, as far as it is played."""

    name: str


@dataclass(frozen=True, eq=False)
class Asked:
    """An intervention, as far as it is played: its operation and strength, and what it and its reads print as."""

    site: Named
    text: str
    reads: tuple[str, ...]
    op: Any
    weight: Any

    def __str__(self) -> str:
        return self.text


class Visits:
    """One forward pass, as what is played sees it.

    Attributes:
        programs: of the worlds in the batch, one after another along the rows.
        captures: of each world, what is kept.
        graph: whether what is kept stays attached to the autograd graph.
    """

    def __init__(
        self,
        programs: tuple[Lowered, ...],
        captures: tuple[tuple[tuple[Key, Entries | None], ...], ...],
        graph: bool,
    ) -> None:
        self.programs, self.captures, self.graph = programs, captures, graph
        self.states = [State() for _ in programs]
        self.kept: list[dict[int, Tensor]] = [{} for _ in programs]
        self.scratch: dict[Any, Any] = {}
        self.rows = 0
        self._placed: Any = None

    def keys(self, layer: int) -> tuple[int, int | None]:
        """The key column that is the first query's own: a trace is of whole texts, without a cache."""
        return 0, None

    def fold(self, stack: str, embedded: bool = False) -> None:
        """There is one stack of layers, so no tower's values."""

    def place(self, x: Tensor) -> None:
        """Bring everything to where the model is, of which nobody knows before."""
        self.rows = len(x)
        if self._placed != x.device:
            moved = [leaf.to(x.device) for leaf in leaves((self.programs, self.captures))]
            self.programs, self.captures = rebuilt((self.programs, self.captures), iter(moved))
            self._placed = x.device

    def visit(self, key: Key, x: Tensor, guard: Guard | None = None) -> Tensor:
        """Edit and keep the value of a site, all worlds of the batch at once; `x` itself if nothing is done."""
        count = len(self.programs)
        parts = list(x.chunk(count)) if count > 1 else [x]
        guards = [None] * count if guard is None else [(g, guard[1]) for g in guard[0].chunk(count)]
        changed = False
        for w, program in enumerate(self.programs):
            if key in program.steps or key in program.held_back:
                self.states[w], parts[w] = visit(program, self.states[w], key, parts[w], guards[w])
                changed = True
            for number, (place, entries) in enumerate(self.captures[w]):
                if place != key:
                    continue
                part = parts[w] if entries is None else entries.get(parts[w])
                if self.graph:
                    # Downstream must use the very tensor that is kept, or no gradient reaches it.
                    part = part.clone() if part.requires_grad else part.detach().clone().requires_grad_()
                    parts[w] = part if entries is None else entries.put(parts[w], part)
                    changed = True
                    self.kept[w][number] = part
                else:
                    self.kept[w][number] = part.detach().clone()
        return (torch.cat(parts) if count > 1 else parts[0]) if changed else x


def play(root: Any, parts: Parts, visits: Visits) -> dict[str, Any]:
    """Visit every site of a trace, in the order in which the model computes them.

    Returns:
        ``logits``, and for each world ``kept`` and the ``changes`` that its steps made.
    """
    with torch.set_grad_enabled(visits.graph):
        _play(parts, visits)
        logits = logits_of(root.output)
    return {"logits": logits, "kept": visits.kept, "changes": [dict(state.changes) for state in visits.states]}


def _play(parts: Parts, visits: Visits) -> None:
    first = parts.embed.output
    visits.place(first)
    if "embed" in parts.names:
        parts.embed.output = visits.visit(("embed", -1, None), first)
    if "pos_embed" in parts.names:
        x = parts.pos_embed.output
        parts.pos_embed.output = visits.visit(("pos_embed", -1, None), x.expand(visits.rows, *x.shape[1:]))
    for block in parts.blocks:
        _play_block(block, parts, visits)
    if "ln_final" in parts.names:
        _output(parts.norm, partial(visits.visit, ("ln_final", -1, None)))
    if "logits" in parts.names:
        _output(parts.unembed, partial(_logits, visits, parts.cap))


def _logits(visits: Visits, cap: Any, x: Tensor) -> Tensor:
    return visits.visit(("logits", -1, None), x if cap is None else cap(x))


def _output(envoy: Any, edit: Any) -> None:
    """Edit what a module returns, or the first of several values."""
    output = envoy.output
    several = isinstance(output, tuple)
    x = output[0] if several else output
    edited = edit(x)
    if edited is not x:
        envoy.output = (edited, *output[1:]) if several else edited


def _input(envoy: Any, edit: Any) -> None:
    """Edit what a module is called with first."""
    x = envoy.input
    edited = edit(x)
    if edited is not x:
        envoy.input = edited


def _play_block(block: BlockParts, parts: Parts, visits: Visits) -> None:
    layer, names = block.layer, block.names

    def seen(name: str, x: Tensor) -> Tensor:
        return visits.visit((name, layer, None), x) if name in names else x

    if "resid_pre" in names:
        _input(block.module, partial(seen, "resid_pre"))
    copies: dict[str, Tensor] = {}

    def attn_in(x: Tensor) -> Tensor:
        x = seen("attn_in", x)
        for name in ("q", "k", "v"):
            if f"{name}_input" in names:
                heads = block.projections[name][1].heads
                copies[name] = seen(f"{name}_input", x.unsqueeze(2).expand(-1, -1, heads, -1))
        return x

    if names & {"attn_in", "q_input", "k_input", "v_input"}:
        _input(block.pre[0], attn_in)
    changes: list[Tensor] = []

    def ln1(x: Tensor) -> Tensor:
        edited = seen("ln1", x)
        if edited is not x:
            changes.append((edited - x).unsqueeze(2))
        return edited

    if "ln1" in names:
        _output(block.pre[0], ln1)
    _projections(block, copies, seen, changes)
    if block.exposed:
        _attention(block, parts.implementation, visits)
    waiting: dict[str, Tensor] = {}
    heads, width = parts.heads[layer]

    def z(x: Tensor) -> Tensor:
        split = seen("z", x.unflatten(-1, (heads, width)))
        waiting["z"] = split
        return split.flatten(-2)

    def result(out: Tensor) -> Tensor:
        weight, _ = linear_weight(block.out._module)
        each = torch.einsum("...hd,mhd->...hm", waiting["z"], weight.unflatten(1, (heads, width)))
        edited = seen("result", each)
        return out if edited is each else out + (edited - each).sum(-2)

    if names & {"z", "result"}:
        _input(block.out, z)
    if "result" in names:
        _output(block.out, result)
    if "attn_out" in names:
        _output(block.end[0], partial(seen, "attn_out"))

    def mlp_in(x: Tensor) -> Tensor:
        waiting["resid_mid"] = x = seen("resid_mid", x)
        return seen("mlp_in", x)

    def mlp_out(x: Tensor) -> Tensor:
        waiting["mlp_out"] = x = seen("mlp_out", x)
        return x

    if names & {"resid_mid", "mlp_in"}:
        _input(block.pre[1], mlp_in)
    if "ln2" in names:
        _output(block.pre[1], partial(seen, "ln2"))
    if block.hidden is not None and "mlp_pre" in names:
        _output(block.hidden[0], partial(seen, "mlp_pre"))
    if block.hidden is not None and "mlp_pre_linear" in names:
        _output(block.hidden[2], partial(seen, "mlp_pre_linear"))
    if block.hidden is not None and "mlp_post" in names:
        _input(block.hidden[1], partial(seen, "mlp_post"))
    if names & {"mlp_out", "resid_mid"}:
        _output(block.end[1], mlp_out)

    def resid_post(x: Tensor) -> Tensor:
        # The block keeps its own copy of the residual from before the norm.
        return seen("resid_post", waiting["resid_mid"] + waiting["mlp_out"] if "resid_mid" in names else x)

    if names & {"resid_post", "resid_mid"}:
        _output(block.module, resid_post)


def _projections(block: BlockParts, copies: dict[str, Tensor], seen: Any, changes: list[Tensor]) -> None:
    shared: dict[int, list[str]] = {}
    for name in ("q", "k", "v"):
        if block.names & {name, f"{name}_input"}:
            shared.setdefault(id(block.projections[name][0]), []).append(name)
    for members in shared.values():
        envoy = block.projections[members[0]][0]

        def project(out: Tensor, envoy: Any = envoy, members: list[str] = members) -> Tensor:
            for name in members:
                projection = block.projections[name][1]
                part = projection.read(out)
                if name in copies:
                    # Rows beside those that edit what a head reads may edit what the norm returns.
                    read = sum(changes, _normed(block.pre[0], copies[name]))
                    part = replace(projection, module=envoy._module).per_head(read)
                out = projection.write(out, seen(name, part))
            return out

        _output(envoy, project)


def _normed(envoy: Any, x: Tensor) -> Tensor:
    """What a norm makes of other values. Its own forward, which nnsight has put another in place of, is its class's."""
    module = envoy._module
    return type(module).forward(module, x)


def _attention(block: BlockParts, implementation: str, visits: Visits) -> None:
    operation = block.attention.source.attention_interface_1
    args, kwargs = operation.inputs
    attend = exposed(block.numbers, block.layer, set(block.names), partial(_itself, visits))
    own = partial(_nothing)
    operation.skip(attend(*args, own=own, kernel=f"{implementation}_attention_forward", **kwargs))


def _itself(visits: Visits) -> Visits:
    return visits


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    return None
