"""Which sites a model has, and how large they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from torch import nn

from ..html import table
from ..plan.sites import DIM, HEAD, KINDS, POS, TEXT, Key, Site
from .architecture import Architecture, Stack, Tower
from .blocks import Block, Feed, Mlp
from .experts import Experts
from .norms import scale_of

_HIDDEN = ("mlp_pre", "mlp_pre_linear", "mlp_post")


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
        here |= _normed("ln1", block.of_attention.pre, arch.width)
        if block.of_mlp is not None and not block.shares_norm:
            here |= _normed("ln2", block.of_mlp.pre, arch.width)
        if block.mlp is not None:
            here |= {name: width for name in ("mlp_in", "mlp_out")} | _inside(block.mlp, arch.width)
            if not block.parallel:
                here["resid_mid"] = width
        for name, size in here.items():
            if name not in missing:
                sizes[Site(name, layer, stack).key] = size
    if arch.norm is not None and "ln_final" not in missing:
        sizes["ln_final", -1, stack] = width
        known = "ln_final_scale" not in missing and scale_of(arch.norm, arch.width) is not None
        if known and getattr(arch, "to_final", None) is None:
            sizes["ln_final_scale", -1, stack] = {DIM: 1}
    return sizes


def _normed(name: str, norm: nn.Module | None, width: int) -> dict[str, dict[str, int]]:
    """What a norm before a sublayer returns, and what it divides by, where that is known."""
    if norm is None:
        return {}
    scale = {} if scale_of(norm, width) is None else {f"{name}_scale": {DIM: 1}}
    return {name: {DIM: width}} | scale


def _inside(mlp: Feed, width: int) -> dict[str, dict[str, int]]:
    if isinstance(mlp, Experts):
        return {"router": {DIM: mlp.count}, "expert_out": {HEAD: mlp.count, DIM: width}}
    names = ("mlp_pre", "mlp_post") if mlp.up is None else ("mlp_pre", "mlp_pre_linear", "mlp_post")
    return {name: {DIM: mlp.width} for name in names} if mlp.width else {}


def why_missing(arch: Architecture | Tower | Stack, name: str, layer: int | None) -> str:
    """Why a layer has no site of some kind, where there is more to say than that; empty elsewhere."""
    missing = getattr(arch, "missing", {})
    if name in missing:
        return missing[name]
    block = arch.blocks[layer or 0]
    if name in ("scores", "pattern", "rot_q", "rot_k"):
        return block.attention.opaque
    if name in _HIDDEN and isinstance(block.mlp, Experts):
        return "its feed-forward layer is a mixture of experts, which has router and expert_out"
    if name.startswith("ln"):
        return _why_no_norm(arch, block, name)
    inside = (*_HIDDEN, "router", "expert_out")
    if name in inside and block.mlp is not None and not isinstance(block.mlp, Experts) and not block.mlp.width:
        return f"nobody knows how the parts of a {type(block.mlp.module).__name__} work together"
    if name == "mlp_pre_linear":
        return "its MLP is not gated, so nothing is multiplied with what mlp_pre becomes"
    return ""


def has_none(arch: Architecture, name: str) -> bool:
    """Whether a model is made without what a kind of sites is of: a gated MLP, or a norm at some place."""
    block = arch.blocks[0]
    if name == "mlp_pre_linear":
        return isinstance(block.mlp, Mlp) and bool(block.mlp.width) and block.mlp.up is None
    if name == "ln_final_scale":
        return arch.norm is None or "ln_final" in arch.missing
    around = block.of_attention if name.startswith("ln1") else block.of_mlp
    missing = around is None or around.pre is None or (name.startswith("ln2") and block.shares_norm)
    return name in ("ln1", "ln1_scale", "ln2", "ln2_scale") and missing


def _why_no_norm(arch: Architecture | Tower | Stack, block: Block, name: str) -> str:
    around = block.of_attention if name.startswith("ln1") else block.of_mlp
    norm = arch.norm if name.startswith("ln_final") else None if around is None else around.pre
    if name.startswith("ln2") and block.shares_norm:
        return "its attention and MLP read the output of one norm, which is ln1"
    if norm is None:
        return "no norm stands there: the residual stream is read as it is"
    return f"a {type(norm).__name__} divides by something that is no root of a mean square of what it reads"


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
        numbers = dict.fromkeys("HK", size.get(HEAD)) | dict.fromkeys("VMDFU", size.get(DIM))
        numbers["E"] = size.get(HEAD, size.get(DIM))
        letters = kind.letters.replace("T", str(size[POS])) if POS in size else kind.letters
        shape = tuple(size[POS] if c.isdigit() else c if c in "BTS" else numbers[c] for c in letters)
        hook = kind.hook if not kind.per_layer else f"blocks.{{}}.{kind.hook}"
        layers = len(keys) if kind.per_layer else 0
        found.append(SiteInfo(name, hook, letters, shape, layers, stack=stack))  # type: ignore[arg-type]
    return SiteTable(found)
