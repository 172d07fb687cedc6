"""What the engine needs to know of a transformer: its parts, named once, for every way of running it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..plan.images import ImageFormat
from .blocks import Block

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Architecture:
    """The parts of a transformer: a causal decoder, unless it says otherwise.

    Attributes:
        family: what the adapter calls it.
        embed: token embedding, called on ids (or on pixels, for every token of an image and with its position);
            `pos_embed`: learned positions, a module called on positions, or None.
        blocks: the blocks in order.
        norm: the final norm; `unembed`: the module from it to logits.
        width: M; vocabulary: V, the tokens or classes that there are logits for.
        cap: what the unembedding's output goes through to be the logits, entry by entry, or None.
        lacks: names of sites that its parts would have, and that nobody can look at.
        lift_cap: context manager within which the model leaves `cap` out, so that edits of the logits come after it.
        swap_attention: context manager that makes one attention module call a given function
            ``f(module, q [B,H,T,D], k [B,K,S,D], v, mask, own=..., scaling=..., dropout=..., **more)``, which returns
            z [B, T, H, D] and, for a model that is asked for them, attention weights. `own` is the module's own.
        readout: the position whose final state alone is unembedded, in a classifier; None where every one is.
        images: what images the model takes, or None where it takes tokens.
    """

    family: str
    embed: nn.Module
    pos_embed: nn.Module | None
    blocks: tuple[Block, ...]
    norm: nn.Module
    unembed: nn.Module
    width: int
    vocabulary: int
    swap_attention: Callable[[Any, AttentionFunction], AbstractContextManager[None]]
    readout: int | None = None
    images: ImageFormat | None = None
    cap: Callable[[Tensor], Tensor] | None = None
    lift_cap: Callable[[], AbstractContextManager[None]] = nullcontext
    lacks: frozenset[str] = frozenset()

    def logits(self, final: Tensor) -> Tensor:
        """Logits [..., V] of the final norm's output [..., M]."""
        return self.capped(self.unembed(final))

    def capped(self, out: Tensor) -> Tensor:
        """The logits of some of the unembedding's output."""
        return out if self.cap is None else self.cap(out)
