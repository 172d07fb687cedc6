"""What the engine needs to know of a transformer: its parts, named once, for every way of running it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from ..errors import ModelError
from ..plan.images import ImageFormat
from ..plan.pictures import Pictures
from ..plan.sites import CROSS, ENCODER, VISION, Site
from .blocks import Block

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


LOOKED_AT = frozenset({"pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw", "batch_num_images"})
"""What models make the features of images of, of all that they are called with."""


@dataclass(frozen=True)
class Tower:
    """A stack of layers that sees the images of prompts, all of a batch at once, and hands on what the text is to read.

    Attributes:
        embed: the module that returns the tower's first values; None where its tokens are in another order there.
        blocks: the blocks that something reads, in order; a last one that nothing reads is none of them.
        norm: the norm of the last block's output, where something reads that; else None.
        width: M.
        swap_attention: as of an `Architecture`.
        look: from ids int64 [B, T], a mask bool [B, T] and what a processor made, by name, to `Pictures`, or None where
            there is no image. Raises InputsError where they do not fit the model.
        arguments: from ids, mask and `Pictures` (or None) to what the model is called with besides ids and mask.
        sees: which of those the features of images are made of.
        nested: whether its processor takes a list of images for each row, and not one list of all.
        token: the id that stands in a text where an image's features go.
        packed: whether its values have no axis of images, [N, ...].
        mutual: whether tokens of one image see one another in the language model, later ones too.
        chosen: what the model's config chooses and a call may choose otherwise, by name, on which `blocks` depend.
        unread: why the layers after `blocks` are none of its sites.
    """

    embed: nn.Module | None
    blocks: tuple[Block, ...]
    norm: nn.Module | None
    width: int
    swap_attention: Callable[[Any, AttentionFunction], AbstractContextManager[None]]
    look: Callable[[Tensor, Tensor, Mapping[str, Any]], Pictures | None]
    arguments: Callable[[Tensor, Tensor, Pictures | None], dict[str, Tensor]]
    token: int
    sees: frozenset[str] = LOOKED_AT
    nested: bool = False
    packed: bool = False
    mutual: bool = False
    chosen: Mapping[str, Any] = field(default_factory=dict)
    unread: str = ""


@dataclass(frozen=True)
class Stack:
    """A stack of layers beside the one that ends in what the model returns: an encoder, or attention to what it makes.

    Attributes:
        embed, blocks, norm, width, swap_attention, missing: as of an `Architecture`.
    """

    embed: nn.Module | None
    blocks: tuple[Block, ...]
    norm: nn.Module | None
    width: int
    swap_attention: Callable[[Any, AttentionFunction], AbstractContextManager[None]]
    missing: Mapping[str, str] = field(default_factory=dict)


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
        tower: the stack that sees images of prompts, in a model that has one. `embed` is then not where the stream
            begins, since the images' features are put in the place of some of its values.
        embed_scale: factor of the embeddings on their way into the stream; `logit_scale`: of the unembedding's output.
        positioned: whether `embed` adds positions, and so is called on whole rows, with `position_ids`.
        at_positions: what `pos_embed` makes of positions, where it is called in another way.
        encoder, cross: in a model that decodes what it has encoded, the encoder, and the attention of this stack's
            layers to what that returns.
        final_scale: factor of the final states on their way into the unembedding.
        first_position: the position id of a row's first token.
        to_final: what is unembedded, of the stream after the last block, where `norm` is the last of several steps.
        pooled: whether the model returns the logits of one token of each row, though it computes those of all.
        bounds: numbers of tokens past which the model may do something else, besides its windows.
        ids: how many token ids the model takes, where those are not as many as its logits.
        missing: sites that the model cannot show, by name, and why. A model without a head has no logits, and its last
            states, after `norm` where there is one, are what it returns.
        pooler: what makes one vector of the states of a row, in a model that returns one; `pooled_width`: of how many
            numbers.
        pools_last: whether the pooled vector is of a row's last column, be it padding.
        look: what makes of pixels what `embed` returns, where that is not `embed` itself, called on them.
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
    tower: Tower | None = None

    @cached_property
    def stacks(self) -> Mapping[str | None, Architecture | Tower | Stack]:
        """The stacks of layers, by the name that keys of sites have for them, as a pass computes them."""
        beside = {VISION: self.tower, ENCODER: self.encoder, CROSS: self.cross}
        return {**{name: part for name, part in beside.items() if part is not None}, None: self}

    def depth(self, stack: str | None) -> int:
        """Number of blocks of a stack."""
        return len(self.stacks[stack].blocks)

    embed_scale: float = 1.0
    logit_scale: float = 1.0
    positioned: bool = False
    at_positions: Callable[[Tensor], Tensor] | None = None
    ids: int | None = None
    first_position: int = 0
    to_final: Callable[[Tensor], Tensor] | None = None
    final_scale: float = 1.0
    encoder: Stack | None = None
    cross: Stack | None = None
    pooled: bool = False
    bounds: tuple[int, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    unshared: str = ""
    pooler: nn.Module | None = None
    pooled_width: int = 0
    pools_last: bool = False
    look: Callable[[Tensor], Tensor] | None = None

    @property
    def headless(self) -> str:
        """Why there are no logits; empty where there are."""
        return self.missing.get("logits", "")

    @property
    def end(self) -> Site:
        """Where what the model returns stands: its logits, or the last states of one that has no head."""
        if not self.headless:
            return Site("logits")
        return Site("resid_post", len(self.blocks) - 1) if "ln_final" in self.missing else Site("ln_final")

    @property
    def token_ids(self) -> int:
        """How many token ids the model takes."""
        return self.vocabulary if self.ids is None else self.ids

    def embedded(self, ids: Tensor) -> Tensor:
        """Embeddings [..., M] of ids, as they enter the stream."""
        return self.embed(ids) if self.embed_scale == 1.0 else self.embed(ids) * self.embed_scale

    def final(self, stream: Tensor) -> Tensor:
        """What is unembedded [..., M], of the residual stream after the last block."""
        return self.norm(stream) if self.to_final is None else self.to_final(stream)

    def logits(self, final: Tensor) -> Tensor:
        """Logits [..., V] of the final norm's output [..., M].

        Raises:
            ModelError: the model has no head.
        """
        if self.headless:
            raise ModelError(f"there are no logits: {self.headless}")
        return self.capped(self.unembed(final if self.final_scale == 1.0 else final * self.final_scale))

    def capped(self, out: Tensor) -> Tensor:
        """The logits of some of the unembedding's output."""
        out = out if self.logit_scale == 1.0 else out * self.logit_scale
        return out if self.cap is None else self.cap(out)
