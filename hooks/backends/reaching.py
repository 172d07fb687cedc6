"""The envoys of an nnsight model at which something is visited, in the order in which the model computes them."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..errors import ModelError
from ..models.architecture import Architecture
from ..models.blocks import Attention, Block, Mlp
from ..models.projections import Projection
from ..plan.sites import Key


@dataclass(frozen=True, eq=False)
class BlockParts:
    """The envoys of a block, and what is visited there.

    Attributes:
        layer: which.
        names: the sites.
        module, attention, out: envoys of the block, its attention and the output projection.
        pre, end: of the norms and the ends of the attention's and of the MLP's sublayer.
        projections: for q, k and v the envoy and where in its output they lie.
        hidden: of what an MLP's hidden values come out of and go into, and of what they are multiplied by.
        numbers: of the attention: scaling, window and cap.
        exposed: whether its inside is computed with its scores and patterns shown.
    """

    layer: int
    names: frozenset[str]
    module: Any
    attention: Any
    out: Any
    pre: tuple[Any, ...]
    end: tuple[Any, ...]
    projections: dict[str, tuple[Any, Projection]]
    hidden: tuple[Any, Any, Any] | None
    numbers: Attention
    exposed: bool


@dataclass(frozen=True, eq=False)
class Parts:
    """The envoys of a model at which something is visited, in the order in which it computes them."""

    embed: Any
    pos_embed: Any
    norm: Any
    unembed: Any
    blocks: tuple[BlockParts, ...]
    names: frozenset[str]
    cap: Any = None
    implementation: str = ""
    heads: dict[int, tuple[int, int]] = field(default_factory=dict)


def parts_of(envoy: Any, arch: Architecture, keys: Set[Key], inside: Set[int]) -> Parts:
    """The envoys of the parts of a model at some sites.

    Raises:
        ModelError: nnsight has no envoy of a part, or cannot look inside attention.
    """
    known = envoy.interleaver.envoys

    def of(module: nn.Module | None) -> Any:
        if module is None:
            return None
        found = known.get(id(module))
        if found is None:
            raise ModelError(f"nnsight has no envoy of a {type(module).__name__}, which is needed here")
        return found

    names = frozenset(name for name, layer, _ in keys if layer == -1)
    blocks = []
    for layer, block in enumerate(arch.blocks):
        here = frozenset(name for name, at, _ in keys if at == layer)
        if here or layer in inside:
            blocks.append(_block_of(of, block, layer, here, layer in inside))
    config = getattr(envoy._module, "config", None)
    return Parts(
        of(arch.embed),
        of(arch.pos_embed),
        of(arch.norm),
        of(arch.unembed),
        tuple(blocks),
        names,
        arch.cap if "logits" in names else None,
        str(getattr(config, "_attn_implementation", "")),
        {layer: (block.attention.q.heads, block.attention.q.width) for layer, block in enumerate(arch.blocks)},
    )


def _block_of(of: Any, block: Block, layer: int, names: frozenset[str], exposed: bool) -> BlockParts:
    attention, around = block.attention, [block.of_attention, *([block.of_mlp] if block.of_mlp else [])]
    ends = [s.drop for s in around if s.drop is not None]
    if len(ends) > len(set(ends)) and names & {"attn_out", "mlp_out", "resid_mid"}:
        raise ModelError(
            f"the sublayers of block {layer} end in one module, which a trace cannot tell apart: leave out attn_out, "
            "mlp_out and resid_mid, or wrap the module itself"
        )
    if exposed and not hasattr(of(attention.module), "source"):
        raise ModelError(f"nnsight cannot look inside the attention of layer {layer}")
    mlp = block.mlp
    bare: Any = None
    return BlockParts(
        layer,
        names,
        of(block.module),
        of(attention.module),
        of(attention.out),
        tuple(of(s.pre) for s in around),
        tuple(of(s.end) for s in around),
        {
            name: (of(projection.module), replace(projection, module=bare))
            for name, projection in (("q", attention.q), ("k", attention.k), ("v", attention.v))
        },
        (of(mlp.pre), of(mlp.down), of(mlp.up) if isinstance(mlp.up, nn.Module) else None)
        if isinstance(mlp, Mlp) and isinstance(mlp.pre, nn.Module)
        else None,
        replace(attention, module=bare, q=bare, k=bare, v=bare, out=bare, q_norm=None, k_norm=None, rotary=None),
        exposed,
    )
