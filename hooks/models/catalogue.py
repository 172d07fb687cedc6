"""Which sites a model has, and how large they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from ..html import table
from ..plan.sites import DIM, HEAD, KINDS, POS, TEXT, Key, Site
from .architecture import Architecture, Stack, Tower
from .blocks import Feed
from .experts import Experts


@dataclass(frozen=True)
class SiteInfo:
    """A site that a model offers, in one layer or all: its shape in letters and in numbers, and whether it can be
    edited.
    """

    name: str
    hook: str
    letters: str
    shape: tuple[int | str, ...]
    layers: int
    writable: bool = True
    stack: str | None = None


class SiteTable(tuple):
    """The sites of a model, printed as a table."""

    def __str__(self) -> str:
        rows = [("site", "layers", "shape", "", "TransformerLens's name")]
        several = any(s.stack for s in self)
        for s in self:
            shape = "[" + ", ".join(map(str, s.shape)) + "]"
            name = f"{s.stack or TEXT}:{s.name}" if several else s.name
            rows.append((name, str(s.layers) if s.layers else "-", f"[{', '.join(s.letters)}]", shape, s.hook))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        shapes = ["[" + ", ".join(map(str, s.shape)) + "]" for s in self]
        several = any(s.stack for s in self)
        names = [f"{s.stack or TEXT}:{s.name}" if several else s.name for s in self]
        rows = [(name, s.layers or "", shape, s.hook) for name, s, shape in zip(names, self, shapes, strict=True)]
        return table(("site", "layers", "shape", "TransformerLens's name"), rows)


def site_sizes(arch: Architecture) -> dict[Key, dict[str, int]]:
    """Sizes of the head and last axes of each site that the architecture has, and of the positions of one whose number
    is not that of the tokens: the logits of a classifier have one. Experts are an axis of heads where they have one of
    their own.
    """
    sizes: dict[Key, dict[str, int]] = {}
    for stack, part in arch.stacks.items():
        sizes |= _stack_sizes(part, stack)
    if arch.pos_embed is not None:
        sizes["pos_embed", -1, None] = {DIM: arch.width}
    if arch.pooler is not None:
        sizes["pooled", -1, None] = {DIM: arch.pooled_width, POS: 1}
    if not arch.headless:
        sizes["logits", -1, None] = {DIM: arch.vocabulary} | ({} if arch.readout is None else {POS: 1})
    return sizes


def _stack_sizes(arch: Architecture | Tower | Stack, stack: str | None) -> dict[Key, dict[str, int]]:
    width, missing = {DIM: arch.width}, getattr(arch, "missing", {})
    sizes: dict[Key, dict[str, int]] = {} if arch.embed is None else {("embed", -1, stack): width}
    for layer, block in enumerate(arch.blocks):
        attention = block.attention
        q, k = ({HEAD: p.heads, DIM: p.width} for p in (attention.q, attention.k))
        heads, groups = {HEAD: attention.q.heads}, {HEAD: attention.k.heads}
        here: dict[str, dict[str, int]] = {name: width for name in ("resid_pre", "attn_in", "attn_out", "resid_post")}
        here |= {"q_input": heads | width, "k_input": groups | width, "v_input": groups | width}
        here |= {"q": q, "k": k, "v": k, "z": q, "result": heads | width}
        if not attention.opaque:
            here |= {"scores": heads, "pattern": heads}
        if attention.rotary is not None and not attention.opaque:
            here |= {"rot_q": q, "rot_k": k}
        if block.mlp is not None:
            here |= {name: width for name in ("mlp_in", "mlp_out")} | _inside(block.mlp, arch.width)
            if not block.parallel:
                here["resid_mid"] = width
        for name, size in here.items():
            if name not in missing:
                sizes[Site(name, layer, stack).key] = size
    if arch.norm is not None and "ln_final" not in missing:
        sizes["ln_final", -1, stack] = width
    return sizes


def _inside(mlp: Feed, width: int) -> dict[str, dict[str, int]]:
    if isinstance(mlp, Experts):
        return {"router": {DIM: mlp.count}, "expert_out": {HEAD: mlp.count, DIM: width}}
    return {name: {DIM: mlp.width} for name in ("mlp_pre", "mlp_post")} if mlp.width else {}


def why_missing(arch: Architecture | Tower | Stack, name: str, layer: int | None) -> str:
    """Why a layer has no site of some kind, where there is more to say than that; empty elsewhere."""
    missing = getattr(arch, "missing", {})
    if name in missing:
        return missing[name]
    block = arch.blocks[layer or 0]
    if name in ("scores", "pattern", "rot_q", "rot_k"):
        return block.attention.opaque
    if name in ("mlp_pre", "mlp_post") and isinstance(block.mlp, Experts):
        return "its feed-forward layer is a mixture of experts, which has router and expert_out"
    inside = ("mlp_pre", "mlp_post", "router", "expert_out")
    if name in inside and block.mlp is not None and not isinstance(block.mlp, Experts) and not block.mlp.width:
        return f"nobody knows how the parts of a {type(block.mlp.module).__name__} work together"
    return ""


def site_table(sizes: Mapping[Key, dict[str, int]], n_layers: int) -> SiteTable:
    """Every kind of site that a model has, given the sizes of all its sites."""
    found = []
    stacks = sorted({key[2] for key in sizes}, key=lambda stack: (stack is not None, stack or ""))
    for stack, (name, kind) in product(stacks, KINDS.items()):
        depth = n_layers if stack is None else 1 + max(layer for _, layer, of in sizes if of == stack)
        layers = range(depth) if kind.per_layer else (None,)
        keys = [key for key in (Site(name, layer, stack).key for layer in layers) if key in sizes]
        if not keys:
            continue
        size = sizes[keys[0]]
        numbers = dict.fromkeys("HK", size.get(HEAD)) | dict.fromkeys("VMDF", size.get(DIM))
        numbers["E"] = size.get(HEAD, size.get(DIM))
        letters = kind.letters.replace("T", str(size[POS])) if POS in size else kind.letters
        shape = tuple(size[POS] if c.isdigit() else c if c in "BTS" else numbers[c] for c in letters)
        hook = kind.hook if not kind.per_layer else f"blocks.{{}}.{kind.hook}"
        layers = len(keys) if kind.per_layer else 0
        found.append(SiteInfo(name, hook, letters, shape, layers, stack=stack))  # type: ignore[arg-type]
    return SiteTable(found)
