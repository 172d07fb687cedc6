"""Counting the floating-point work of a run, in the unit that people compare by: forward passes of one row."""

from __future__ import annotations

from dataclasses import dataclass

from .models.architecture import Architecture
from .models.blocks import Block


def block_costs(block: Block, width: int) -> dict[str, int]:
    """Multiplications a token of a block's linear layers: q, k, v, the output projection, and the MLP."""
    attention = block.attention
    costs = {
        name: width * p.heads * p.width for name, p in zip("qkv", (attention.q, attention.k, attention.v), strict=True)
    }
    costs["out"] = width * attention.q.heads * attention.q.width
    costs["mlp"] = 0 if block.mlp is None else block.mlp.matrices * width * block.mlp.width
    return costs


@dataclass(eq=False)
class Meter:
    """The work of the linear layers, in multiplications; attention's own products are left out.

    Attributes:
        arch: the model's parts.
        work: multiplications so far.
    """

    arch: Architecture
    work: float = 0.0

    def __post_init__(self) -> None:
        self.costs = [block_costs(block, self.arch.width) for block in self.arch.blocks]

    def block(self, layer: int, part: str, tokens: int) -> None:
        """Count a part of a block on some tokens."""
        self.work += self.costs[layer][part] * tokens

    def unembedding(self, tokens: int, columns: int) -> None:
        """Count columns of the logits at some tokens."""
        self.work += self.arch.width * columns * tokens

    def whole(self, rows: int, tokens: int) -> None:
        """Count a plain forward pass over some rows of so many tokens, unembedding and all."""
        self.work += rows * self.row(tokens)

    def row(self, tokens: float) -> float:
        """The work of a plain forward pass of one row of some tokens."""
        read = tokens if self.arch.readout is None else 1
        return tokens * sum(sum(c.values()) for c in self.costs) + read * self.arch.width * self.arch.vocabulary

    def forwards(self, tokens: float) -> float:
        """The work so far in forward passes of one row of that many tokens."""
        return self.work / self.row(tokens)
