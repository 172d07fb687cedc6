"""What a model is run on: token ids, which of them are real, and which position of which row each one is; or images,
whose tokens are the class token and the patches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import InputsError, SiteError
from .columns import Columns
from .encoding import Put, Record
from .images import patch_grid, patch_labels, patch_pixels
from .pictures import PICTURES, Pictures
from .sites import CROSS, ENCODER, VISION, Site, same

KEYS_OF_CROSS = ("k", "v")
"""Sites of attention to what is encoded that have one value for each token of that."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """A batch of prompts or images, on the CPU (a run moves what it needs to the model's device).

    Attributes:
        ids: int64 [B, T] token ids; padding holds any valid id. Zeros for images.
        mask: bool [B, T], True at real tokens.
        row_ids: int64 [B], the identity of each row: what random interventions are a function of, so that a row draws
            the same numbers in whatever batch it stands.
        tokens: the text of each real token, one tuple a row, or None without a tokenizer. Of an image ``"[cls]"``, and
            each patch as ``"row,column"``.
        pixels: [B, C, height, width], floating point, or None where the rows are prompts.
        patch: height and width of a patch in pixels, with images; `prefix`: how many tokens stand before the patches.
        pictures: the images of prompts that have some; None where no row has.
        source: the text that is encoded, where the rows are what is decoded.
        bos_id: the token that texts begin with, where there is one.
    """

    ids: Tensor
    mask: Tensor
    row_ids: Tensor
    tokens: tuple[tuple[str, ...], ...] | None = None
    pixels: Tensor | None = None
    patch: tuple[int, int] | None = None
    pictures: Pictures | None = None
    bos_id: int | None = None
    prefix: int = 1
    source: Inputs | None = None

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor | None = None, row_ids: Tensor | None = None, tokens=None) -> Inputs:
        """Check and complete ids [B, T], a mask [B, T] (default: all real) and row ids [B] (default: 0 .. B-1).

        Raises:
            InputsError: the shapes disagree, a row has no real token, or nothing is given.
        """
        ids = torch.as_tensor(ids).detach()
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise InputsError(f"token ids are integers, not {ids.dtype}")
        # A copy: what the caller does to the tensor later is not to reach the worlds made of it.
        ids = ids.to("cpu", torch.int64, copy=True)
        if ids.ndim == 1:
            ids = ids[None]
        if ids.ndim != 2 or ids.numel() == 0:
            raise InputsError(f"token ids are [rows, tokens] with at least one of each, got shape {list(ids.shape)}")
        mask = torch.ones_like(ids) if mask is None else torch.as_tensor(mask).detach().to("cpu")
        if mask.shape != ids.shape:
            raise InputsError(f"the mask has shape {list(mask.shape)}, the ids {list(ids.shape)}")
        if bool((mask < 0).any()):
            raise InputsError(
                "a mask is nonzero at real tokens and 0 at padding; this one, with negative numbers, is added"
            )
        mask = mask.to(torch.bool, copy=True)
        empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise InputsError(f"rows {empty} have no token: an empty prompt cannot be run")
        row_ids = torch.arange(len(ids)) if row_ids is None else torch.as_tensor(row_ids).detach()
        if row_ids.is_floating_point() or row_ids.is_complex() or row_ids.dtype == torch.bool:
            raise InputsError(f"row_ids are integers, not {row_ids.dtype}")
        row_ids = row_ids.to("cpu", torch.int64, copy=True)
        if row_ids.shape != ids.shape[:1]:
            raise InputsError(f"row_ids has shape {list(row_ids.shape)}, expected [{len(ids)}]")
        return cls(ids, mask, row_ids, tokens)

    @classmethod
    def of_images(
        cls, pixels: Tensor, patch: tuple[int, int], row_ids: Tensor | None = None, prefix: int = 1
    ) -> Inputs:
        """Complete pixels [B, C, height, width] that are cut into patches of [height, width] pixels.

        Before them stand `prefix` tokens, of class or none.

        Raises:
            InputsError: the pixels are of another shape, or no numbers.
        """
        if pixels.ndim != 4 or not pixels.is_floating_point() or len(patch) != 2 or min(patch) < 1:
            raise InputsError(f"no images: pixels {pixels.dtype} {list(pixels.shape)} in patches of {patch}")
        down, across = patch_grid(pixels, patch)
        made = cls.of(torch.zeros(len(pixels), prefix + down * across, dtype=torch.int64), None, row_ids)
        labels = (patch_labels(pixels, patch, prefix),) * len(pixels)
        return replace(made, tokens=labels, pixels=pixels, patch=tuple(patch), prefix=prefix)

    def encoded(self, put: Put) -> dict[str, Any]:
        """The inputs as data."""
        kind = TOKENS if self.pictures is None else SEEN
        kind = kind if self.source is None else DECODED
        # What saves images that have a class token stays as it was.
        images = IMAGES if self.prefix == 1 else PATCHES
        return (kind if self.pixels is None else images).encoded(self, put)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        if self.pixels is not None:
            size = " x ".join(map(str, self.pixels.shape[1:]))
            return f"Inputs({len(self)} image{'s' * (len(self) > 1)} of {size}, {self.width} tokens)"
        lengths = sorted(set(self.lengths.tolist()))
        size = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        first = "" if self.tokens is None else ": " + repr("".join(self._shown(0)))
        seen = "" if self.pictures is None else f", {len(self.pictures)} image{'s' * (len(self.pictures) > 1)}"
        seen += "" if self.source is None else f" after {self.source!r}"
        return f"Inputs({len(self)} row{'s' * (len(self) > 1)} of {size} tokens{seen}{first})"

    def _shown(self, row: int) -> list[str]:
        """The text of a row's tokens, those of one image once."""
        labels = list(self.labels(row))
        if self.pictures is None:
            return labels
        image = self.pictures.image[row][self.mask[row]].tolist()
        return [label for at, label in enumerate(labels) if not at or image[at] < 0 or image[at] != image[at - 1]]

    @property
    def width(self) -> int:
        """Number of columns T, padding included."""
        return self.ids.shape[1]

    @cached_property
    def positions(self) -> Tensor:
        """int64 [B, T]: the number of real tokens before each column in its row (0 at padding before the first)."""
        return (self.mask.long().cumsum(1) - 1).clamp_min(0)

    @cached_property
    def columns(self) -> Columns:
        """The tokens as an axis of activations."""
        if self.pictures is None:
            return Columns(self.positions, self.mask, self.lengths)
        return Columns(self.positions, self.mask, self.lengths, rotary=self.pictures.rotary, image=self.pictures.image)

    def along(self, stack: str | None) -> Columns:
        """The tokens of a stack as an axis of its activations: of the text, or of the tower that sees its images.

        Raises:
            SiteError: there is no image, so there are no tokens in a tower.
        """
        if stack == ENCODER:
            if self.source is None:
                raise SiteError(f"{self!r} has no text that is encoded")
            return self.source.columns
        if stack != VISION:
            return self.columns
        if self.pictures is None:
            raise SiteError(f"{self!r} has no image, so nothing is in the {stack} stack")
        return self.pictures.columns

    def tokens_of(self, site: Site) -> tuple[Columns, Columns]:
        """The tokens along the query and the key axis of an activation.

        Raises:
            SiteError: there are none.
        """
        if site.stack != CROSS:
            along = self.along(site.stack)
            return along, along
        keys = self.along(ENCODER)
        return (keys if site.name in KEYS_OF_CROSS else self.columns), keys

    @cached_property
    def lengths(self) -> Tensor:
        """int64 [B]: real tokens in each row."""
        return self.mask.sum(1)

    @cached_property
    def shortest(self) -> int:
        """Real tokens of the row that has fewest."""
        return int(self.lengths.min())

    @cached_property
    def order(self) -> Tensor:
        """int64 [B, T]: columns with the real ones first, so that ``order[b, p]`` is the column of position p."""
        return torch.argsort((~self.mask).byte(), dim=1, stable=True)

    @cached_property
    def id_range(self) -> tuple[int, int]:
        """The lowest and the highest id."""
        return int(self.ids.min()), int(self.ids.max())

    @cached_property
    def padded(self) -> bool:
        """Whether any column of any row is padding."""
        return not bool(self.mask.all())

    @cached_property
    def but_bos(self) -> Tensor:
        """bool [B, T]: the real tokens without BOS at the beginning of a row, as positions of a site take them.

        What stands at BOS is unlike all else, and in a mean over positions it outweighs the rest.
        """
        if self.bos_id is None:
            return self.mask
        return self.mask & ~((self.ids == self.bos_id) & (self.positions == 0))

    def rows(self, index: slice) -> Inputs:
        """The batch restricted to a range of rows, which keep their ids."""
        tokens = None if self.tokens is None else self.tokens[index]
        pixels = None if self.pixels is None else self.pixels[index]
        pictures = None if self.pictures is None else self.pictures.rows(index) or None
        return replace(
            self,
            ids=self.ids[index],
            mask=self.mask[index],
            row_ids=self.row_ids[index],
            tokens=tokens,
            pixels=pixels,
            pictures=pictures,
            source=None if self.source is None else self.source.rows(index),
        )

    def contents(self) -> Tensor:
        """[B, T, n]: what stands in each column: its id, and a number for the image that it is of, if any; or the
        pixels of its patch (0 for the class token).
        """
        if self.pixels is None or self.patch is None:
            seen = torch.full_like(self.ids, -1) if self.pictures is None else self.pictures.seen()
            return torch.stack([self.ids, seen], -1)
        return torch.nn.functional.pad(patch_pixels(self.pixels, self.patch), (0, 0, self.prefix, 0))

    def same_as(self, other: Inputs) -> bool:
        """Whether these are the same prompts or images, padded and numbered in the same way."""
        return (
            same(self.ids, other.ids)
            and same(self.mask, other.mask)
            and same(self.row_ids, other.row_ids)
            and same(self.pixels, other.pixels)
            and self.prefix == other.prefix
            and same(self.contents(), other.contents())
            and (self.source is None) == (other.source is None)
            and (self.source is None or other.source is None or self.source.same_as(other.source))
        )

    def differs(self, other: Inputs) -> Tensor:
        """bool [B, T]: the columns in which a batch of the same shape holds another token or patch."""
        if other is self:
            return torch.zeros_like(self.mask)
        return (self.contents() != other.contents()).any(-1)

    def labels(self, row: int = 0) -> tuple[str, ...]:
        """Text of each real token of a row, or its id where there is no tokenizer."""
        if self.tokens is not None:
            return self.tokens[row]
        return tuple(str(i) for i in self.ids[row][self.mask[row]].tolist())


TOKENS = Record(
    "inputs",
    {**{name: (Tensor,) for name in ("ids", "mask", "row_ids")}, "tokens": (tuple, type(None))},
    Inputs.of,
)
SEEN = Record(
    "seen",
    {
        **{name: (Tensor,) for name in ("ids", "mask", "row_ids")},
        "tokens": (tuple, type(None)),
        "pictures": (Pictures,),
    },
    lambda ids, mask, row_ids, tokens, pictures: replace(Inputs.of(ids, mask, row_ids, tokens), pictures=pictures),
)
DECODED = Record(
    "decoded",
    {
        **{name: (Tensor,) for name in ("ids", "mask", "row_ids")},
        "tokens": (tuple, type(None)),
        "source": (Inputs,),
    },
    lambda ids, mask, row_ids, tokens, source: replace(Inputs.of(ids, mask, row_ids, tokens), source=source),
)
_PIXELS = {"pixels": (Tensor,), "patch": (tuple,), "row_ids": (Tensor,)}
IMAGES = Record("images", _PIXELS, Inputs.of_images)
PATCHES = Record("patches", {**_PIXELS, "prefix": (int,)}, Inputs.of_images)
INPUTS_RECORDS = (TOKENS, IMAGES, SEEN, PICTURES, PATCHES, DECODED)
"""How inputs stand in a file."""
