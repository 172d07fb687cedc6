"""Making a reader read something else: the interventions that stand for another residual stream at one reader."""

from __future__ import annotations

import torch
from torch import Tensor

from hooks import Index, Intervention, Model, PathError, Plan, Site, nearest, patch
from interp.parts import frozen_norm
from interp.paths.nodes import QKV, Reader
from interp.paths.streams import Streams, edits

NORMS = ("recompute", "frozen")


def check_norms(norms: str) -> None:
    """Raise PathError unless this is a way to treat a reader's norm."""
    if norms not in NORMS:
        raise PathError(f"norms is 'recompute' or 'frozen', not {norms!r}{nearest(str(norms), NORMS)}")


def responses(base: Streams, kind: str, layer: int, change: Tensor, norms: str = "recompute") -> dict[str, Tensor]:
    """What the readers of one kind compute first when they read in + change, all writers' changes at once.

    Args:
        base: the edited run.
        kind: "q", "k", "v", "attn", "mlp" or "logits".
        layer: the block.
        change: [..., B, T, M], what is added to the residual stream that they read.
        norms: whether the norm is recomputed on the sum, or held at its scale in the base.

    Returns:
        the value of each site, by name, that the reader's input determines: [..., B, T, heads, D] for "q", "k", "v",
        [..., B, T, heads, M] for their inputs, [..., B, T, M] elsewhere.

    Raises:
        PathError: norms that are frozen, where a plan that is held edits what the readers compute.
    """
    if edits(base.held, kind, layer):
        if norms == "frozen":
            raise PathError(
                f"the plan that is held on the model edits what the readers of layer {layer} compute, which is set "
                "where their norm is frozen: norms='recompute'"
            )
        if kind in QKV:
            # What is set has to come before what is held edits.
            name = f"{kind}_input"
            return {name: base.per_head[Site(name, layer)] + change.unsqueeze(-2)}
    with base.model.suspended():  # parts of the model are called, and the hooks of what is held stand on them
        return _responses(base, kind, layer, change, norms)


def _responses(base: Streams, kind: str, layer: int, change: Tensor, norms: str) -> dict[str, Tensor]:
    arch = base.model.architecture
    read = base.read_by(kind, layer)
    if kind == "logits":
        if norms == "recompute":
            return {"resid_post": read + change}
        return {"ln_final": arch.norm(read) + frozen_norm(arch.norm, read)(change)}
    block = arch.blocks[layer]
    if kind == "mlp":
        around = block.of_mlp
        assert around is not None
        if norms == "recompute":
            return {"mlp_in": read + change}
        normed = around.read(read) + frozen_norm(around.pre, read)(change)
        return {"mlp_out": around.added(around.fn.module(normed))}
    if norms == "recompute":
        if kind == "attn":
            return {"attn_in": read + change}
        normed = block.of_attention.read(read + change)
    else:
        normed = block.of_attention.read(read) + frozen_norm(block.of_attention.pre, read)(change)
    return {name: getattr(block.attention, name)(normed) for name in (("q", "k", "v") if kind == "attn" else (kind,))}


def forced(
    reader: Reader, values: dict[str, Tensor], heads: Index, pos: Index = None, where: Tensor | None = None
) -> Plan:
    """The plan that makes one reader have the values of `responses`.

    Args:
        reader: whose values they are.
        values: by site name, for the whole batch, [B, T, ...].
        heads: the heads that are meant, of the site; None for all.
        pos: positions; None for all.
        where: bool [B, T], the tokens; None for all.
    """
    items: list[Intervention] = []
    for name, value in values.items():
        layer = None if name == "ln_final" else reader.layer - 1 if name == "resid_post" else reader.layer
        head = heads if name.removesuffix("_input") in QKV else None
        item = patch(Site(name, layer, head=head, pos=pos), value)
        items.append(item if where is None else item.where(where))
    return Plan(tuple(items))


def key_value_head(model: Model, reader: Reader, query_heads: bool) -> int | None:
    """The head of the site that a reader reads by."""
    if reader.kind in ("k", "v") and query_heads:
        block = model.architecture.blocks[reader.layer]
        assert reader.head is not None
        return reader.head // (block.attention.q.heads // block.attention.k.heads)
    return reader.head


def changed_tokens(change: Tensor) -> Tensor:
    """bool [B, T] on the CPU: where a change [B, T, M] is not zero."""
    return (change != 0).any(-1).cpu()


def suffix(changed: Tensor) -> int | None:
    """The column from which on every row has changed, and none before; None if that is not how it is."""
    first = int(changed[0].long().argmax()) if bool(changed[0].any()) else changed.shape[1]
    columns = torch.arange(changed.shape[1])
    return first if bool((changed == (columns >= first)).all()) else None
