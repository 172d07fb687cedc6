"""Visual features multiplied by edited attention, as in CausalMM's released code: image by image, on its patches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hooks import Context, Inputs, InputsError, Model, PlanError, choice, nearest

FORMS = ("random", "uniform", "reversed", "shuffle")


def edited_attention(attention: Tensor, form: str = "shuffle", generator: torch.Generator | None = None) -> Tensor:
    """Attention weights edited as in the code, which does not normalise them.

    Args:
        attention: [B, H, N, N], of the encoder.
        form: ``"random"``: uniform in [0, 2); ``"uniform"``: each head's mean; ``"reversed"``: each head's largest
            minus each; ``"shuffle"``: each head's entries permuted, alike in all rows.
        generator: of the draws, on the CPU.

    Raises:
        PlanError: an unknown form.
    """
    if form == "random":
        return 2 * torch.rand(attention.shape, generator=generator, dtype=attention.dtype).to(attention.device)
    if form == "uniform":
        return attention.mean((2, 3), keepdim=True).expand_as(attention)
    if form == "reversed":
        return attention.amax((2, 3), keepdim=True) - attention
    if form == "shuffle":
        heads = []
        for head in attention.flatten(2).unbind(1):
            order = torch.randperm(head.shape[1], generator=generator).to(head.device)
            heads.append(head[:, order])
        return torch.stack(heads, 1).reshape_as(attention)
    raise PlanError(f"unknown form {form!r}{nearest(str(form), FORMS)}; the code has {', '.join(FORMS)}")


def weighted_features(features: Tensor, attention: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """Visual features multiplied by edited attention, patch by patch.

    Args:
        features: [B, N, M], N patches, row by row of the image.
        attention: [B, H, S, S], edited.
        grid: how many patches an image has in height and width; None for a square, which the code takes it to be.

    Returns:
        [B, N, M].

    Raises:
        PlanError: there are not as many patches.
    """
    side = math.isqrt(features.shape[1])
    size = (side, side) if grid is None else grid
    if size[0] * size[1] != features.shape[1]:
        raise PlanError(f"features of {features.shape[1]} patches are no {size[0]} x {size[1]} of them")
    resized = torch.nn.functional.interpolate(attention, size=size, mode="bilinear", align_corners=False)
    return features * resized.mean(1).flatten(1)[..., None]


@dataclass(frozen=True)
class Frame:
    """Tokens of one row of the tower that are one image, tile or frame: some of class, and a grid of patches."""

    start: int
    extra: int
    grid: tuple[int, int]

    @property
    def tokens(self) -> slice:
        """All of them."""
        return slice(self.start, self.start + self.extra + self.grid[0] * self.grid[1])


def frames_of(model: Model, inputs: Inputs) -> tuple[tuple[Frame, ...], ...]:
    """For each row, what it sees, in order.

    Raises:
        InputsError: there are no images.
    """
    pictures = inputs.pictures
    if not pictures:
        raise InputsError("the visual branch is of images, and these inputs have none: give what the processor made")
    packed = pictures.tensors.get("image_grid_thw")
    vision: Any = getattr(model.module.config, "vision_config", None)
    rows: list[list[Frame]] = [[] for _ in range(pictures.count)]
    side = 0 if packed is not None else vision.image_size // vision.patch_size
    extra = int(any(name.endswith("class_embedding") for name, _ in model.module.named_parameters()))
    for number, (row, count) in enumerate(zip(pictures.row.tolist(), pictures.patches.tolist(), strict=True)):
        if packed is not None:
            deep, height, width = (int(n) for n in packed[number])
            sizes = [(0, (height, width))] * deep
        else:
            sizes = [(extra, (side, side))] * (count // (side * side + extra))
        at = rows[row][-1].tokens.stop if rows[row] else 0
        end = at + count
        for more, grid in sizes:
            rows[row].append(Frame(at, more, grid))
            at = rows[row][-1].tokens.stop
        if at != end:
            raise InputsError(f"an image has {count} tokens in the tower, which are no {sizes} of patches")
    return tuple(tuple(row) for row in rows)


@dataclass(frozen=True, eq=False)
class Weighted:
    """The edit of a tower's features, given the pattern of a layer; see `reference.visual`."""

    frames: tuple[tuple[Frame, ...], ...]
    form: str
    seed: int

    def __call__(self, x: Tensor, pattern: Tensor, *, ctx: Context) -> Tensor:
        if ctx.total != len(self.frames):
            raise InputsError(f"the visual branch is of {len(self.frames)} rows of images, the call has {ctx.total}")
        shown = torch.arange(ctx.total)[ctx.window.cpu() if isinstance(ctx.window, Tensor) else ctx.window]
        made = [
            self._row(features, attention, int(number), int(name))
            for features, attention, number, name in zip(x, pattern, shown, ctx.row, strict=True)
        ]
        return torch.stack(made)

    def _row(self, features: Tensor, attention: Tensor, number: int, name: int) -> Tensor:
        made, frames = features.clone(), self.frames[number]
        if frames and frames[-1].tokens.stop > len(features):
            raise InputsError(
                f"the visual branch is of {frames[-1].tokens.stop} tokens of images in row {number}, "
                f"the call has {len(features)}"
            )
        for at, frame in enumerate(frames):
            patches = slice(frame.start + frame.extra, frame.tokens.stop)
            draw = torch.Generator().manual_seed(int(choice(1 << 31, self.seed, name, at)))
            edited = edited_attention(attention[None, :, frame.tokens, frame.tokens], self.form, draw)
            made[patches] = weighted_features(features[None, patches], edited, frame.grid)[0]
        return made
