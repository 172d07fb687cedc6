"""What the engine needs to know of a transformer: its parts, named once, for every way of running it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
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
        norm: the final norm, or whatever else stands between the last block and the unembedding; `unembed`: the module
            from it to logits.
        width: M; vocabulary: V, the tokens or classes that there are logits for.
        cap: what the unembedding's output goes through to be the logits, entry by entry, or None.
        lift_cap: context manager within which the model leaves `cap` out, so that edits of the logits come after it.
        swap_attention: context manager that makes one attention module call a given function
            ``f(module, q [B,H,T,D], k [B,K,S,D], v, mask, own=..., scaling=..., dropout=..., **more)``, which returns
            z [B, T, H, D] and, for a model that is asked for them, attention weights. `own` is the module's own.
        readout: the position whose final state alone is unembedded, in a classifier; None where every one is.
        images: what images the model takes, or None where it takes tokens.
        embed_scale: factor of the embeddings on their way into the stream; `logit_scale`: of the unembedding's output.
        positioned: whether `embed` adds positions, and so is called on whole rows, with `position_ids`.
        at_positions: what `pos_embed` makes of positions, where it is called in another way.
        bounds: numbers of tokens past which the model may do something else, besides its windows.
        ids: how many token ids the model takes, where those are not as many as its logits.
        missing: sites that the model cannot show, by name, and why.
        unshared: why the copy-on-write executor cannot compute the model; empty where it may.
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
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    positioned: bool = False
    at_positions: Callable[[Tensor], Tensor] | None = None
    ids: int | None = None
    bounds: tuple[int, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    unshared: str = ""

    @property
    def token_ids(self) -> int:
        """How many token ids the model takes."""
        return self.vocabulary if self.ids is None else self.ids

    def embedded(self, ids: Tensor) -> Tensor:
        """Embeddings [..., M] of ids, as they enter the stream."""
        return self.embed(ids) if self.embed_scale == 1.0 else self.embed(ids) * self.embed_scale

    def logits(self, final: Tensor) -> Tensor:
        """Logits [..., V] of the final norm's output [..., M]."""
        return self.capped(self.unembed(final))

    def capped(self, out: Tensor) -> Tensor:
        """The logits of some of the unembedding's output."""
        out = out if self.logit_scale == 1.0 else out * self.logit_scale
        return out if self.cap is None else self.cap(out)
